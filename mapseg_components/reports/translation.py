# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of slices that were translated, there and back, beside a slice of the domain they shall look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from monai.utils import optional_import

from mapseg_components.errors import ConfigError
from mapseg_components.files import readable, replacing

__all__ = ["draw_translation"]

COLUMNS = ("source", "translated", "back", "target")
INCHES, DPI = 2.4, 100


def draw_translation(rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], title: str, path: str | Path) -> None:
    """Write a PNG, a row of four slices for each case: source, translated, translated back, and one of the target.

    All slices are shown from 0, black, to 1, white: nothing is stretched, so that rows and epochs compare.

    Args:
        rows: for each case four slices (X, Y) in [0, 1], in the order of the columns.
        names: of the cases, beside the rows.
        title: above the picture.
        path: of the PNG.

    Raises:
        ConfigError: matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    figure = figure_module.Figure(
        figsize=(INCHES * len(COLUMNS), INCHES * len(rows) + 0.4), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for number, (slices, name) in enumerate(zip(rows, names)):
        for axis, pixels, column in zip(axes[number], slices, COLUMNS):
            axis.imshow(np.asarray(pixels).T, cmap="gray", vmin=0, vmax=1, origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(column, fontsize=10)
        axes[number][0].set_ylabel(readable(name)[:24], fontsize=8, parse_math=False)
    figure.suptitle(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
