# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""All stages of an adaptation become longer or shorter by one factor, and each keeps what it needs to end well."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mapseg_components.commands.stages import processor_time
from mapseg_components.plans.length import epochs_of_length, of_length, planned_length


@pytest.mark.parametrize("length", [0.001, 0.3, 0.99, 1.01, 2.7])
def test_every_stage_has_an_epoch_that_is_validated_and_a_longer_run_is_never_shorter(length):
    for epochs in (1, 2, 3, 16, 36):
        for interval in (1, 5, 40):
            found = of_length({"max_epochs": epochs, "val_interval": interval}, length)
            assert found["val_interval"] <= found["max_epochs"] and found["val_interval"] <= interval
            assert found["max_epochs"] >= min(epochs, 2)
            assert found["max_epochs"] <= epochs_of_length(epochs, length * 1.5)


def test_a_factor_of_one_and_a_stage_without_epochs_are_left_as_they_are():
    assert of_length({"max_epochs": 16, "val_interval": 16}, 1.0) == {}
    assert of_length({"max_epochs": 16}, 1.0) == of_length({"max_epochs": 16, "val_interval": "@other"}, 1.0) == {}
    assert of_length({"rounds": 3}, 0.5) == of_length({"max_epochs": "@other"}, 0.5) == {}
    assert of_length({"max_epochs": 16}, 0.5) == {"max_epochs": 8}


def test_a_stage_that_a_recipe_has_shortened_is_validated_by_its_last_epoch():
    assert of_length({"max_epochs": 8, "val_interval": 10}, 1.0) == {"max_epochs": 8, "val_interval": 8}


def test_what_was_planned_is_kept_beside_what_is_run():
    settings = {"max_epochs": 18, "val_interval": 5, "learning_rate": 0.001}
    assert planned_length(settings) == {"max_epochs": 18, "val_interval": 5}
    assert planned_length({}) == {"max_epochs": None, "val_interval": None}


def test_seconds_of_a_stage_are_those_of_its_processes_and_add_up():
    record: dict = {}
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    for _ in range(2):
        with processor_time(record, "source", lambda: None):
            subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert 0.5 <= record["processor_seconds"]["source"] < 2
    with pytest.raises(ValueError), processor_time(record, "adaptation", lambda: None):
        raise ValueError
    assert list(record["processor_seconds"]) == ["source"]


def test_a_stage_that_is_stopped_keeps_the_seconds_that_it_took():
    record, saved = {"seconds": {"source": 5.0}}, []
    with pytest.raises(SystemExit), processor_time(record, "source", lambda: saved.append(dict(record["seconds"]))):
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"], check=True)
        raise SystemExit(143)
    assert 5.2 <= saved[0]["source"] < 7 and "source" in record["processor_seconds"]
