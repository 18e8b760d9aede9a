# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One stage of an experiment: a bundle's command, run as a user types it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING, ADAPTATION = ROOT / "bundles" / "mapseg_pretraining", ROOT / "bundles" / "mapseg_adaptation"


def run_bundle(title: str, bundle: Path, configs: list[str], output: Path, **settings: object) -> float:
    """One command of a bundle, run from its folder; its output goes to a log. Returns seconds."""
    output.mkdir(parents=True, exist_ok=True)
    files = [f"configs/{name}" for name in configs]
    settings = {"ckpt_dir": output, "output_dir": output, **settings}
    command = [sys.executable, "-m", "monai.bundle", "run", "run", "--config_file", str(files)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    started, log = time.monotonic(), output / "log.txt"
    print(f"{title} ...", end="", flush=True)
    with log.open("w") as stream:
        code = subprocess.run(command, cwd=bundle, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    seconds = time.monotonic() - started
    if code:
        print(" failed\n" + "\n".join(log.read_text().splitlines()[-15:]))
        sys.exit(f"{title} ended with exit code {code}; the whole log is in {log}")
    print(f" {seconds:.0f} s", flush=True)
    return seconds
