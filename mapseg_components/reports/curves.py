# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves over epochs as SVG in the page's colours, readable in its light and in its dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.reports.page import breakable

__all__ = ["FIGURES_STYLE", "curves", "small_multiples"]

# matplotlib's colours on the left are replaced by the page's
COLOURS = {"#010203": "currentColor", "#010204": "var(--line)"} | {
    f"#01020{4 + i}": f"var(--series-{i})" for i in range(1, 5)
}
INK, GRID, *SERIES = COLOURS
DASHES = ("solid", "dashed", "dotted", "dashdot")
PARTS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
# what matplotlib writes for all of the page, and what no browser needs
NOT_WANTED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)
MOST_PANELS = 60
FIGURES_STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1.25rem 1rem;
  align-items: end; }
@media (max-width: 34rem) { .panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); } }
figure { margin: 0; max-width: 40rem; min-width: 0; } figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption b { color: var(--text); font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .25rem 0; list-style: none;
  font-size: .875rem; }
.key i { display: inline-block; width: 2em; margin-right: .4em; border-top: 3px solid; vertical-align: .25em; }
.key i.swatch, figcaption i.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
  border: 1px solid var(--muted); vertical-align: -.1em; }
"""


def curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str, quantity: str) -> str:
    """A figure of HTML with one curve per key that some epoch has; empty without any. Up to four curves.

    Args:
        history: one mapping per epoch, with ``epoch``.
        keys: name in the legend to key.
        title: plain text.
        quantity: what the values are, and their unit in brackets: the title of the axis.
    """
    found = {name: points for name, key in keys.items() if (points := points_of(history, key))}
    if not found:
        return ""
    lines = list(zip(found.values(), SERIES, DASHES, strict=False))
    drawing = draw(lines, quantity, (4.8, 2.9), 9, described(title, found, quantity))
    legend = "".join(
        f'<li><i style="border-top-color:{COLOURS[colour]};border-top-style:{dash.replace("dashdot", "double")}"></i>'
        f"{escape(name)}</li>"
        for name, colour, dash in zip(found, SERIES, DASHES)
    )
    return f'<figure><figcaption><b>{escape(title)}</b></figcaption><ul class="key">{legend}</ul>{drawing}</figure>'


def small_multiples(
    history: Sequence[Mapping[str, Any]],
    keys: Mapping[str, str],
    quantity: str,
    unit: str,
    usual: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """One small figure per key that some epoch has, each on a separate axis from 0, for small values beside large ones.

    Args:
        history: as for `curves`.
        keys: name of a structure, in the order of their colours, to key.
        quantity: quantity of the values.
        unit: unit of the values.
        usual: name to lowest and highest value, shown as a band as far as the axis has it.

    Returns:
        HTML; empty without any value. At most 60 figures.
    """
    parts = []
    for (name, key), colour in zip(list(keys.items())[:MOST_PANELS], structure_colours(len(keys))):
        points = points_of(history, key)
        if not points:
            continue
        values = [value for _, value in points]
        top = 1.25 * max(values) or 1.0
        band = None if usual is None or name not in usual else (usual[name][0], usual[name][-1])
        if band is not None and band[0] < 2 * top:
            top = max(top, min(1.1 * band[1], 2 * top))
        description = described(f"{quantity} of {name}", {name: points}, unit)
        drawing = draw([(points, SERIES[0], "solid")], f"{quantity} ({unit})", (2.5, 1.75), 8, description, top, band)
        parts.append(
            f'<figure><figcaption><i class="swatch" style="background:{colour}"></i><b>{breakable(name)}</b> '
            f"{values[-1]:.3g} {escape(unit)}</figcaption>{drawing}</figure>"
        )
    return f'<div class="panels">{"".join(parts)}</div>' if parts else ""


def points_of(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Epochs and values of a key."""
    return [(line["epoch"], line[key]) for line in history if line.get(key) is not None]


def described(title: str, found: Mapping[str, Sequence[tuple[int, float]]], quantity: str) -> str:
    """Text alternative of a figure."""
    ends = "; ".join(
        f"{name}: {points[0][1]:.3g} in epoch {points[0][0]}, {points[-1][1]:.3g} in epoch {points[-1][0]}"
        for name, points in found.items()
    )
    return f"{title}, {quantity}. {ends}."


def draw(
    lines: Sequence[tuple[Sequence[tuple[int, float]], str, str]],
    quantity: str,
    size: tuple[float, float],
    font: float,
    description: str,
    top: float | None = None,
    band: tuple[float, float] | None = None,
) -> str:
    """SVG of curves.

    Args:
        lines: points, colour, dashes.
        quantity: title of the axis.
        size: in inches.
        font: size in points.
        description: in words.
        top: of an axis from 0; by default the axis fits the values.
        band: to shade.
    """
    matplotlib, _ = optional_import("matplotlib")
    figure_type, _ = optional_import("matplotlib.figure", name="Figure")
    locator, _ = optional_import("matplotlib.ticker", name="MaxNLocator")
    settings = {"svg.fonttype": "none", "svg.hashsalt": description, "font.size": font, **dict.fromkeys(PARTS, INK)}
    with matplotlib.rc_context(settings):
        figure = figure_type(figsize=size, layout="constrained")
        axis = figure.subplots()
        if band is not None:
            axis.axhspan(*band, color=GRID, alpha=0.6, linewidth=0)
        for points, colour, dashes in lines:
            marker = "o" if len(points) < 15 else None
            axis.plot(*zip(*points), color=colour, linestyle=dashes, marker=marker, markersize=3, linewidth=1.8)
        axis.set_xlabel("Time (epochs)")
        axis.set_ylabel(quantity)
        axis.xaxis.set_major_locator(locator(nbins=4 if size[0] < 3 else 8, integer=True))
        axis.yaxis.set_major_locator(locator(nbins=4 if size[0] < 3 else 6))
        if top is not None:
            axis.set_ylim(0, top)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = NOT_WANTED.sub("", svg[svg.index("<svg") :])
    for mine, of_page in COLOURS.items():
        svg = svg.replace(mine, of_page)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
