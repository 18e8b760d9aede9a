# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of a scan with its label map in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.errors import ConfigError
from mapseg_components.files import readable, replacing

__all__ = ["can_draw", "draw_preview"]

# plane: fixed axis, horizontal axis, vertical axis of a RAS volume, and what stands left and right of the picture
PLANES = {"sagittal": (0, 1, 2, "P", "A"), "coronal": (1, 0, 2, "L", "R"), "axial": (2, 0, 1, "L", "R")}
BRIGHTEST = 99.5  # percentile shown as white


def can_draw() -> bool:
    """Whether matplotlib is installed; a packed bundle may run without."""
    return bool(optional_import("matplotlib.figure")[1])


def draw_preview(
    scan: np.ndarray, label_map: np.ndarray, affine: np.ndarray, names: Sequence[str], title: str, path: str | Path
) -> None:
    """Write a PNG: sagittal, coronal and axial slice through the middle of the structures, colours and legend beside.

    Args:
        scan: (X, Y, Z). label_map: integers of the same shape. affine: (4, 4), voxel to mm, of both.
        names: structures in the order of their value. title: above the picture. path: of the PNG.

    Raises:
        ConfigError: matplotlib is missing. ResourceError: the file cannot be written.
    """
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    patches, _ = optional_import("matplotlib.patches")
    colours, _ = optional_import("matplotlib.colors")
    turn = nib.orientations.io_orientation(affine)
    grey, label = (nib.orientations.apply_orientation(voxels, turn) for voxels in (scan.astype(np.float32), label_map))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(turn[:, 0])]
    centre = middle(label > 0)
    finite = grey[np.isfinite(grey)]
    low, high = float(finite.min()), float(np.percentile(finite, BRIGHTEST, overwrite_input=True))
    listed = colours.ListedColormap(["#00000000", *structure_colours(len(names))])
    widths = [label.shape[across] * spacing[across] for _, across, _, _, _ in PLANES.values()]
    figure = figure_module.Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(PLANES), width_ratios=widths)
    for axis, (plane, (fixed, across, up, left, right)) in zip(axes, PLANES.items()):
        shape = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
        axis.imshow(np.take(grey, centre[fixed], fixed).T, cmap="gray", vmin=low, vmax=high, **shape)
        overlay = np.take(label, centre[fixed], fixed).T
        axis.imshow(overlay, cmap=listed, vmin=0, vmax=len(names), interpolation="nearest", alpha=0.6, **shape)
        axis.set_title(f"{plane}, slice {centre[fixed] + 1} of {label.shape[fixed]}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        for text, place, side in ((left, 0.02, "left"), (right, 0.98, "right")):
            axis.text(place, 0.5, text, transform=axis.transAxes, color="white", ha=side, va="center", fontsize=9)
    handles = [patches.Patch(color=colour, label=n) for n, colour in zip(names, structure_colours(len(names)))]
    figure.legend(handles=handles, loc="outside lower center", ncol=min(len(names), 6), frameon=False, fontsize=9)
    figure.suptitle(readable(title), fontsize=10, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def middle(mask: np.ndarray) -> list[int]:
    """Median index of the voxels of a mask along each axis; the middle of its grid if there is none."""
    centre = []
    for axis, side in enumerate(mask.shape):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(mask.ndim) if other != axis))
        below, total = np.cumsum(counts), int(counts.sum())
        ends = np.searchsorted(below, [(total - 1) // 2, total // 2], side="right")
        centre.append(int(ends.sum()) // 2 if total else side // 2)
    return centre
