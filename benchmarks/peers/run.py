# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""This package beside nnU-Net v2 and MONAI alone: training steps, and a folder of scans by each command line.

make bench-peers                              two processors: half an hour
python -m benchmarks.peers.run --quick        a minute at tiny size: does everything work?
python -m benchmarks.peers.report runs/bench-peers/results.json --docs docs/reference/performance.md

Each side trains in a process of its own, and the processes take turns; so do the commands. Needs the extra [nnunet].
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.analytic import counted
from benchmarks.peers import monai_side, nnunet_side, package_side
from benchmarks.peers.plan import Plan, dynunet
from benchmarks.peers.report import table
from benchmarks.peers.scans import CHANNEL, scan_folder, write_scans
from benchmarks.peers.side import Side, environment
from benchmarks.timing import CLOCKS, machine, product_rates, ratios, summary
from benchmarks.trees import tree_bytes

__all__ = ["run"]

logger = logging.getLogger("benchmarks")
COMMANDS = {"package": package_side.command, "monai": monai_side.command, "nnunet": nnunet_side.command}
STEPS = {"step": "training step", "step_with_samples": "training step and its samples"}
SIDE = 2048  # rows and columns of matrices whose product shows what the processor can do
QUICK = Plan(patch=16, filters=(4, 8, 8), shape=(30, 36, 30), scans=2, steps=2, training=2)
POLL_SECONDS = 0.1


def run(plan: Plan, repeats: int, commands: int, threads: int, folder: Path) -> dict[str, Any]:
    """All cases.

    Args:
        plan: sizes.
        repeats: timed steps of each side.
        commands: timed commands of each side, for each folder of scans.
        threads: of all sides.
        folder: new, for scans, weights and results.

    Returns:
        what ``results.json`` holds.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    write_scans(folder, plan)
    plan.write(folder)
    sides = {name: Side(name, folder) for name in ("monai", "package", "nnunet")}  # MONAI's trains the weights
    prepared = {name: side.ask("prepare") for name, side in sides.items()}
    results: dict[str, Any] = {
        "machine": {**machine(torch.device("cpu")), "threads": threads, "date": datetime.date.today().isoformat()},
        "plan": json.loads((folder / "plan.json").read_text(encoding="utf-8")),
        "logits": prepared["nnunet"],
        "operations": {"step": step_operations(plan), "products": rate(threads)},
        "cases": {},
    }
    for key, name in STEPS.items():
        logger.info(f"{name} ...")
        found = in_turns(
            {side: lambda key=key, one=one: one.ask(key) for side, one in sides.items()}, repeats, warmup=2
        )
        results["cases"][name] = case(found)
    rates = results["operations"]
    rates["products"] = max(rates["products"], rate(threads))  # a moment in which others used the machine is no limit
    results["training_memory"] = {side: one.ask("peak") for side, one in sides.items()}
    for side in sides.values():
        side.close()
    for amount in dict.fromkeys((1, plan.scans)):
        logger.info(f"commands, {amount} scans ...")
        used: dict[str, list[int]] = {name: [] for name in COMMANDS}

        def timed(name: str, amount: int = amount, used: dict[str, list[int]] = used) -> float:
            output = folder / "predicted" / f"{name}_{amount}_{len(used[name])}"
            seconds, peak = measured(COMMANDS[name], folder, scan_folder(folder, amount), output, threads)
            used[name].append(peak)
            return seconds

        found = in_turns({name: lambda name=name: timed(name) for name in COMMANDS}, commands, warmup=0)
        results["cases"][f"command, {amount} scan{'s' * (amount > 1)}"] = {
            **case(found), "memory": {name: max(peaks) for name, peaks in used.items()}
        }  # fmt: skip
    results["dice"] = {name: dice(folder, folder / "predicted" / f"{name}_{plan.scans}_0", plan) for name in COMMANDS}
    logger.info("nnU-Net as it comes, with eight flips, one scan ...")
    seconds, _ = measured(
        lambda *places: nnunet_side.command(*places, mirrored=True),
        *(folder, scan_folder(folder, 1), folder / "predicted" / "mirrored", threads),
    )
    results["nnunet_as_it_comes"] = seconds
    return results


def step_operations(plan: Plan) -> int:
    """Operations of the convolutions of a training step, forward and backward."""
    network, images = dynunet(plan), torch.rand(plan.batch_size, 1, *[plan.patch] * 3)
    return counted(lambda: network(images).sum().backward())


def rate(threads: int) -> float:
    """Operations a second of products of large float32 matrices."""
    torch.set_num_threads(threads)
    return product_rates(torch.device("cpu"), CLOCKS["wall"], SIDE, precisions={"float32": torch.float32})["float32"]


def in_turns(calls: dict[str, Callable[[], float]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds that each call returned, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            value = call()
            if turn >= warmup:
                seconds[name].append(value)
    return seconds


def case(found: dict[str, list[float]]) -> dict[str, Any]:
    """Summaries, and how many times faster than each other side this package is, the median over turns."""
    faster = {name: ratios(found, name)["package"] for name in found if name != "package"}
    return {"seconds": {name: summary(values) for name, values in found.items()}, "faster_than": faster}


def measured(
    command: Callable[..., list[str]], folder: Path, scans: Path, output: Path, threads: int
) -> tuple[float, int]:
    """Run a command to its end.

    Returns:
        seconds, and bytes of resident memory of all its processes together at their largest.

    Raises:
        RuntimeError: it failed.
    """
    output.parent.mkdir(exist_ok=True)
    log, peak, start = output.with_suffix(".log"), 0, time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(folder, scans, output, threads), env=environment(folder), cwd=folder,
            stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}, see {log}")
    return seconds, peak


def dice(folder: Path, predicted: Path, plan: Plan) -> float:
    """Mean Dice of all structures and scans that a command wrote."""
    values = []
    for scan in sorted(scan_folder(folder, plan.scans).glob("*.nii.gz")):
        name = scan.name.removesuffix(CHANNEL)
        truth = np.asarray(nib.load(folder / "unseen" / f"{name}_label.nii.gz").dataobj)
        (path,) = [one for one in predicted.rglob(f"{name}*.nii.gz") if not one.name.startswith(".")]
        label_map = np.asarray(nib.load(path).dataobj)
        for value in plan.labels.values():
            both = (label_map == value).sum() + (truth == value).sum()
            values.append(2 * ((label_map == value) & (truth == value)).sum() / both)
    return float(np.mean(values))


def main(line: Sequence[str] | None = None) -> int:
    """Measure, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="timed steps of each side")
    parser.add_argument("--commands", type=int, default=3, help="timed commands of each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: nothing that is measured means anything")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-peers"))
    parser.add_argument("--keep", type=Path, help="new folder for scans, logs and label maps, which stays")
    arguments = parser.parse_args(line)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    plan, repeats, commands = (QUICK, 1, 1) if arguments.quick else (Plan(), arguments.repeats, arguments.commands)
    threads = os.cpu_count() or 1  # nnUNetv2_predict takes them all
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.keep or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        results = run(plan, repeats, commands, threads, folder)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
