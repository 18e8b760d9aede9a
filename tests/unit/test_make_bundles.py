# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/make_bundles.py: made bundles are what their list and the adaptation bundle say, and lack nothing."""

from __future__ import annotations

import json

import pytest
from monai.bundle import ConfigParser

from mapseg_components.configs import check_settings
from tests.conftest import ROOT
from tools import make_bundles
from tools.make_bundles import files_of, made_bundles, needed, references

BUNDLES = ROOT / "bundles"


def test_made_bundles_are_up_to_date(capsys):
    assert make_bundles.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", made_bundles())
def test_a_made_bundle_refers_to_nothing_that_was_left_out(name):
    configs = {path.name: ConfigParser.load_config_file(path) for path in (BUNDLES / name / "configs").glob("*.[jy]*")}
    base = set(ConfigParser.load_config_file(BUNDLES / "mapseg_adaptation" / "configs" / "train.json"))
    for file, config in configs.items():
        if file not in ("metadata.json", "evaluate.json"):
            known = set(configs["inference.json" if file == "inference.json" else "train.json"]) | set(config)
            assert (references(config) & base) <= known | set(configs["inference.json"]), file
    check_settings({"samples": 1} if "samples" in configs["train.json"] else {}, BUNDLES / name / "configs")


def test_entries_that_nothing_leads_to_are_left_out():
    config = {
        "run": ["$@trainer.run()"],
        "trainer": {"_target_": "T", "steps": "@steps"},
        "steps": 2,
        "other": "@steps",
    }
    assert needed(config, ["run"]) == {"run", "trainer", "steps"}
    assert needed(config, ["run", "other", "nowhere"]) == set(config)


def test_a_change_of_the_adaptation_bundle_reaches_the_made_ones(monkeypatch, tmp_path):
    name, asked = next(iter(made_bundles().items()))
    before = json.loads(files_of(name, asked)["configs/train.json"])
    changed = {**asked, "settings": {**asked["settings"], "learning_rate": 7.0}}
    after = json.loads(files_of(name, changed)["configs/train.json"])
    assert {key for key in after if after[key] != before.get(key)} == {"learning_rate"}
