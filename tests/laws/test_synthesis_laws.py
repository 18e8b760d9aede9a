# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of images that are synthesised from label maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms import RandGlobalLocalCropd, RandGlobalLocalSynthesisd

SHAPE = (18, 22, 26)
VALUES = (0, 2, 17, 53, 16)
PLAIN = {"blur": (0, 0), "noise": (0, 0), "low_resolution_prob": 0.0, "background_prob": 0.0, "optional_prob": 0.0}


def slabs(shape=SHAPE, values=VALUES):
    """A label map (1, X, Y, Z) of a slab for each value along the last axis."""
    places = np.arange(shape[2]) * len(values) // shape[2]
    return torch.from_numpy(np.broadcast_to(np.array(values, np.float32)[places], shape).copy())[None]


def synthesis(keys="image", seed=0, **options):
    return RandGlobalLocalSynthesisd(keys, **{**PLAIN, **options}).set_random_state(seed)


@pytest.mark.parametrize("seed", range(3))
def test_each_value_has_one_gaussian_and_its_group_the_same(seed):
    labels = slabs((40, 42, 44))
    transform = synthesis(seed=seed, mean=(0.3, 0.7), std=(0.01, 0.05), alike=[[17, 53]])
    image = transform({"image": labels})["image"]
    drawn = dict(zip(sorted(VALUES), zip(transform.means.tolist(), transform.stds.tolist())))
    for value in VALUES[1:]:
        inside = image[labels == value]
        assert inside.mean() == pytest.approx(drawn[value][0], abs=4 * drawn[value][1] / len(inside) ** 0.5)
        assert inside.std() == pytest.approx(drawn[value][1], rel=0.05)
    assert drawn[17] == drawn[53] and len({mean for mean, _ in drawn.values()}) == len(VALUES) - 1


def test_the_same_seed_gives_the_same_image_and_another_one_another():
    sample = {"image": slabs()}
    options = {"low_resolution_prob": 0.5, "noise": (0, 0.1), "blur": (0, 1)}
    first, again, other = (synthesis(seed=seed, **options)(sample)["image"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("seed", range(4))
def test_values_lie_within_0_and_1_and_background_is_exactly_0(seed):
    labels = MetaTensor(slabs(), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])).double(), meta={"a": 1})
    options = {"blur": (0.5, 2), "noise": (0.1, 0.3), "std": (0.2, 0.4), "low_resolution_prob": 1.0}
    image = synthesis(seed=seed, **options)({"image": labels})["image"]
    assert image.dtype == torch.float32 and image.shape == labels.shape and torch.equal(image.affine, labels.affine)
    assert 0 <= image.min() and image.max() <= 1
    assert (image[labels == 0] == 0).all() and (image[labels > 0] > 0).float().mean() > 0.5
    bright = synthesis(seed=seed, background_prob=1.0, std=(0, 0))({"image": labels})["image"]
    assert (bright[labels == 0] > 0).all(), "a tissue of its own"
    whole = synthesis(seed=seed, std=(0, 0))({"image": slabs(values=(2, 17))})["image"]
    assert (whole > 0).all(), "a map without background has none"


def test_patch_and_view_have_the_same_draw():
    views = {"image": slabs((10, 12, 26)), "global_image": slabs()}
    made = synthesis(["image", "global_image"], std=(0, 0))(views)
    for value in VALUES:
        found = {float(v) for key in views for v in made[key][views[key] == value]}
        assert len(found) == 1
    box = torch.tensor([[0, 5.0], [0, 4.0], [3, 16.0]])  # the patch in voxels of the view
    transform = synthesis(["image", "global_image"])
    np.testing.assert_allclose(transform.width("global_image", {**views, "box": box}), [1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_array_equal(transform.width("image", {**views, "box": box}), 1)


def test_blur_is_partial_volume_and_keeps_a_constant():
    labels = slabs()
    sharp, soft = (synthesis(std=(0, 0), blur=(s, s))({"image": labels})["image"] for s in (0.0, 1.5))
    levels = {round(float(v), 5) for v in sharp.flatten()}
    assert len(levels) == len(VALUES) < len({round(float(v), 5) for v in soft.flatten()})
    same = synthesis(std=(0, 0), blur=(2, 2), low_resolution_prob=1.0)({"image": torch.full((1, *SHAPE), 5.0)})["image"]
    assert same.max() - same.min() < 1e-6, "borders are not dark"


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_optional_values_become_background_together(prob):
    labels = slabs()
    image = synthesis(optional=[2, 16], optional_prob=prob, std=(0, 0))({"image": labels})["image"]
    outside = (labels == 2) | (labels == 16)
    assert ((image[outside] == 0) == bool(prob)).all() and (image[(labels == 17) | (labels == 53)] > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_label_is_that_of_the_crop_and_the_image_is_made_of_its_values(seed):
    """A patch through a turned crop: the same with and without synthesis; raw values are never mixed."""
    case = {"image": slabs(), "label": (slabs() == 17).to(torch.uint8)}
    crop = RandGlobalLocalCropd(
        (8, 10, 12), prob=1.0, scale_range=(0.7, 1.3), rotate_range_deg=30, image_mode="nearest"
    )
    keys = ["image", "global_image"]
    raw = Compose([crop]).set_random_state(seed)(case)
    made = Compose([crop, RandGlobalLocalSynthesisd(keys)]).set_random_state(seed)(case)
    for key in keys:
        assert {float(v) for v in raw[key].unique()} <= {0, *VALUES}
        assert torch.equal((raw[key] == 17).to(torch.uint8), raw[key.replace("image", "label")])
        assert raw[key].shape == made[key].shape and 0 <= made[key].min() and made[key].max() <= 1
    for key in ("label", "global_label", "box", "valid_box"):
        assert torch.equal(made[key], raw[key])


def test_what_is_no_label_map_is_refused():
    with pytest.raises(DataError, match=r"values that are not whole.*nearest neighbour"):
        synthesis()({"image": slabs() / 2 + 0.25})
    with pytest.raises(DataError, match=r"shape \(2, 18, 22, 26\), expected a label map"):
        synthesis()({"image": torch.zeros(2, *SHAPE)})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mean": (0.5, 1.2)}, r"mean is \[0.5, 1.2\], expected 0 <= lowest <= highest <= 1"),
        ({"low_resolution": (0.5, 2)}, "low_resolution is .*expected 1 <= lowest"),
        ({"optional_prob": 2}, "optional_prob is 2, expected a share"),
        ({"alike": [[1, 2], [2, 3]]}, "name each value in one group"),
        ({"optional": [0]}, "and 0 in none"),
    ],
)
def test_draws_out_of_bounds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        synthesis(**options)
