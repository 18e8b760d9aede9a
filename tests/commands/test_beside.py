# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A run trained by another process: its errors come back, and it ends when this one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mapseg_components.commands.beside import training_beside
from mapseg_components.errors import DataError, ResourceError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This module, for the other process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


PARENT = """
import os, sys
from pathlib import Path
from mapseg_components.commands.beside import training_beside
from tests.commands.test_beside import Endless, beside, seen

folder = Path(sys.argv[1])
with training_beside(*beside(Endless, folder)):
    seen(folder / "begun")
    os._exit(0)  # as if it were killed: nothing is cleaned up
"""


@dataclass
class Run:
    """What is read of a run."""

    folder: Path
    request: dict[str, Any] = field(default_factory=lambda: {"num_threads": 1})


class Failing(Run):
    def train(self):
        raise DataError("scan a is empty: remove it")


class Full(Run):
    def train(self):
        raise OSError(28, "No space left on device")


class Killed(Run):
    def train(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Endless(Run):
    def train(self):
        (self.folder / "begun").touch()
        try:
            time.sleep(600)
        except SystemExit:
            (self.folder / "saved").touch()
            raise


def beside(kind, folder):
    """Arguments of `training_beside` for a run of a kind above."""
    make = f"lambda given: test_beside.{kind.__name__}(Path(given['folder']))"
    modules = "from pathlib import Path; from mapseg_components.commands import beside; from tests.commands import "
    code = f"{modules}test_beside; beside.train_beside({make})"
    return kind(folder), code, {"folder": str(folder)}


def seen(path, seconds=60):
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.02)


def test_errors_are_those_of_the_stage(tmp_path):
    with (
        pytest.raises(DataError, match="scan a is empty: remove it"),
        training_beside(*beside(Failing, tmp_path)) as wait,
    ):
        wait()
    with pytest.raises(ResourceError, match="No space left"), training_beside(*beside(Full, tmp_path)) as wait:
        wait()
    with pytest.raises(ResourceError, match="was killed"), training_beside(*beside(Killed, tmp_path)) as wait:
        wait()


def test_an_error_here_stops_it_with_its_state_saved(tmp_path):
    with pytest.raises(KeyboardInterrupt), training_beside(*beside(Endless, tmp_path)):
        seen(tmp_path / "begun")
        raise KeyboardInterrupt
    assert (tmp_path / "saved").is_file()


def test_it_does_not_outlive_a_process_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    subprocess.run([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], check=True)
    seen(tmp_path / "saved")
