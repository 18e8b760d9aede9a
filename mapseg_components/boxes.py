# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pure 3D geometry of half-open boxes.

A box is a float or integer array of shape (3, 2), ``[[start, stop], ...]`` per axis, half-open, in voxel *edge*
coordinates: voxel ``i`` covers ``[i, i + 1)`` and its centre lies at ``i + 0.5``. A whole volume of shape
``(X, Y, Z)`` therefore has the box ``[[0, X], [0, Y], [0, Z]]``, and an integer box slices an array directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = [
    "axis_extremes",
    "box_of_mask",
    "corner_distance",
    "expand_box",
    "index_affine",
    "interpolation_matrices",
    "is_thick",
    "relative_box",
    "resample_box",
    "transformed_box",
]

THICK = 2.5  # slices this many times thicker than the voxels in the plane are wide


def is_thick(spacing: np.ndarray) -> bool:
    """Whether voxels are those of thick slices: at least 2.5 times as long along one axis as they mostly are.

    Args:
        spacing: (3,), mm.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import is_thick
        >>> is_thick(np.array([0.75, 8, 0.75])), is_thick(np.array([1, 1, 2]))
        (True, False)
    """
    return bool(spacing.max() >= THICK * np.median(spacing))


def axis_extremes(mask: np.ndarray) -> np.ndarray:
    """First and last foreground voxel of every column along the longest axis of a 3D mask.

    The bounding box of a point set under any affine map depends on its convex hull alone, and every hull vertex is
    the first or last voxel of its column: these few points suffice to find the box of the whole foreground.

    Args:
        mask: boolean array (X, Y, Z).

    Returns:
        integer voxel indices (N, 3), N is 0 for an empty mask; int16, or int32 where an index does not fit.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import axis_extremes
        >>> mask = np.zeros((3, 4, 9), bool)
        >>> mask[1, 2, 3:8] = True  # one column along the longest axis
        >>> axis_extremes(mask).tolist()
        [[1, 2, 3], [1, 2, 7]]
    """
    axis = int(np.argmax(mask.shape))
    columns = mask.any(axis=axis)
    first = mask.argmax(axis=axis)
    last = mask.shape[axis] - 1 - np.flip(mask, axis=axis).argmax(axis=axis)
    rest = np.argwhere(columns)
    ends = [np.insert(rest, axis, depth[columns], axis=1) for depth in (first, last)]
    return np.unique(np.concatenate(ends), axis=0).astype(np.int16 if max(mask.shape) <= 2**15 else np.int32)


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """Smallest half-open integer box (3, 2) around the ``True`` voxels of a mask (X, Y, Z).

    Args:
        mask: boolean array (X, Y, Z).

    Raises:
        ValueError: the mask is empty.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import box_of_mask
        >>> mask = np.zeros((5, 6, 7), bool)
        >>> mask[1:3, 2:4, 3:6] = True
        >>> box_of_mask(mask).tolist()
        [[1, 3], [2, 4], [3, 6]]
    """
    points = axis_extremes(np.asarray(mask, dtype=bool))
    if len(points) == 0:
        raise ValueError("an empty mask has no bounding box")
    return np.stack([points.min(0).astype(int), points.max(0).astype(int) + 1], axis=1)


