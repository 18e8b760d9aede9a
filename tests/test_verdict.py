# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/verdict.py: estimates of `assess` beside the Dice that an evaluation found."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.errors import ConfigError
from tests.conftest import write_nifti
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
    monkeypatch.setattr(verdict, "verdict_of", lambda *_: said)
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
    lines = verdict.tables([source, adapted, unknown]).splitlines()
    assert lines[2] == "| 1 | source-only | 0.500 |  |  |  |  |"
    assert lines[3] == "| 1 | adapted | 0.700 | +0.200 | -0.050 (-0.100 to +0.000) | no gain | 0.200 |"
    assert lines[4] == "| 1 | federated | 0.500 | +0.200 | none | no gain | 0.200 |"
    assert lines[8:10] == [
        "| within the calibration | 2 | +0.100 | 0.100 |",
        "| outside | 1 | -0.300 | 0.300 |",
    ]
    assert lines[-1] == "Correlation with Dice over 3 segmentations: consistency 1.00, confidence -1.00."


def finished_run(folder, shift: int, ship: str, held_out: bool = True):
    """A run with two target scans, whose adapted label maps are the truth, moved."""
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[2:6, 2:6, 2:6] = 1
    truth[6:8, 6:9, 6:9] = 2
    run = folder / "run"
    cases = []
    for name in ("a", "b"):
        write_nifti(folder / "truth" / f"{name}.nii.gz", truth * 5)
        for model, moved in (("source_only", 1), ("adapted", shift)):
            write_nifti(run / "predictions" / model / f"{name}_seg.nii.gz", np.roll(truth, moved, axis=0))
        cases.append({"image": str(folder / "scans" / f"{name}.nii.gz"), "case_id": f"site_{name}"})
    (run / "configs").mkdir()
    (run / "configs" / "inference.json").write_text(json.dumps({"labels": {"first": 5, "second": 10}}))
    (run / "datalist.json").write_text(json.dumps({"target_training": cases[:1], "target_heldout": cases[1:]}))
    figures = {"estimated_dice": 0.7, "interval": [0.6, 0.8]}
    models = {name: {"cases": [{"case": "site_b", **figures}]} for name in ("source_only", "adapted")}
    said = {"models": models, "held_out": held_out, "coverage": 0.8, "verdict": {"ship": ship, "gain": 0.0}}
    (run / "run.json").write_text(json.dumps({"assessment": said}))
    return run, folder / "truth"


def test_runs_are_held_against_the_truth_of_the_scans_that_were_judged(tmp_path, monkeypatch, capsys):
    good, truth = finished_run(tmp_path / "good", 0, "adapted")
    bad, _ = finished_run(tmp_path / "bad", 3, "adapted")
    rows = [verdict.judged(run, truth) for run in (good, bad)]
    source = (0.75 + 0.5) / 2  # of 4 and of 2 voxels along the axis, one is outside
    assert [row["dice"]["source_only"] for row in rows] == pytest.approx([source, source])
    assert rows[0]["dice"]["adapted"] == 1 and rows[0]["lost"] == 0
    assert rows[1]["lost"] == pytest.approx(source - rows[1]["dice"]["adapted"]) and rows[1]["lost"] > 0
    monkeypatch.setattr(sys, "argv", ["verdict.py", "--runs", str(good), str(bad), "--truth", str(truth)])
    verdict.main()
    printed = capsys.readouterr().out
    errors = [abs(0.7 - row["dice"][name]) for row in rows for name in row["dice"]]
    assert "The better model was shipped in 1 of 2 runs (50%)." in printed
    assert f"Mean absolute error of the estimated Dice: {np.mean(errors):.3f} (4 segmentations)." in printed
    assert "Intervals hold the Dice in 2 of 4 (50%; nominal 80%)." in printed


def test_a_run_or_a_truth_that_does_not_do_is_named(tmp_path, monkeypatch):
    run, truth = finished_run(tmp_path, 0, "adapted")
    with pytest.raises(ConfigError, match="expected 1 or one for each of 3 runs"):
        verdict.compare_runs([run] * 3, [truth] * 2)
    with pytest.raises(ConfigError, match="has no finished run of mapseg adapt"):
        verdict.judged(truth, truth)
    (truth / "b.nii.gz").unlink()
    with pytest.raises(ConfigError, match=r"has no label map of \['site_b'\], which the verdict of"):
        verdict.judged(run, truth)
    monkeypatch.setattr(sys, "argv", ["verdict.py", "--runs", str(run)])
    with pytest.raises(SystemExit):
        verdict.main()
