# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapseg_components.boxes import (
    axis_extremes,
    box_of_mask,
    expand_box,
    index_affine,
    relative_box,
    resample_box,
    transformed_box,
)


def random_mask(seed, shape=(7, 9, 11)):
    mask = np.random.default_rng(seed).random(shape) > 0.97
    mask[3, 4, 5] = True
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_box_slices_to_exactly_the_mask(seed):
    mask = random_mask(seed)
    box = box_of_mask(mask)
    part = mask[tuple(slice(*ends) for ends in box)]
    assert part.sum() == mask.sum()
    assert all(part.any(axis=tuple(a for a in range(3) if a != axis))[[0, -1]].all() for axis in range(3))


def test_last_plane_is_inside_the_box():
    mask = np.zeros((4, 5, 6), bool)
    mask[1:, 2:, 3:] = True
    assert box_of_mask(mask).tolist() == [[1, 4], [2, 5], [3, 6]]


def test_empty_mask_has_no_box():
    with pytest.raises(ValueError, match="empty mask"):
        box_of_mask(np.zeros((2, 3, 4), bool))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_extremes_give_the_box_of_all_voxels_under_any_affine(seed):
    mask = random_mask(seed)
    affine = np.eye(4)
    affine[:3] = np.random.default_rng(seed).normal(size=(3, 4))
    all_voxels = np.argwhere(mask)
    np.testing.assert_allclose(transformed_box(axis_extremes(mask), affine), transformed_box(all_voxels, affine))


@given(
    start=st.lists(st.integers(-5, 5), min_size=3, max_size=3),
    side=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    size=st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_expanded_box_is_large_enough_and_holds_the_box(start, side, size):
    box = np.stack([start, np.add(start, side)], 1)
    grown = expand_box(box, size)
    assert (grown[:, 0] <= box[:, 0]).all() and (grown[:, 1] >= box[:, 1]).all()
    assert (grown[:, 1] - grown[:, 0] == np.maximum(side, size)).all()
    assert np.issubdtype(grown.dtype, np.integer)


def test_relative_box_of_the_frame_is_the_whole_grid():
    frame = np.array([[2.0, 10.0], [1.0, 5.0], [-3.0, 3.0]])
    assert relative_box(frame, frame, (16, 8, 3)).tolist() == [[0, 16], [0, 8], [0, 3]]


def test_index_affine_puts_voxel_centres():
    affine = index_affine(np.array([[2.0, 10.0], [0.0, 3.0], [1.0, 2.0]]), (4, 3, 2))
    assert (affine @ [0, 0, 0, 1]).tolist() == [2.5, 0.0, 0.75, 1]  # centre of the first output voxel
    assert (affine @ [3, 2, 1, 1]).tolist() == [8.5, 2.0, 1.25, 1]


def test_box_survives_resize():
    """A linear ramp stays linear, and the box's ends stay its ends."""
    ramp = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 1, 12, 5, 7)
    out = resample_box(ramp, torch.tensor([[[2.0, 10.0], [0.0, 5.0], [0.0, 7.0]]]), [4, 5, 7])
    torch.testing.assert_close(out[0, 0, :, 0, 0], torch.tensor([2.5, 4.5, 6.5, 8.5]))


def test_whole_voxel_box_is_a_slice():
    volume = torch.rand(2, 3, 6, 7, 8)
    box = torch.tensor([[[1.0, 4.0], [2.0, 7.0], [0.0, 8.0]]] * 2)
    torch.testing.assert_close(resample_box(volume, box, [3, 5, 8]), volume[:, :, 1:4, 2:7, :])


def test_an_index_beyond_16_bits_stays_what_it_is():
    mask = np.zeros((40_000, 2, 1), bool)
    mask[100:39_990] = True
    assert box_of_mask(mask).tolist() == [[100, 39_990], [0, 2], [0, 1]]
    assert axis_extremes(mask[:32_768]).dtype == np.int16