def transformed_box(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Box (3, 2) around voxels whose centres were moved by an affine map of voxel indices.

    Args:
        points: voxel indices (N, 3), e.g. from `axis_extremes`.
        affine: (4, 4), maps a voxel index of the input to a voxel index of the output.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import transformed_box
        >>> points = np.array([[1, 2, 3], [4, 2, 3]])
        >>> transformed_box(points, np.diag([2, 1, 1, 1])).tolist()  # from centre to centre, half a voxel around
        [[2.0, 9.0], [2.0, 3.0], [3.0, 4.0]]
    """
    moved = affine[:3, :3] @ points.T + affine[:3, 3:]  # (3, N): along rows, minima are found ten times faster
    return np.stack([moved.min(1), moved.max(1) + 1.0], axis=1)


def expand_box(box: np.ndarray, minimum_size: Sequence[int]) -> np.ndarray:
    """Grow a box (3, 2) symmetrically so that each side has at least ``minimum_size`` voxels.

    Integer boxes stay on integers: with an odd difference the extra voxel is added at the end.

    Args:
        box: (3, 2).
        minimum_size: voxels per axis.

    Returns:
        (3, 2), which may leave the volume.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import expand_box
        >>> expand_box(np.array([[1, 3], [2, 4], [3, 6]]), (4, 5, 2)).tolist()
        [[0, 4], [1, 6], [3, 6]]
    """
    missing = np.maximum(np.asarray(minimum_size) - (box[:, 1] - box[:, 0]), 0)
    before = missing // 2 if np.issubdtype(box.dtype, np.integer) else missing / 2
    return np.stack([box[:, 0] - before, box[:, 1] + (missing - before)], axis=1)


def relative_box(box: np.ndarray, frame: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Express a box in the grid onto which another box is resampled.

    Args:
        box: (3, 2), e.g. the local patch.
        frame: (3, 2), the region that the grid covers, in the same coordinates.
        grid: voxels per axis of the grid, e.g. the size of the global view.

    Returns:
        (3, 2), continuous edge coordinates of ``grid``.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import relative_box
        >>> patch, scan = np.array([[10, 20], [0, 30], [5, 10]]), np.array([[0, 40], [0, 30], [0, 10]])
        >>> relative_box(patch, scan, grid=(20, 15, 10)).tolist()
        [[5.0, 10.0], [0.0, 15.0], [5.0, 10.0]]
    """
    scale = np.asarray(grid) / (frame[:, 1] - frame[:, 0])
    relative: np.ndarray = (box - frame[:, :1]) * scale[:, None]
    return relative


def index_affine(box: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Affine (4, 4) from voxel indices of a grid of ``size`` laid over ``box`` to voxel indices of the box's space.

    Voxel centres are used throughout: index ``i`` of an axis lies at ``start + (i + 0.5) * side / size - 0.5``.

    Args:
        box: (3, 2).
        size: voxels per axis of the grid.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import index_affine
        >>> affine = index_affine(np.array([[0, 8], [2, 6], [0, 5]]), size=(4, 4, 5))
        >>> (affine @ [0, 0, 0, 1])[:3].tolist()  # the first voxel along x covers [0, 2), its centre is index 0.5
        [0.5, 2.0, 0.0]
    """
    step = (box[:, 1] - box[:, 0]) / np.asarray(size)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(step)
    affine[:3, 3] = box[:, 0] + 0.5 * step - 0.5
    return affine


def corner_distance(shape: tuple[int, ...], one: np.ndarray, two: np.ndarray) -> float:
    """Largest distance between the places where two affines put a corner of a grid.

    Args:
        shape: (X, Y, Z) of the grid.
        one: (4, 4), from voxel index to mm.
        two: (4, 4), likewise.

    Returns:
        mm.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.boxes import corner_distance
        >>> corner_distance((11, 5, 5), np.eye(4), np.diag([1.5, 1, 1, 1]))  # 10 voxels, 0.5 mm each
        5.0
    """
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape], [1])).reshape(4, -1)
    return float(np.linalg.norm(((one - two) @ corners)[:3], axis=0).max())


def interpolation_matrices(start: torch.Tensor, stop: torch.Tensor, size_in: int, size_out: int) -> torch.Tensor:
    """Linear interpolation along one axis as a matrix per sample; positions outside are clamped to the border.

    Args:
        start: (B,), first edge of the region, in edge coordinates of the input axis.
        stop: (B,), last edge of the region.
        size_in: length of the input axis.
        size_out: number of equally spaced samples in the region.

    Returns:
        (B, size_out, size_in), float32; every row sums to 1.

    Examples:
        >>> import torch
        >>> from mapseg_components.boxes import interpolation_matrices
        >>> interpolation_matrices(torch.tensor([0.0]), torch.tensor([4.0]), size_in=4, size_out=2).tolist()
        [[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]]
    """
    steps = (torch.arange(size_out, device=start.device, dtype=torch.float32) + 0.5) / size_out
    position = start.float()[:, None] + steps[None] * (stop - start).float()[:, None] - 0.5
    position = position.clamp(0.0, float(size_in - 1))
    nodes = torch.arange(size_in, device=start.device, dtype=torch.float32)
    return (1.0 - (position[:, :, None] - nodes).abs()).clamp(min=0.0)


def resample_box(volume: torch.Tensor, box: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Resample the region that a box covers onto a grid, linearly and differentiably.

    The box is axis-aligned, so that the trilinear weights factor into one small matrix per axis: three matrix
    products, deterministic on every device.

    Args:
        volume: (B, C, X, Y, Z).
        box: (B, 3, 2), continuous edge coordinates of the volume's grid.
        size: output grid (x, y, z).

    Returns:
        (B, C, x, y, z), dtype of ``volume``.

    Examples:
        >>> import torch
        >>> from mapseg_components.boxes import resample_box
        >>> volume = torch.arange(4.0).reshape(1, 1, 4, 1, 1)
        >>> box = torch.tensor([[[0.0, 4.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> resample_box(volume, box, size=[2, 1, 1]).flatten().tolist()
        [0.5, 2.5]
    """
    box = box.to(device=volume.device)
    x = interpolation_matrices(box[:, 0, 0], box[:, 0, 1], volume.shape[2], size[0]).to(volume.dtype)
    y = interpolation_matrices(box[:, 1, 0], box[:, 1, 1], volume.shape[3], size[1]).to(volume.dtype)
    z = interpolation_matrices(box[:, 2, 0], box[:, 2, 1], volume.shape[4], size[2]).to(volume.dtype)
    out = torch.matmul(volume, z.transpose(1, 2)[:, None, None])  # (B, C, X, Y, z)
    out = torch.matmul(y[:, None, None], out)  # (B, C, X, y, z)
    flat = out.flatten(3)  # (B, C, X, y*z)
    out = torch.matmul(x[:, None], flat)
    return out.view(out.shape[0], out.shape[1], out.shape[2], size[1], size[2])
