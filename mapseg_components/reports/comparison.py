# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of scans with the truth and the label maps of models, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.errors import ConfigError
from mapseg_components.files import replacing
from mapseg_components.reports.preview import PLANES, as_written, mark, plane_of

__all__ = ["ComparedScan", "draw_comparison"]


class ComparedScan(NamedTuple):
    """A scan and its label maps, arrays (X, Y, Z) on axes to the right, to the front and up."""

    name: str
    spacing: Sequence[float]
    """mm per axis."""
    grey: np.ndarray
    maps: Sequence[np.ndarray]
    """The truth, then that of each model."""


def draw_comparison(scans: Sequence[ComparedScan], models: Sequence[str], names: Sequence[str], path: Path) -> None:
    """Write a PNG: scan, truth and a label map of each model, one row a scan, the axial slice with the most structures.

    The right side of the body is on the left; the scan has letters of the sides and a bar of a length in mm.

    Args:
        scans: the rows.
        models: titles of the label maps after the truth.
        names: structures in the order of their value.
        path: of the PNG.

    Raises:
        ConfigError: matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    figure = comparison_figure(scans, models, names)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def comparison_figure(scans: Sequence[ComparedScan], models: Sequence[str], names: Sequence[str]) -> Any:
    """The matplotlib figure of `draw_comparison`. Raises `ConfigError` without matplotlib."""
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    patches, _ = optional_import("matplotlib.patches")
    colours, _ = optional_import("matplotlib.colors")
    palette = ["#00000000", *structure_colours(len(names))]  # background is transparent
    overlay = {"cmap": colours.ListedColormap(palette), "vmin": 0, "vmax": len(names), "interpolation": "nearest"}
    columns = 2 + len(models)
    figure = figure_module.Figure(figsize=(2.75 * columns, 3.2 * len(scans)))
    axes = figure.subplots(len(scans), columns, squeeze=False)
    for number, (row, scan) in enumerate(zip(axes, scans)):
        shape = {"origin": "lower", "aspect": scan.spacing[1] / scan.spacing[0]}
        slices = [scan.maps[0][..., z] for z in range(scan.grey.shape[2])]
        level = max(range(len(slices)), key=lambda z: (len(np.unique(slices[z])), np.count_nonzero(slices[z])))
        for column, (axis, title) in enumerate(zip(row, ["scan", "truth", *models])):
            axis.imshow(plane_of(scan.grey, 2, level), cmap="gray", **shape)
            if column:
                axis.imshow(plane_of(scan.maps[column - 1], 2, level), alpha=0.7, **shape, **overlay)
            axis.set_title("" if number else title, fontsize=12)
            axis.set_xticks([])
            axis.set_yticks([])
        mark(row[0], PLANES["axial"][3], scan.grey.shape[1::-1], scan.spacing[0])
        title = f"{scan.name.replace('_', ' ')}\nslice {level + 1} of {scan.grey.shape[2]}"
        row[0].set_ylabel(title, fontsize=11, parse_math=False)
    handles = [patches.Patch(color=colour, label=name) for colour, name in zip(palette[1:], names)]
    as_written(figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False, fontsize=11))
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure
