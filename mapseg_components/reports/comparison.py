# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of scans with the truth and the label maps of models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.errors import ConfigError
from mapseg_components.files import replacing
from mapseg_components.reports.preview import plane_of

__all__ = ["draw_comparison"]

BAR_MM = 20


def draw_comparison(
    cases: Sequence[Mapping[str, str]], folders: Mapping[str, Path], names: Sequence[str], path: Path
) -> None:
    """Write a PNG: scan, truth and a label map of each model, one row a scan, the axial slice with the most structures.

    The right side of the body is on the left; a bar shows 20 mm.

    Args:
        cases: ``image``, ``label`` and ``case_id`` of each scan; all on the grid of its scan.
        folders: name of a model to the folder of its label maps, ``<case_id>_seg.nii.gz``.
        names: structures in the order of their value. path: of the PNG.

    Raises:
        ConfigError: matplotlib is missing. ResourceError: the file cannot be written.
    """
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    patches, _ = optional_import("matplotlib.patches")
    colours, _ = optional_import("matplotlib.colors")
    palette = ["#00000000", *structure_colours(len(names))]  # background is transparent
    overlay = {"cmap": colours.ListedColormap(palette), "vmin": 0, "vmax": len(names), "interpolation": "nearest"}
    columns = 2 + len(folders)
    figure = figure_module.Figure(figsize=(2.75 * columns, 3.2 * len(cases)))
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for number, (row, case) in enumerate(zip(axes, cases)):
        files = [
            case["image"],
            case["label"],
            *(folder / f"{case['case_id']}_seg.nii.gz" for folder in folders.values()),
        ]
        scan, *others = (nib.as_closest_canonical(nib.load(file)) for file in files)
        maps, spacing = [np.asarray(other.dataobj) for other in others], scan.header.get_zooms()[:3]
        slices = [maps[0][..., z] for z in range(scan.shape[2])]
        level = max(range(len(slices)), key=lambda z: (len(np.unique(slices[z])), np.count_nonzero(slices[z])))
        pictures = [plane_of(volume, 2, level) for volume in (np.asarray(scan.dataobj), *maps)]
        for column, (axis, title) in enumerate(zip(row, ["scan", "truth", *folders])):
            axis.imshow(pictures[0], cmap="gray", origin="lower", aspect=spacing[1] / spacing[0])
            if column:
                axis.imshow(pictures[column], origin="lower", alpha=0.7, aspect=spacing[1] / spacing[0], **overlay)
            axis.set_title("" if number else title, fontsize=12)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{case['case_id'].replace('_', ' ')}\nslice {level + 1} of {len(slices)}", fontsize=11)
        row[0].plot([2, 2 + BAR_MM / spacing[0]], [2, 2], color="white", linewidth=3)
        row[0].text(2, 3, f"{BAR_MM} mm", color="white", va="bottom", fontsize=10)
        for text, place, side in (("R", 0.03, "left"), ("L", 0.97, "right")):
            row[0].text(place, 0.5, text, transform=row[0].transAxes, color="white", ha=side, va="center", fontsize=10)
    handles = [patches.Patch(color=colour, label=name) for colour, name in zip(palette[1:], names)]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
