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
from mapseg_components.reports.preview import PLANES, mark, plane_of

__all__ = ["draw_comparison"]


def draw_comparison(
    cases: Sequence[Mapping[str, str]], folders: Mapping[str, Path], names: Sequence[str], path: Path
) -> None:
    """Write a PNG: scan, truth and a label map of each model, one row a scan, the axial slice with the most structures.

    The right side of the body is on the left; the scan has letters of the sides and a bar of a length in mm.

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
        grey, *maps = (np.asarray(one.dataobj) for one in (scan, *others))
        spacing = [float(side) for side in scan.header.get_zooms()[:3]]
        shape = {"origin": "lower", "aspect": spacing[1] / spacing[0]}
        slices = [maps[0][..., z] for z in range(grey.shape[2])]
        level = max(range(len(slices)), key=lambda z: (len(np.unique(slices[z])), np.count_nonzero(slices[z])))
        for column, (axis, title) in enumerate(zip(row, ["scan", "truth", *folders])):
            axis.imshow(plane_of(grey, 2, level), cmap="gray", **shape)
            if column:
                axis.imshow(plane_of(maps[column - 1], 2, level), alpha=0.7, **shape, **overlay)
            axis.set_title("" if number else title, fontsize=12)
            axis.set_xticks([])
            axis.set_yticks([])
        mark(row[0], PLANES["axial"][3], grey.shape[1::-1], spacing[0])
        title = f"{case['case_id'].replace('_', ' ')}\nslice {level + 1} of {grey.shape[2]}"
        row[0].set_ylabel(title, fontsize=11, parse_math=False)
    handles = [patches.Patch(color=colour, label=name) for colour, name in zip(palette[1:], names)]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
