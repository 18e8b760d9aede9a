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

from mapseg_components.contrast import contrast_view
from mapseg_components.quality import (
    COVERAGE,
    Calibration,
    Positions,
    conformal_quantile,
    consistency,
    expected_dice,
    label_agreement,
    positions_of,
    reconciled,
)


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


@pytest.mark.parametrize("views, flip", [((), 0), (("gamma 0.7",), None), (("inverted", "gamma 2", "gamma 1.5"), 1)])
def test_each_view_costs_one_segmentation(views, flip):
    shown = []

    def segment(image):
        shown.append(image)
        return (image[0] > 0.5).long()

    image = torch.rand(1, 4, 5, 6)
    consistency(image, segment(image), segment, 2, flip, [contrast_view(name) for name in views])
    assert len(shown) == 1 + len(views) + (flip is not None)


def test_a_model_that_takes_dark_for_bright_is_not_consistent_with_the_inverted_scan():
    image = torch.rand(1, 6, 7, 8, generator=torch.Generator().manual_seed(0))

    def segment(image):
        return (image[0] > image.median()).long()

    label_map = segment(image)
    assert consistency(image, label_map, segment, 2).item() == 1
    assert consistency(image, label_map, segment, 2, views=[contrast_view("inverted")]).item() < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_no_truth_lets_two_models_differ_by_more_than_the_reconciled_estimates_may(seed):
    """The true Dice of two label maps, whatever the truth is, are left as they are."""
    torch.manual_seed(seed)
    first, truth = torch.randint(0, 3, (2, 4, 5, 6))
    second = torch.where(torch.rand(4, 5, 6) < 0.1 * seed, truth, first)
    dice = [label_agreement(one, truth, 3).double().numpy() for one in (first, second)]
    agreement = label_agreement(first, second, 3).double().numpy()
    np.testing.assert_allclose(reconciled(*dice, agreement), dice, atol=1e-6)


def test_estimates_of_label_maps_that_are_alike_are_alike():
    one, other = reconciled(np.array([0.9, 0.2, np.nan, 0.9]), np.array([0.3, 0.2, 0.5, 0.1]), np.array([1, 0, 1, 0.8]))
    assert one[0] == pytest.approx(other[0]) and 0.3 < one[0] < 0.9
    assert one[1] == pytest.approx(0.2) and np.isnan(one[2]) and np.isnan(other[2])
    assert 0.1 < other[3] < one[3] < 0.9
    jaccard = [dice / (2 - dice) for dice in (one[3], other[3], 0.8)]
    assert jaccard[0] - jaccard[1] == pytest.approx(1 - jaccard[2])


def test_intervals_cover_as_often_as_they_say():
    """Over many calibrations of scans alike, the next scan's Dice lies inside as often as the nominal coverage says."""
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        seen = generator.uniform(0.3, 1, (13, 4))
        dice = np.clip(0.8 * seen + 0.05 * generator.standard_normal((13, 1)), 0, 1)
        fitted = Calibration.fit({"sign": seen[:-1]}, dice[:-1])
        low, high = fitted.interval(np.mean([fitted.dice(sign=value) for value in seen[-1]]))
        inside.append(low <= dice[-1].mean() <= high)
    assert COVERAGE - 0.06 < np.mean(inside) < COVERAGE + 0.12


def test_too_few_segmentations_make_no_interval():
    assert conformal_quantile([0.1, 0.2, 0.3], 0.8) is None and conformal_quantile([0.4, 0.2, 0.3, 0.1], 0.8) == 0.4
    assert conformal_quantile([], 0.8) is None
    versions = [[0.5, 0.7], [0.6, 0.9], [0.2, 0.3], [0.4, 0.5], [0.5, 0.6]]
    assert Calibration.fit({"sign": versions}, versions, [0, 0, 0, 0, 0]).interval(0.5) is None, "of one scan alone"
    assert Calibration.fit({"sign": versions[:3]}, versions[:3], [0, 1, 2]).interval(0.5) is None
    assert Calibration.fit({"sign": versions}, versions, [0, 1, 0, 1, 0]).interval(0.5) == pytest.approx((0.5, 0.5))


