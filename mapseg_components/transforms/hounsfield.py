# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a CT is in Hounsfield units (HU), or in HU + 1024 to be positive: recognised by its intensities."""

from __future__ import annotations

import numpy as np

__all__ = ["CT_SHIFT", "ct_scale"]

CT_SHIFT = 1024.0
# Of a body's voxels denser than lung, most are fat and soft tissue: fat is near -100 HU, muscle near 50.
DENSER_THAN_LUNG = -400.0
SOFT_TISSUE = (-150.0, 150.0)
MOST = 0.5
AIR_BELOW = -200.0  # a whole scan in HU has air or lung in it
SHIFTED_LOWEST = -50.0  # noise of air at -1000 HU, after the shift


def ct_scale(voxels: np.ndarray) -> str | None:
    """Scale of CT intensities by their distribution.

    Args:
        voxels: any shape, finite.

    Returns:
        ``"hu"``; ``"shifted"`` for HU + 1024; ``None`` if neither is recognised, as in a scan that is cropped within
        an organ, or one that was clipped.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.transforms.hounsfield import ct_scale
        >>> body = np.array([-1000.0, -1000.0, -100.0, 40.0, 50.0, 60.0])  # air, fat and soft tissue
        >>> ct_scale(body), ct_scale(body + 1024), ct_scale(np.array([5.0, 9.0]))
        ('hu', 'shifted', None)
    """
    lowest = float(voxels.min())
    if lowest < AIR_BELOW:
        return "hu" if soft_tissue_share(voxels, 0.0) > MOST else None
    if lowest >= SHIFTED_LOWEST and float((voxels < CT_SHIFT + DENSER_THAN_LUNG).mean()) > 0:
        return "shifted" if soft_tissue_share(voxels, CT_SHIFT) > MOST else None
    return None


def soft_tissue_share(voxels: np.ndarray, offset: float) -> float:
    """Share of soft tissue among the voxels denser than lung, in HU + ``offset``; 0 if there are none."""
    dense = voxels[voxels > DENSER_THAN_LUNG + offset]
    low, high = (bound + offset for bound in SOFT_TISSUE)
    return float(((dense > low) & (dense < high)).mean()) if dense.size else 0.0
