#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Is the label-free verdict of `mapseg adapt` right? Its estimates beside the Dice of models of tools/measure.py.

    python tools/verdict.py --datalist DATALIST --experiment neonate_t1_to_t2 --measured DIR --seeds 0 1

DATALIST, --experiment, --more and --seeds as they were given to measure.py, whose --output is DIR. Each model is
compared with the source-only model that it comes from on the scans of target_test, without their labels, as `mapseg
adapt` compares its two models; Dice is what measure.py's evaluation found there. Lost by the choice is what the other
model would have had more than the one that the verdict ships. Writes DIR/verdict.json and prints two tables.

    python tools/verdict.py --runs RUN RUN ... --truth LABELS LABELS ...

Finished output folders of `mapseg adapt`, and for each the folder of the true label maps of its target scans (or one
for all): what each verdict said and the Dice of the predictions of both models on the scans that it judged. Prints the
mean absolute error of the estimates, the share of right choices and how often the intervals hold the Dice.
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

from mapseg_components.commands.assess import assess, verdict_of
from mapseg_components.commands.evaluate import evaluate
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import all_targets, stem
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.measure import MODELS, SOURCE, value_of, weights_of
from tools.stages import ADAPTATION

COMPARED = [name for name in MODELS if name != "oracle"]


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
            said = verdict_of(models[SOURCE], models[name])
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
            interval = row["interval"] and " ({:+.3f} to {:+.3f})".format(*row["interval"])
            estimate = f"{row['estimated_gain']:+.3f}{interval}" if interval else "none"
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


def judged(run: Path, truth: Path) -> dict[str, Any]:
    """What the verdict of a run said and what is true. Raises `ConfigError` for a run or truth that does not do."""
    record = run / "run.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if "assessment" not in found:
        raise ConfigError(f"{run} has no finished run of mapseg adapt: name output folders that have a report.html")
    assessment = found["assessment"]
    files = {case["case_id"]: stem(Path(case["image"])) for case in all_targets(run / "datalist.json")}
    segmentations, means = [], {}
    for model, figures in assessment["models"].items():
        folder = run / "predictions" / model
        native = folder / "native"
        rows = evaluate(
            str(native if native.is_dir() else folder), str(truth), labels=str(run), common=True, quiet=True
        ).rows
        dice: dict[str, list[float]] = {}
        for row in rows:
            if row["dice"] is not None:
                dice.setdefault(row["case"], []).append(row["dice"])
        missing = [case["case"] for case in figures["cases"] if files[case["case"]] not in dice]
        if missing:
            raise ConfigError(f"{truth} has no label map of {missing}, which the verdict of {run} judged: add them")
        truths = [float(np.mean(dice[files[case["case"]]])) for case in figures["cases"]]
        means[model] = float(np.mean(truths))
        for case, true in zip(figures["cases"], truths):
            own = {"case": case["case"], "model": model, "dice": true, "estimate": case["estimated_dice"]}
            segmentations.append(own | {"interval": case.get("interval")})
    verdict = assessment["verdict"]
    gain = means["adapted"] - means["source_only"]
    lost = max(-gain if verdict["ship"] == "adapted" else gain, 0.0)
    return {
        "run": str(run),
        "held_out": assessment.get("held_out", False),
        "coverage": assessment.get("coverage"),
        "dice": means,
        "gain": gain,
        "estimated_gain": verdict["gain"],
        "ship": verdict["ship"],
        "lost": lost,
        "segmentations": segmentations,
    }


def table_of_runs(rows: list[dict[str, Any]]) -> str:
    """A line per run in Markdown, and the figures of all."""
    lines = ["| run | judged on | source-only | adapted | true gain | estimated gain | shipped | lost by the choice |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        scans = f"{len(row['segmentations']) // len(row['dice'])} {'held out' if row['held_out'] else 'adapted on'}"
        estimate = "none" if row["estimated_gain"] is None else f"{row['estimated_gain']:+.3f}"
        cells = [Path(row["run"]).name, scans, *(f"{row['dice'][name]:.3f}" for name in ("source_only", "adapted"))]
        cells += [f"{row['gain']:+.3f}", estimate, row["ship"], f"{row['lost']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    every = [one for row in rows for one in row["segmentations"]]
    known = [one for one in every if one["estimate"] is not None]
    within = [one for one in known if one["interval"] is not None]
    right = sum(row["lost"] == 0 for row in rows)
    lines += ["", f"The better model was shipped in {right} of {len(rows)} runs ({right / len(rows):.0%})."]
    if known:
        error = np.mean([abs(one["estimate"] - one["dice"]) for one in known])
        lines.append(f"Mean absolute error of the estimated Dice: {error:.3f} ({len(known)} segmentations).")
    if within:
        holds = sum(one["interval"][0] <= one["dice"] <= one["interval"][1] for one in within)
        nominal = ", ".join(sorted({f"{row['coverage']:.0%}" for row in rows if row["coverage"] is not None}))
        lines.append(
            f"Intervals hold the Dice in {holds} of {len(within)} ({holds / len(within):.0%}; nominal {nominal})."
        )
    if len(within) < len(every):
        lines.append(f"{len(every) - len(within)} of {len(every)} segmentations have no interval.")
    return "\n".join(lines)


def compare_runs(runs: list[Path], truths: list[Path]) -> None:
    """Print the table of finished runs. Raises `ConfigError`."""
    if len(truths) not in (1, len(runs)):
        raise ConfigError(f"--truth has {len(truths)} folders, expected 1 or one for each of {len(runs)} runs")
    print(table_of_runs([judged(run, truth) for run, truth in zip(runs, truths * (len(runs) // len(truths)))]))


def main() -> None:
    """Assess all models of all seeds; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", type=Path)
    parser.add_argument("--experiment", help="name of an overlay of the bundle")
    parser.add_argument("--more", action="append", default=[], help="a further overlay, such as fine.yaml")
    parser.add_argument("--measured", type=Path, help="the --output of measure.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED, help="judge these models")
    parser.add_argument("--amp", help="bf16, fp16 or None; else bf16, as in small_data.yaml")
    parser.add_argument("--symmetric", action="store_true", help="as of mapseg adapt: mirrored scans are compared too")
    parser.add_argument("--tiny", action="store_true", help="if measure.py had it")
    parser.add_argument("--runs", type=Path, nargs="+", help="finished output folders of mapseg adapt")
    parser.add_argument("--truth", type=Path, nargs="+", help="true label maps: one folder, or one for each run")
    arguments = parser.parse_args()
    if arguments.runs:
        if not arguments.truth:
            parser.error("--runs needs --truth")
        try:
            compare_runs(arguments.runs, arguments.truth)
        except MAPSegError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        return
    missing = [name for name in ("datalist", "experiment", "measured") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"--{', --'.join(missing)} missing (or name --runs)")
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
