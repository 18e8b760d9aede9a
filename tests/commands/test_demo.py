# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg demo`: a result without scans of the user, whose files stay. The shipped bundle by its name."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import sys

import numpy as np
import pytest

from mapseg_components import shipped_files as shipped
from mapseg_components.commands import demo as demo_command
from mapseg_components.commands import evaluate, predict
from mapseg_components.commands.demo import GENTLE, STAGES
from mapseg_components.commands.main import main
from mapseg_components.errors import CheckpointError, ConfigError
from tests.conftest import ROOT, SAMPLE

MODULE = sys.modules["mapseg_components.commands.demo"]  # the name itself is the function
ADAPTATION = ROOT / "bundles" / "mapseg_adaptation"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, demo_command(str(folder), sample="fetal_age", num_threads=1, quiet=True)


def test_it_segments_both_held_out_scans_and_says_how_well(finished):
    folder, report = finished
    maps = sorted(path.name for path in (folder / "predictions").glob("*_seg.nii.gz"))
    assert maps == ["GA24_notoperated_seg.nii.gz", "GA25_operated_seg.nii.gz"]
    figures = json.loads((folder / "scores" / "evaluation.json").read_text())["structures"]
    assert report.figures["structures"] == figures and len(figures) == 9
    rows = list(csv.DictReader((folder / "scores" / "evaluation.csv").open()))
    dice = [float(row["dice"]) for row in rows]
    assert len(rows) == 16 and np.mean(dice) == pytest.approx(figures["mean of structures"]["dice"]["mean"])
    assert np.mean(dice) > 0.4, "the shipped weights are trained on this sample's kind"
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert shipped.SEGMENTS in str(report) and str(folder / "comparison.png") in str(report)


def test_an_earlier_demo_is_replaced_when_asked_to_and_nothing_else_ever_is(finished, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    with pytest.raises(ConfigError, match="holds an earlier demo: set overwrite to remove it"):
        demo_command(str(folder), sample="fetal_age")
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics.json").write_text("of an earlier demo")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds \['notes.txt'\], which no demo wrote: choose a new folder"):
            demo_command(str(folder), sample="fetal_age", overwrite=overwrite)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "predictions").is_dir()
    (folder / "notes.txt").unlink()
    demo_command(str(folder), sample="fetal_age", overwrite=True, quiet=True)
    assert (folder / "predictions" / "manifest.json").is_file() and not (folder / "metrics.json").exists()
    assert main(["demo", str(folder / "comparison.png")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err


def test_a_missing_requirement_or_device_is_named_before_any_work(tmp_path, monkeypatch):
    def raising():
        raise ConfigError("scipy is missing")

    with pytest.raises(ConfigError, match="device is 'tpu'"):
        demo_command(str(tmp_path / "out"), device="tpu")
    monkeypatch.setattr(MODULE, "require_scipy", raising)
    with pytest.raises(ConfigError, match="scipy is missing"):
        demo_command(str(tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr(shipped, "PLACES", (tmp_path,))
    with pytest.raises(ConfigError, match="install mapseg-monai again"):
        demo_command(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_training_goes_the_whole_way_in_order_and_each_stage_starts_from_the_one_before(tmp_path, monkeypatch, capsys):
    calls = []

    def stage(title, bundle, configs, output, settings):
        """What a stage leaves behind, without its hours."""
        assert all((bundle / name).is_file() for name in configs)
        calls.append((output.name, bundle.name, settings))
        output.mkdir(parents=True)
        if output.name == "adaptation":
            (output / "model_selection.json").write_text(
                json.dumps({"model.pt": {"weights": "teacher", "epoch": 7, "score": 0.5}})
            )
        if output.parent.name == "predictions":
            for path in (SAMPLE / "test" / "labels").iterdir():
                shutil.copy(path, output / path.name.replace(".nii.gz", "_seg.nii.gz"))
            mean = 0.5 if output.name == "source-only" else 0.75
            metrics = {"structures": {"ventricles": mean, "cerebellum": mean}, "mean": mean}
            (output / "metrics.json").write_text(json.dumps(metrics))
        return 1.0

    monkeypatch.setattr(MODULE, "run_stage", stage)
    folder = tmp_path / "out"
    report = demo_command(str(folder), sample="fetal_age", train=True, seed=3, device="cpu")
    assert [name for name, _, _ in calls] == [*STAGES, "source-only", "adapted"]
    assert [bundle for _, bundle, _ in calls] == ["mapseg_pretraining", *["mapseg_adaptation"] * 4]
    by_name = {name: settings for name, _, settings in calls}
    assert all(by_name[name]["seed"] == 3 for name in STAGES)
    assert all(settings["dataset_dir"] == SAMPLE for settings in by_name.values())
    assert {settings["device"] for settings in by_name.values()} == {"$torch.device('cpu')"}
    assert by_name["source_only"]["encoder_weights"] == folder / "pretraining" / "model.pt"
    assert by_name["adaptation"]["initial_weights"] == folder / "source_only" / "source_only.pt"
    assert by_name["adaptation"].items() >= GENTLE.items()
    assert by_name["source-only"]["weights"] == folder / "source_only" / "source_only.pt"
    assert by_name["adapted"]["weights"] == folder / "adaptation" / "model.pt"
    assert "Adaptation helped: +0.250 mean Dice (seed 3)" in str(report)
    assert "the teacher of epoch 7" in str(report) and "ventricles" in str(report)
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["adapted"]["mean"] == 0.75 and sorted(saved["seconds"]) == sorted(STAGES)
    printed = capsys.readouterr()
    assert printed.out == "" and [line.split()[0] for line in printed.err.splitlines()] == [
        f"{k}/5" for k in range(1, 6)
    ]


def test_a_stage_that_fails_names_its_log_and_its_kind_of_error(tmp_path, monkeypatch, capsys):
    def stage(title, bundle, configs, output, settings):
        raise CheckpointError("weights are damaged")

    monkeypatch.setattr(MODULE, "run_stage", stage)
    assert main(["demo", str(tmp_path / "out"), "--sample", "fetal_age", "--train"]) == 4
    said = capsys.readouterr().err
    assert str(tmp_path / "out" / "pretraining" / "log.txt") in said and "weights are damaged" in said


def test_the_shipped_bundle_is_taken_by_name_and_never_unasked(finished, tmp_path, capsys, caplog, monkeypatch):
    scan = SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"
    assert main(["predict", str(scan), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--bundle is missing" in said and "shipped" in said and shipped.SEGMENTS in said
    assert not (tmp_path / "out").exists()

    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        done = predict(str(scan), "out", bundle="shipped", quiet=False, num_threads=1)
    assert done.exit_code == 0 and any(shipped.SEGMENTS in record.getMessage() for record in caplog.records)
    name = "GA24_notoperated_seg.nii.gz"
    assert (tmp_path / "out" / name).read_bytes() == (finished[0] / "predictions" / name).read_bytes()
    truth = str(SAMPLE / "test" / "labels" / "GA24_notoperated.nii.gz")
    bundles = ("shipped", "mapseg_adaptation", ADAPTATION)
    by_word, by_name, by_folder = (evaluate(f"out/{name}", truth, labels=str(b)).rows for b in bundles)
    assert by_word == by_name == by_folder and by_word[0]["structure"] == "white matter"
    with pytest.raises(ConfigError, match=r"no config at shipped/configs/inference\.json"):
        predict(str(scan), "other", bundle="./shipped")
    with pytest.raises(ConfigError, match=r"one of \[.*'buda_seg'.*\], overlays"):
        predict(str(scan), "other", bundle="buda")
