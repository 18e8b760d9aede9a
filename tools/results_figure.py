#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The README's picture, from a table of docs/reference/results.md: python tools/results_figure.py PNG."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from matplotlib.figure import Figure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "results.md"
SECTION = "### The three settings, two seeds"
MODELS = {  # row of the table: name in the picture, colour
    "continued": ("source-only (equal steps)", "#999999"),
    "adapted": ("adapted (MAPSeg)", "#0072b2"),
    "oracle": ("oracle (trained on target labels)", "#e69f00"),
}


def read_table(text: str, section: str) -> tuple[list[str], dict[str, list[float]]]:
    """Columns and rows of the first table below a heading.

    Args:
        text: Markdown.
        section: the heading.

    Returns:
        names of the columns after the first; first cell of each row to its numbers.

    Raises:
        ValueError: there is no such heading, or no table below it.
    """
    after = text[text.index(section) :].splitlines()
    table = itertools.takewhile(is_row, itertools.dropwhile(lambda line: not is_row(line), after))
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    if len(cells) < 3:
        raise ValueError(f"no table below {section!r}")
    return cells[0][1:], {first: [float(cell) for cell in others] for first, *others in cells[2:]}


def is_row(line: str) -> bool:
    """Whether a line of Markdown belongs to a table."""
    return line.startswith("|")


def draw(path: Path) -> None:
    """Mean Dice of each structure, and of all with both seeds as points."""
    columns, rows = read_table(PAGE.read_text(encoding="utf-8"), SECTION)
    seeds = [number for number, name in enumerate(columns) if name.startswith("seed")]
    shown = [number for number, _ in enumerate(columns) if number not in seeds]
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(MODELS)
    for place, (row, (name, colour)) in enumerate(MODELS.items()):
        at = [group + (place - (len(MODELS) - 1) / 2) * width for group in range(len(shown))]
        axis.bar(at, [rows[row][number] for number in shown], width * 0.94, color=colour, label=name)
        axis.plot([at[0]] * len(seeds), [rows[row][number] for number in seeds], "o", color="black", markersize=4)
    axis.plot([], [], "o", color="black", markersize=4, label="single runs (seeds 0 and 1)")
    labels = ["all seven" if columns[number] == "mean" else columns[number] for number in shown]
    axis.set_xticks(range(len(shown)), labels)
    axis.set_ylabel("Dice on T2w of six newborns")
    axis.set_ylim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=2, frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
