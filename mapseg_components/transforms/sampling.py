# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Values of a volume on another grid, without touching more of the volume than the grid does.

Random crops sample large volumes at few voxels. A grid along the volume's axes is a resized box of it; any other grid
is sampled voxel by voxel. Neither copies or converts the whole volume, which may hold integers or be a mapped file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mapseg_components.transforms.percentiles import clipped

__all__ = ["sample"]

SLAB = 16  # planes per step, so that intermediate results stay in the processor's cache
COPIED = 4  # most voxels per sample of a box that is clipped as a whole; in a larger one, only what is read is clipped


def sample(
    volumes: Sequence[torch.Tensor],
    affine: np.ndarray,
    size: Sequence[int],
    modes: Sequence[str],
    limits: Sequence[torch.Tensor | None] | None = None,
    moved_by: np.ndarray | None = None,
) -> list[torch.Tensor]:
    """Sample volumes that share a grid, e.g. a scan and its label, once each, where the output's voxels are.

    A volume with limits is clipped and scaled by them before it is interpolated (`intensity.clipped`), but only where
    it is read: the result is that of sampling the clipped volume.

    Args:
        volumes: (C, X, Y, Z) each, of any real types that torch indexes (not uint16).
        affine: (4, 4), voxel index of the output to voxel index of the volumes.
        size: output grid.
        modes: of each volume, "bilinear" (trilinear in 3D) or "nearest". Outside the volume the value is 0.
        limits: of each volume, (C, 2), what becomes 0 and what becomes 1 in each channel, or ``None``; with "bilinear".
        moved_by: (3, *size), voxels of the volumes by which each place is moved besides, or ``None``.

    Returns:
        (C, *size) each, on the volume's device; float32 with "bilinear", the volume's type with "nearest". A shift by
        whole voxels, with or without flips, copies values exactly.
    """
    limits = [None] * len(volumes) if limits is None else limits
    found = aligned_box(affine, size) if moved_by is None else None
    if found is not None and (all(limit is None for limit in limits) or is_small(found[0], size)):
        box, flipped = found
        parts = [resize(take_box(v, box, limit), size, mode) for v, mode, limit in zip(volumes, modes, limits)]
        return [part.flip(flipped) if flipped else part for part in parts]
    volumes = [volume.contiguous() for volume in volumes]
    results = [volume.new_empty((len(volume), *size), dtype=kept_type(volume, m)) for volume, m in zip(volumes, modes)]
    for start in range(0, size[0], SLAB):
        slab = (min(SLAB, size[0] - start), *size[1:])
        moved = affine[:3].copy()
        moved[:, 3] += moved[:, 0] * start
        further = None if moved_by is None else torch.from_numpy(moved_by[:, start : start + SLAB])
        places = find_places(moved, slab, volumes[0].shape[1:], volumes[0].device, further)
        for volume, mode, limit, result in zip(volumes, modes, limits, results):
            for number, values in enumerate(volume.flatten(1)):
                if mode == "bilinear":
                    looked_up = interpolate(values, places, None if limit is None else limit[number])
                else:
                    looked_up = nearest(values, places)
                result[number, start : start + SLAB] = looked_up
    return results


def kept_type(volume: torch.Tensor, mode: str) -> torch.dtype:
    """Type of the samples of a volume."""
    return volume.dtype if mode == "nearest" else torch.float32


def aligned_box(affine: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, list[int]] | None:
    """Box (3, 2) of whole voxels that a grid along the axes covers, and the dimensions it runs through backwards.

    ``None`` for any other grid, and for one finer than the voxels: its first samples lie between the box and what is
    around it.
    """
    steps = np.diag(affine)[:3]
    if np.any(affine[:3, :3] != np.diag(steps)) or np.any(np.abs(steps) < 1):
        return None
    first = np.where(steps < 0, affine[:3, 3] + steps * (np.asarray(size) - 1), affine[:3, 3])
    start = first + 0.5 - np.abs(steps) / 2
    box = np.stack([start, start + np.abs(steps) * np.asarray(size)], axis=1)
    if np.abs(box - np.round(box)).max() > 1e-6:
        return None
    return np.round(box).astype(int), [1 + axis for axis in range(3) if steps[axis] < 0]


def is_small(box: np.ndarray, size: Sequence[int]) -> bool:
    """Whether a box (3, 2) has few voxels for each one of a grid."""
    return bool(np.prod(box[:, 1] - box[:, 0]) <= COPIED * np.prod(size))


def take_box(volume: torch.Tensor, box: np.ndarray, limits: torch.Tensor | None = None) -> torch.Tensor:
    """The part of a volume (C, X, Y, Z) in a box of whole voxels (3, 2), clipped if there are limits.

    Without limits it is a view, or a copy with 0 where there is no volume.
    """
    low, high = np.clip(box, 0, np.asarray(volume.shape[1:])[:, None]).T
    part = volume[(slice(None), *map(slice, low, high))]
    part = part if limits is None else clipped(part, limits)
    if np.array_equal(box, np.stack([low, high], axis=1)):
        return part
    result = part.new_zeros((len(volume), *(box[:, 1] - box[:, 0]).tolist()))
    if part.numel():
        result[(slice(None), *map(slice, low - box[:, 0], high - box[:, 0]))] = part
    return result


