# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One side in a process of its own, which does and times what it is asked for, line by line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.plan import Plan
from benchmarks.timing import peak_bytes

__all__ = ["SIDES", "Side", "environment", "serve"]

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"package": "this package", "monai": "MONAI alone", "nnunet": "nnU-Net"}
MARK = "peers: "  # before what is meant for the other process: the libraries print as well


def environment(folder: Path) -> dict[str, str]:
    """Variables of all processes: where nnU-Net keeps its files, and this repository's modules."""
    places = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **places, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "nnUNet_n_proc_DA": "0"}


class Side:
    """The process of a side.

    Args:
        name: one of `SIDES`.
        folder: with ``plan.json``, scans and weights.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.log = folder / f"{name}.log"
        line = [sys.executable, "-m", f"benchmarks.peers.{name}_side", str(folder)]
        self.stream = self.log.open("ab")
        self.process = subprocess.Popen(
            line, cwd=folder, env=environment(folder), text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stream,
        )  # fmt: skip

    def ask(self, what: str) -> Any:
        """What a call returned.

        Raises:
            RuntimeError: the process has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the next lines find
            self.process.stdin.write(f"{what}\n")
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.stream.write(line.encode())
        raise RuntimeError(f"{what}: the process ended with {self.process.wait()}, see {self.log}")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.stream.close()


def serve(calls: Callable[[Path, Plan], Mapping[str, Callable[[], Any]]]) -> None:
    """Answer each line of the standard input: the seconds that a call of this name took, or what ``prepare`` returned.

    Args:
        calls: from the folder and its plan to functions by name; ``prepare`` is not timed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    known = calls(folder, Plan.read(folder))
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        found = peak_bytes() if name == "peak" else known[name]()
        answer = found if name in ("peak", "prepare") else time.perf_counter() - start
        print(f"{MARK}{json.dumps(answer)}", flush=True)