def test_versions_of_a_scan_are_left_out_together():
    seen = [[0.0, 0.5, 1.0]] * 4
    dice = [[0.0, 0.1, 0.2], [0.0, 0.1, 0.2], [0.4, 0.5, 0.6], [0.4, 0.5, 0.6]]
    assert Calibration.fit({"sign": seen}, dice, [0, 0, 1, 1]).error == pytest.approx(0.4)
    assert Calibration.fit({"sign": seen}, dice).error < 0.3


def test_calibration_finds_the_line_and_says_where_it_was_seen():
    seen = [[0.5, 0.7, 0.9], [0.6, 0.8, math.nan]]
    dice = [[2 * c - 0.9 for c in one] for one in seen]
    fitted = Calibration.fit({"sign": seen}, dice)
    assert fitted.lines == {"sign": (pytest.approx(2), pytest.approx(-0.9))}
    assert fitted.error == pytest.approx(0, abs=1e-9) and fitted.points == 5
    assert fitted.dice(sign=0.75) == pytest.approx(0.6) and fitted.dice(sign=0.1) == 0 and fitted.dice(sign=1.0) == 1
    assert fitted.covers(0.9) and not fitted.covers(0.4)


def test_error_is_that_of_scans_left_out():
    """Each scan alone is a perfect line, the other one's is far away."""
    seen = [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]
    dice = [[0.0, 0.1, 0.2], [0.4, 0.5, 0.6]]
    assert Calibration.fit({"sign": seen}, dice).error == pytest.approx(0.4)
    assert Calibration.fit({"sign": seen[:1]}, dice[:1]).error == pytest.approx(0, abs=1e-9)


def test_what_lies_outside_the_tissue_is_background_in_all_label_maps():
    image = torch.zeros(1, 4, 4, 4)
    image[:, :2] = 0.5
    outside = image[0] == 0

    def everywhere_else(shown):  # a structure in the tissue, and beyond it where the contrast is changed
        return torch.ones(4, 4, 4, dtype=torch.long)

    label_map = everywhere_else(image).masked_fill(outside, 0)
    assert consistency(image, label_map, everywhere_else, 2).item() < 0.7
    assert consistency(image, label_map, everywhere_else, 2, flip_axis=0, outside=outside).item() == 1.0


def test_consistency_that_speaks_against_dice_is_not_believed():
    fitted = Calibration.fit({"sign": [[0.2, 0.5, 0.9]]}, [[0.9, 0.5, 0.1]])
    assert fitted.lines["sign"][0] == 0 and fitted.dice(sign=0.3) == pytest.approx(0.5)


def test_the_estimate_is_that_of_the_sign_that_says_less():
    """Each sign alone sees one half of the errors."""
    dice = [[0.9, 0.5, 0.9], [0.5, 0.9, 0.5]]
    signs = {"one": [[0.9, 0.5, 0.9], [0.9, 0.9, 0.9]], "other": [[0.8, 0.8, 0.8], [0.4, 0.8, 0.4]]}
    fitted = Calibration.fit(signs, dice)
    alone = {name: Calibration.fit({name: values}, dice) for name, values in signs.items()}
    for one, other in ((0.9, 0.8), (0.5, 0.8), (0.9, 0.4)):
        each = alone["one"].dice(one=one), alone["other"].dice(other=other)
        assert fitted.dice(one=one, other=other) == pytest.approx(min(each))
    assert fitted.highest == 0.9, "of the first sign"
    assert fitted.dice(one=0.5, other=math.nan) == pytest.approx(alone["one"].dice(one=0.5))
    assert np.isnan(fitted.dice(one=math.nan, other=math.nan))


