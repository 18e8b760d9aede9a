#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg demo`` into runs/demo of this clone; stopped, it goes on where it was.

With ``--ship`` the whole method on the fetal sample, into runs/demo_fetal_age, whose weights become those of the
bundles.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.commands import demo
from mapseg_components.errors import MAPSegError
from mapseg_components.shipped_files import SAMPLES
from tools.stages import ADAPTATION, PRETRAINING, ROOT


def main() -> None:
    """Run every stage and report."""
    adults, fetuses = SAMPLES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of results (runs/demo, or runs/demo_<sample>)")
    parser.add_argument("--sample", choices=SAMPLES, help=f"default: {adults}; with --ship {fetuses}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="remove the results of an earlier demo")
    parser.add_argument("--ship", action="store_true", help="put the resulting weights into the bundles")
    arguments = parser.parse_args()
    sample = arguments.sample or (fetuses if arguments.ship else adults)
    if arguments.ship and sample != fetuses:
        parser.error(f"the shipped weights are those of {fetuses}: leave out --sample")
    output = arguments.output or ROOT / "runs" / ("demo" if sample == adults else f"demo_{sample}")
    # the whole method on the fetuses starts anew each time, as its weights may be shipped
    overwrite = arguments.overwrite or sample == fetuses
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")  # of libraries, as the command line does
    if overwrite and output.exists():
        print(f"Removing the results of an earlier run in {output}", flush=True)
    try:
        print(f"\n{demo(str(output), sample=sample, train=True, seed=arguments.seed, overwrite=overwrite)}")
    except MAPSegError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if arguments.ship:
        shutil.copyfile(output / "pretraining" / "model.pt", PRETRAINING / "models" / "model.pt")
        shutil.copyfile(output / "adaptation" / "model.pt", ADAPTATION / "models" / "model.pt")
        print(f"Weights put into {PRETRAINING / 'models'} and {ADAPTATION / 'models'}.")


if __name__ == "__main__":
    main()
