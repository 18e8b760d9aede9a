# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/measure.py: every setting gets the same steps, and no more than what it may see."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from monai.bundle import ConfigParser

from tests.conftest import SAMPLE
from tools import measure


@pytest.fixture
def stages(monkeypatch):
    """Stages that would be run: title to (files, settings)."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}

    def keep(title: str, _, files: list[str], output, **settings: Any) -> None:
        output.mkdir(parents=True)
        found[title] = (files, settings)

    monkeypatch.setattr(measure, "run_bundle", keep)
    return found


def experiment(tmp_path, **changes: Any) -> measure.Experiment:
    given = {"datalist": SAMPLE, "oracle": None, "sites": 3, "set": [], "amp": None, "tiny": False, "more": []}
    arguments = argparse.Namespace(**given | {"experiment": "fetal_age", "epochs": 12} | changes)
    return measure.Experiment(arguments, 5, tmp_path)


def images(path) -> dict[str, list[str]]:
    sections = {name: cases for name, cases in json.loads(path.read_text()).items() if isinstance(cases, list)}
    return {name: [each["image"] for each in cases] for name, cases in sections.items()}


def test_test_time_sees_the_package_and_the_target_alone(tmp_path, stages):
    experiment(tmp_path).make("test-time")
    files, settings = stages["test-time"]
    assert list(images(settings["datalist"])) == ["target_training"] and files[-2:] == [
        "handover.yaml",
        "test_time.yaml",
    ]
    assert settings["handover_dir"] == stages["package"][1]["handover_dir"] and "initial_weights" not in settings
    assert "label" not in settings["datalist"].read_text()


@pytest.mark.parametrize(("sites", "epochs", "length"), [(1, 12, 50), (3, 7, 50), (4, 12, 30)])
def test_federation_takes_the_steps_of_the_others_and_shares_the_target(tmp_path, stages, sites, epochs, length):
    experiment(tmp_path, sites=sites, epochs=epochs, set=[f"epoch_length={length}"]).make("federated")
    _, settings = stages["federated"]
    rounds, steps = settings["rounds"], epochs * length
    for asked, parties in ((settings["server_steps"], 1), (settings["client_steps"], sites)):
        assert steps <= rounds * asked * parties < steps + rounds * parties  # rounded up to whole steps of a round
    server = images(settings["datalist"])
    shared = [scan for path in settings["sites"].values() for scan in images(tmp_path / path)["target_training"]]
    everything = images(SAMPLE / "datalist.json")["target_training"]
    assert sorted(shared) == sorted(str(SAMPLE / scan) for scan in everything)
    assert list(server) == ["source_training", "source_validation"]


def test_changes_reach_the_models_that_go_on_and_amp_every_stage(tmp_path, stages):
    made = experiment(tmp_path, set=["learning_rate=0.1", "ema_schedule=[[None, 0.5]]"], amp="None")
    made.start()
    for name in measure.MODELS:
        made.make(name)
    assert "oracle" not in stages  # it has no scans
    made.evaluate("adapted", tmp_path / "model.pt")
    assert stages.pop("evaluation of adapted")[1]["amp"] == "$None"
    for name, (_, settings) in stages.items():
        assert settings["amp"] == "$None" and settings["seed"] == 5, name
        assert ("learning_rate" in settings) is (name not in ("pretraining", "source", "package")), name
    assert stages["federated"][1]["ema_schedule"] == "[[None, 0.5]]"


def test_settings_of_every_stage_exist(tmp_path, stages):
    made = experiment(tmp_path, set=["learning_rate=0.1"], oracle=SAMPLE)
    made.start()
    for name in measure.MODELS:
        made.make(name)
    assert set(stages) == {"pretraining", "source", "package", *measure.MODELS}
    for name, (files, settings) in stages.items():
        bundle = measure.PRETRAINING if name == "pretraining" else measure.ADAPTATION
        known = ConfigParser.load_config_files([str(bundle / "configs" / file) for file in files])
        assert set(settings) <= set(known), name


def test_two_commands_share_the_work(tmp_path):
    for seed, name in ((0, "source-only"), (1, "source-only"), (0, "adapted"), (1, "adapted"), (0, "federated")):
        folder = tmp_path / f"seed{seed}" / "evaluation" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"mean": seed}))
    assert measure.evaluated(tmp_path, [0, 1]) == {
        name: {0: {"mean": 0}, 1: {"mean": 1}} for name in ("source-only", "adapted")
    }


def test_table_has_every_seed_and_their_mean():
    runs = {seed: {"mean": 0.5 + seed / 10, "structures": {"a": 0.4 + seed / 10}} for seed in (0, 2)}
    lines = measure.table({"adapted": runs}, [0, 2]).splitlines()
    assert (
        lines[0] == "| model | seed 0 | seed 2 | mean | a |"
        and lines[2] == "| adapted | 0.500 | 0.700 | 0.600 | 0.500 |"
    )