def resize(part: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """Resize a part of a volume (C, X, Y, Z) to a grid that is not finer; the result shares no memory with it."""
    wanted = kept_type(part, mode)
    if tuple(part.shape[1:]) == tuple(size):
        return part.to(wanted, copy=True, memory_format=torch.contiguous_format)
    if mode == "bilinear":
        return F.interpolate(part.to(wanted)[None], size=tuple(size), mode="trilinear", align_corners=False)[0]
    for axis, number in enumerate(size, start=1):
        centres = (2 * torch.arange(number, device=part.device) + 1) * part.shape[axis] // (2 * number)
        part = part.index_select(axis, centres)
    return part


class Places(NamedTuple):
    """Where the voxels of a grid lie in a volume; tensors broadcast to the grid."""

    size: Sequence[int]
    index: torch.Tensor  # int (voxels of the grid,), of the voxel of the flattened volume at or below
    fractions: list[torch.Tensor]  # per axis, [0, 1], of the way to the next voxel
    steps: list[int]  # per axis, from a voxel of the flattened volume to the next one
    shares: list[torch.Tensor]  # of the axes along which a place lies outside: share of its value from inside


def find_places(
    affine: np.ndarray,
    size: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
    moved_by: torch.Tensor | None = None,
) -> Places:
    """Places of a grid in a volume.

    A place outside is moved to the border. Linear interpolation between a border voxel and a 0 beside it is the
    border voxel times the share of the way: with the shares the values are those of a volume surrounded by 0.

    Args:
        affine: (3, 4), voxel index of the grid to voxel index of the volume.
        size: voxels per axis of the grid.
        shape: (X, Y, Z) of the volume.
        device: of the result.
        moved_by: (3, *size), voxels of the volume by which places are moved besides.
    """
    strides = [shape[1] * shape[2], shape[2], 1]
    index_type = torch.int32 if shape[0] * strides[0] <= torch.iinfo(torch.int32).max else torch.int64
    below, fractions, shares = [], [], []
    for number, (row, side) in enumerate(zip(affine, shape)):
        position = torch.full((1, 1, 1), row[3], dtype=torch.float32, device=device)
        for axis in np.flatnonzero(row[:3]):  # float32 is off by 1e-4 voxels at most
            along = torch.from_numpy(np.arange(size[axis]) * row[axis]).float().to(device)
            position = position + along.view([-1 if other == axis else 1 for other in range(3)])
        reach = row[:3] * (np.asarray(size) - 1)
        low, high = row[3] + reach.clip(max=0).sum(), row[3] + reach.clip(min=0).sum()
        if moved_by is not None:
            by = moved_by[number].to(device)
            position, low, high = position + by, low + float(by.min()), high + float(by.max())
        if low < 0.01 or high > side - 1.01:
            shares.append(torch.minimum(position + 1, side - position).clamp_(0, 1))
            # the largest float32 below the last voxel, so that a next voxel exists
            position = position.clamp(0, max(float(np.nextafter(np.float32(side - 1), np.float32(0))), 0))
        fractions.append(position.frac())
        below.append(position.to(index_type))
    x, y, z = below
    index = torch.add(torch.add(z, y, alpha=strides[1]), x, alpha=strides[0])
    steps = [stride if side > 1 else 0 for stride, side in zip(strides, shape)]
    return Places(size, index.expand(tuple(size)).reshape(-1), fractions, steps, shares)


def interpolate(values: torch.Tensor, places: Places, limits: torch.Tensor | None = None) -> torch.Tensor:
    """Linear interpolation of a flattened volume, clipped before if there are limits (2,); float32 (*size)."""

    def corner(offset: int) -> torch.Tensor:
        found = values[offset:].index_select(0, places.index).view(tuple(places.size)).float()
        return found if limits is None else found.clamp_(*limits.tolist())

    (x, y, z), (dx, dy, dz) = places.fractions, places.steps
    lines = [torch.lerp(corner(of), corner(of + dz), z) for of in (0, dy, dx, dx + dy)]
    result = torch.lerp(torch.lerp(lines[0], lines[1], y), torch.lerp(lines[2], lines[3], y), x)
    result = result if limits is None else clipped(result[None], limits[None])[0]  # scaling commutes, clipping does not
    for share in places.shares:
        result.mul_(share)
    return result


def nearest(values: torch.Tensor, places: Places) -> torch.Tensor:
    """Nearest voxels of a flattened volume, (*size), in its type."""
    index = places.index.view(tuple(places.size))
    for fraction, step in zip(places.fractions, places.steps):
        index = torch.add(index, fraction.round().to(index.dtype), alpha=step)
    result = values.index_select(0, index.reshape(-1)).view(tuple(places.size))
    for share in places.shares:
        result.mul_(share >= 0.5)  # beyond half a voxel outside the border, the nearest value is 0
    return result
