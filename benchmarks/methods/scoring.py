# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Both models of a finished run of ``mapseg adapt`` on test scans, and what its verdict said beside what is true."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods.processes import Usage
from benchmarks.methods.task import Inputs, Task, stem_of
from mapseg_components.data.datalist import all_targets, load_datalist
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import sha256_of
from mapseg_components.metrics import METRICS, case_means

__all__ = ["MODELS", "CommandError", "finished", "mean_dice", "refuse_seen", "score", "scored", "verdict_beside_truth"]

MODELS = ("source_only", "adapted")
EQUAL = 0.01  # Dice: models that differ by less are both right choices
Run = Callable[[Sequence[str]], Usage]


class CommandError(Exception):
    """A command of a run failed.

    Args:
        reason: the last line that it printed.
        code: its exit code.
    """

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def finished(folder: Path) -> dict[str, Any]:
    """``run.json`` of a finished run. Raises `ConfigError`."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no run of mapseg adapt ({error}): name its output folder") from error
    missing = [name for name in MODELS if not (folder / "models" / f"{name}.pt").is_file()]
    if "assessment" not in record or missing:
        raise ConfigError(f"{folder} has no finished run of mapseg adapt: let it end, it has a report.html then")
    return record


def refuse_seen(folder: Path, task: Task) -> None:
    """Refuse a run whose scans are among the test scans, or whose structures are others. Raises `DataError`."""
    sections = ("source_training", "source_validation")
    cases = [*(case for name in sections for case in load_datalist(folder / "datalist.json", name))]
    images = [case["image"] for case in (*cases, *all_targets(folder / "datalist.json"))]
    checksums = {sha256_of(image) for image in images if Path(image).is_file()}
    paths = set(images)
    seen = [case["image"] for case in task.parts["test"]]
    seen = [image for image in seen if image in paths or sha256_of(image) in checksums]
    if seen:
        raise DataError(f"{folder} was trained on test scans of the task: {', '.join(seen)}: name another run")
    labels = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))["labels"]
    if dict(labels) != task.labels:
        raise DataError(f"{folder} has the structures {labels}, the task {task.labels}: name a run of this task")


def score(folder: Path, output: Path, task: Task, inputs: Inputs, run: Run) -> dict[str, Any]:
    """Predict the test scans by both models, and compare with the truth.

    Args:
        folder: finished run, read only.
        output: for label maps and figures.
        task: of the test.
        inputs: its files.
        run: a command of ``mapseg``.

    Returns:
        ``models`` (model to one row per case and structure), ``same_model``, ``weights_bytes``, ``verdict``, ``order``
        and ``stages``.

    Raises:
        CommandError: a command failed.
        ConfigError: the run is not finished.
    """
    record = finished(folder)
    weights = {name: folder / "models" / f"{name}.pt" for name in MODELS}
    same = sha256_of(weights["source_only"]) == sha256_of(weights["adapted"])
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        if same and rows:
            rows[name] = rows["source_only"]
            continue
        rows[name] = scored(folder, weights[name], output / name, task, inputs, run)
    return {
        "models": rows,
        "same_model": same,
        "weights_bytes": weights["adapted"].stat().st_size,
        "verdict": verdict_beside_truth(folder, record, output, task, inputs, run, rows),
        "order": record.get("order"),
        "stages": {key: record.get(key, {}) for key in ("epochs", "seconds", "processor_seconds")},
    }


def scored(folder: Path, weights: Path, output: Path, task: Task, inputs: Inputs, run: Run) -> list[dict[str, Any]]:
    """Label maps of the test scans by one model, and their rows, see `evaluated`. Raises `CommandError`."""
    device = [f"--device={task.arguments['device']}"] if "device" in task.arguments else []
    common = [*device, "--overwrite", "--quiet", "--num_threads=1"]
    words = ["predict", str(inputs.images), str(output), f"--bundle={folder}", f"--weights={weights}"]
    run([*words, "--no_preview", "--no_overlap", *common])
    figures = output.with_name(f"{output.name}_figures")
    rows = evaluated(output, inputs.truth, folder, figures, task.tolerance_mm, run)
    lacking = {case["case_id"] for case in task.parts["test"]} - {row["case"] for row in rows}
    if lacking:
        raise CommandError(f"no label map of the test scans {sorted(lacking)}", 1)
    return rows


def evaluated(
    predictions: Path, truth: Path, bundle: Path, output: Path, tolerance_mm: float, run: Run, common: bool = False
) -> list[dict[str, Any]]:
    """Rows of ``mapseg evaluate``: one per case and structure."""
    words = ["evaluate", str(predictions), str(truth), f"--labels={bundle}", f"--tolerance_mm={tolerance_mm}"]
    words += [f"--output={output}", "--overwrite", "--quiet", "--num_threads=1"]
    run([*words, "--common"] if common else words)
    with (output / "evaluation.csv").open(encoding="utf-8", newline="") as stream:
        rows = [dict(row) for row in csv.DictReader(stream)]
    kept = []
    for row in rows:
        values = {metric: float(row[metric]) if row[metric] else None for metric in METRICS}
        kept.append({"case": row["case"], "structure": row["structure"], **values})
    return kept


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over cases of the mean over structures."""
    return float(np.mean([value for value in case_means(rows, "dice").values() if value is not None]))


