# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""All stages of an adaptation become longer or shorter by one factor, and each keeps what it needs to end well."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mapseg_components.commands.stages import timed
from mapseg_components.plans.length import epochs_of_length, of_length, settings_of_stage
from mapseg_components.plans.recipes import Stage


@pytest.mark.parametrize("length", [0.001, 0.3, 0.99, 1.01, 2.7])
def test_every_stage_has_an_epoch_that_is_validated_and_a_longer_run_is_never_shorter(length):
    for epochs in (1, 2, 3, 16, 36):
        for interval in (1, 5, 40):
            found = of_length({"max_epochs": epochs, "val_interval": interval}, length)
            assert found["val_interval"] <= found["max_epochs"] and found["val_interval"] <= interval
            assert found["max_epochs"] >= min(epochs, 2)
            assert found["max_epochs"] <= epochs_of_length(epochs, length * 1.5)


def test_a_factor_of_one_and_a_stage_without_epochs_are_left_as_they_are():
    assert of_length({"max_epochs": 16, "val_interval": 20}, 1.0) == {}
    assert of_length({"rounds": 3}, 0.5) == of_length({"max_epochs": "@other"}, 0.5) == {}
    assert of_length({"max_epochs": 16}, 0.5) == {"max_epochs": 8}


def test_the_factor_counts_on_top_of_the_recipe_and_of_what_was_asked():
    stage = Stage("contrasts", scale={"max_epochs": 0.5, "learning_rate": 0.5}, settings={"diagnostics_scans": 2})
    config = {"max_epochs": 36, "val_interval": 5, "learning_rate": 0.002, "diagnostics_scans": 0}
    planned, own = settings_of_stage(stage, config, {}, 0.5)
    assert planned == {"max_epochs": 18, "val_interval": 5}
    assert own == {"max_epochs": 9, "learning_rate": 0.001, "diagnostics_scans": 2, "val_interval": 5}
    planned, own = settings_of_stage(stage, {**config, "max_epochs": 10}, {"max_epochs": 10}, 0.5)
    assert planned["max_epochs"] == 10 and own["max_epochs"] == 5
    assert "max_epochs" not in settings_of_stage(stage, {**config, "max_epochs": 10}, {"max_epochs": 10}, 1.0)[1]


def test_seconds_of_a_stage_are_those_of_its_processes_and_add_up():
    record: dict = {}
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    for _ in range(2):
        with timed(record, "source"):
            subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert 0.5 <= record["processor_seconds"]["source"] < 2
    with pytest.raises(ValueError), timed(record, "adaptation"):
        raise ValueError
    assert list(record["seconds"]) == ["source"]
