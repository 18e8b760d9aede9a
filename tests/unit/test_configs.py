# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
from monai.bundle import ConfigParser

from mapseg_components.configs import (
    check_settings,
    known_keys,
    plain_error_hook,
    require_same_settings,
    running_workflow,
)
from mapseg_components.errors import ConfigError, DataError
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"patch_size": 96, "learning_rate": 1}))
    (tmp_path / "evaluate.json").write_text(json.dumps({"section": "target_test"}))
    (tmp_path / "mine.json").write_text(json.dumps({"ptach_size": 1}))
    return tmp_path


def test_settings_of_all_standalone_configs_are_known(folder):
    assert {"patch_size", "learning_rate", "section"} <= known_keys(folder)[""]
    check_settings({"patch_size": 1, "section": 2, "_mine": 3, "_meta_": {}}, folder)


def test_an_overlay_does_not_make_its_own_typo_known(folder):
    with pytest.raises(ConfigError, match=r"'ptach_size' \(did you mean 'patch_size'\?\)"):
        check_settings({"ptach_size": 1}, folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train": {"handlers": [], "handlres": []}}, r"'train#handlres' \(did you mean 'handlers'\?\)"),
        (
            {"train": {"handlers": [{"_target_": "StatsHandler", "nmae": "x"}]}},
            r"'train#handlers#0#nmae' \(did you mean 'name'\?\)",
        ),
        ({"patch_size": {"_target_": "torch.nn.Linear", "in_feature": 3}}, r"'patch_size#in_feature' \(did you mean"),
    ],
)
def test_nested_typos_are_named(folder, settings, message):
    (folder / "train.json").write_text(json.dumps({"patch_size": 96, "train": {"handlers": []}}))
    with pytest.raises(ConfigError, match=message):
        check_settings(settings, folder)


@pytest.mark.parametrize("name", ["seed", "learning_rate", "mask_ratio", "labels", "batch_size", "amp"])
def test_what_makes_another_training_may_not_change(name):
    same = {"seed": 0, "learning_rate": 0.1, "mask_ratio": 0.7, "labels": {"a": 1}, "batch_size": 1}
    same |= {"amp": None, "max_epochs": 3}
    changed = {**same, name: "another", "max_epochs": 9}
    with pytest.raises(ConfigError, match=rf"last\.pt was written with other settings \({name}"):
        require_same_settings(same, changed, "last.pt")
    require_same_settings(same, {**same, "max_epochs": 9}, "last.pt")


def test_resuming_with_other_settings_is_refused():
    saved = {"learning_rate": 0.1, "max_epochs": 2, "train": {"a": 1}}
    require_same_settings(saved, {**saved, "max_epochs": 5, "num_workers": 3, "compile": True, "_mine": 1}, "last.pt")
    with pytest.raises(ConfigError, match=r"last\.pt .*learning_rate was 0\.1, now 0\.2\).*resume to false"):
        require_same_settings(saved, {**saved, "learning_rate": 0.2}, "last.pt")
    with pytest.raises(ConfigError, match=r"patch_size was null, now 3; train#a was 1, now 2"):
        require_same_settings(saved, {**saved, "patch_size": 3, "train": {"a": 2}}, "last.pt")
    require_same_settings({}, saved, "last.pt")  # written outside of a bundle run


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"a": 1, "trainer": {"max_epochs": 3}, "handlers": [{"_target_": "StatsHandler"}]}},
        {"train": {"a": 1}, "network": {"_target_": "torch.nn.parallel.DistributedDataParallel"}},
        {"train": {"a": 1}, "validate": {"dataloader": {"num_workers": 2}}, "batched_passes": False},
    ],
)
def test_what_does_not_change_training_may_change(change):
    require_same_settings({"train": {"a": 1}}, change, "last.pt")


def test_a_setting_of_the_other_stage_is_refused():
    configs = ROOT / "bundles" / "mapseg_adaptation" / "configs"
    training, inference = (ConfigParser.load_config_file(configs / f"{n}.json") for n in ("train", "inference"))
    check_settings({**training, "finalize": [], "negative_values": "clip"}, configs)  # overlays serve both stages
    check_settings({**inference, "learning_rate": 1}, configs)
    with pytest.raises(ConfigError, match=r"'weights' \(did you mean '(?:initial|class)_weights'\?\)"):
        check_settings({**training, "weights": "a.pt"}, configs)
    with pytest.raises(ConfigError, match="unknown setting 'initial_weights'"):
        check_settings({**inference, "initial_weights": "a.pt"}, configs)


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
