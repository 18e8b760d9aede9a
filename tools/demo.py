#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The whole method on the shipped scans: ``mapseg demo --train``, into runs/demo of this clone.

With ``--ship`` the resulting weights become those of the bundles.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.commands import demo
from mapseg_components.errors import MAPSegError
from tools.stages import ADAPTATION, PRETRAINING, ROOT


def main() -> None:
    """Run every stage and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="folder of results (runs/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="put the resulting weights into the bundles")
    arguments = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if arguments.output.exists():
        print(f"Removing the results of an earlier run in {arguments.output}", flush=True)
    try:
        print(f"\n{demo(str(arguments.output), train=True, seed=arguments.seed, overwrite=True)}")
    except MAPSegError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if arguments.ship:
        shutil.copyfile(arguments.output / "pretraining" / "model.pt", PRETRAINING / "models" / "model.pt")
        shutil.copyfile(arguments.output / "adaptation" / "model.pt", ADAPTATION / "models" / "model.pt")
        print(f"Weights put into {PRETRAINING / 'models'} and {ADAPTATION / 'models'}.")


if __name__ == "__main__":
    main()
