#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure adaptation on your own scans: source-only, continued, adapted, and an oracle trained with target labels.

    python tools/measure.py --datalist DATALIST --oracle ORACLE --experiment neonate_t1_to_t2 --output DIR

DATALIST has source_training, source_validation, target_training (images) and, to score, target_test. ORACLE has as
source_training and source_validation labelled scans of the target's kind, of people who are not in target_test. From
one source-only model three go on for equal steps: on the source alone, with adaptation, and on the oracle's scans.
``small_data.yaml``, then the experiment's overlay. Run it again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.stages import ADAPTATION, PRETRAINING, run_bundle


def main() -> None:
    """Train every model, evaluate it, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, help="labelled target scans; left out without it")
    parser.add_argument("--experiment", required=True, help="name of an overlay in both bundles")
    parser.add_argument("--more", action="append", default=[], help="a further overlay; tiny.yaml tries the script out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    overlays = ["small_data.yaml", f"{arguments.experiment}.yaml", *arguments.more]
    train = ["train.json", *overlays]
    more = ["train.json", "small_data.yaml", f"{arguments.experiment}.yaml", "from_source.yaml", *arguments.more]
    data = {"datalist": arguments.datalist.absolute(), "seed": arguments.seed}
    encoder = {"encoder_weights": output / "pretraining" / "model.pt"}

    run_bundle("pretraining", PRETRAINING, train, output / "pretraining", **data)
    run_bundle("source-only", ADAPTATION, [*train, "source_only.yaml"], output / "source", **data, **encoder)
    start = {"initial_weights": output / "source" / "source_only.pt"}
    continued = [*more, "source_only.yaml"]
    run_bundle("source-only, continued", ADAPTATION, continued, output / "source_continued", **data, **start)
    run_bundle("adaptation", ADAPTATION, more, output / "adapted", **data, **start)
    models = {
        "source-only": output / "source" / "source_only.pt",
        "source-only, continued": output / "source_continued" / "source_only.pt",
        "adapted": output / "adapted" / "model.pt",
    }
    if arguments.oracle:
        truth = {**data, "datalist": arguments.oracle.absolute()}
        run_bundle("oracle", ADAPTATION, continued, output / "oracle", **truth, **start)
        models["oracle"] = output / "oracle" / "source_only.pt"

    settings = ConfigParser.load_config_files([str(ADAPTATION / "configs" / name) for name in train])
    rows = []
    for name, weights in models.items():
        folder = output / "evaluation" / name.replace(", ", "_")
        configs = ["inference.json", "evaluate.json", *overlays]
        extra = {"weights": weights, "datalist": data["datalist"], "labels": settings["labels"], "amp": "bf16"}
        extra["overwrite"] = True  # run again, it goes on where it stopped
        run_bundle(f"evaluation of {name}", ADAPTATION, configs, folder, **extra)
        metrics = json.loads((folder / "metrics.json").read_text())
        rows.append([name, metrics["mean"], *metrics["structures"].values()])
        names = list(metrics["structures"])
    print("\n| model | mean | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for name, *values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
