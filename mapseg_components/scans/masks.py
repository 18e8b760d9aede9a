# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a scan has nothing to look at, such as torn or missing tissue: by a mask, or by transparent pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mapseg_components.scans.files import PICTURES, is_picture, stem
from mapseg_components.scans.findings import fault
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.scans.pictures import picture_outside

__all__ = ["MASK", "mask_beside", "outside_of"]

MASK = "_mask"


def mask_beside(image: str | Path) -> Path | None:
    """The file ``CASE_mask`` beside a PNG or TIFF image ``CASE``, of either format; ``None`` without.

    Of NIfTI files such a name is that of a label map.
    """
    path = Path(image)
    if not is_picture(path) or stem(path).endswith(MASK):
        return None
    masks = (path.with_name(f"{stem(path)}{MASK}{ending}") for ending in dict.fromkeys((path.suffix, *PICTURES)))
    return next((mask for mask in masks if mask.is_file()), None)


def outside_of(image: str | Path, mask: str | Path | None) -> np.ndarray | None:
    """Where a scan does not count: its mask is 0, or it is fully transparent.

    Args:
        image: file of the scan, of any format.
        mask: file of a mask on its grid; ``None`` without.

    Returns:
        bool (X, Y, Z); ``None`` if the whole scan counts.

    Raises:
        DataError: a file cannot be read, the mask has another shape, or nothing is left of the scan.
    """
    found = picture_outside(image) if is_picture(image) else None
    if mask is None:
        return found
    outside = np.asarray(read_nifti(mask).voxels == 0)
    if found is not None:
        if outside.shape != found.shape:
            raise unlike(mask, outside.shape, found.shape)
        outside = outside | found
    if outside.all():
        raise fault(mask, "a mask of 0 alone, nothing of its scan is left", "draw 1 where there is tissue")
    return outside


def unlike(mask: str | Path, shape: tuple[int, ...], scan: tuple[int, ...]) -> Exception:
    """Error of a mask on another grid."""
    return fault(mask, f"mask of shape {shape}, its scan {scan}", "draw it on the scan's own grid")
