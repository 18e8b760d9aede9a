# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What every test of a fault asserts: type, exit code, file and remedy in the message, and what is on disk."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mapseg_components.errors import DataError, MAPSegError
from mapseg_components.networks import GlobalLocalDeepLabV3
from tests.conftest import ROOT
from tests.warm import python

ADAPTATION = ROOT / "bundles" / "mapseg_adaptation"
LABELS = {"first": 1, "second": 2}
CODES = {"ConfigError": 2, "DataError": 3, "ResourceError": 6}
# network and windows of the small weights below, as settings of inference.json
SMALL = {
    "labels": LABELS,
    "patch_size": [16, 16, 16],
    "width": 8,
    "depth": 1,
    "dilations": [1, 2],
    "head_channels": 8,
    "window_stride": [12, 12, 12],
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with size and time of change, but for the empty lock file; links are not followed."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in set(names) - {".run.lock"}:
            status = os.lstat(Path(place) / name)
            found[str((Path(place) / name).relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def refused(folder: Path, *words: str, kind: type[MAPSegError] = DataError, lines: int = 1, written: tuple = ()):
    """The block raises exactly this kind of error, with these words, and writes nothing below the folder but named."""
    before = tree(folder)
    with pytest.raises(MAPSegError) as caught:
        yield caught
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert caught.value.exit_code == CODES[kind.__name__]
    assert len(message.splitlines()) == lines, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    after = tree(folder)
    assert {name: stamp for name, stamp in after.items() if name in before} == before
    assert set(after) - set(before) == set(written)


def save_small_weights(path: Path) -> Path:
    """Random weights of the network of `SMALL`."""
    torch.manual_seed(0)
    network = GlobalLocalDeepLabV3(
        in_channels=1, num_classes=3, width=8, depth=1, stride=4, dilations=(1, 2), head_channels=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def bundle_run(files: list[str], **settings) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run`` from the bundle's folder."""
    names = str([f"configs/{name}" for name in files])
    line = [python(), "-m", "monai.bundle", "run", "run", "--config_file", names, "--device", "cpu"]
    line[-1] = "$torch.device('cpu')"
    for key, value in settings.items():
        line += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(line, cwd=ADAPTATION, capture_output=True, text=True, encoding="utf-8", env=environment)
