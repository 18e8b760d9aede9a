# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves over epochs as SVG that takes the page's own text colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from monai.utils import optional_import

from mapseg_components.colours import structure_colours

__all__ = ["curves"]

INK = "#010203"  # replaced by the page's text colour
PARTS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str, unit: str) -> str:
    """A figure of HTML with one curve per key that some epoch has; empty without any.

    Args:
        history: one mapping per epoch, with ``epoch``. keys: name in the legend to key. title: plain text. unit: of the
            values, the label of the axis.
    """
    found = {}
    for name, key in keys.items():
        points = [(line["epoch"], line[key]) for line in history if line.get(key) is not None]
        if points:
            found[name] = points
    if not found:
        return ""
    matplotlib, _ = optional_import("matplotlib")
    figure_type, _ = optional_import("matplotlib.figure", name="Figure")
    locator, _ = optional_import("matplotlib.ticker", name="MaxNLocator")
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, **dict.fromkeys(PARTS, INK)}
    with matplotlib.rc_context(settings):
        figure = figure_type(figsize=(7.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for (name, points), colour in zip(found.items(), structure_colours(len(found))):
            axis.plot(*zip(*points), marker="o", markersize=3, color=colour, label=name)
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(locator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return f'<figure role="img" aria-label="{escape(title)}">{svg}<figcaption>{escape(title)}</figcaption></figure>'
