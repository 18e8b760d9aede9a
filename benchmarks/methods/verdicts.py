# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Are the verdicts without labels right? All benchmarks together, and what one task can learn of the others.

python -m benchmarks.methods.verdicts runs/benchmark/*/results.json [--docs docs/explanation/model_selection.md]

The estimates of a model's Dice are held against the truth, task by task. Their error has a part that all scans of a
task share: what a model gets wrong alike in every view shows in no agreement. So each task's estimates are also moved
by the median error of the other tasks, with intervals as wide as four fifths of the errors are then, in the task where
they are widest. That is the error on a task that was not used.

Further tables have what other rules would have shipped: the adapted model where its estimated gain is more than a least
one, which is negative of a method that learns from the source's labels while it learns from the target. Where no target
scan is held out, a method without them is judged on scans whose labels it has made itself. Their last row takes for
each task the least gain that lost least on the others. Where two models differ by less than 0.01 either is right: those
that differ are counted by themselves as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods.report import markdown, verdicts_of
from benchmarks.methods.scoring import EQUAL
from benchmarks.report import replace_between
from mapseg_components.plans.recipes import read_recipe
from mapseg_components.quality import COVERAGE, conformal_quantile

__all__ = ["errors_of", "pooled", "rules", "rules_table", "table"]

MARKER = "verdicts"
SOURCE, HELD_OUT, ADAPTED_ON = "source", "held out", "adapted on"
LEAST_GAINS = {  # Dice, by whether the method has the source's labels, else by what scans are judged
    SOURCE: (0.0, -0.005, -0.01, -0.015, -0.02, -0.025, -0.03, -0.04),
    HELD_OUT: (0.0, 0.005, 0.01, 0.015, 0.02),
    ADAPTED_ON: (0.0, 0.01, 0.02, 0.03, 0.04, 0.05),
}
TITLES = {
    SOURCE: "with the source's labels at hand",
    HELD_OUT: "without them, on scans held out of adaptation",
    ADAPTED_ON: "without them, on scans adapted on",
}
OTHERS, ALWAYS = "that of the other tasks", "none: always the adapted model"


def errors_of(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Estimate less truth, (n,): one number for each model of a run, the mean over its scans.

    Args:
        runs: records of a benchmark, as in ``results.json``.
    """
    found: dict[tuple[str, int, str], list[float]] = {}
    for run in runs:
        if run["state"] != "done" or run["oracle"] or run["same_model"]:
            continue
        for one in run["verdict"]["estimates"]:
            if one["estimate"] is not None and one["dice"] is not None:
                key = run["name"], run["seed"], one["model"]
                found.setdefault(key, []).append(one["estimate"] - one["dice"])
    return np.array([np.mean(errors) for errors in found.values()])


def pooled(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of each task, and of all together.

    Args:
        results: contents of ``results.json``.

    Returns:
        for each of them, then for all: ``title``, what `benchmarks.methods.report.verdicts_of` finds, ``models``
        (number of estimates), ``error`` (mean absolute), ``bias`` (mean, positive where too high), and ``moved_error``
        and ``held``, once moved and with intervals by the other tasks; ``None`` with a single task.
    """
    errors = [errors_of(one["runs"]) for one in results]
    tasks: dict[str, list[np.ndarray]] = {}
    for one, own in zip(results, errors):
        tasks.setdefault(one["task"]["name"], []).append(own)
    rows: list[dict[str, Any]] = []
    for one, own in zip(results, errors):
        variants = one.get("knobs")
        row = {
            "title": one["task"]["title"] + (f", variants of {variants['method']}" if variants else ""),
            **verdicts_of(one["runs"]),
            **figures(own),
            "moved_error": None,
            "held": 0,
        }
        others = [np.concatenate(each) for name, each in tasks.items() if name != one["task"]["name"]]
        others = [each for each in others if len(each)]
        if others and len(own):
            # tasks weigh alike, however many runs they have
            shift = float(np.median([np.median(each) for each in others]))
            widths = [conformal_quantile(sorted(abs(each - shift).tolist()), COVERAGE) for each in others]
            width = max(np.inf if each is None else each for each in widths)
            row["moved_error"] = float(np.mean(abs(own - shift)))
            row["held"] = int((abs(own - shift) <= width).sum())
        rows.append(row)
    moved = [row for row in rows if row["moved_error"] is not None]
    sums = [row["moved_error"] * row["models"] for row in moved]
    total = {
        "title": "all",
        **verdicts_of([run for one in results for run in one["runs"]]),
        **figures(np.concatenate(errors) if errors else np.zeros(0)),
        "moved_error": sum(sums) / sum(row["models"] for row in moved) if moved else None,
        "held": sum(row["held"] for row in moved),
    }
    return [*rows, total]


def figures(errors: np.ndarray) -> dict[str, Any]:
    """Number, mean absolute value and mean of errors."""
    known = len(errors) > 0
    return {
        "models": len(errors),
        "error": float(abs(errors).mean()) if known else None,
        "bias": float(errors.mean()) if known else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of Markdown."""
    head = ["task", "right", "lost", "models", "estimated Dice off by", "of it too high", "moved by the other tasks"]
    head += [f"intervals that hold (nominal {COVERAGE:.0%})"]

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.3f}"

    lines = []
    for row in rows:
        held = "" if row["moved_error"] is None else f"{row['held']} of {row['models']}"
        cells = [row["title"], f"{row['right']} of {row['comparisons']}", number(row["lost"]), str(row["models"])]
        cells += [number(row["error"]), number(row["bias"], "+"), number(row["moved_error"]), held]
        lines.append(cells)
    return "\n".join(markdown(head, lines))


def lost_by(least: float, runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Dice that the other model has more, of each comparison, with this least gain (see `rules`)."""
    lost = []
    for run in runs:
        said, ship = run["verdict"], run["verdict"]["ship"] == "adapted"
        if said["estimated_gain"] is not None:
            ship = said["estimated_gain"] >= least if least < 0 else ship and said["estimated_gain"] > least
        lost.append(max(-said["gain"] if ship else said["gain"], 0.0))
    return lost


def kind_of(run: Mapping[str, Any]) -> str:
    """Which of the least gains is for a run."""
    if read_recipe(run["method"]).source:
        return SOURCE
    return HELD_OUT if run["verdict"].get("held_out") else ADAPTED_ON


def rules(results: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What verdicts with another least gain would have shipped, over all benchmarks.

    Args:
        results: contents of ``results.json``; several may be of one task.
        kind: of runs, one of `LEAST_GAINS`.

    Returns:
        a row for each least gain, one without any, and one where it is that of the other tasks, which loses least on
        them: ``least`` (its name, or Dice), ``comparisons``, ``right`` (the better model, or a difference below 0.01),
        ``differ`` (by 0.01 or more), ``lost`` (Dice that the other model has more, mean).
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for one in results:
        judged = [run for run in one["runs"] if run["state"] == "done" and not run["oracle"] and not run["same_model"]]
        of_kind = [run for run in judged if kind_of(run) == kind]
        tasks.setdefault(one["task"]["name"], []).extend(of_kind)
    lost: dict[float | str, list[float]] = {
        least: [each for runs in tasks.values() for each in lost_by(least, runs)] for least in LEAST_GAINS[kind]
    }
    gains = [run["verdict"]["gain"] for runs in tasks.values() for run in runs]
    lost[ALWAYS] = [max(-gain, 0.0) for gain in gains]
    if len(tasks) > 1:
        lost[OTHERS] = []
        for name, runs in tasks.items():
            others = [run for other, own in tasks.items() if other != name for run in own]
            best = min(LEAST_GAINS[kind], key=lambda least: sum(lost_by(least, others)))
            lost[OTHERS] += lost_by(best, runs)
    return [
        {
            "least": least,
            "comparisons": len(values),
            "right": sum(value < EQUAL for value in values),
            "differ": sum(abs(gain) >= EQUAL for gain in gains),
            "lost": float(np.mean(values)) if values else None,
        }
        for least, values in lost.items()
    ]


def rules_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lines of Markdown."""
    lines = []
    for kind, title in TITLES.items():
        cells = []
        for row in rules(results, kind):
            lost = "" if row["lost"] is None else f"{row['lost']:.4f}"
            same = row["comparisons"] - row["differ"]
            right = [f"{row['right']} of {row['comparisons']}", f"{row['right'] - same} of {row['differ']}"]
            cells.append([str(row["least"]), *right, lost])
        head = [f"least estimated gain, {title}", "right", "of those that differ", "lost"]
        lines.append("\n".join(markdown(head, cells)))
    return "\n\n".join(lines)


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of benchmarks, or lists of them")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    read = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    results = [one for each in read for one in (each if isinstance(each, list) else [each])]
    text = f"{table(pooled(results))}\n\n{rules_table(results)}"
    if arguments.docs:
        replace_between(arguments.docs, MARKER, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
