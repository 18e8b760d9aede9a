# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation along axes is MONAI's, and faster; oblique grids are MONAI's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from mapseg_components.transforms import resampling
from mapseg_components.transforms.resampling import linear_resampling

SHAPE, NEW_SHAPE = (9, 7, 12), (11, 16, 8)


def grid(turn, sides, shape, centre=(3.0, -20.0, 7.0)):
    """Affine of a grid with these axes and sides, around a centre."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(turn, dtype=float) * np.asarray(sides, dtype=float)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


def monai(volume, affine, new_affine, shape):
    move = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float64)
    image = MetaTensor(volume[None].double(), affine=torch.from_numpy(affine))
    return (
        move(image, dst_affine=torch.from_numpy(new_affine), spatial_size=shape)[0].as_subclass(torch.Tensor).double()
    )


def turns():
    """All signed permutations of three axes, in the frame of an oblique scan."""
    angle = 0.4
    oblique = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    for order in itertools.permutations(range(3)):
        for signs in ((1, 1, 1), (-1, 1, 1), (1, -1, -1)):
            yield oblique, oblique @ (np.eye(3)[:, list(order)] * signs)


@pytest.mark.parametrize("old, new", list(turns()))
def test_axes_that_are_parallel_are_interpolated_as_by_monai(old, new, monkeypatch):
    affine, new_affine = grid(old, (1.5, 2, 1), SHAPE), grid(new, (0.8, 1.1, 1.7), NEW_SHAPE, (3.3, -20.2, 7.0))
    volume = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    expected = monai(volume, affine, new_affine, NEW_SHAPE)
    monkeypatch.setattr(resampling, "SpatialResample", None)
    found = linear_resampling(affine, SHAPE, new_affine, NEW_SHAPE)(volume)
    assert found.shape == NEW_SHAPE and torch.allclose(found.double(), expected, atol=1e-5)


def test_oblique_grids_are_monais():
    affine, new_affine = grid(next(turns())[0], (1.5, 2, 1), SHAPE), grid(np.eye(3), (1, 1, 1), NEW_SHAPE)
    volume = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    found = linear_resampling(affine, SHAPE, new_affine, NEW_SHAPE)(volume)
    assert torch.allclose(found.double(), monai(volume, affine, new_affine, NEW_SHAPE), atol=1e-4)


@pytest.mark.parametrize("side", [1, 2])
def test_thin_grids_keep_their_border(side):
    volume = torch.arange(float(side)).view(side, 1, 1) + 1
    found = linear_resampling(np.eye(4), volume.shape, grid(np.eye(3), (0.25, 1, 1), (8, 1, 1), (0, 0, 0)), (8, 1, 1))
    assert found(volume).min() >= 1 and found(volume).max() <= side
