# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How long until something happens: imports, and a bundle's first iteration."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from benchmarks.package import BUNDLES, write_datalist
from benchmarks.timing import summary
from benchmarks.volume import write_brain

__all__ = ["FirstIteration", "startup"]

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "import torch": "import torch",
    "import monai": "import monai",
    "import the package": "import mapseg_components.data, mapseg_components.networks, mapseg_components.transforms, "
    "mapseg_components.engines, mapseg_components.handlers, mapseg_components.inferers, mapseg_components.configs",
}


class FirstIteration:
    """Handler that writes when the first iteration ended, and what the process computed until then, to a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._write)

    def _write(self, engine: Engine) -> None:
        self.path.write_text(json.dumps({"wall": time.time(), "cpu": time.process_time()}))


def children_seconds() -> float:
    """What the ended children of this process have computed so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def startup(folder: Path, repeats: int, clock: str = "wall") -> dict[str, Any]:
    """Seconds from the start of a new process, files in the disk cache.

    Args:
        folder: for scans and results.
        repeats: processes of each kind.
        clock: a name of `timing.CLOCKS`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONWARNINGS"] = "ignore"
    found = {}
    for name, line in IMPORTS.items():
        times = []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), children_seconds()
            subprocess.run([sys.executable, "-c", line], check=True, env=environment, capture_output=True)
            times.append(time.perf_counter() - wall if clock == "wall" else children_seconds() - cpu)
        found[name] = summary(times)

    source, *others = (write_brain(folder / "scans", (40, 48, 44), seed) for seed in range(3))
    labels = write_datalist(folder / "datalist.json", [source], others)
    overlay, mark = folder / "first_iteration.json", folder / "first_iteration"
    handler = {"_target_": "benchmarks.startup.FirstIteration", "path": str(mark)}
    overlay.write_text(json.dumps({"+train#handlers": [handler]}))
    times = []
    for number in range(repeats):
        files = ["configs/train.json", "configs/tiny.yaml", str(overlay)]
        line = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(files)]
        options = {"datalist": folder / "datalist.json", "labels": json.dumps(labels), "device": "$torch.device('cpu')"}
        options |= {"ckpt_dir": folder / f"run{number}", "output_dir": folder / f"run{number}"}
        line += [str(text) for key, value in options.items() for text in (f"--{key}", value)]
        start = time.time()
        done = subprocess.run(line, cwd=BUNDLES / "mapseg_adaptation", env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the tiny run ended with {done.returncode}: {done.stderr[-1000:]}")
        reached = json.loads(mark.read_text())
        times.append(reached["wall"] - start if clock == "wall" else reached["cpu"])
    return {**found, "tiny bundle run, until its first iteration": summary(times)}
