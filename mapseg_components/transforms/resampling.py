# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From one voxel grid to another. A grid is a shape with an affine, (4, 4), from voxel index to mm in RAS+."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd, SpatialResample

from mapseg_components.memory import naming_memory_errors, require_memory

__all__ = [
    "canonical_grid",
    "linear_resampling",
    "nearest_only",
    "resample",
    "spaced_grid",
    "spacing_of",
    "to_canonical",
]

SAME_SPACING = 1e-3  # relative; headers keep spacings as float32, and some writers round them to three digits
PARALLEL = 1e-3  # voxels that an axis may leave the other grid's by, over its whole length
MODES = {"linear": "bilinear", "nearest": "nearest"}  # torch's names
# float64 copies of input and output, and three coordinates of each voxel of the output with their copy
BYTES_PER_INPUT, BYTES_PER_OUTPUT = 12, 64


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Sides of a voxel in mm, (3,)."""
    return np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)


def nearest_only(transforms: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """The same transforms, but that ``Spacingd`` takes nearest voxels of every key: for images that are label maps.

    Examples:
        >>> from monai.transforms import Spacingd
        >>> from mapseg_components.transforms import nearest_only
        >>> nearest_only([Spacingd(["image", "label"], pixdim=2, mode=["bilinear", "nearest"])])[0].mode
        ('nearest', 'nearest')
    """
    result = []
    for step in transforms:
        if isinstance(step, Spacingd):
            step = copy.copy(step)
            step.mode = ("nearest",) * len(step.keys)
        result.append(step)
    return result


def linear_resampling(
    affine: Any, shape: Sequence[int], new_affine: Any, new_shape: Sequence[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from a volume (X, Y, Z), float32, to linear interpolation at the voxel centres of another grid.

    Where each axis of one grid is parallel to one of the other, it interpolates along one axis after the other, several
    times faster than MONAI's ``SpatialResample``, which does the rest. Outside of the old grid its border value is
    taken.

    Args:
        affine: (4, 4) of the volume.
        shape: its (X, Y, Z).
        new_affine: (4, 4) of the new grid.
        new_shape: (3,) of the new grid.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms.resampling import linear_resampling
        >>> wider = torch.diag(torch.tensor([2.0, 1, 1, 1]))
        >>> linear_resampling(wider, (2, 1, 1), torch.eye(4), (3, 1, 1))(torch.tensor([0.0, 1]).view(2, 1, 1)).flatten()
        tensor([0.0000, 0.5000, 1.0000])
    """
    old, new = (torch.as_tensor(one, dtype=torch.float64) for one in (affine, new_affine))
    indices = torch.linalg.solve(old, new)  # from a voxel of the new grid to one of the old
    turn = indices[:3, :3]
    order = turn.abs().argmax(dim=1).tolist()
    beside = turn.clone()
    beside[range(3), order] = 0
    if len({*order}) < 3 or bool((beside.abs() * torch.tensor(new_shape)).max() > PARALLEL):
        move = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)

        def anyhow(volume: torch.Tensor) -> torch.Tensor:
            moved = move(MetaTensor(volume[None], affine=old), dst_affine=new, spatial_size=tuple(new_shape))
            return moved.as_subclass(torch.Tensor)[0]

        return anyhow
    neighbours = [
        neighbours_along(turn[axis, along] * torch.arange(new_shape[along]) + indices[axis, 3], shape[axis])
        for axis, along in enumerate(order)
    ]

    def by_axes(volume: torch.Tensor) -> torch.Tensor:
        for axis in (2, 1, 0):
            low, high, share = neighbours[axis]
            weight = share.view([-1 if other == axis else 1 for other in range(3)])
            volume = torch.lerp(volume.index_select(axis, low), volume.index_select(axis, high), weight)
        return volume.permute([order.index(axis) for axis in range(3)])

    return by_axes


def neighbours_along(places: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of places on an axis in voxels: the voxel before, the one after, and the share of the latter, float32."""
    places = places.clamp(0, side - 1)
    low = places.floor().long().clamp(max=max(side - 2, 0))
    return low, (low + 1).clamp(max=side - 1), (places - low).float()


def canonical_grid(shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The grid of the same voxels with axes to right, anterior and superior, as closely as flips and swaps allow."""
    turn = nib.orientations.io_orientation(affine)
    canonical = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    return tuple(int(shape[axis]) for axis in np.argsort(turn[:, 0])), canonical


def to_canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and affine on `canonical_grid`; axes are swapped and flipped, no value changes."""
    turn = nib.orientations.io_orientation(affine)
    return nib.orientations.apply_orientation(voxels, turn), canonical_grid(voxels.shape, affine)[1]


def spaced_grid(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float | None]
) -> tuple[tuple[int, ...], np.ndarray]:
    """The grid of another spacing over the same field of view, with the same axes and centre.

    Args:
        shape: (3,) of the old grid.
        affine: (4, 4) of the old grid.
        spacing: mm per axis; ``None`` keeps an axis. An axis that has it to a thousandth is kept as well.

    Returns:
        shape and affine. A side is rounded to whole voxels, at least one.
    """
    old = spacing_of(affine)
    scale, sides = np.ones(3), [int(side) for side in shape]
    for axis, wanted in enumerate(spacing):
        if wanted is not None and abs(wanted - old[axis]) > SAME_SPACING * wanted:
            scale[axis] = wanted / old[axis]
            sides[axis] = max(1, round(sides[axis] / scale[axis]))
    result = np.array(affine, dtype=float)
    result[:3, :3] *= scale
    result[:3, 3] += affine[:3, :3] @ ((np.array(shape) - 1) / 2) - result[:3, :3] @ ((np.array(sides) - 1) / 2)
    return tuple(sides), result


def resample(
    voxels: np.ndarray, affine: np.ndarray, shape: Sequence[int], new_affine: np.ndarray, interpolation: str
) -> np.ndarray:
    """Values at the voxel centres of another grid, by MONAI's ``SpatialResample`` in float64.

    Args:
        voxels: (X, Y, Z).
        affine: (4, 4) of ``voxels``.
        shape: (3,) of the new grid.
        new_affine: (4, 4) of the new grid.
        interpolation: ``"linear"`` or ``"nearest"``. Outside of the old grid its border value is taken.

    Returns:
        float32 for ``"linear"``, else the type of ``voxels``.

    Raises:
        ResourceError: the memory does not suffice.
    """
    what = f"resampling {tuple(voxels.shape)} to {tuple(shape)} voxels"
    needed = voxels.size * BYTES_PER_INPUT + math.prod(shape) * BYTES_PER_OUTPUT
    require_memory(needed, "cpu", what, "set a larger spacing, or use a larger machine")
    with naming_memory_errors(what, "workers, or set a larger spacing"):
        image = MetaTensor(
            torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float64))[None], affine=torch.from_numpy(affine)
        )
        move = SpatialResample(mode=MODES[interpolation], padding_mode="border", dtype=torch.float64)
        moved = move(image, dst_affine=torch.from_numpy(new_affine), spatial_size=tuple(shape))
        kind = np.float32 if interpolation == "linear" else voxels.dtype
        return moved.numpy()[0].astype(kind)