def test_the_expected_dice_is_that_of_the_probabilities_with_their_own_label_map():
    """Counted voxel by voxel; of sure probabilities 1, of a structure that is nowhere none."""
    torch.manual_seed(0)
    probabilities = (3 * torch.rand(4, 5, 6, 7)).softmax(dim=0)
    probabilities[3] = 0
    label_map = probabilities.argmax(dim=0)
    found = expected_dice(probabilities, label_map)
    for number in (1, 2):
        inside = [
            value for value, label in zip(probabilities[number].flatten(), label_map.flatten()) if label == number
        ]
        expected = 2 * sum(inside) / (len(inside) + probabilities[number].sum())
        assert found[number - 1] == pytest.approx(float(expected), abs=1e-5)
    assert found[2].isnan()
    sure = torch.nn.functional.one_hot(label_map, 4).movedim(-1, 0).float()
    assert expected_dice(sure, label_map)[:2].tolist() == [1, 1]


def test_too_few_points_make_no_calibration():
    assert Calibration.fit({"sign": [[0.5, math.nan]]}, [[0.5, 0.5]]) is None
    assert Calibration.fit({"sign": []}, []) is None
    assert np.isnan(Calibration({"sign": (1, 0)}, 3, 0, 0, 1).dice(sign=math.nan))


def head(size=20, at=(8, 10, 12), shape=(40, 44, 48), start=6, radius=3.0):
    """A bright box, and in it a ball of one structure at a place given in voxels of the box."""
    image = torch.zeros(1, *shape)
    image[0, start : start + size, start : start + size, start : start + size] = 1
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in shape), indexing="ij"), dim=-1)
    return image, ((grid - torch.tensor(at, dtype=torch.float32) - start).norm(dim=-1) <= radius).long()


def test_positions_are_those_in_the_foreground_wherever_it_lies_and_however_large_it_is():
    first = positions_of(*head(), 3)
    torch.testing.assert_close(first[0][0], torch.tensor([8.0, 10.0, 12.0]) / 20, atol=0.03, rtol=0)
    assert first[0][1].isnan().all() and first[1][1].isnan()
    moved = positions_of(*head(start=15), 3)
    torch.testing.assert_close(moved, first, equal_nan=True, atol=1e-5, rtol=0)
    larger = positions_of(*head(size=30, at=(12, 15, 18), radius=4.5), 3)
    torch.testing.assert_close(larger[0], first[0], equal_nan=True, atol=0.03, rtol=0)
    torch.testing.assert_close(larger[1], first[1], equal_nan=True, atol=0.005, rtol=0)


def test_the_bound_of_a_displaced_structure_is_the_dice_of_two_balls():
    places = [positions_of(*head(at=at), 2) for at in ((8, 10, 12), (8.4, 10, 12), (8, 10.4, 12))]
    positions = Positions.fit(places)
    for at in ((8, 10, 12), (8, 10, 12.8), (8, 10.8, 12)):  # natural
        assert positions.highest_dice(positions_of(*head(at=at), 2)[0]).item() == 1
    spread = 20 * positions.spread.item()
    for off in (1.0, 2.0, 4.0):
        image, moved = head(at=(8.13, 10.13, 12 - spread - off), radius=3.0)
        _, there = head(at=(8.13, 10.13, 12 - spread), radius=3.0)
        true = label_agreement(moved, there, 2).item()
        assert positions.highest_dice(positions_of(image, moved, 2)[0]).item() == pytest.approx(true, abs=0.08)
    far = positions.highest_dice(positions_of(*head(at=(8, 10, 1)), 2)[0]).item()
    assert far == 0 and Positions.fit(places, anywhere=True).highest_dice(places[0][0] + 0.4).item() == 1


def test_a_structure_that_is_missing_counts_as_0_where_all_labelled_scans_have_it():
    image, label = head()
    both = label.clone()
    both[20:24, 20:24, 20:24] = 2
    positions = Positions.fit([positions_of(image, one, 4) for one in (both, label)])
    none = torch.zeros_like(label)
    bound = positions.highest_dice(positions_of(image, none, 4)[0])
    assert bound[0] == 0 and bound[1:].isnan().all()
    third = label.clone()
    third[20:24, 8:12, 8:12] = 3  # no labelled scan has it: nothing is known of its place
    assert positions.highest_dice(positions_of(image, third, 4)[0]).tolist()[2] == 1
    single = Positions.fit([positions_of(image, label, 4)])
    assert single.spread.tolist() == pytest.approx([0.05] * 3)
