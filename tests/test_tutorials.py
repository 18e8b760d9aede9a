# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the tutorials run, as they stand in the pages, on the shipped sample at tiny size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from tests.conftest import ROOT, SAMPLE
from tests.scans import halve_sample
from tests.warm import python

PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
TARGET = ("GA22_notoperated", "GA23_notoperated", "GA25_notoperated", "GA26_operated")


def script(page: Path) -> str:
    """A page's shell blocks one after the other; Python blocks that follow each other are one program."""
    lines, program = ["set -euo pipefail"], ""
    for block in [*BLOCK.finditer(page.read_text()), None]:
        language = block["language"] if block else ""
        if program and language != "python":
            lines.append(f"python - <<'END_OF_PROGRAM'\n{program}END_OF_PROGRAM")
            program = ""
        if language == "python":
            program += block["code"]
        elif language == "bash":
            lines.append(block["code"])
        else:
            assert language in ("", "text"), f"{page.name}: a block of {language} that no test runs"
            assert block is None or language == "text", f"{page.name}: a block without a language"
    return "\n".join(lines)


def follow(name: str, out: Path, **settings: str) -> str:
    """Run a page in a fresh shell; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PRESET": "configs/tiny.yaml"}
    environment |= {"OUT": str(out), "CUDA_VISIBLE_DEVICES": "", **settings}
    folders = [str(Path(program).parent) for program in (python(), sys.executable)]
    environment["PATH"] = os.pathsep.join([*folders, environment["PATH"]])
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    line = ["bash", "-c", script(PAGES / name)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def test_every_tutorial_has_a_test():
    source = Path(__file__).read_text()
    assert [page.name for page in PAGES.glob("*.md") if f'follow("{page.name}"' not in source] == []


def test_segment(tmp_path):
    (tmp_path / "scans").mkdir()
    scan = shutil.copy(SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz", tmp_path / "scans")
    printed = follow("segment.md", tmp_path / "out", SCANS=str(tmp_path / "scans"))
    label_map = nib.load(tmp_path / "out" / "segment" / "GA24_notoperated_seg.nii.gz")
    assert label_map.shape == nib.load(scan).shape
    assert "case,structure,voxels,volume_mm3" in printed and "GA24_notoperated,white matter," in printed
    assert json.loads((tmp_path / "out" / "evaluate" / "metrics.json").read_text())["mean"] > 0.45


@pytest.mark.slow
def test_adapt_and_then_the_settings(tmp_path):
    data = str(halve_sample(tmp_path / "data"))
    printed = follow("adapt.md", tmp_path, EPOCHS="2", DATA=data)
    assert {f"{case}_seg.nii.gz" for case in TARGET} | {"volumes.csv"} <= set(printed.splitlines())
    assert (tmp_path / "pretraining" / "model.pt").is_file()
    assert (tmp_path / "source_only" / "source_only.pt").is_file()
    assert "model.pt" in json.loads((tmp_path / "adapted" / "model_selection.json").read_text())

    printed = follow("three_settings.md", tmp_path, EPOCHS="1", DATA=data)
    assert {"handover.json", "weights.pt"} <= set(printed.splitlines())
    assert json.loads((tmp_path / "target.json").read_text()).keys() == {"target_training"}
    (line,) = [json.loads(line) for line in printed.splitlines() if line.startswith('{"round"')]
    assert sorted(line["sites"]) == ["one", "three", "two"]
    scores = dict(line.split() for line in printed.splitlines() if re.fullmatch(r"\w+ 0\.\d+", line))
    assert sorted(scores) == ["adapted", "federated", "source_only", "test_time"]


def test_pipeline(tmp_path):
    printed = follow("pipeline.md", tmp_path)
    assert "'image': (2, 1, 32, 24, 16)" in printed and "'box': (2, 3, 2)" in printed
    assert "GlobalLocalDeepLabV3" in printed and "UNet" in printed


def test_restart(tmp_path):
    printed = follow("restart.md", tmp_path)
    assert "ended with exit code 143" in printed
    history = (tmp_path / "restart" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2, 3, 4]
    assert {"last.pt", "previous.pt", "model.pt"} <= set(printed.splitlines())
