# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Sizes for scans and machines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mapseg_components.errors import ConfigError
from mapseg_components.networks import GlobalLocalUNet
from mapseg_components.plans.frame import sizes_of
from mapseg_components.plans.plan import make_plan
from mapseg_components.plans.sizes import PRESETS, plan_sizes, plan_unet, preset_for, settings_of
from tests.pictures import cells, write_picture


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((182, 218, 182), (1, 1, 1)),
        ((53, 65, 56), (1.6, 1.6, 1.6)),
        ((256, 256, 12), (1.25, 1.25, 8)),
        ((320, 320, 20), (0.8, 0.8, 6)),
        ((512, 512, 120), (0.7, 0.7, 2.0)),
        ((30, 30, 30), (2, 2, 2)),
    ],
)
def test_sizes_fit_each_other(shape, spacing, preset):
    plan = plan_sizes([shape], [spacing], preset)
    for axis in range(3):
        side, stride = plan["patch_size"][axis], plan["stride"][axis]
        assert side % stride == 0 and side % plan["local_block_size"][axis] == 0 and side >= 8
        assert side % plan["global_block_size"][axis] == 0
        assert plan["window_stride"][axis] % stride == 0 and 0 < plan["window_stride"][axis] <= side
        features = side // stride
        assert all(1 <= dilation[axis] <= features for dilation in plan["dilations"] if isinstance(dilation, list))


def test_isotropic_scans_get_the_papers_sizes_on_a_large_gpu():
    plan = plan_sizes([(182, 218, 182)], [(1, 1, 1)], "paper")
    assert plan["patch_size"] == [96, 96, 96] and plan["dilations"] == [4, 8, 16] and "rotation_deg" not in plan


def test_thick_slices_get_flat_patches_that_are_not_reduced_along_them():
    plan = plan_sizes([(256, 256, 12)], [(1.25, 1.25, 8)], "single-gpu")
    assert plan["patch_size"][:2] == [96, 96] and plan["patch_size"][2] <= 16
    assert plan["stride"] == [4, 4, 1] and plan["rotation_deg"] == [0, 0, 15]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("spacing", [(0.012, 0.004, 0.007), (0.004, 0.012, 0.004), (0.01, 0.01, 0.01)])
def test_long_pixels_of_an_image_are_no_thick_slices(spacing, preset):
    plan = plan_sizes([(512, 496, 1)], [spacing], preset)
    widths = [side * mm for side, mm in zip(plan["patch_size"][:2], spacing)]
    assert plan["patch_size"][2] == 1 and "rotation_deg" not in plan
    assert max(widths) <= 1.1 * min(widths), "about as wide as high"


def test_the_median_decides():
    odd = [(64, 64, 64), (182, 218, 182), (182, 218, 182)]
    assert plan_sizes(odd, [(1, 1, 1)] * 3, "paper") == plan_sizes(odd[1:], [(1, 1, 1)] * 2, "paper")


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((93, 93, 12), (1.5, 1.5, 8)),
        ((117, 159, 126), (0.9, 0.9, 0.9)),
        ((40, 50, 3), (1, 1, 5)),
        ((320, 300, 1), (1, 1, 3)),
    ],
)
def test_a_planned_network_takes_the_planned_patch(shape, spacing, fine):
    plan = plan_sizes([shape], [spacing], "small-data-cpu", fine)
    unet = plan_unet(plan["patch_size"], spacing, reduced=not fine)
    del unet["upsample_kernel_size"]
    network = GlobalLocalUNet(1, 3, **unet)
    patch = torch.zeros(1, 1, *plan["patch_size"])
    assert network(patch).shape == (1, 3, *plan["patch_size"])
    assert network.encoder.levels[0](patch).shape[2] == plan["patch_size"][0] // (1 if fine else 2)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_sizes_follow_from_the_patch_and_the_window_of_the_user(preset):
    isotropic = [(120, 140, 120)], [(1, 1, 1)], preset, True
    plan = plan_sizes(*isotropic, {"patch_size": [32, 32, 40]})
    assert plan["patch_size"] == [32, 32, 40] and plan["local_block_size"] == [4, 4, 4]
    assert all(0 < step <= side for step, side in zip(plan["window_stride"], plan["patch_size"]))
    wide = plan_sizes(*isotropic, {"patch_size": [32, 32, 32], "window_size": [48, 48, 48]})
    assert (
        wide["window_stride"] == [40, 40, 40]
        and wide["dilations"] == plan_sizes(*isotropic, {"patch_size": [32, 32, 32]})["dilations"]
    )
    for wrong in (32, [32, 32], ["32", 32, 32], [33, 32, 32], [0, 32, 32], None):
        with pytest.raises(ConfigError, match=r"settings: patch_size is .* expected three whole numbers"):
            plan_sizes(*isotropic, {"patch_size": wrong})


def test_by_default_the_preset_is_the_one_that_was_measured():
    assert preset_for({"preset": "auto"}) == ("small-data-cpu", "the one that was measured")
    assert preset_for({"preset": "single-gpu"}) == ("single-gpu", "asked for")
    with pytest.raises(ConfigError, match="preset 'large' is unknown"):
        preset_for({"preset": "large"})


def test_rotation_gets_the_names_that_a_config_has():
    planned = {"stride": [4, 4, 1], "rotation_deg": 0}
    known = dict.fromkeys(["stride", "source_rotation_deg", "target_rotation_deg"])
    assert settings_of(known, planned) == {"stride": [4, 4, 1], "source_rotation_deg": 0, "target_rotation_deg": 0}


def test_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="preset 'huge' is unknown, expected one of"):
        plan_sizes([(9, 9, 9)], [(1, 1, 1)], "huge")


def planned(folder, pixel_um):
    """Plan for six images of cells, the first three labelled, with pixel sizes of both sides in um."""
    cases = []
    for number in range(6):
        image, label = cells(number, (200 + 10 * number, 260))
        dots = 25400 / pixel_um[number > 2]
        path = write_picture(folder / f"{number}.png", image, dpi=(dots, dots))
        cases.append(
            {"image": path, "label": write_picture(folder / f"{number}_label.png", label), "case_id": str(number)}
        )
    request = {"settings": None, "preset": "small-data-cpu", "device": "cpu"}
    return make_plan(cases[:2], cases[2:3], cases[3:], [], {"ring": 1, "core": 2}, request)


def test_images_are_planned_by_what_lies_in_their_plane(tmp_path):
    plan = planned(tmp_path / "one", (0.5, 0.5))
    assert plan["settings"]["working_spacing"] is None and plan["median_shape"] == [260, 225, 1]
    assert plan["settings"]["patch_size"][2] == 1 and min(plan["settings"]["patch_size"][:2]) >= 96
    assert plan["settings"]["stride"][2] == plan["settings"]["local_block_size"][2] == 1
    plan_unet(plan["settings"]["patch_size"], plan["working_spacing_mm"])
    coarser = planned(tmp_path / "two", (0.5, 1.0))["settings"]["working_spacing"]
    assert coarser == pytest.approx([1.0, 1.0, 0.0])


def test_a_structure_of_an_image_is_as_wide_as_it_is_there(tmp_path):
    label = np.zeros((90, 120), np.uint8)
    label[20:41, 30:51], label[70:75, 10:100] = 1, 2
    path = write_picture(tmp_path / "a.png", label)
    sizes = sizes_of([path], {"square": 1, "band": 2}, None)
    assert 17 <= sizes.widths["square"] <= 22 and 4 <= sizes.widths["band"] <= 6
    assert sizes.extent.tolist() == [90, 21, 1]
