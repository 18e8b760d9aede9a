#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Is the label-free verdict of `mapseg adapt` right? Its estimates beside the Dice of models of tools/measure.py.

    python tools/verdict.py --datalist DATALIST --experiment neonate_t1_to_t2 --measured DIR --seeds 0 1

DATALIST, --experiment, --more and --seeds as they were given to measure.py, whose --output is DIR. Each model is
compared with the source-only model that it comes from on the scans of target_test, without their labels, as `mapseg
adapt` compares its two models; Dice is what measure.py's evaluation found there. Lost by the choice is what the other
model would have had more than the one that the verdict ships. Writes DIR/verdict.json and prints two tables.

Runs of `mapseg adapt` are held against the truth by `make benchmark FROM=RUN` (docs/reference/benchmark.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from mapseg_components.commands.assess import assess
from mapseg_components.commands.verdict import least_gain_of, verdict_of
from mapseg_components.data import load_datalist
from mapseg_components.files import write_json
from mapseg_components.plans.recipes import read_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.measure import MODELS, SOURCE, value_of, weights_of
from tools.stages import ADAPTATION

RECIPES = {"continued": "source_only", "adapted": "mapseg", "test-time": "test_time", "federated": "federated"}
COMPARED = [name for name in MODELS if name in RECIPES]


def write_bundle(folder: Path, datalist: Path, overlays: list[str], changes: dict[str, Any]) -> None:
    """What `assess` reads: a config for inference, and a datalist with the test scans in the place of the target's."""
    configs = ADAPTATION / "configs"
    own = ConfigParser.load_config_file(configs / "inference.json")
    asked = ConfigParser.load_config_files([str(configs / name) for name in ("train.json", *overlays)])
    written = ConfigParser.load_config_files([str(configs / name) for name in ("inference.json", *overlays)])
    (folder / "configs").mkdir()
    settled = {key: written[key] for key in own} | {"labels": asked["labels"]} | changes
    write_json(settled, folder / "configs" / "inference.json")
    sections = {name: load_datalist(datalist, name) for name in ("source_training", "source_validation")}
    scans = [{key: case[key] for key in ("image", "case_id")} for case in load_datalist(datalist, "target_test")]
    write_json({**sections, "target_training": scans}, folder / "datalist.json")


def true_dice(seed: Path, name: str) -> dict[str, float]:
    """Mean Dice over structures, per scan."""
    cases = json.loads((seed / "evaluation" / name / "metrics.json").read_text(encoding="utf-8"))["cases"]
    return {
        case: float(np.mean([dice for dice in structures.values() if dice is not None]))
        for case, structures in cases.items()
    }


def compare(seed: Path, bundle: str, symmetric: bool, only: list[str]) -> list[dict[str, Any]]:
    """A row for each model of a seed: its scans' estimates and truth and, beside the source-only model, the verdict."""
    names = [SOURCE, *(name for name in only if (seed / "evaluation" / name / "metrics.json").is_file())]
    models = assess(bundle, {name: str(weights_of(seed, name)) for name in names}, symmetric)["models"]
    rows: list[dict[str, Any]] = []
    for name in names:
        truth = true_dice(seed, name)
        keys = ("case", "estimated_dice", "consistency", "confidence", "within_calibration")
        scans = [{"dice": truth[case["case"]], **{key: case[key] for key in keys}} for case in models[name]["cases"]]
        row = {"seed": seed.name, "model": name, "dice": float(np.mean([scan["dice"] for scan in scans]))}
        if rows:
            said = verdict_of(models[SOURCE], models[name], least_gain=least_gain_of(read_recipe(RECIPES[name]), False))
            gain = row["dice"] - rows[0]["dice"]
            lost = max(-gain if said["ship"] == "adapted" else gain, 0.0)
            row |= {"gain": gain, "estimated_gain": said["gain"], "interval": said["interval"]}
            row |= {"verdict": said["verdict"], "lost": lost}
        rows.append({**row, "scans": scans})
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables in Markdown: the verdicts, and how far the estimates of single scans are from the truth."""
    lines = ["| seed | model | Dice | true gain | estimated gain (95 % interval) | verdict | lost by the choice |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["seed"].removeprefix("seed"), row["model"], f"{row['dice']:.3f}"]
        if row["model"] == SOURCE:
            cells += [""] * 4
        else:
            interval = " ({:+.3f} to {:+.3f})".format(*row["interval"]) if row["interval"] else ""
            estimate = "none" if row["estimated_gain"] is None else f"{row['estimated_gain']:+.3f}{interval}"
            cells += [f"{row['gain']:+.3f}", estimate, row["verdict"], f"{row['lost']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    scans = [scan for row in rows for scan in row["scans"] if scan["estimated_dice"] is not None]
    if len(scans) < 3:
        return "\n".join(lines)
    values = {key: np.array([float(scan[key]) for scan in scans]) for key in scans[0] if key != "case"}
    error, inside = values["estimated_dice"] - values["dice"], values["within_calibration"] == 1
    lines += ["", "| segmentations | number | mean error of the estimate | mean absolute error |", "|---|---|---|---|"]
    for name, chosen in (("within the calibration", inside), ("outside", ~inside)):
        if chosen.any():
            lines.append(f"| {name} | {chosen.sum()} | {error[chosen].mean():+.3f} | {abs(error[chosen]).mean():.3f} |")
    found = (f"{key} {np.corrcoef(values['dice'], values[key])[0, 1]:.2f}" for key in ("consistency", "confidence"))
    lines += ["", f"Correlation with Dice over {len(scans)} segmentations: {', '.join(found)}."]
    gains = np.array([[row["gain"], row["estimated_gain"]] for row in rows if row.get("estimated_gain") is not None])
    if len(gains) > 2:
        lines.append(f"True and estimated gain, {len(gains)} models: {np.corrcoef(gains.T)[0, 1]:.2f}.")
    return "\n".join(lines)


def main() -> None:
    """Assess all models of all seeds; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", type=Path, required=True)
    parser.add_argument("--experiment", required=True, help="name of an overlay of the bundle")
    parser.add_argument("--more", action="append", default=[], help="a further overlay, such as fine.yaml")
    parser.add_argument("--measured", type=Path, required=True, help="the --output of measure.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED, help="judge these models")
    parser.add_argument("--amp", help="auto, bf16, fp16 or None; else auto, as in small_data.yaml")
    parser.add_argument("--symmetric", action="store_true", help="as of mapseg adapt: mirrored scans are compared too")
    parser.add_argument("--tiny", action="store_true", help="if measure.py had it")
    arguments = parser.parse_args()
    overlays = ["small_data.yaml", f"{arguments.experiment}.yaml", *arguments.more]
    overlays += ["tiny.yaml"] if arguments.tiny else []
    changes = {"amp": value_of(arguments.amp)} if arguments.amp else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder), arguments.datalist.absolute(), overlays, changes)
        for seed in arguments.seeds:
            rows += compare(arguments.measured / f"seed{seed}", folder, arguments.symmetric, arguments.only)
            write_json(rows, arguments.measured / "verdict.json")
    print(tables(rows))


if __name__ == "__main__":
    main()
