#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure adaptation on your own scans, in the paper's three settings, beside a baseline of equal steps and an oracle.

    python tools/measure.py --datalist DATALIST --oracle ORACLE --experiment neonate_t1_to_t2 --seeds 0 1 --output DIR

DATALIST has source_training, source_validation, target_training (images) and, to score, target_test. ORACLE has as
source_training and source_validation labelled scans of the target's kind, of people who are not in target_test.

From one source-only model five go on for equal steps: on the source alone ("continued"), with adaptation ("adapted",
centralized), on the target alone from a hand-over package ("test-time"), as a simulated federation between the source
and sites that share the target scans ("federated"), and on the oracle's scans. ``small_data.yaml``, then the
experiment's overlay, then those of --more (where a bundle has one of that name). Run it again to go on where it
stopped; with --only it makes some of the models, so that two commands can share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from mapseg_components.data import load_datalist
from mapseg_components.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.stages import ADAPTATION, PRETRAINING, run_bundle

SOURCE = "source-only"  # that every model starts from
MODELS = ["continued", "adapted", "test-time", "federated", "oracle"]
# A site's few steps of a round must show in the teacher that it sends: 34 steps at 0.95 take it four fifths of the way.
FEDERATED: dict[str, Any] = {"ema_schedule": [[None, 0.95]], "last_learning_rate": 1e-5}


