# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Smooth random displacements, for samples of a volume whose structures have another shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["control_grid", "displacement"]


def control_grid(box: np.ndarray, spacing: np.ndarray | float) -> tuple[int, int, int]:
    """Control points per axis of a cubic B-spline over a box.

    Args:
        box: (3, 2), in voxels.
        spacing: voxels between control points, one number or one per axis.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.transforms.deformation import control_grid
        >>> control_grid(np.array([[0, 32], [0, 40], [0, 1]]), 16.0)  # one lies before, two lie beyond
        (5, 6, 4)
    """
    sides = np.ceil((box[:, 1] - box[:, 0]) / spacing - 1e-9).astype(int)
    x, y, z = (np.maximum(sides, 1) + 3).tolist()
    return x, y, z


def displacement(
    controls: np.ndarray, box: np.ndarray, spacing: np.ndarray | float, part: np.ndarray, size: Sequence[int]
) -> np.ndarray:
    """Displacement of the voxels of a grid laid over a part of a box, by a cubic B-spline.

    The same control points give a patch and a view of the whole the same field.

    Args:
        controls: (3, *control_grid(box, spacing)), displacements of the control points.
        box: (3, 2), in voxels.
        spacing: voxels between control points, as for `control_grid`.
        part: (3, 2), within the box.
        size: voxels per axis of the grid.

    Returns:
        (3, *size), float32, in the controls' unit.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.transforms.deformation import control_grid, displacement
        >>> box = np.array([[0, 32], [0, 40], [0, 8]])
        >>> controls = np.ones((3, *control_grid(box, 16.0)))  # all moved alike: so is every voxel
        >>> field = displacement(controls, box, 16.0, box, (8, 8, 8))
        >>> field.shape, bool(np.allclose(field, 1))
        ((3, 8, 8, 8), True)
    """
    weights = []
    steps = np.broadcast_to(spacing, 3)
    for (start, stop), first, step, number, points in zip(part, box[:, 0], steps, size, controls.shape[1:]):
        places = start + (np.arange(number) + 0.5) * (stop - start) / number - first
        distance = np.abs(places[:, None] / step - (np.arange(points) - 1)[None])
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
        weights.append(np.where(distance < 1, near, far))
    return np.einsum("cxyz,ix,jy,kz->cijk", controls, *weights, optimize=True).astype(np.float32)
