# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/verdict.py: estimates of `assess` beside the Dice that an evaluation found."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from monai.bundle import ConfigParser

from tools import verdict

OVERLAYS = ["small_data.yaml", "fetal_age.yaml", "tiny.yaml"]


def measured(folder, dataset, dice: dict[str, float]):
    """What measure.py leaves of models with random weights, as if their evaluation had found such Dice."""
    (folder / "bundle").mkdir(parents=True)
    verdict.write_bundle(folder / "bundle", dataset / "datalist.json", OVERLAYS, {})
    parser = ConfigParser()
    parser.read_config(str(folder / "bundle" / "configs" / "inference.json"))
    for seed, (name, value) in enumerate(dice.items()):
        torch.manual_seed(seed)
        path = verdict.weights_of(folder / "seed3", name)
        path.parent.mkdir(parents=True)
        torch.save(parser.get_parsed_content("network_def", instantiate=True).state_dict(), path)
        parser.parse(reset=True)
        metrics = folder / "seed3" / "evaluation" / name / "metrics.json"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({"cases": {"target_test-0": {"first": value, "second": None}}}))


def test_models_of_a_measurement_are_judged_without_the_labels_of_their_test_scans(
    tmp_path, dataset, monkeypatch, capsys
):
    measured(tmp_path, dataset, {"source-only": 0.5, "continued": 0.4, "adapted": 0.7})
    listed = json.loads((tmp_path / "bundle" / "datalist.json").read_text())["target_training"]
    assert [case["case_id"] for case in listed] == ["target_test-0"] and "label" not in listed[0]
    line = ["verdict.py", "--datalist", str(dataset / "datalist.json"), "--experiment", "fetal_age", "--tiny"]
    monkeypatch.setattr(sys, "argv", [*line, "--measured", str(tmp_path), "--seeds", "3"])
    verdict.main()
    rows = json.loads((tmp_path / "verdict.json").read_text())
    assert [row["model"] for row in rows] == ["source-only", "continued", "adapted"]
    assert [row["scans"][0]["dice"] for row in rows] == [0.5, 0.4, 0.7]
    assert [row["gain"] for row in rows[1:]] == pytest.approx([-0.1, 0.2])
    for row in rows[1:]:
        right = (row["verdict"] == "adapted") is (row["model"] == "adapted")
        assert row["lost"] == pytest.approx(0.0 if right else abs(row["gain"]))
    assert capsys.readouterr().out.startswith(verdict.tables(rows))


@pytest.mark.parametrize(("ships", "lost"), [("adapted", [0.1, 0.0]), ("source_only", [0.0, 0.2])])
def test_lost_is_what_the_other_model_has_more(tmp_path, dataset, monkeypatch, ships, lost):
    measured(tmp_path, dataset, {"source-only": 0.5, "continued": 0.4, "adapted": 0.7})
    said = {"ship": ships, "gain": 0.0, "interval": [0.0, 0.0], "verdict": ships}
    cases = [{"case": "target_test-0", "estimated_dice": 0.5, "consistency": 1, "confidence": 1}]
    cases[0]["within_calibration"] = True
    monkeypatch.setattr(verdict, "assess", lambda _, names, *__: {"models": {name: {"cases": cases} for name in names}})
    monkeypatch.setattr(verdict, "verdict_of", lambda *_, **__: said)
    rows = verdict.compare(tmp_path / "seed3", str(tmp_path / "bundle"), False, ["continued", "adapted"])
    assert [row["lost"] for row in rows[1:]] == pytest.approx(lost)


def scan(dice: float, estimate: float | None, inside: bool = True) -> dict:
    figures = {"estimated_dice": estimate, "consistency": dice, "confidence": 1 - dice, "within_calibration": inside}
    return {"case": "a", "dice": dice, **figures}


def test_tables_tell_right_from_wrong_and_single_scans_within_and_without():
    source = {"seed": "seed1", "model": "source-only", "dice": 0.5, "scans": [scan(0.4, 0.5), scan(0.6, 0.7)]}
    judged = {"gain": 0.2, "estimated_gain": -0.05, "interval": [-0.1, 0.0], "verdict": "no gain", "lost": 0.2}
    adapted = {**source, "model": "adapted", "dice": 0.7, **judged, "scans": [scan(0.7, 0.4, False)]}
    unknown = {**source, "model": "federated", **judged, "estimated_gain": None, "interval": None}
    unknown["scans"] = [scan(0.5, None)]
    single = {**source, "model": "test-time", **judged, "interval": None, "scans": []}
    lines = verdict.tables([source, adapted, unknown]).splitlines()
    assert "| 1 | test-time | 0.500 | +0.200 | -0.050 | no gain | 0.200 |" in verdict.tables([source, adapted, single])
    assert lines[2] == "| 1 | source-only | 0.500 |  |  |  |  |"
    assert lines[3] == "| 1 | adapted | 0.700 | +0.200 | -0.050 (-0.100 to +0.000) | no gain | 0.200 |"
    assert lines[4] == "| 1 | federated | 0.500 | +0.200 | none | no gain | 0.200 |"
    assert lines[8:10] == [
        "| within the calibration | 2 | +0.100 | 0.100 |",
        "| outside | 1 | -0.300 | 0.300 |",
    ]
    assert lines[-1] == "Correlation with Dice over 3 segmentations: consistency 1.00, confidence -1.00."
