# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Agreement of label maps, consistency under changes of a scan, and the line from it to Dice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from monai.networks.utils import one_hot

from mapseg_components.quality import Calibration, consistency, label_agreement


def test_agreement_is_monais_dice():
    torch.manual_seed(0)
    first, second = torch.randint(0, 4, (2, 5, 6, 7))
    maps = [one_hot(one[None, None], 4) for one in (first, second)]
    torch.testing.assert_close(label_agreement(first, second, 4), compute_dice(*maps, include_background=False)[0])


def test_structure_that_neither_map_has_is_nan():
    first = torch.zeros(2, 3, 4, dtype=torch.long)
    first[0, 0, 0] = 1
    assert label_agreement(first, first, 3).tolist()[0] == 1
    assert label_agreement(first, first, 3)[1].isnan()


def above(threshold):
    return lambda image: (image[0] > threshold).long()


def test_a_rule_on_rank_is_consistent_and_a_threshold_is_not():
    """A threshold on intensities moves when they are raised to a power; the brightest half stays what it is."""
    torch.manual_seed(0)
    image = torch.rand(1, 6, 7, 8)

    def brightest_half(image):
        return (image[0] > image.median()).long()

    assert consistency(image, brightest_half(image), brightest_half, 2).item() == 1
    assert consistency(image, above(0.5)(image), above(0.5), 2).item() < 0.95


def test_mirrored_label_maps_are_mirrored_back():
    image = torch.linspace(0, 1, 6 * 2 * 2).reshape(1, 6, 2, 2)

    def first_plane(image):  # knows the place, not the scan
        label_map = torch.zeros(image.shape[1:], dtype=torch.long)
        label_map[0] = 1
        return label_map

    assert consistency(image, first_plane(image), first_plane, 2).item() == 1
    mirrored = consistency(image, first_plane(image), first_plane, 2, flip_axis=0).item()
    assert mirrored == pytest.approx(2 / 3)  # mirrored it finds the other end


def test_calibration_finds_the_line_and_says_where_it_was_seen():
    seen = [[0.5, 0.7, 0.9], [0.6, 0.8, math.nan]]
    dice = [[2 * c - 0.9 for c in one] for one in seen]
    fitted = Calibration.fit(seen, dice)
    assert fitted.slope == pytest.approx(2) and fitted.intercept == pytest.approx(-0.9)
    assert fitted.error == pytest.approx(0, abs=1e-9) and fitted.points == 5
    assert fitted.dice(0.75) == pytest.approx(0.6) and fitted.dice(0.1) == 0 and fitted.dice(1.0) == 1
    assert fitted.covers(0.9) and not fitted.covers(0.4)


def test_error_is_that_of_scans_left_out():
    """Each scan alone is a perfect line, the other one's is far away."""
    seen = [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]
    dice = [[0.0, 0.1, 0.2], [0.4, 0.5, 0.6]]
    assert Calibration.fit(seen, dice).error == pytest.approx(0.4)
    assert Calibration.fit(seen[:1], dice[:1]).error == pytest.approx(0, abs=1e-9)


def test_consistency_that_speaks_against_dice_is_not_believed():
    fitted = Calibration.fit([[0.2, 0.5, 0.9]], [[0.9, 0.5, 0.1]])
    assert fitted.slope == 0 and fitted.dice(0.3) == pytest.approx(0.5)


def test_too_few_points_make_no_calibration():
    assert Calibration.fit([[0.5, math.nan]], [[0.5, 0.5]]) is None
    assert Calibration.fit([], []) is None
    assert np.isnan(Calibration(1, 0, 3, 0, 0, 1).dice(math.nan))
