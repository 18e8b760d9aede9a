# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How large the source's bodies are beside the target's, by the scans' foreground; source scans at their size."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.boxes import box_of_mask
from mapseg_components.errors import DataError
from mapseg_components.keys import IMAGE, LABEL, MASK
from mapseg_components.plans.frame import laid
from mapseg_components.plans.judging import evenly
from mapseg_components.scans.files import is_picture, stem
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.scans.rewriting import copy_scaled

__all__ = ["SIZED", "Extent", "describe_size", "extent_of", "find_size", "sized_cases"]

SIZED = "sized"  # folder of the scaled source scans
FILES = (IMAGE, LABEL, MASK)  # entries of a case that lie on its grid
LOOKED_AT = 10  # scans of each side
CUT = 0.2  # share of a face of the image that is foreground, above which the body goes on beyond it
MOST_OF_THEM = 0.8  # share of a side's scans that must show the whole body
ALIKE = 1.15  # sizes within this factor are left to the random scales of training
ONE_FORM = 1.25  # largest ratio among the axes over the smallest: beyond, one factor does not fit
FARTHEST = 3.0  # beyond, it is another body part or a wrong unit

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set


@dataclass(frozen=True)
class Extent:
    """Size of what a scan shows.

    Args:
        sides: (3,), mm of the box around all foreground, along the axes nearest to right, anterior and superior.
        whole: whether the foreground ends within the image: a brain without its skull, a head in air of zeros; not a
            part of the body that the field of view cuts off, nor a scan whose background is noise.
    """

    sides: np.ndarray
    whole: bool


def extent_of(path: str | Path) -> Extent:
    """Extent of the foreground of a scan, its voxels above the lowest value.

    Args:
        path: NIfTI file.

    Raises:
        DataError: it cannot be read.
    """
    scan = read_nifti(path)
    mask = scan.voxels > np.min(scan.voxels)
    if not mask.any():  # a scan of one value, which the check refuses
        return Extent(np.zeros(3), False)
    box = box_of_mask(mask)
    faces = [face.mean() for axis in range(3) for face in (mask.take(0, axis), mask.take(-1, axis))]
    grid = laid(box[:, 1] - box[:, 0], scan.affine, None)
    return Extent(grid.shape * grid.spacing, bool(max(faces) <= CUT))


def find_size(source: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Factor by which the target's bodies are larger than the source's, or ``None`` where they are alike or not known.

    Known is what most scans of both sides show whole. The factor is the ratio of the median extents, if it is about the
    same along all three axes.

    Args:
        source: labelled cases.
        target: cases.

    Returns:
        ``factor``, ``source_mm`` and ``target_mm`` (medians, three numbers each).
    """
    if any(is_picture(case["image"]) for case in (*source, *target)):
        return None  # images of tissue have no size of their own
    medians = []
    for cases in (target, source):
        looked_at = evenly(cases, min(LOOKED_AT, len(cases)))
        whole = [extent.sides for extent in map(readable_extent, looked_at) if extent is not None and extent.whole]
        if not whole or len(whole) < MOST_OF_THEM * len(looked_at):
            return None
        medians.append(np.median(whole, axis=0))
    ratios = medians[0] / medians[1]
    factor = float(np.exp(np.log(ratios).mean()))
    if ratios.max() > ONE_FORM * ratios.min() or not ALIKE < max(factor, 1 / factor) < FARTHEST:
        return None
    of_target, of_source = ([round(float(side), 1) for side in one] for one in medians)
    return {"factor": round(factor, 3), "source_mm": of_source, "target_mm": of_target}


def readable_extent(case: Mapping[str, Any]) -> Extent | None:
    """Extent of a case's scan; ``None`` where it cannot be read, which the check of all scans says with all others."""
    try:
        return extent_of(case["image"])
    except DataError:
        return None


def sized_cases(cases: Iterable[Mapping[str, Any]], factor: float, folder: Path) -> list[dict[str, Any]]:
    """The cases with copies of their files whose voxels are larger or smaller by a factor; values are the same.

    Args:
        cases: of the source.
        factor: of the voxels' sides.
        folder: for the copies; those that are there are written again.

    Raises:
        DataError: a file cannot be read.
        ResourceError: the disk is full.
    """
    result = []
    for number, case in enumerate(cases):
        copies = {}
        for key in FILES:
            if case.get(key):
                copies[key] = str(folder / f"{key}s" / f"{number:04d}_{stem(Path(case[key]))}.nii.gz")
                Path(copies[key]).parent.mkdir(parents=True, exist_ok=True)
                copy_scaled(case[key], copies[key], factor)
        result.append({**case, **copies})
    return result


def describe_size(size: Mapping[str, Any]) -> str:
    """The factor in words, for the terminal and the report."""
    sides = (" x ".join(f"{side:.0f}" for side in size[f"{name}_mm"]) for name in ("target", "source"))
    return (
        "Source scans are shown at {:.2f} of their size: what target scans show measures {} mm, what source scans show "
        "{} mm (medians; another choice: match_size)."
    ).format(size["factor"], *sides)
