# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``keep_freed_memory`` brings on a CPU: steps with the sizes of ``small_data.yaml``, and inference.

    OMP_NUM_THREADS=1 python -m benchmarks.freed_memory --repeats 5

With and without in turn, each in a new process, as the setting is one of a whole process. Prints a table in Markdown:
medians of processor time, how many times as fast (the median over turns), and the largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.package import BUNDLES, inference_of, part, step_of
from benchmarks.timing import peak_bytes
from mapseg_components.memory import keep_freed_memory

ROOT = BUNDLES.parent
SHAPE = (128, 160, 128)  # of the scan that is segmented
SMALL = ["train.json", "fetal_age.yaml", "small_data.yaml"]
# bundle, configs, settings, timed calls
CASES: dict[str, tuple[str, list[str], dict[str, Any], int]] = {
    "adaptation step, float32": ("mapseg_adaptation", SMALL, {"amp": None}, 5),
    "adaptation step, bf16": ("mapseg_adaptation", SMALL, {"amp": "bf16"}, 8),
    "pretraining step, bf16": ("mapseg_pretraining", SMALL, {"amp": "bf16"}, 10),
    "inference, 128 x 160 x 128 voxels, float32": ("mapseg_adaptation", ["inference.json"], {"amp": None}, 3),
}


def call_of(name: str) -> Callable[[], Any]:
    """What a case times, once."""
    bundle, files, settings, _ = CASES[name]
    folder = BUNDLES / bundle
    parser = ConfigParser(ConfigParser.load_config_files([str(folder / "configs" / file) for file in files]))
    parser.update({"bundle_root": str(folder), "device": "$torch.device('cpu')", **settings})
    torch.manual_seed(0)
    if files == SMALL:
        data = {"dataset_dir": str(ROOT / "sample" / "fetal_age"), "cache_rate": 0.0, "train#handlers": []}
        parser.update(data)
        return step_of(parser, next(iter(part(parser, "train#dataloader"))))
    parser.update({"handlers": [], "cases": [], "dataset#data": [{}]})
    return inference_of(parser, part(parser, "network_def"), torch.rand(1, *SHAPE))


def timed(name: str, keep: bool) -> dict[str, float]:
    """Median seconds of a case in this process, after one call, and its peak memory in MiB."""
    if keep and not keep_freed_memory():
        sys.exit("keep_freed_memory needs glibc")
    call, seconds = call_of(name), []
    for _ in range(CASES[name][3] + 1):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak_bytes() / 2**20}


def in_a_process(name: str, keep: bool) -> dict[str, float]:
    """`timed` in a process of its own."""
    line = [sys.executable, "-W", "ignore", "-m", "benchmarks.freed_memory", "--case", name, *["--keep"] * keep]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, cwd=Path.cwd(), env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(repeats: int) -> str:
    """All cases, in turns."""
    rows = ["| | n | returned | kept | times as fast | memory, returned | kept |", "|---|---|---|---|---|---|---|"]
    for name in CASES:
        pairs = [[in_a_process(name, keep) for keep in (False, True)] for _ in range(repeats)]
        middle = {
            key: [statistics.median(pair[way][key] for pair in pairs) for way in (0, 1)]
            for key in ("seconds", "peak_mib")
        }
        gain = statistics.median(before["seconds"] / after["seconds"] for before, after in pairs)
        times = [f"{value:.3g} s" for value in middle["seconds"]]
        peaks = [f"{value:.0f} MiB" for value in middle["peak_mib"]]
        rows.append(f"| {' | '.join([name, str(repeats), *times, f'{gain:.2f}', *peaks])} |")
    return "\n".join(rows)


def main() -> None:
    """Measure one case for the process that asks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each case and way")
    parser.add_argument("--case", choices=[*CASES], help="measure this one, here")
    parser.add_argument("--keep", action="store_true", help="with --case: keep freed memory")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(timed(arguments.case, arguments.keep)))
    else:
        print(table(arguments.repeats))


if __name__ == "__main__":
    main()
