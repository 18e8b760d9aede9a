# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandBiasFieldd
from numpy.polynomial.legendre import legval3d

from mapseg_components.errors import DataError
from mapseg_components.transforms import RandGlobalLocalBiasFieldd

KEYS = ["image", "global_image"]
BOX = [[1.5, 6.0], [0.0, 8.0], [3.25, 9.25]]
LOCAL, GLOBAL = (9, 8, 12), (12, 10, 14)


def pair(value=1.0):
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])).double()
    return {
        "image": MetaTensor(torch.full((1, *LOCAL), value), affine=affine, meta={"filename_or_obj": "a.nii"}),
        "global_image": torch.full((1, *GLOBAL), value),
        "box": torch.tensor(BOX),
    }


def transform(seed=0, **settings):
    settings = {"prob": 1.0, "coeff_range": (-0.3, 0.3), **settings}
    return RandGlobalLocalBiasFieldd(KEYS, **settings).set_random_state(seed)


def centres(box, size, sides):
    """Voxel centres of a grid over a box of the view, where the view runs from -1 to 1."""
    axes = [a + (np.arange(n) + 0.5) * (b - a) / n for (a, b), n in zip(box, size)]
    return np.meshgrid(*[2 * axis / side - 1 for axis, side in zip(axes, sides)], indexing="ij")


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_field_is_the_polynomial_at_the_voxel_centres(degree):
    bias = transform(degree=degree)
    out = bias(pair())
    coefficients = bias.coefficients()
    assert np.count_nonzero(coefficients) == {1: 4, 2: 10, 3: 20}[degree]
    whole = [[0, side] for side in GLOBAL]
    for key, box, size in (("image", BOX, LOCAL), ("global_image", whole, GLOBAL)):
        expected = np.exp(legval3d(*centres(box, size, GLOBAL), coefficients))
        np.testing.assert_allclose(out[key][0].numpy(), expected, rtol=1e-5)


def test_patch_has_the_part_of_the_field_of_the_view():
    whole_voxels = [[2, 11], [1, 9], [2, 14]]  # of the view, at its own resolution
    data = pair() | {"box": torch.tensor(whole_voxels).float()}
    out = transform()(data)
    part = out["global_image"][(slice(None), *(slice(*ends) for ends in whole_voxels))]
    torch.testing.assert_close(out["image"].as_tensor(), part)
    assert part.std() > 0.05


@pytest.mark.parametrize("prob", [0.0, 0.35, 1.0])
def test_coefficients_and_chances_are_those_of_monai(prob):
    for seed in range(6):
        ours = transform(seed, prob=prob)
        monai = RandBiasFieldd(KEYS, coeff_range=(-0.3, 0.3), prob=prob).set_random_state(seed)
        fields = [t(pair())["global_image"][0].log() for t in (ours, monai)]
        if fields[1].any():  # MONAI's -1 and 1 are the centres of the outer voxels, ours their edges
            assert ours.rand_bias_field._coeff == monai.rand_bias_field._coeff
            edges = np.meshgrid(*[np.linspace(-1, 1, side) for side in GLOBAL], indexing="ij")
            np.testing.assert_allclose(fields[1].numpy(), legval3d(*edges, ours.coefficients()), atol=1e-5)
        assert bool(fields[0].any()) == bool(fields[1].any())


def test_same_seed_same_field_and_inputs_stay_untouched():
    data = pair(2.0)
    first, again, other = (transform(seed)(data)["image"].as_tensor() for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert data["image"].eq(2).all() and data["global_image"].eq(2).all()


def test_metadata_and_type_are_kept():
    out = transform()(pair())
    assert isinstance(out["image"], MetaTensor) and not isinstance(out["global_image"], MetaTensor)
    assert out["image"].meta["filename_or_obj"] == "a.nii"
    assert torch.equal(out["image"].affine, pair()["image"].affine)
    assert out["image"].dtype == torch.float32


def test_missing_images():
    data = pair()
    view = {"global_image": data["global_image"]}
    with pytest.raises(KeyError, match="image"):
        transform()(view)
    out = transform(allow_missing_keys=True)(view)
    assert torch.equal(out["global_image"], transform()(data)["global_image"])
    with pytest.raises(DataError, match="box"):
        transform()({key: data[key] for key in KEYS})
