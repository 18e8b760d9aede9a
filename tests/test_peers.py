# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The comparison with nnU-Net and MONAI alone: equal work, honest tables. nnU-Net itself is an extra."""

from __future__ import annotations

import copy
import importlib.util
import json
import pydoc

import numpy as np
import pytest
import torch

from benchmarks.peers import monai_side, package_side
from benchmarks.peers.plan import Plan, dynunet, nnunet_architecture, nnunet_weights, turned
from benchmarks.peers.report import table
from benchmarks.peers.run import QUICK, case, dice, in_turns, measured, step_operations
from benchmarks.peers.scans import scan_folder, write_scans
from benchmarks.peers.side import SIDES, Side
from tests.conftest import ROOT
from tests.warm import warm_processes

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("peers")
    write_scans(place, QUICK)
    QUICK.write(place)
    return place


@pytest.fixture(scope="module")
def prepared(folder):
    """Weights, and what each side but nnU-Net needs for its command; the steps are made in a process of their own."""
    with warm_processes():
        sides = {name: Side(name, folder) for name in ("monai", "package")}
    found = {
        name: [side.ask(what) for what in ("prepare", "step", "step_with_samples", "peak")]
        for name, side in sides.items()
    }
    for side in sides.values():
        side.close()
    return found


def test_a_plan_comes_back_from_its_file(folder):
    assert Plan.read(folder) == QUICK


def test_sides_time_their_own_steps(prepared):
    for nothing, step, with_samples, peak in prepared.values():
        assert nothing is None and step > 0 and with_samples > 0 and peak > 1e8


@pytest.mark.usefixtures("warm_processes")
def test_a_side_that_fails_says_where_to_look(folder):
    side = Side("package", folder)
    with pytest.raises(RuntimeError, match=r"nothing: the process ended with 1, see .*package.log"):
        side.ask("nothing")


@pytest.mark.parametrize("name", ["package", "monai"])
def test_a_folder_is_segmented_by_the_command_of_a_side(name, folder, prepared):
    command = {"package": package_side, "monai": monai_side}[name].command
    output = folder / "predicted" / name
    seconds, peak = measured(command, folder, scan_folder(folder, QUICK.scans), output, 1)
    assert seconds > 0 and peak > 1e8
    assert 0 <= dice(folder, output, QUICK) < 1


def test_a_command_that_fails_is_no_measurement(folder, tmp_path):
    with pytest.raises(RuntimeError, match="ended with 1"):
        measured(lambda *places: ["false"], folder, tmp_path, tmp_path / "out" / "a", 1)


def test_dice_is_that_of_the_label_maps(folder, tmp_path):
    for scan in scan_folder(folder, QUICK.scans).glob("*.nii.gz"):
        name = scan.name.removesuffix("_0000.nii.gz")
        (tmp_path / f"{name}.nii.gz").write_bytes((folder / "unseen" / f"{name}_label.nii.gz").read_bytes())
    assert np.isclose(dice(folder, tmp_path, QUICK), 1)


def test_operations_of_a_step_are_those_of_its_convolutions():
    plan = Plan(patch=8, filters=(4, 8, 12), batch_size=1)
    sides, pairs = (8, 4, 2), ((1, 4), (4, 8), (8, 12))
    forward = sum(54 * side**3 * (first * second + second**2) for side, (first, second) in zip(sides, pairs))
    for side, below, channels in ((4, 12, 8), (8, 8, 4)):  # a transposed convolution of 2, and two convolutions
        forward += 2 * side**3 * below * channels + 54 * side**3 * (2 * channels * channels + channels**2)
    forward += 2 * 8**3 * 4 * plan.classes
    image = 54 * 8**3 * 4  # needs no gradient
    assert step_operations(plan) == 3 * forward - image


def test_sides_take_turns():
    asked = []
    found = in_turns({"package": lambda: asked.append("a") or 1.0, "nnunet": lambda: asked.append("b") or 3.0}, 2, 1)
    assert asked == ["a", "b"] * 3 and case(found)["faster_than"] == {"nnunet": 3.0}


def test_the_table_is_of_equal_work():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["logits"] < 1e-4 and {*results["dice"]} == {*SIDES}
    assert max(results["dice"].values()) - min(results["dice"].values()) < 0.05  # the same work has the same result
    other = copy.deepcopy(results)
    other["cases"]["training step"]["faster_than"]["nnunet"] = 7.77
    assert "**7.77**" in table(other)


@pytest.mark.skipif(
    importlib.util.find_spec("dynamic_network_architectures") is None, reason="needs the extra [nnunet]"
)
def test_nnunets_network_with_the_same_weights_is_the_same_function():
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    plan = Plan()
    options = nnunet_architecture(plan)["arch_kwargs"]
    options |= {key: pydoc.locate(options[key]) for key in ("conv_op", "norm_op", "nonlin")}
    theirs = PlainConvUNet(input_channels=1, num_classes=plan.classes, **options).eval()
    ours, image = dynunet(plan).eval(), torch.randn(1, 1, 16, 16, 16)
    theirs.load_state_dict(nnunet_weights(ours.state_dict(), theirs))
    assert torch.allclose(turned(theirs(turned(image))), ours(image), atol=1e-5)
    with pytest.raises(ValueError, match="another one than MONAI's"):
        nnunet_weights(dynunet(Plan(filters=(8, 24, 48, 96))).state_dict(), theirs)