class Experiment:
    """Models of one seed, each made by the bundle commands that a user types.

    Args:
        arguments: of the command line.
        seed: of every stage.
        output: folder of this seed.
    """

    def __init__(self, arguments: argparse.Namespace, seed: int, output: Path) -> None:
        self.datalist, self.seed, self.output = arguments.datalist.absolute(), seed, output
        self.oracle = arguments.oracle.absolute() if arguments.oracle else None
        self.sites = arguments.sites
        self.changes = {key: value_of(text) for key, text in (change.split("=", 1) for change in arguments.set)}
        self.amp = {"amp": value_of(arguments.amp)} if arguments.amp else {}
        self.last = ["tiny.yaml"] if arguments.tiny else []
        self.overlays = ["small_data.yaml", f"{arguments.experiment}.yaml", *arguments.more]
        self.task = ["train.json", *self.overlays, *self.last]
        self.goes_on = ["train.json", *self.overlays, "from_source.yaml", *self.last]
        self.epochs = {"max_epochs": arguments.epochs} if arguments.epochs else {}

    @property
    def source_only(self) -> Path:
        """Weights that every model starts from."""
        return weights_of(self.output, SOURCE)

    def train(self, name: str, files: list[str], bundle: Path = ADAPTATION, **settings: Any) -> None:
        """One stage, in a folder of its name."""
        run_bundle(name, bundle, files, self.output / name, seed=self.seed, **self.amp, **settings)

    def start(self) -> None:
        """Pretraining and source-only training, unless they are finished."""
        encoder = self.output / "pretraining" / "model.pt"
        if not encoder.is_file():
            files = [name for name in self.task if (PRETRAINING / "configs" / name).is_file()]
            self.train("pretraining", files, PRETRAINING, datalist=self.datalist)
        done = self.output / "source" / "done"
        if not done.is_file():
            files = [*self.task, "source_only.yaml"]
            self.train("source", files, datalist=self.datalist, encoder_weights=encoder)
            done.touch()

    def make(self, name: str) -> Path | None:
        """Train one model; returns its weights, or ``None`` for the oracle without its scans."""
        start = {"initial_weights": self.source_only, **self.epochs, **self.changes}
        if name == "continued":
            self.train(name, [*self.goes_on, "source_only.yaml"], datalist=self.datalist, **start)
        elif name == "adapted":
            self.train(name, self.goes_on, datalist=self.datalist, **start)
        elif name == "test-time":
            self.test_time()
        elif name == "federated":
            self.federated()
        elif self.oracle is not None:
            self.train(name, [*self.goes_on, "source_only.yaml"], datalist=self.oracle, **start)
        else:
            return None
        return weights_of(self.output, name)

    def scans(self, section: str) -> list[dict[str, str]]:
        """Files of a section, by absolute paths."""
        cases = load_datalist(self.datalist, section)
        return [{key: case[key] for key in ("image", "label") if key in case} for case in cases]

    def test_time(self) -> None:
        """The package as the source site writes it, then adaptation with a datalist that knows the target alone."""
        package, site = self.output / "handover", self.output / "target.json"
        if not (package / "handover.json").is_file():
            files, weights = [*self.task, "handover_only.yaml"], {"initial_weights": self.source_only}
            self.train("package", files, datalist=self.datalist, handover_dir=package, **weights)
        write_json({"target_training": self.scans("target_training")}, site)
        files = [*self.goes_on, "handover.yaml", "test_time.yaml"]
        self.train("test-time", files, datalist=site, handover_dir=package, **self.epochs, **self.changes)

    def federated(self) -> None:
        """Rounds of two epochs' steps at the server, and as many at all sites together."""
        server, sites = self.output / "server.json", {}
        write_json({name: self.scans(name) for name in ("source_training", "source_validation")}, server)
        scans = self.scans("target_training")
        for number, own in enumerate(np.array_split(np.arange(len(scans)), self.sites), start=1):
            path = self.output / f"site_{number}.json"
            write_json({"target_training": [scans[index] for index in own]}, path)
            sites[f"site_{number}"] = str(path)
        files = [*self.goes_on, "federated.json"]
        settings = ConfigParser.load_config_files([str(ADAPTATION / "configs" / name) for name in files])
        settings |= {**self.epochs, **self.changes}
        epochs, length = int(settings["max_epochs"]), int(settings["epoch_length"])
        rounds = max(epochs // 2, 1)
        plan = {
            "rounds": rounds,
            "server_steps": math.ceil(epochs * length / rounds),
            "client_steps": math.ceil(epochs * length / (rounds * self.sites)),
        }
        start = {"datalist": server, "sites": sites, "initial_weights": self.source_only}
        self.train("federated", files, **{**start, **plan, **FEDERATED, **self.changes})

    def evaluate(self, name: str, weights: Path) -> None:
        """Dice on the target's test scans, into ``evaluation/<name>/metrics.json``."""
        settings = ConfigParser.load_config_files([str(ADAPTATION / "configs" / file) for file in self.task])
        folder = self.output / "evaluation" / name
        configs = ["inference.json", "evaluate.json", *self.overlays, *self.last]
        extra = {"weights": weights, "datalist": self.datalist, "labels": settings["labels"], "amp": "auto", **self.amp}
        extra["overwrite"] = True  # run again, it goes on where it stopped
        run_bundle(f"evaluation of {name}", ADAPTATION, configs, folder, **extra)


def weights_of(seed: Path, name: str) -> Path:
    """File of a model below the folder of its seed."""
    file = "source_only.pt" if name in (SOURCE, "continued", "oracle") else "model.pt"
    return seed / ("source" if name == SOURCE else name) / file


def value_of(text: str) -> str:
    """A value for a bundle's command line, which takes ``None`` for "not given" and leaves the value of the config."""
    return "$None" if text in ("None", "null") else text


def evaluated(output: Path, seeds: list[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Metrics of the models that every seed has, those of other commands as well."""
    results = {}
    for name in [SOURCE, *MODELS]:
        files = {seed: output / f"seed{seed}" / "evaluation" / name / "metrics.json" for seed in seeds}
        if all(file.is_file() for file in files.values()):
            results[name] = {seed: json.loads(file.read_text()) for seed, file in files.items()}
    return results


def table(results: dict[str, dict[int, dict[str, Any]]], seeds: list[int]) -> str:
    """Mean Dice of every seed, and per structure the mean over the seeds."""
    names = list(next(iter(next(iter(results.values())).values()))["structures"])
    head = ["model", *(f"seed {seed}" for seed in seeds), *(["mean"] if len(seeds) > 1 else []), *names]
    rows = [head, ["---"] * len(head)]
    for name, runs in results.items():
        means = [runs[seed]["mean"] for seed in seeds]
        means += [statistics.mean(means)] if len(seeds) > 1 else []
        structures = [statistics.mean(runs[seed]["structures"][each] for seed in seeds) for each in names]
        rows.append([name, *(f"{value:.3f}" for value in (*means, *structures))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Train every model of every seed, evaluate it, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, help="labelled target scans; left out without it")
    parser.add_argument("--experiment", required=True, help="name of an overlay in both bundles")
    parser.add_argument("--more", action="append", default=[], help="a further overlay, such as fine.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the models that go on")
    parser.add_argument("--amp", help="of every stage: auto, bf16, fp16 or None; else auto, as in small_data.yaml")
    parser.add_argument("--epochs", type=int, help="epochs of the models that go on; else from_source.yaml's")
    parser.add_argument("--sites", type=int, default=3, help="of the federation")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="make and score these models")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the script out; nothing is learnt")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    if any("=" not in change for change in arguments.set):
        parser.error(f"--set {' '.join(arguments.set)}: expected KEY=VALUE")
    if not 0 < arguments.sites <= len(load_datalist(arguments.datalist, "target_training")):
        parser.error(f"--sites {arguments.sites}: expected 1 to the number of target scans, for none may be without")
    output = arguments.output.absolute()
    for seed in arguments.seeds:
        print(f"seed {seed}")
        experiment = Experiment(arguments, seed, output / f"seed{seed}")
        experiment.start()
        models = {SOURCE: experiment.source_only, **{name: experiment.make(name) for name in arguments.only}}
        for name, weights in models.items():
            if weights is not None:
                experiment.evaluate(name, weights)
    print(f"\n{table(evaluated(output, arguments.seeds), arguments.seeds)}")


if __name__ == "__main__":
    main()
