# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a picture: Dice of every method before and after adaptation, beside the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.methods.report import ORACLE
from mapseg_components.files import replacing
from mapseg_components.metrics import MEAN

__all__ = ["draw"]

# model: name in the picture, colour (those of tools/results_figure.py)
MODELS = {"source_only": ("before adaptation", "#999999"), "adapted": ("after adaptation", "#0072b2")}
ORACLE_COLOUR = "#e69f00"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars of the mean Dice with its interval over cases, the seeds as points, the oracle and the baseline as lines.

    Args:
        results: content of ``results.json``; failed methods have their name alone.
        path: PNG to write.
    """
    summary = results["summary"]
    shown = {name: one for name, one in summary["methods"].items() if name != ORACLE}
    figure = Figure(figsize=(9.5, 1.6 + 0.5 * len(shown)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(MODELS)
    for row, one in enumerate(shown.values()):
        if not one["seeds"]:
            axis.text(0.01, row, "failed", va="center", fontsize=9, color="#d55e00")
            continue
        for place, (model, (_, colour)) in enumerate(MODELS.items()):
            found, at = one["summary"][model][MEAN]["dice"], row + (place - 0.5) * height
            low, high = found["ci95"] or (found["mean"], found["mean"])
            error = [[max(found["mean"] - low, 0.0)], [max(high - found["mean"], 0.0)]]
            axis.barh(at, found["mean"], height * 0.94, color=colour, xerr=error, ecolor="#555555", capsize=2)
            seeds = one["dice_by_seed"][model]
            axis.plot(seeds, [at] * len(seeds), "o", color="black", markersize=3)
    for name, colour in MODELS.values():
        axis.barh([0], [0], color=colour, label=name)
    axis.plot([], [], "o", color="black", markersize=3, label="single seeds")
    oracle = summary["methods"].get(ORACLE)
    if oracle and oracle["seeds"]:
        axis.axvline(oracle["dice"]["adapted"], color=ORACLE_COLOUR, linestyle="--", label="oracle (target labels)")
    if summary["baseline"]:
        value = summary["methods"][summary["baseline"]]["dice"]["adapted"]
        axis.axvline(value, color="#555555", linestyle=":", label="strongest source-only baseline")
    axis.set_yticks(range(len(shown)), list(shown))
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel(f"Dice on {results['task']['test_cases']} test cases: {results['task']['title']}")
    axis.set_xlim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=5, frameon=False, loc="outside upper center", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