def verdict_beside_truth(
    folder: Path,
    record: Mapping[str, Any],
    output: Path,
    task: Task,
    inputs: Inputs,
    run: Run,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What ``mapseg adapt`` said without labels, and what the test scans say.

    Where label maps of the target scans are known, which no method reads, each estimate is compared with the Dice of
    the same scan. Else the mean estimate of a model is compared with its mean Dice on the test scans, which are others.

    Returns:
        ``ship``, ``estimated_gain``, ``interval``, ``gain`` (of the test), ``right`` (ships the better model, or they
        differ by less than 0.01), ``lost`` (Dice that the other model has more), ``held_out``, ``coverage`` (nominal,
        of the intervals of single scans), ``on`` ("the judged scans" or "the test scans"), and ``estimates``:
        ``model``, ``estimate``, ``dice``, and of single scans ``case`` and ``interval``.
    """
    assessment = record["assessment"]
    said = assessment["verdict"]
    dice = {name: mean_dice(rows[name]) for name in MODELS}
    gain = dice["adapted"] - dice["source_only"]
    lost = max(-gain if said["ship"] == "adapted" else gain, 0.0)
    estimates: list[dict[str, Any]] = []
    images = {case["case_id"]: Path(case["image"]) for case in all_targets(folder / "datalist.json")}
    files = {case: stem_of(image) for case, image in images.items()}
    judged = {case["case"] for case in assessment["models"]["adapted"]["cases"]}
    on_judged = bool(judged) and all(is_known(images[case], task, inputs.target_truth) for case in judged)
    for name in MODELS:
        cases = assessment["models"][name]["cases"]
        if on_judged:
            found = evaluated(
                predictions_of(folder, name),
                Path(str(inputs.target_truth)),
                folder,
                output / f"{name}_judged",
                1.0,
                run,
                True,
            )
            truths = case_means(found, "dice")
            for case in cases:
                one = {"model": name, "case": case["case"], "estimate": case["estimated_dice"]}
                estimates.append(one | {"dice": truths.get(files[case["case"]]), "interval": case.get("interval")})
        else:
            values = [case["estimated_dice"] for case in cases if case["estimated_dice"] is not None]
            if values:
                estimates.append({"model": name, "estimate": float(np.mean(values)), "dice": dice[name]})
    return {
        "ship": said["ship"],
        "estimated_gain": said["gain"],
        "interval": said["interval"],
        "gain": gain,
        "right": lost < EQUAL,
        "lost": lost,
        "held_out": assessment.get("held_out", False),
        "coverage": assessment.get("coverage"),
        "on": "the judged scans" if on_judged else "the test scans",
        "estimates": estimates,
    }


def is_known(image: Path, task: Task, truth: Path | None) -> bool:
    """Whether a scan is one of the task's target, by its content, whose label map is there."""
    targets = {stem_of(case["image"]): case["image"] for case in task.parts["target"]}
    name = stem_of(image)
    if truth is None or name not in targets or name not in {stem_of(path) for path in truth.iterdir()}:
        return False
    return image.is_file() and sha256_of(image) == sha256_of(targets[name])


def predictions_of(run: Path, model: str) -> Path:
    """Label maps of a run's target scans, on the scans' own grids."""
    native = run / "predictions" / model / "native"
    return native if native.is_dir() else native.parent
