# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle of label maps alone: its weights segment both contrasts of the shipped adults, and can be adapted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from benchmarks.zero_shot import main, measured
from mapseg_components.handover import package_of_bundle
from mapseg_components.plans.package import place_of
from tests.conftest import ROOT

BRAIN = ROOT / "bundles" / "brain_any_contrast"
ADULTS = ROOT / "sample" / "adult_t1_to_t2"
# silver labels of three tissues: what they call grey matter is the cortex and the nuclei
TISSUES = {"white matter": [[9], [3]], "grey matter": [[1, 2, 3, 4, 5, 6, 7, 10], [2]]}


# T1w of one person, T2w of another one; the Dice of the weights is 0.73 and 0.61
@pytest.mark.parametrize(("section", "least"), [("validation", 0.7), ("test", 0.6)])
def test_white_matter_is_found_in_both_contrasts(section, least, tmp_path):
    for kind in ("images", "labels"):
        first = sorted((ADULTS / section / kind).iterdir())[0]
        (tmp_path / kind).mkdir()
        shutil.copy(first, tmp_path / kind)
    found = measured(str(tmp_path / "images"), str(tmp_path / "labels"), TISSUES, "brain_any_contrast", threads=1)
    assert found.cases == 1 and found.summary["white matter"]["dice"]["mean"] > least


def test_scans_of_another_size_can_be_measured_at_the_model_s(monkeypatch, tmp_path):
    asked = []

    def predict(*arguments, **options):
        asked.append(options["match_size"])
        return type("Found", (), {"exit_code": 3, "__str__": lambda self: "nothing segmented"})()

    monkeypatch.setattr("benchmarks.zero_shot.predict", predict)
    with pytest.raises(RuntimeError, match="nothing segmented"):
        main([str(tmp_path), str(tmp_path), "--structures", json.dumps(TISSUES), "--match_size"])
    assert asked == [True]


def test_a_package_of_it_names_structures_spacing_and_windows(tmp_path):
    package = package_of_bundle(place_of("brain_any_contrast"), tmp_path)
    assert list(package.labels)[:2] == ["hippocampus", "amygdala"] and len(package.labels) == 12
    assert package.content["spacing_mm"] == [2.0, 2.0, 2.0]
    assert package.content["foreground_mm"] == [135.0, 166.0, 139.5]
    assert package.settings["training"]["window_size"] == package.settings["preprocessing"]["patch_size"] == [48] * 3
    shown = torch.zeros(1, 1, 16, 16, 16)
    assert package.network.eval()(shown).shape == (1, 13, 16, 16, 16)
    same = torch.load(BRAIN / "models" / "model.pt", weights_only=True)
    package.network.load_state_dict(same)
