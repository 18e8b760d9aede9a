#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure adaptation on your own scans: source-only, continued, adapted, and an oracle trained with target labels.

    python tools/measure.py --datalist DATALIST --oracle ORACLE --experiment neonate_t1_to_t2 --output DIR

DATALIST has source_training, source_validation, target_training (images) and, to score, target_test. ORACLE has as
source_training and source_validation labelled scans of the target's kind, of people who are not in target_test. From
one source-only model three go on for equal steps: on the source alone, with adaptation, and on the oracle's scans.
``small_data.yaml``, then the experiment's overlay, then those of --more (where a bundle has one of that name). Run it
again to go on where it stopped; with --only it makes some of the models, so that two commands can share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.stages import ADAPTATION, PRETRAINING, run_bundle

MODELS = ["continued", "adapted", "oracle"]


def main() -> None:
    """Train every model, evaluate it, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, help="labelled target scans; left out without it")
    parser.add_argument("--experiment", required=True, help="name of an overlay in both bundles")
    parser.add_argument("--more", action="append", default=[], help="a further overlay, such as fine.yaml")
    parser.add_argument("--epochs", type=int, help="epochs of the models that go on; else from_source.yaml's")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="make and score these models")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the script out; nothing is learnt")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    overlays = ["small_data.yaml", f"{arguments.experiment}.yaml", *arguments.more]
    last = ["tiny.yaml"] if arguments.tiny else []
    train = ["train.json", *overlays, *last]
    pretraining = [name for name in train if (PRETRAINING / "configs" / name).is_file()]
    goes_on = ["train.json", *overlays, "from_source.yaml", *last]
    data = {"datalist": arguments.datalist.absolute(), "seed": arguments.seed}
    encoder = {"encoder_weights": output / "pretraining" / "model.pt"}
    start = {"initial_weights": output / "source" / "source_only.pt"}
    if arguments.epochs:
        start |= {"max_epochs": arguments.epochs}
    truth = {**data, "datalist": arguments.oracle.absolute()} if arguments.oracle else None

    if not (output / "pretraining" / "model.pt").is_file():
        run_bundle("pretraining", PRETRAINING, pretraining, output / "pretraining", **data)
    if not (output / "source" / "done").is_file():
        run_bundle("source-only", ADAPTATION, [*train, "source_only.yaml"], output / "source", **data, **encoder)
        (output / "source" / "done").touch()
    models = {"source-only": output / "source" / "source_only.pt"}
    for name in arguments.only:
        folder = output / name.replace(", ", "_")
        if name == "continued":
            run_bundle(name, ADAPTATION, [*goes_on, "source_only.yaml"], folder, **data, **start)
        elif name == "adapted":
            run_bundle(name, ADAPTATION, goes_on, folder, **data, **start)
        elif name == "oracle" and truth:
            run_bundle(name, ADAPTATION, [*goes_on, "source_only.yaml"], folder, **truth, **start)
        else:
            continue
        models[name] = folder / ("model.pt" if name == "adapted" else "source_only.pt")

    settings = ConfigParser.load_config_files([str(ADAPTATION / "configs" / name) for name in train])
    rows = []
    for name, weights in models.items():
        folder = output / "evaluation" / name.replace(", ", "_")
        configs = ["inference.json", "evaluate.json", *overlays, *last]
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
