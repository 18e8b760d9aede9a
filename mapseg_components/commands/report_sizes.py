# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of ``mapseg report`` about how large structures are: on the target, and over the epochs of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from mapseg_components.data import read_nifti
from mapseg_components.reports import small_multiples, sortable_table
from mapseg_components.scans.files import is_picture
from mapseg_components.transforms.resampling import spacing_of

__all__ = ["MODELS", "Unit", "sizes", "unit_of", "volume_section"]

MODELS = {"source_only": "source-only", "adapted": "adapted"}  # of a run, and their titles
VOLUMES_NOTE = (
    "Median over the judged target scans, in {unit}, and the range over the source's label maps. Another age or "
    "disease may well lie outside of it; a model that fails does too."
)
SIZES_NOTE = (
    "Mean over the target scans that were looked at during training. Each structure has a separate axis from 0."
)
BAND_NOTE = " Shaded: the range over the source's label maps, as far as the axis has it."


class Unit(NamedTuple):
    """A unit of volume."""

    name: str
    per_ml: float
    """So many of it are what the record of a run calls a ml."""
    quantity: str = "Size"
    note: str = ""


ML = Unit("ml", 1.0, "Volume")
PIXELS = Unit("pixels", 1000.0, note=" Images without a pixel size: sizes are numbers of pixels.")
CUBIC_UM = Unit(
    "um^3", 1000.0, note=" Images: a pixel is as thick as it is wide; without a pixel size it counts as 1 um^3."
)


def unit_of(image: str) -> Unit:
    """The unit for scans of a target, by one of them: affines of PNG and TIFF images are in um, or in pixels."""
    if not is_picture(image):
        return ML
    return PIXELS if set(spacing_of(read_nifti(image).affine).tolist()) == {1.0} else CUBIC_UM


def volume_section(assessment: Mapping[str, Any], names: Sequence[str], unit: Unit) -> str:
    """Median volumes of both models beside the range of the source's labels."""
    rows = []
    for name in names:
        prior = [unit.per_ml * value for value in assessment["prior_ml"][name]]
        medians = [
            unit.per_ml * float(np.median([case["volumes_ml"][name] for case in assessment["models"][model]["cases"]]))
            for model in MODELS
        ]
        if not prior:  # a package without figures of this structure
            rows.append([name, *medians, None, None, "not known"])
            continue
        outside = [title for title, value in zip(MODELS.values(), medians) if not prior[0] <= value <= prior[-1]]
        rows.append([name, *medians, float(prior[0]), float(prior[-1]), ", ".join(outside)])
    titles = [f"{title}, {unit.name}" for title in (*MODELS.values(), "source lowest", "source highest")]
    note = escape(VOLUMES_NOTE.format(unit=unit.name) + unit.note)
    table = sortable_table(["structure", *titles, "outside"], rows, compact=True)
    return f'<h3>{unit.quantity} on the target</h3><p class="quiet">{note}</p>{table}'


def sizes(
    history: Sequence[Mapping[str, Any]], prior: Mapping[str, Sequence[float]], names: Sequence[str], unit: Unit
) -> str:
    """Volume of each of the teacher's structures over the epochs; in voxels if an earlier version wrote the history."""
    keys = {name: f"target_ml_{name}" for name in names}
    scaled = [
        {
            key: value * unit.per_ml if key in keys.values() and value is not None else value
            for key, value in line.items()
        }
        for line in history
    ]
    band = {name: [unit.per_ml * value for value in values] for name, values in prior.items()}
    ml = small_multiples(scaled, keys, unit.quantity, unit.name, band)
    shown = ml or small_multiples(history, {name: f"target_voxels_{name}" for name in names}, "Size", "voxels")
    note = SIZES_NOTE + (BAND_NOTE if ml else "")
    return f'<h3>Size of the teacher\'s structures</h3><p class="quiet">{note}</p>{shown}' if shown else ""
