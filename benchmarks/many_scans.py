# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Processor time and memory of ``mapseg check`` and ``mapseg predict`` on folders of more and more scans (Linux).

    OMP_NUM_THREADS=1 python -m benchmarks.many_scans --scans 1 100 1000 10000 --docs docs/reference/performance.md

The scans are made up, small and each another one; the network is the adaptation bundle's at a small size with random
weights, without pictures: what is measured is what each further scan costs beside its voxels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.predict_memory import BUNDLE, watched
from benchmarks.report import replace_between
from benchmarks.startup import children_seconds
from benchmarks.timing import machine
from mapseg_components.prediction.bundle import read_bundle

__all__ = ["measure", "table"]

SIDE = 16
SIZES = {
    "patch_size": [SIDE] * 3, "window_stride": [SIDE] * 3, "width": 8, "depth": 1, "dilations": [1, 2],
    "head_channels": 8,
}  # fmt: skip


def measure(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Each command on folders of so many scans.

    Args:
        folder: for scans and results.
        counts: numbers of scans, rising; the first is what the others' start is taken from.

    Returns:
        ``machine``, ``counts``, and ``commands``: name to ``seconds`` (processor time) and ``bytes`` (largest resident
        memory), a number for each count.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    overlay, weights = folder / "sizes.json", folder / "random.pt"
    overlay.write_text(json.dumps(SIZES), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(read_bundle(BUNDLE, [str(overlay)], {}).get_parsed_content("network_def").state_dict(), weights)
    options = ["--bundle", str(BUNDLE), "--overlays", str(overlay), "--weights", str(weights), "--device", "cpu"]
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bytes": []} for name in ("check", "predict")}
    generator, written = np.random.default_rng(0), 0
    for count in counts:
        scans = folder / "scans"
        scans.mkdir(exist_ok=True)
        for number in range(written, count):
            voxels = np.zeros([SIDE] * 3, np.int16)
            voxels[2:-2, 2:-2, 2:-2] = generator.integers(50, 1000, [SIDE - 4] * 3)
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), scans / f"{number}.nii.gz")
        written = count
        lines = {
            "check": ["check", str(scans)],
            "predict": ["predict", str(scans), str(folder / f"out_{count}"), *options, "--no_preview"],
        }
        for name, line in lines.items():
            seconds, peak = measured([sys.executable, "-m", "mapseg_components.commands", *line, "--quiet"])
            found[name]["seconds"].append(seconds)
            found[name]["bytes"].append(peak)
            print(f"{name}, {count} scans: {seconds:.1f} s, {peak / 1e6:.0f} MB", file=sys.stderr)
    return {"machine": machine(torch.device("cpu")), "counts": [*counts], "commands": found}


def measured(line: list[str]) -> tuple[float, int]:
    """Processor seconds of a command, and bytes of its largest resident memory. Raises as `watched`."""
    before = children_seconds()
    peak, _ = watched(line)
    return children_seconds() - before, peak


def exponent(counts: Sequence[int], values: Sequence[float]) -> float:
    """By which power of the number of scans a value grows from the last but one count to the last, beyond the first.

    Args:
        counts: three or more.
        values: one for each.

    Examples:
        >>> from benchmarks.many_scans import exponent
        >>> exponent([1, 100, 1000], [8.0, 9.0, 18.0])
        1.0
    """
    (low, high), (small, large) = counts[-2:], (value - values[0] for value in values[-2:])
    return math.log(large / small) / math.log(high / low)


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    counts, place = results["counts"], results["machine"]
    lines = [
        f"{place['processor']}, {place['threads']} thread; {SIDE}x{SIDE}x{SIDE} voxels, a small network, no pictures; "
        "processor time and largest resident memory.",
        "",
        f"| scans | {' | '.join(f'{count:,}' for count in counts)} | time grows by the power |",
        f"|---|{'---|' * len(counts)}---|",
    ]
    for name, found in results["commands"].items():
        pairs = zip(found["seconds"], found["bytes"])
        cells = [f"{seconds:.3g} s, {peak / 1e6:.0f} MB" for seconds, peak in pairs]
        lines.append(f"| `mapseg {name}` | {' | '.join(cells)} | {exponent(counts, found['seconds']):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, nargs="+", default=[1, 100, 1000, 10_000], help="three numbers or more")
    parser.add_argument("--output", type=Path, help="file for the results, JSON")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    if len(arguments.scans) < 3 or arguments.scans != sorted(set(arguments.scans)):
        parser.error("--scans: expected three numbers or more, rising")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.scans)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    if arguments.docs:
        replace_between(arguments.docs, "bench-many", table(results))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
