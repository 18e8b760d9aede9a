# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure the largest resident memory of ``mapseg predict`` on one large scan, or several of one size (Linux).

    OMP_NUM_THREADS=1 python -m benchmarks.predict_memory --shape 512 512 400
    OMP_NUM_THREADS=1 python -m benchmarks.predict_memory --shape 256 256 200 --scans 4 --options --no_overlap

The scan is made up: noise in an ellipsoid, int16, compressed. The network is the adaptation bundle's with random
weights, small by default, and windows do not overlap: what takes the memory, the whole scan's arrays, depends on
neither, but on the number of classes (one float32 a voxel each).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from mapseg_components.prediction.bundle import read_bundle

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
INTERVAL = 0.02  # seconds between looks at the process


def main() -> None:
    """Make scan and weights, run the command, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400], metavar="VOXELS")
    parser.add_argument("--scans", type=int, default=1, help="with several, the next is read and the last written")
    parser.add_argument("--patch", type=int, default=96, help="side of a window")
    parser.add_argument("--width", type=int, default=8, help="channels of the network; the bundle has 32")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of mapseg predict")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (arguments.shape, arguments.patch, arguments.width)
        print(json.dumps(measure(Path(folder), *sizes, arguments.options, arguments.scans)))


def measure(
    folder: Path, shape: list[int], patch: int, width: int, options: list[str], scans: int = 1
) -> dict[str, Any]:
    """Peak and settings of one run in a folder.

    Returns:
        ``peak_mib``, ``bytes_per_voxel`` of it above ``idle_mib`` (the peak on a scan of 16 voxels a side), seconds,
        and what was measured.
    """
    sizes = {"patch_size": [patch] * 3, "window_stride": [patch] * 3, "window_batch_size": 1, "width": width}
    sizes |= {"depth": 1, "dilations": [1, 2], "head_channels": 8}
    overlay, weights = folder / "sizes.json", folder / "random.pt"
    overlay.write_text(json.dumps(sizes))
    bundle: ConfigParser = read_bundle(BUNDLE, [str(overlay)], {})
    torch.manual_seed(0)
    torch.save(bundle.get_parsed_content("network_def").state_dict(), weights)
    line = [sys.executable, "-m", "mapseg_components.commands", "predict", "SCAN", "OUT", "--bundle", str(BUNDLE)]
    line += ["--overlays", str(overlay), "--weights", str(weights), "--device", "cpu", *options]
    found = []
    for name, sides in (("idle", [16] * 3), ("scan", shape)):
        (folder / name).mkdir()
        first = make_scan(folder / name / "0.nii.gz", sides)
        for number in range(1, scans):
            os.link(first, folder / name / f"{number}.nii.gz")
        places = {"SCAN": str(folder / name), "OUT": str(folder / f"{name}_results")}
        found.append(watched([places.get(word, word) for word in line]))
    (idle, _), (peak, seconds) = found
    return {
        "peak_mib": round(peak / 2**20),
        "idle_mib": round(idle / 2**20),
        "bytes_per_voxel": round((peak - idle) / np.prod(shape), 1),
        "seconds": round(seconds),
        "shape": shape,
        "scans": scans,
        "classes": len(bundle.get_parsed_content("labels")) + 1,
        "settings": sizes,
        "options": options,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "torch": torch.__version__,
    }


def make_scan(path: Path, shape: list[int]) -> str:
    """Write an ellipsoid of noise that reaches the edges of its box; slice by slice, to need little memory itself."""
    generator = np.random.default_rng(0)
    voxels = np.zeros(shape, np.int16)
    x, y, z = (np.linspace(-1, 1, side, dtype=np.float32) for side in shape)
    for number, height in enumerate(z):
        inside = x[:, None] ** 2 + y[None] ** 2 + height**2 <= 1
        voxels[..., number][inside] = generator.integers(50, 1000, int(inside.sum()))
    nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.0, 1.0])), path)
    return str(path)


def watched(line: list[str]) -> tuple[int, float]:
    """Run a command, which starts no workers; its largest resident memory in bytes, by the kernel, and seconds.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started, peak = time.monotonic(), 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, 1024 * int(found[1])) if found else peak
            time.sleep(INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, line)
    return peak, time.monotonic() - started


if __name__ == "__main__":
    main()
