# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One stage of an experiment: a bundle's command, run as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

from mapseg_components.commands.stages import run_stage
from mapseg_components.errors import MAPSegError

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING, ADAPTATION = ROOT / "bundles" / "mapseg_pretraining", ROOT / "bundles" / "mapseg_adaptation"


def run_bundle(title: str, bundle: Path, configs: list[str], output: Path, **settings: object) -> float:
    """One command of a bundle, run from its folder; its output goes to a log. Returns seconds."""
    print(f"{title} ...", end="", flush=True)
    try:
        seconds = run_stage(title, bundle, [f"configs/{name}" for name in configs], output, settings)
    except MAPSegError as error:
        print(" failed", flush=True)
        sys.exit(f"{title}: {error}\nThe whole log is in {output / 'log.txt'}")
    print(f" {seconds:.0f} s", flush=True)
    return seconds
