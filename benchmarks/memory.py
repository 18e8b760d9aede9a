# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of an adaptation step and of inference, each in a separate process.

python -m benchmarks.memory step --side package --width 64 --depth 8 --patch 96 --target_clean true
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BLOCKS, optimizer_of, plain_batch
from benchmarks.package import bundle, inference_of, part, settings_of, step_of, write_datalist
from benchmarks.plain import training as plain_training
from benchmarks.timing import CLOCKS, peak_bytes, wait
from benchmarks.volume import brain, write_brain
from mapseg_components.memory import keep_freed_memory

__all__ = ["inference_memory", "measure", "step_memory"]

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 8


def measure(what: str, **options: Any) -> dict[str, Any]:
    """Run this module in another process; returns what it prints."""
    line = [sys.executable, "-m", "benchmarks.memory", what]
    line += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(device: torch.device) -> int:
    """Bytes of this process on a CPU, bytes of tensors on a GPU."""
    wait(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def random_batch(patch: int, classes: int) -> dict[str, torch.Tensor]:
    """One labelled pair of noise."""
    batch = {f"{plain_training.PREFIX[scale]}image": torch.rand(1, 1, patch, patch, patch) for scale in BLOCKS}
    batch |= {
        f"{plain_training.PREFIX[scale]}label": torch.randint(classes, (1, 1, patch, patch, patch)) for scale in BLOCKS
    }
    return {**batch, "box": torch.tensor([[[0.0, patch * 2 / 3]] * 3])}


def step_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Two steps of adaptation; the second has the optimizer's moments.

    Returns:
        ``before`` the first step, with network, teacher and libraries, and ``peak``, both in bytes.
    """
    device = torch.device(options.device)
    more = {"target_clean": options.target_clean == "true", "amp": options.amp, "cache_rate": 0.0}
    settings = settings_of(options.width, options.depth, options.patch, device, {**more, **json.loads(options.set)})
    with tempfile.TemporaryDirectory() as folder:
        scans = [write_brain(Path(folder), (24, 28, 20))]
        labels = write_datalist(Path(folder) / "datalist.json", scans)
        parser = bundle("adaptation", Path(folder) / "datalist.json", {**settings, "labels": labels})
        sides = {side: random_batch(options.patch, len(labels) + 1) for side in ("source", "target")}
        if options.side == "package":
            keep_freed_memory(parser["keep_freed_memory"])
            step = step_of(parser, sides)
        else:
            network = plain_training.plain_network(part(parser, "network_def")).to(device)
            teacher, optimizer = copy.deepcopy(network).requires_grad_(False), optimizer_of(network)
            source, target = (plain_batch(sides[side], device) for side in ("source", "target"))

            def step() -> float:
                return plain_training.adaptation_step(
                    network, teacher, optimizer, source, target, BLOCKS, options.target_clean == "true"
                )

        before = peak(device)
        for _ in range(2):
            step()
        return {"before": before, "peak": peak(device)}


def inference_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Segment a synthetic scan once.

    Returns:
        ``voxels``, ``seconds``, ``before`` (with the scan in memory) and ``peak`` in bytes.
    """
    device = torch.device(options.device)
    shape = tuple(int(side) for side in options.shape.split("x"))
    image, _ = brain(shape)
    scan = (torch.from_numpy(image).float() / float(image.max()))[None].to(device)
    settings = settings_of(options.width, options.depth, options.patch, device, json.loads(options.set))
    settings |= {"labels": {f"structure {value}": value for value in range(1, CLASSES)}, "amp": options.amp}
    settings |= {"handlers": [], "cases": [], "dataset#data": [{}]}
    parser = bundle("adaptation", Path("datalist.json"), settings, "inference.json")
    keep_freed_memory(parser["keep_freed_memory"])
    network = part(parser, "network")
    segment = inference_of(parser, network, scan)
    if device.type != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # what making the scan took is not counted
    clock = CLOCKS[options.clock]
    before, start = peak(device), clock()
    segment()
    wait(device)
    seconds = clock() - start
    voxels = shape[0] * shape[1] * shape[2]
    return {"voxels": voxels, "seconds": seconds, "before": before, "peak": peak(device)}


def main() -> None:
    """Print the measurement as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "inference"])
    parser.add_argument("--side", choices=["plain", "package"], default="package")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target_clean", choices=["true", "false"], default="false")
    parser.add_argument("--amp", type=lambda text: None if text == "None" else text)
    parser.add_argument("--shape", default="182x218x182", help="voxels of the scan to segment")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--set", default="{}", help="further settings of the package, as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps({"step": step_memory, "inference": inference_memory}[options.what](options)))


if __name__ == "__main__":
    main()
