# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What `mapseg predict` gains by reading and writing while the network works: in turns with one scan after the other.

OMP_NUM_THREADS=1 python -m benchmarks.overlap --shape 160 192 160 --docs docs/reference/performance.md

The scans are copies of a shipped one, resampled to a realistic number of voxels; bundle and weights are the shipped
ones. Writes overlap.json, and its table into a page; exit code 1 if the two ways do not write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch

from benchmarks.report import place_of, replace_between, seconds
from benchmarks.timing import machine, summary
from mapseg_components.commands.predict import predict
from mapseg_components.prediction.run import Run

__all__ = ["measure", "table", "write_scans"]

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
SCAN = ROOT / "sample" / "fetal_age" / "test" / "images" / "GA24_notoperated.nii.gz"
WAYS = {"one by one": True, "overlap": False}  # no_overlap
STAGES = {"read": "read", "segment": "network", "write": "write"}


def write_scans(folder: Path, shape: Sequence[int], count: int) -> Path:
    """Copies of the shipped scan, resampled linearly to a shape, as int16 in .nii.gz."""
    folder.mkdir(parents=True)
    scan = nib.load(SCAN)
    voxels = torch.from_numpy(np.asarray(scan.dataobj, dtype=np.float32))[None, None]
    large = torch.nn.functional.interpolate(voxels, size=list(shape), mode="trilinear")[0, 0]
    affine = scan.affine @ np.diag([*(np.array(scan.shape) / shape), 1.0])
    nib.save(nib.Nifti1Image(large.round().numpy().astype(np.int16), affine), folder / "0.nii.gz")
    for number in range(1, count):
        shutil.copyfile(folder / "0.nii.gz", folder / f"{number}.nii.gz")
    return folder


@contextmanager
def counted_stages() -> Iterator[dict[str, list[float]]]:
    """Context in which processor seconds of each stage of each scan are noted; of one by one, where no other runs."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}

    def counting(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            value = stage(*arguments)
            found[name].append(time.process_time() - start)
            return value

        return call

    with mock.patch.multiple(Run, **{name: counting(name, getattr(Run, name)) for name in STAGES}):
        yield found


def measure(folder: Path, shape: Sequence[int], scans: int, repeats: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the whole command each way, in turns, and of the stages of a scan.

    Args:
        folder: for scans and results.
        shape: voxels of a scan.
        options: further ones of `predict`.

    Returns:
        ``seconds`` by way and clock, ``speed_up`` (wall clock, median over turns), ``stages`` (processor seconds of a
        scan), ``equal``: whether all label maps, tables and pictures have the same bytes.
    """
    source = write_scans(folder / "scans", shape, scans)
    found: dict[str, dict[str, list[float]]] = {way: {"wall": [], "cpu": []} for way in WAYS}
    contents: list[dict[str, bytes]] = []
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    predict(str(source / "0.nii.gz"), str(folder / "warm"), bundle=str(BUNDLE), quiet=True, **options)
    for turn in range(repeats):
        for way, no_overlap in WAYS.items():
            output = folder / f"{way} {turn}"
            wall, cpu = time.perf_counter(), time.process_time()
            with counted_stages() as counted:
                done = predict(
                    str(source), str(output), bundle=str(BUNDLE), no_overlap=no_overlap, quiet=True, **options
                )
            found[way]["wall"].append(time.perf_counter() - wall)
            found[way]["cpu"].append(time.process_time() - cpu)
            if done.failed:
                raise RuntimeError(f"{done.failed[0].case} failed: {done.failed[0].message}")
            for name in stages if no_overlap else ():
                stages[name] += counted[name]
            kept = [path for path in output.rglob("*") if path.suffix in (".gz", ".csv", ".png")]
            contents.append({str(path.relative_to(output)): path.read_bytes() for path in kept})
            shutil.rmtree(output)
    pairs = zip(found["one by one"]["wall"], found["overlap"]["wall"])
    return {
        "seconds": {way: {clock: summary(values) for clock, values in one.items()} for way, one in found.items()},
        "speed_up": statistics.median(slow / fast for slow, fast in pairs),
        "stages": {name: summary(values) for name, values in stages.items()},
        "equal": all(one == contents[0] for one in contents) and len(contents[0]) > scans,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and write ``overlap.json``."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (arguments.shape, arguments.scans, arguments.repeats)
        found = measure(Path(folder), *sizes, {"device": arguments.device})
    place = {**machine(torch.device(arguments.device)), "load": os.getloadavg()[2]}
    settings = {name: getattr(arguments, name) for name in ("shape", "scans", "repeats")}
    results = {"machine": place, "settings": settings, **found}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "overlap.json").write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    return results


def table(results: Mapping[str, Any]) -> str:
    """Results in Markdown."""
    settings, place = results["settings"], results["machine"]
    size = f"{settings['scans']} scans of {'x'.join(map(str, settings['shape']))}, int16, compressed"
    lines = [
        f"{place_of(place)}; {size}; shipped bundle and weights. Load of the machine: {place['load']:.1f} processes.",
        "",
        "| whole command | wall clock, median | min..max | processor time, median | n |",
        "|---|---|---|---|---|",
    ]
    for way, found in results["seconds"].items():
        wall, cpu = found["wall"], found["cpu"]
        spread = f"{seconds(wall['min'])} .. {seconds(wall['max'])}"
        lines.append(f"| {way} | {seconds(wall['median'])} | {spread} | {seconds(cpu['median'])} | {wall['n']} |")
    means = {name: found["median"] for name, found in results["stages"].items()}
    parts = ", ".join(f"{STAGES[name]} {seconds(value)}" for name, value in means.items())
    best = sum(means.values()) / max(means.values())
    same = "the same bytes" if results["equal"] else "**different bytes**"
    lines += [
        "",
        f"Overlapped it is **{results['speed_up']:.2f}** times as fast by wall clock (median over turns), with {same} "
        f"in label maps, tables and pictures. Processor time of a scan, one by one: {parts} "
        f"(n {results['stages']['read']['n']}): with a processor for each stage, many scans could be {best:.2f} times "
        "as fast, not more.",
    ]
    return "\n".join(lines)


def main(line: Sequence[str] | None = None) -> int:
    """Measure, or take an earlier run's file; print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 192, 160], metavar="VOXELS")
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-overlap"))
    parser.add_argument("--results", type=Path, help="overlap.json of an earlier run: nothing is measured")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args(line)
    if arguments.results is None:
        results = run(arguments)
    else:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    if arguments.docs:
        replace_between(arguments.docs, "bench-overlap", table(results))
    else:
        print(table(results))
    return 0 if results["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
