# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: with the number of scans, the volume of a scan, and the workers. Writes JSON and a figure.

python -m benchmarks.scaling --output runs/bench --figure docs/images/scaling.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.memory import measure
from benchmarks.package import bundle, part, settings_of, write_datalist
from benchmarks.report import place_of, replace_between
from benchmarks.timing import CLOCKS, machine
from benchmarks.volume import SHAPE, write_brain

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw", "linear_fit", "of_scans", "of_volumes", "of_workers", "table"]


def elapsed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds of a call by one of `timing.CLOCKS`, and its value."""
    start = clock()
    value = call()
    return clock() - start, value


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares ``y = slope * x + constant``, and the share of the variance that the line explains (r2)."""
    slope, constant = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + constant)
    spread = np.asarray(y) - np.mean(y)
    return {"slope": float(slope), "constant": float(constant), "r2": float(1 - (rest @ rest) / (spread @ spread))}


def of_scans(
    scans: list[tuple[Path, Path]],
    counts: Sequence[int],
    patch: int,
    samples: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Seconds until the cache is filled, and of an epoch of source samples from it, for the first scans of a list."""
    rows = []
    for count in counts:
        datalist = scans[0][0].parent / f"datalist_{count}.json"
        settings = settings_of(8, 1, patch, torch.device("cpu"), {"epoch_length": samples})
        settings["labels"] = write_datalist(datalist, scans[:count])
        parser = bundle("adaptation", datalist, settings)
        filling, loader = elapsed(lambda parser=parser: part(parser, "train#source_dataloader"), clock)
        epoch, made = elapsed(lambda loader=loader: sum(1 for _ in loader), clock)
        rows.append({"scans": count, "cache_seconds": filling, "epoch_seconds": epoch, "samples": made})
    return rows


def of_workers(scans: list[tuple[Path, Path]], counts: Sequence[int], patch: int, samples: int) -> list[dict[str, Any]]:
    """Source and target samples a second of time that passes, the start of the workers left out."""
    rows = []
    for count in counts:
        datalist = scans[0][0].parent / "datalist_workers.json"
        more = {"epoch_length": samples + 1, "num_workers": count}
        settings = settings_of(8, 1, patch, torch.device("cpu"), more)
        settings["labels"] = write_datalist(datalist, scans)
        batches = iter(part(bundle("adaptation", datalist, settings), "train#dataloader"))
        next(batches)
        seconds, made = elapsed(lambda batches=batches: sum(1 for _ in batches))
        rows.append({"workers": count, "seconds": seconds, "samples_per_second": 2 * made / seconds})
    return rows


def of_volumes(shapes: Sequence[Sequence[int]], sizes: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of inference, each volume in a separate process, and the bytes per voxel."""
    rows = [
        {"shape": list(shape), **measure("inference", shape="x".join(map(str, shape)), **sizes)} for shape in shapes
    ]
    grown = [row["peak"] - row["before"] for row in rows]
    return {"rows": rows, "memory": linear_fit([row["voxels"] for row in rows], grown)}


def draw(results: dict[str, Any], path: Path) -> None:
    """Three small panels, and a fourth where workers were measured."""
    scans, volumes, workers = results["scans"], results["volumes"], results["workers"]
    panels = 4 if workers else 3
    figure, axes = plt.subplots(1, panels, figsize=(3 * panels, 2.8), layout="constrained")
    what = "processor time" if results["settings"]["clock"] == "cpu" else "time"
    count = [row["scans"] for row in scans]
    axes[0].plot(count, [row["cache_seconds"] for row in scans], "o-", label="fill the cache")
    label = f"{scans[0]['samples']} samples"
    axes[0].plot(count, [row["epoch_seconds"] for row in scans], "s--", label=label)
    axes[0].set(xlabel="scans", ylabel=f"{what} (s)")
    axes[0].legend(frameon=False)
    millions = [row["voxels"] / 1e6 for row in volumes["rows"]]
    axes[1].plot(millions, [row["seconds"] for row in volumes["rows"]], "o-")
    axes[1].set(xlabel="volume (million voxels)", ylabel=f"inference, {what} (s)")
    fit = volumes["memory"]
    axes[2].plot(millions, [(row["peak"] - row["before"]) / 1e9 for row in volumes["rows"]], "o")
    line = [(fit["slope"] * m * 1e6 + fit["constant"]) / 1e9 for m in millions]
    axes[2].plot(millions, line, "--", label=f"{fit['slope']:.0f} bytes a voxel")
    axes[2].set(xlabel="volume (million voxels)", ylabel="memory of inference (GB)")
    axes[2].legend(frameon=False)
    if workers:
        axes[3].plot([row["workers"] for row in workers], [row["samples_per_second"] for row in workers], "o-")
        axes[3].set(xlabel="workers", ylabel="samples a second")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    """What the figure shows, in words and figures."""
    place, settings, fit = results["machine"], results["settings"], results["volumes"]["memory"]
    first, last = results["scans"][0], results["scans"][-1]
    clock = "processor time" if settings["clock"] == "cpu" else "time that passed"
    shape = "x".join(map(str, settings["scan_shape"]))
    size = f"width {settings['width']}, depth {settings['depth']}, windows of {settings['patch']}"
    workers = ", ".join(f"{row['workers']}: {row['samples_per_second']:.1f}" for row in results["workers"])
    lines = [
        f"{place_of(place)};",
        f"{clock}, n 1 each. Load of the machine: {place['load']:.1f} processes.",
        f"Inference: {size}, so that stitching shows.",
        "",
        f"The memory of inference grows linearly: **{fit['slope']:.1f} bytes a voxel**",
        f"and {fit['constant'] / 1e6:.0f} MB beyond the decoded scan (r2 {fit['r2']:.4f}).",
        f"Filling the cache: {first['cache_seconds']:.1f} s with {first['scans']} of {shape},",
        f"{last['cache_seconds']:.1f} s with {last['scans']};",
        f"{first['samples']} samples from it: {first['epoch_seconds']:.2f} s and {last['epoch_seconds']:.2f} s.",
        f"Samples a second by workers: {workers or 'not measured, for they need a quiet machine'}.",
        "",
        "| volume | inference | its memory |",
        "|---|---|---|",
    ]
    for row in results["volumes"]["rows"]:
        grown = (row["peak"] - row["before"]) / 1e9
        lines.append(f"| {'x'.join(map(str, row['shape']))} | {row['seconds']:.1f} s | {grown:.2f} GB |")
    return "\n".join(lines)


def main(line: Sequence[str] | None = None) -> int:
    """Measure, write ``scaling.json``, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--samples", type=int, default=32, help="of an epoch")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.75, 1.0, 1.25, 1.5], help="of each axis")
    parser.add_argument("--width", type=int, default=8, help="of inference: small, so that stitching shows")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--shape", type=int, nargs=3, default=list(SHAPE))
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="cpu: leaves out the workers")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--figure", type=Path, help="by default scaling.png in the output folder")
    parser.add_argument("--results", type=Path, help="scaling.json of an earlier run: nothing is measured")
    parser.add_argument("--docs", type=Path, help="page whose text is replaced")
    arguments = parser.parse_args(line)
    if arguments.results is None:
        results = run(arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "scaling.json").write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    else:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    draw(results, arguments.figure or arguments.output / "scaling.png")
    if arguments.docs:
        replace_between(arguments.docs, "bench-scaling", table(results))
    print(table(results))
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what ``scaling.json`` holds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scans = [write_brain(Path(folder), arguments.shape, seed) for seed in range(max(arguments.scans))]
        shapes = [[round(factor * side) for side in arguments.shape] for factor in arguments.factors]
        sizes = {"width": arguments.width, "depth": 1, "patch": arguments.patch, "clock": arguments.clock}
        workers = arguments.workers if arguments.clock == "wall" else []
        return {
            "machine": {**machine(torch.device("cpu")), "load": os.getloadavg()[2]},
            "settings": {**sizes, "scan_shape": list(arguments.shape)},
            "scans": of_scans(scans, arguments.scans, arguments.patch, arguments.samples, CLOCKS[arguments.clock]),
            "workers": of_workers(scans[:2], workers, arguments.patch, arguments.samples),
            "volumes": of_volumes(shapes, sizes),
        }


if __name__ == "__main__":
    sys.exit(main())
