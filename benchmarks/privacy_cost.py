# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What privacy settings cost in Dice on the shipped sample: python -m benchmarks.privacy_cost WEIGHTS OUTPUT.

A simulated federation of a server with the labelled source scans and two sites with two unlabelled scans each, from
the same weights (``source_only.pt`` of the demo on fetuses), once for each setting and seed, with the weights of the
last round evaluated on the held-out scans. Writes ``privacy_cost.json`` and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from mapseg_components.checkpoints import write_atomic
from mapseg_components.federated import simulate
from mapseg_components.federated.site import parser_of
from mapseg_components.files import write_json
from tools.stages import ADAPTATION, run_bundle

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "sample" / "fetal_age"
FILES = ("train.json", "from_source.yaml", "federated.json")
CLIP = 0.003  # two thirds of what a site's update moves here without it, see the table
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "percentile 90": {"privacy_percentile": 90.0},
    "noise 0.003": {"privacy_clip": CLIP, "privacy_noise": 0.003},
    "noise 0.03": {"privacy_clip": CLIP, "privacy_noise": 0.03},
    "noise 1": {"privacy_clip": CLIP, "privacy_noise": 1.0},
}


def make_sites(folder: Path) -> tuple[str, dict[str, str]]:
    """The server's datalist, and two sites that share the target scans."""
    content = json.loads((SAMPLE / "datalist.json").read_text())
    scans = [{"image": str(SAMPLE / each["image"])} for each in content["target_training"]]
    sites = {"site-1": scans[0::2], "site-2": scans[1::2]}
    for name, own in sites.items():
        write_json({"target_training": own}, folder / f"{name}.json")
    return str(SAMPLE / "datalist.json"), {name: str(folder / f"{name}.json") for name in sites}


def measure(folder: Path, weights: Path, changes: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict:
    """One federation and its evaluation."""
    settings = ConfigParser.load_config_files([ADAPTATION / "configs" / name for name in FILES])
    settings |= {
        "bundle_root": str(ADAPTATION),
        "dataset_dir": str(SAMPLE),
        "initial_weights": str(weights),
        "seed": seed,
        "rounds": arguments.rounds,
        "server_steps": arguments.steps,
        "client_steps": arguments.steps,
        "min_sites": 2,
        "last_learning_rate": settings["learning_rate"] / 10,
        "ema_schedule": [[None, 0.9]],
        **changes,
    }
    datalist, sites = make_sites(folder)
    plan = parser_of(settings).get_parsed_content("federation")
    write_atomic(simulate(plan, datalist, sites, folder, folder, settings=settings), folder / "last_round.pt")
    configs = ["inference.json", "evaluate.json"]
    run_bundle(folder.name, ADAPTATION, configs, folder, dataset_dir=SAMPLE, weights=folder / "last_round.pt")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    reports = [site for line in lines for site in line["sites"].values()]
    budgets = [site["privacy"] for site in reports if "privacy" in site]
    return {
        "dice": json.loads((folder / "metrics.json").read_text())["mean"],
        "movement": statistics.median(site["movement"] for site in reports),
        "epsilon_round": budgets[0]["epsilon"] if budgets else None,
        "epsilon_total": max(each["epsilon_total"] for each in budgets) if budgets else None,
    }


def table(results: dict[str, list[dict]], start: float, seeds: list[int]) -> str:
    """A row for each setting, Dice of each seed."""
    head = ["setting", *(f"Dice, seed {seed}" for seed in seeds), "mean", "movement of an update"]
    head += ["epsilon of a round", "epsilon in total"]
    rows = [["weights at the start", *[f"{start:.3f}"] * (len(seeds) + 1), "", "", ""]]
    for name, runs in results.items():
        dice = [run["dice"] for run in runs]
        epsilons = [runs[0]["epsilon_round"], runs[0]["epsilon_total"]]
        cells = [f"{each:,.0f}" if each and each > 100 else f"{each:.1f}" if each else "none" for each in epsilons]
        movement = f"{statistics.median(run['movement'] for run in runs):.2g}"
        rows.append([name, *(f"{each:.3f}" for each in dice), f"{statistics.mean(dice):.3f}", movement, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Run every setting and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="source_only.pt of the demo on fetuses")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="T_s and T_t")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parser.parse_args()
    output, weights = arguments.output.absolute(), arguments.weights.absolute()
    configs = ["inference.json", "evaluate.json"]
    run_bundle("start", ADAPTATION, configs, output / "start", dataset_dir=SAMPLE, weights=weights)
    start = json.loads((output / "start" / "metrics.json").read_text())["mean"]
    results: dict[str, list[dict]] = {}
    for name in arguments.settings:
        for seed in arguments.seeds:
            folder = output / f"{name.replace(' ', '_')}_{seed}"
            folder.mkdir()
            results.setdefault(name, []).append(measure(folder, weights, SETTINGS[name], seed, arguments))
            given = {"rounds": arguments.rounds, "steps": arguments.steps, "seeds": arguments.seeds, "clip": CLIP}
            write_json({**given, "start": start, "results": results}, output / "privacy_cost.json")
    print(table(results, start, arguments.seeds))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    main()
