# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How large what scans show is: the box around their foreground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from mapseg_components.boxes import box_of_mask
from mapseg_components.errors import DataError, ResourceError
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.nifti import along_ras, read_nifti

__all__ = ["Extent", "extent_of", "median_extent"]

LOOKED_AT = 10  # scans
CUT = 0.2  # share of a face of the image that is foreground, above which the body goes on beyond it
MOST_OF_THEM = 0.8  # share of the scans that must show the whole body


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


def extent_of(path: str | Path, negative_values: str | None = None) -> Extent:
    """Extent of the foreground of a scan, its voxels above the lowest value.

    Args:
        path: NIfTI file.
        negative_values: as of the bundles: where they are clipped, 0 is the lowest value.

    Raises:
        DataError: it cannot be read.
    """
    scan = read_nifti(path)
    lowest = np.min(scan.voxels)
    mask = scan.voxels > (max(lowest, 0) if negative_values == "clip" else lowest)
    if not mask.any():  # a scan of one value, which the check refuses
        return Extent(np.zeros(3), False)
    box = box_of_mask(mask)
    faces = [face.mean() for axis in range(3) for face in (mask.take(0, axis), mask.take(-1, axis))]
    sides = (box[:, 1] - box[:, 0]) * nib.affines.voxel_sizes(scan.affine)
    return Extent(along_ras(sides, scan.affine), bool(max(faces) <= CUT))


def median_extent(paths: Sequence[str | Path], negative_values: str | None = None) -> list[float] | None:
    """Median extent in mm over scans, along the axes nearest to right, anterior and superior; four digits.

    Args:
        paths: files; up to ten of them, evenly spaced, are read. One that cannot be read counts as one that shows no
            whole body: the check of all scans says what is wrong with it.
        negative_values: see `extent_of`.

    Returns:
        three numbers, or ``None`` unless most of the scans show a whole body: also of images, which have no size of
        their own.
    """
    if not paths or any(map(is_picture, paths)):
        return None
    chosen = [paths[int(n)] for n in np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).round()]
    extents = (readable_extent(path, negative_values) for path in chosen)
    whole = [extent.sides for extent in extents if extent is not None and extent.whole]
    if not whole or len(whole) < MOST_OF_THEM * len(chosen):
        return None
    return [float(f"{side:.4g}") for side in np.median(whole, axis=0)]


def readable_extent(path: str | Path, negative_values: str | None) -> Extent | None:
    """Extent of a scan; ``None`` where it cannot be read, or is too large for memory."""
    try:
        return extent_of(path, negative_values)
    except (DataError, ResourceError):
        return None
