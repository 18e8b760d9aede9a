#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure the methods of mapseg adapt on scans that took no part in it, as a user runs them.

    python tools/measure_methods.py --source SOURCE --target TARGET --test TEST --truth TRUTH --output DIR

SOURCE and TARGET are what ``mapseg adapt`` takes, TEST is a folder of other scans of the target's kind and TRUTH one of
their label maps. Each method and seed is ``mapseg adapt --method``, then ``mapseg predict`` and ``mapseg evaluate`` of
the model before adaptation and of the one after it. Run it again to go on where it stopped; all figures are written to
``methods.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mapseg_components.files import write_json
from mapseg_components.plans.recipes import recipe_names

MODELS = ("source_only", "adapted")


def mapseg(*words: str) -> None:
    """Run a command as a user types it."""
    subprocess.run([sys.executable, "-m", "mapseg_components.commands", *words], check=True)


def measure(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Mean Dice on the test scans of both models, the seconds of the adaptation, and the verdict without labels."""
    folder = arguments.output / f"{method}_{seed}"
    record = folder / "measured.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    started = time.monotonic()
    more = ["--settings", arguments.settings] if arguments.settings else []
    more += ["--labels", arguments.labels] if arguments.labels else []
    scans = ["--source", str(arguments.source), "--target", str(arguments.target), "--output", str(folder)]
    mapseg("adapt", *scans, "--method", method, "--seed", str(seed), "--num_threads", str(arguments.threads), *more)
    seconds = time.monotonic() - started
    verdict = json.loads((folder / "run.json").read_text(encoding="utf-8"))["assessment"]["verdict"]["ship"]
    found: dict[str, Any] = {"method": method, "seed": seed, "seconds": round(seconds), "chosen": verdict}
    for model in MODELS:
        output, weights = folder / "test" / model, folder / "models" / f"{model}.pt"
        common = ["--output", str(output), "--overwrite", "--quiet"]
        mapseg("predict", str(arguments.test), "--bundle", str(folder), "--weights", str(weights), *common)
        figures = output / "figures"
        mapseg(
            "evaluate", str(output), str(arguments.truth), "--labels", str(folder), "--output", str(figures), "--quiet"
        )
        summary = json.loads((figures / "evaluation.json").read_text(encoding="utf-8"))
        found[model] = summary
    write_json(found, record)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "test", "truth", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=recipe_names())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--settings", help="of mapseg adapt, JSON")
    parser.add_argument("--labels", help="of mapseg adapt, JSON")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    lines = [measure(arguments, method, seed) for seed in arguments.seeds for method in arguments.methods]
    write_json({"runs": lines}, arguments.output / "methods.json")


if __name__ == "__main__":
    main()
