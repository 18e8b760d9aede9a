# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of a scan with its label map in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.errors import ConfigError
from mapseg_components.files import readable, replacing

__all__ = ["as_written", "can_draw", "draw_preview"]

# plane: fixed axis, horizontal axis, vertical axis of a RAS volume, and what stands left, right, below and above
PLANES = {"sagittal": (0, 1, 2, "PAIS"), "coronal": (1, 0, 2, "RLIS"), "axial": (2, 0, 1, "RLPA")}
PLACES = (  # of these letters, in shares of the picture
    (0.02, 0.5, "left", "center"),
    (0.98, 0.5, "right", "center"),
    (0.5, 0.02, "center", "bottom"),
    (0.5, 0.98, "center", "top"),
)
BARS_MM = (5, 10, 20, 50, 100, 200)  # the longest below a third of the picture is drawn
BRIGHTEST = 99.5  # percentile shown as white
MOST_ACROSS = 1200  # voxels along a side of a slice that are drawn
WIDEST_LEGEND, WIDEST_TITLE = 130, 110  # characters of 10 points on 11 inches


def can_draw() -> bool:
    """Whether matplotlib is installed; a packed bundle may run without."""
    return bool(optional_import("matplotlib.figure")[1])


def draw_preview(
    scan: np.ndarray,
    label_map: np.ndarray,
    affine: np.ndarray,
    names: Sequence[str],
    title: str,
    path: str | Path,
    body: bool = True,
) -> None:
    """Write a PNG: sagittal, coronal and axial slice through the middle of the structures; of one slice, that alone.

    A slice of more than 1200 voxels along a side is drawn with every second one, and so on.

    Titles have the number of the slice, the pictures letters of the sides and a bar of a length in mm, the legend the
    colour and the volume in ml of each structure. Coronal and axial slices show the right side of the body on the left,
    as the report of `mapseg adapt` does.

    Args:
        scan: (X, Y, Z).
        label_map: integers of the same shape.
        affine: (4, 4), voxel to mm, of both.
        names: structures in the order of their value.
        title: above the picture.
        path: of the PNG.
        body: the axes are those of a body, so that sides have letters and structures a volume; else structures have
            their area in pixels.

    Raises:
        ConfigError: matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    figure = preview_figure(scan, label_map, affine, names, title, body)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def preview_figure(
    scan: np.ndarray, label_map: np.ndarray, affine: np.ndarray, names: Sequence[str], title: str, body: bool = True
) -> Any:
    """The matplotlib figure of `draw_preview`. Raises `ConfigError` without matplotlib."""
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    patches, _ = optional_import("matplotlib.patches")
    colours, _ = optional_import("matplotlib.colors")
    turn = nib.orientations.io_orientation(affine)
    grey, label = (nib.orientations.apply_orientation(voxels, turn) for voxels in (scan, label_map))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(turn[:, 0])]
    centre = middle(label > 0)
    whole, counts = label.shape, [np.count_nonzero(label == value) for value in range(1, len(names) + 1)]
    flat = [axis for axis, side in enumerate(whole) if side == 1]
    planes = {name: plane for name, plane in PLANES.items() if len(flat) != 1 or plane[0] == flat[0]}
    step = 1 if len(planes) > 1 else max(-(-max(whole) // MOST_ACROSS), 1)  # volumes are no larger than that
    grey, label = grey[::step, ::step, ::step].astype(np.float32), label[::step, ::step, ::step]
    spacing = np.where(np.equal(whole, 1), spacing, spacing * step)
    finite = grey[np.isfinite(grey)]
    low, high = float(finite.min()), float(np.percentile(finite, BRIGHTEST, overwrite_input=True))
    listed = colours.ListedColormap(["#00000000", *structure_colours(len(names))])
    sides = [size * float(step) for size, step in zip(label.shape, spacing)]  # mm
    voxel_ml = float(np.prod(nib.affines.voxel_sizes(affine))) / 1000
    sizes = [f"{count * voxel_ml:.3g} ml" if body else f"{count} pixels" for count in counts]
    texts = [f"{name}, {size}" for name, size in zip(names, sizes)]
    columns = max(min(len(names), int(WIDEST_LEGEND / (max(map(len, texts), default=0) + 5)), 6), 1)
    widths = [sides[across] for _, across, _, _ in planes.values()]
    # each picture in its own proportions, and room for the legend
    tallest = 11 / sum(widths) * max(sides[up] for _, _, up, _ in planes.values())
    figure = figure_module.Figure(
        figsize=(11, min(tallest, 7) + 0.9 + 0.22 * -(-len(names) // columns)), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(1, len(planes), width_ratios=widths, squeeze=False)[0]
    for axis, (plane, (fixed, across, up, letters)) in zip(axes, planes.items()):
        shape = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
        axis.imshow(plane_of(grey, fixed, centre[fixed]), cmap="gray", vmin=low, vmax=high, **shape)
        overlay = plane_of(label, fixed, centre[fixed])
        axis.imshow(overlay, cmap=listed, vmin=0, vmax=len(names), interpolation="nearest", alpha=0.6, **shape)
        if body:
            axis.set_title(f"{plane}, slice {centre[fixed] + 1} of {whole[fixed]}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        mark(axis, letters if body else "", overlay.shape, float(spacing[across]))
    handles = [patches.Patch(color=colour, label=text) for text, colour in zip(texts, structure_colours(len(names)))]
    as_written(figure.legend(handles=handles, loc="outside lower center", ncol=columns, frameon=False, fontsize=10))
    voxel = " x ".join(f"{side:.3g}" for side in nib.affines.voxel_sizes(affine)[np.argsort(turn[:, 0])])
    size = f"voxels of {voxel} mm" if body else " x ".join(map(str, whole[:2])) + " pixels"
    figure.suptitle(f"{shortened(readable(title))}\n{size}", fontsize=10, parse_math=False)
    return figure


def as_written(legend: Any) -> None:
    """Let matplotlib draw the names of a legend as they are, with dollars that are no formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def mark(axis: Any, letters: str, shape: Sequence[int], spacing: float) -> None:
    """Letters of the sides of a slice, and a bar of a length in mm.

    Args:
        axis: of matplotlib.
        letters: left, right, below, above; empty for a picture without sides, whose size is not known to be in mm.
        shape: (up, across) of the slice.
        spacing: mm across.
    """
    ground = {"color": "white", "fontsize": 10, "bbox": {"facecolor": "#000000A0", "edgecolor": "none", "pad": 1.5}}
    for text, (x, y, ha, va) in zip(letters, PLACES):
        axis.text(x, y, text, transform=axis.transAxes, ha=ha, va=va, **ground)
    length = 0 if not letters else max((mm for mm in BARS_MM if mm < shape[1] * spacing / 3), default=0)
    if length:
        start, height = 0.04 * shape[1], 0.05 * shape[0]
        axis.plot([start, start + length / spacing], [height] * 2, color="white", linewidth=3)
        axis.text(start, 2 * height, f"{length} mm", ha="left", va="bottom", **ground)


def plane_of(volume: np.ndarray, fixed: int, index: int) -> np.ndarray:
    """A slice (up, across) of a volume (X, Y, Z) on RAS axes, the right side of the body on the left."""
    shown = np.take(volume, index, fixed).T
    return shown[:, ::-1] if fixed else shown


def shortened(name: str) -> str:
    """A name that fits the picture's width."""
    return name if len(name) <= WIDEST_TITLE else f"{name[: WIDEST_TITLE // 2]} ... {name[-WIDEST_TITLE // 2 :]}"


def middle(mask: np.ndarray) -> list[int]:
    """Median index of the voxels of a mask along each axis; the middle of its grid if there is none."""
    centre = []
    for axis, side in enumerate(mask.shape):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(mask.ndim) if other != axis))
        below, total = np.cumsum(counts), int(counts.sum())
        ends = np.searchsorted(below, [(total - 1) // 2, total // 2], side="right")
        centre.append(int(ends.sum()) // 2 if total else side // 2)
    return centre
