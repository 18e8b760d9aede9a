# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the comparison of two models costs at most, and which scans it looks at."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.data.utils import dense_patch_slices

from mapseg_components.plans.judging import (
    DEGRADATIONS,
    affordable_images,
    count_windows,
    evenly,
    judged_images,
    judged_region,
    versions_of,
)


@pytest.mark.parametrize(
    "shape, patch, stride", [((40, 33, 20), (16, 16, 16), (12, 12, 12)), ((5, 9, 8), (8, 8, 8), (4, 3, 2))]
)
def test_windows_are_counted_as_monai_lays_them(shape, patch, stride):
    padded = [max(side, window) for side, window in zip(shape, patch)]
    assert count_windows(shape, patch, stride) == len(dense_patch_slices(padded, patch, stride))


def test_no_more_images_than_the_bound_and_than_a_tenth_of_the_adaptation_allows():
    for targets, affordable in itertools.product((1, 2, 5, 25), (None, 0, 3, 6, 9, 15, 40)):
        versions, judged = judged_images(targets, affordable)
        assert 4 <= versions <= 12 and min(2, targets) <= judged <= min(10, targets)
        if affordable is not None:
            assert versions + judged <= max(affordable, 4 + 2)
    assert judged_images(25, None) == judged_images(25, 10**6) == (12, 10)
    assert 10 * 27 * affordable_images(27, 7500) <= 3 * 7500


@pytest.mark.parametrize("scans, most", [(1, 12), (2, 12), (5, 12), (9, 12), (3, 4), (1, 4)])
def test_versions_are_different_and_most_degradations_come(scans, most):
    found = versions_of(scans, most)
    assert len(found) == len(set(found)) <= most
    assert {name for _, name in found} >= {None, "inverted"} and (0, None) in found
    assert len({number for number, _ in found}) == min(scans, 5, most // 2)
    if most == 12:
        assert {name for _, name in found} == {None, *DEGRADATIONS}


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degraded_scans_are_other_ones_in_the_same_range_with_the_same_background(name):
    image = torch.rand(1, 12, 13, 14, generator=torch.Generator().manual_seed(0))
    image[:, :3] = 0
    shown = DEGRADATIONS[name](image)
    assert shown.shape == image.shape and shown.min() >= 0 and shown.max() <= 1
    assert (shown[:, :3] == 0).all() and (shown - image).abs().mean() > 0.02
    assert torch.equal(shown, DEGRADATIONS[name](image)), "the same each time"


def test_evenly_spaced_cases_are_different_and_all_if_there_are_no_more():
    for length, number in ((1, 1), (7, 7), (25, 10), (11, 10), (5, 2)):
        chosen = evenly(list(range(length)), number)
        assert len(set(chosen)) == number and chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("shape", "sides"), [((6500, 5700, 1), (672, 672, 1)), ((672, 100, 1), (672, 100, 1)), ((6500, 5700, 2), None)]
)
def test_of_a_large_image_the_middle_is_judged(shape: tuple[int, int, int], sides: tuple[int, int, int] | None) -> None:
    region = judged_region(shape, (192, 192, 1), (160, 160, 1))
    assert tuple(part.stop - part.start for part in region) == (sides or shape)
    assert all(abs(part.start - (side - part.stop)) <= 1 for part, side in zip(region, shape))
    assert count_windows(sides or shape, (192, 192, 1), (160, 160, 1)) <= 16 or sides is None
