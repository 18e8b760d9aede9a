# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from mapseg_components.configs import check_settings, known_settings, plain_error_hook, running_workflow
from mapseg_components.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"patch_size": 96, "learning_rate": 1}))
    (tmp_path / "evaluate.json").write_text(json.dumps({"section": "target_test"}))
    (tmp_path / "mine.json").write_text(json.dumps({"ptach_size": 1}))
    return tmp_path


def test_settings_of_all_standalone_configs_are_known(folder):
    assert {"patch_size", "learning_rate", "section"} <= known_settings(folder)
    check_settings({"patch_size": 1, "section": 2, "_mine": 3, "_meta_": {}}, folder)


def test_an_overlay_does_not_make_its_own_typo_known(folder):
    with pytest.raises(ConfigError, match=r"'ptach_size' \(did you mean 'patch_size'\?\)"):
        check_settings({"ptach_size": 1}, folder)


def test_what_tracking_adds_is_known(folder):
    check_settings({"tracking_uri": "x", "experiment_name": "x", "save_execute_config": None}, folder)


def test_a_folder_without_configs_is_not_judged(tmp_path):
    check_settings({"anything": 1}, tmp_path)


def test_no_workflow_runs_here():
    assert running_workflow() is None


def test_user_error_ends_the_output(capsys):
    try:
        try:
            raise DataError("scan.nii.gz: no contrast: leave it out")
        except DataError as inner:
            raise RuntimeError("Failed to evaluate ConfigExpression") from inner
    except RuntimeError as outer:
        plain_error_hook(type(outer), outer, outer.__traceback__)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == "DataError: scan.nii.gz: no contrast: leave it out"
    assert lines[0].startswith("Traceback")
