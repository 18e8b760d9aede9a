# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One intensity curve for the patch and the global view of a scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandAdjustContrastd, RandHistogramShiftd

from mapseg_components.errors import ConfigError
from mapseg_components.transforms import (
    RandGlobalLocalAdjustContrastd,
    RandGlobalLocalBiasFieldd,
    RandGlobalLocalHistogramShiftd,
    RandGlobalLocalIntensityCurved,
)

KEYS = ["image", "global_image"]
CURVES = {
    "gamma": (RandGlobalLocalAdjustContrastd, RandAdjustContrastd, {"gamma": (0.67, 1.5)}),
    "gamma of the inverse": (
        RandGlobalLocalAdjustContrastd,
        RandAdjustContrastd,
        {"gamma": (0.5, 2.0), "invert_image": True, "retain_stats": True},
    ),
    "histogram": (RandGlobalLocalHistogramShiftd, RandHistogramShiftd, {"num_control_points": (4, 10)}),
}


def pair(scale=1.0, seed=0):
    """A view of the whole range, and a patch that has the view's intensities of a part of it."""
    view = torch.from_numpy(np.random.default_rng(seed).random((1, 9, 11, 13)).astype(np.float32)) * scale
    view[0, 0, 0, 0], view[0, 1, 1, 1] = 0.0, scale
    patch = view[:, :5, :7, 2:8].clone()
    patch[(patch < 0.2 * scale) | (patch > 0.7 * scale)] = 0.5 * scale
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])).double()
    return {"image": MetaTensor(patch, affine=affine, meta={"filename_or_obj": "a.nii"}), "global_image": view}


def largest_difference(before, after):
    """Between what patch and view make of one intensity."""
    curve = {float(x): float(y) for x, y in zip(before["global_image"].flatten(), after["global_image"].flatten())}
    pairs = zip(before["image"].flatten().tolist(), after["image"].flatten().tolist())
    return max(abs(curve[x] - y) for x, y in pairs if x in curve)


@pytest.mark.parametrize("scale", [1.0, 800.0])
@pytest.mark.parametrize("name", CURVES)
def test_equal_intensities_stay_equal(name, scale):
    ours, monais, settings = CURVES[name]
    data, differences = pair(scale), []
    for seed in range(8):
        after = [kind(KEYS, prob=1.0, **settings).set_random_state(seed)(data) for kind in (ours, monais)]
        assert largest_difference(data, after[0]) < 1e-5 * scale
        differences.append(largest_difference(data, after[1]))
    assert max(differences) > 0.02 * scale  # what MONAI's own curves do to a patch and its view


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
def test_of_one_image_the_curve_and_the_draws_are_monais(name, prob):
    ours, monais, settings = CURVES[name]
    changed = 0
    for seed in range(10):
        made = [kind("global_image", prob=prob, **settings).set_random_state(seed) for kind in (ours, monais)]
        for _ in range(2):  # the second draw follows the first
            found, expected = (transform(pair())["global_image"] for transform in made)
            torch.testing.assert_close(torch.as_tensor(found), expected.as_tensor())
            changed += not torch.equal(torch.as_tensor(found), pair()["global_image"])
    assert {0.0: changed == 0, 1.0: changed == 20}.get(prob, 0 < changed < 20)


@pytest.mark.parametrize("name", ["gamma", "histogram"])
def test_the_range_and_the_background_are_kept(name):
    ours, _, settings = CURVES[name]
    for seed in range(10):
        after = ours(KEYS, prob=1.0, **settings).set_random_state(seed)(pair())
        assert all(0 <= after[key].min() and after[key].max() <= 1 for key in KEYS)
        assert after["global_image"][0, 0, 0, 0] == 0 and (after["image"] > 0).all()


def test_a_curve_that_may_fall_gives_tissues_any_order_and_patch_and_view_the_same():
    tissues = torch.tensor([0.0, 0.2, 0.55, 0.85, 1.0])  # background, then three tissues, then the brightest voxel
    orders = set()
    for seed in range(60):
        curve = RandGlobalLocalIntensityCurved(KEYS, prob=1.0).set_random_state(seed)
        after = curve(pair())
        assert largest_difference(pair(), after) < 1e-5
        assert all(0 <= after[key].min() and after[key].max() <= 1 for key in KEYS)
        assert after["global_image"][0, 0, 0, 0] == 0 and (after["image"] > 0).all()
        changed = curve.set_random_state(seed)({"image": tissues[None], "global_image": tissues[None]})["image"][0]
        orders.add(tuple(changed[1:4].argsort().tolist()))
    assert len(orders) == 6
    same = RandGlobalLocalIntensityCurved(KEYS, prob=0.0)(pair())
    assert torch.equal(same["global_image"], pair()["global_image"])


@pytest.mark.parametrize("name", CURVES)
def test_metadata_is_kept_and_inputs_stay_untouched(name):
    ours, _, settings = CURVES[name]
    data = pair()
    after = ours(KEYS, prob=1.0, **settings)(data)
    assert after["image"].meta["filename_or_obj"] == "a.nii" and not isinstance(after["global_image"], MetaTensor)
    assert torch.equal(after["image"].affine, data["image"].affine)
    assert after["image"].shape == data["image"].shape and after["image"].dtype == torch.float32
    assert all(torch.equal(torch.as_tensor(data[key]), torch.as_tensor(pair()[key])) for key in KEYS)
    with pytest.raises(KeyError, match="image"):
        ours(KEYS, prob=1.0, **settings)({"global_image": data["global_image"]})
    alone = ours(KEYS, prob=1.0, allow_missing_keys=True, **settings)({"global_image": data["global_image"]})
    assert set(alone) == {"global_image"}


@pytest.mark.parametrize("seed", range(6))
def test_a_field_with_a_maximum_divides_patch_and_view_alike(seed):
    data = pair() | {"box": torch.tensor([[1.0, 6.0], [0.0, 7.0], [2.0, 8.0]])}
    settings = {"prob": 1.0, "coeff_range": (-0.3, 0.3)}
    free, held = (
        RandGlobalLocalBiasFieldd(KEYS, maximum=maximum, **settings).set_random_state(seed)(data)
        for maximum in (None, 1.0)
    )
    highest = max(float(free[key].max()) for key in KEYS)
    for key in KEYS:
        expected = torch.as_tensor(free[key]) / max(highest, 1.0)
        torch.testing.assert_close(torch.as_tensor(held[key]), expected)
        assert held[key].max() <= 1
    with pytest.raises(ConfigError, match="maximum is 0"):
        RandGlobalLocalBiasFieldd(KEYS, maximum=0)
