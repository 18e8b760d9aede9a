# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Properties of a whole volume that random crops need: foreground extremes and voxels of each class, to be cached."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from mapseg_components.boxes import axis_extremes
from mapseg_components.errors import DataError
from mapseg_components.structures import IGNORED
from mapseg_components.transforms.inputs import as_volume, require_spatial, scan_name, tissue_is_raised

__all__ = ["AxisExtremesd", "ClassVoxelsd"]

WHOLE = 1e-3  # tolerance of a class index


def foreground_extremes(img: torch.Tensor, lowest: torch.Tensor | None = None) -> np.ndarray:
    """The ``boxes.axis_extremes`` of the foreground of a volume (C, X, Y, Z).

    Args:
        img: the volume, tensor or array.
        lowest: (C,), intensity of background in each channel, by default 0; foreground differs from it.

    Raises:
        DataError: the volume has another number of axes, or no foreground; the message names the file.
    """
    volume = as_volume(img).as_subclass(torch.Tensor)
    require_spatial(volume, scan_name(img))
    background = 0 if lowest is None else lowest.to(volume.device).view(-1, 1, 1, 1)
    extremes = axis_extremes((volume != background).any(dim=0).cpu().numpy())
    if len(extremes) == 0:
        above = "0" if lowest is None else "its minimum"
        raise DataError(f"{scan_name(img)}: no voxel above {above}, no foreground: leave the scan out")
    return extremes


def voxels_of_classes(label: torch.Tensor, max_per_class: int = 2000) -> np.ndarray:
    """Rows (class, x, y, z) of a label (1, X, Y, Z), see `ClassVoxelsd`.

    Raises:
        DataError: the label has another shape, or values that are not whole; the message names the file.
    """
    volume = as_volume(label)
    if volume.ndim != 4 or len(volume) != 1:
        raise DataError(
            f"{scan_name(label)} has shape {tuple(volume.shape)}, expected class indices (1, X, Y, Z): "
            "take the argmax of one-hot labels first"
        )
    values = np.asarray(volume.detach().cpu())[0]
    indices = np.rint(values).astype(np.int64)
    off = np.abs(values - indices) > WHOLE
    if off.any():
        raise DataError(
            f"{scan_name(label)}: {int(off.sum())} voxels such as {values[off][0]:g} are no class, expected whole "
            "numbers: resample label maps with mode 'nearest', and not in a lazy pipeline"
        )
    rows = []
    for value in np.unique(indices[(indices > 0) & (indices != IGNORED)]):
        voxels = np.argwhere(indices == value)
        picked = np.linspace(0, len(voxels) - 1, min(len(voxels), max_per_class)).astype(int)
        rows.append(np.insert(voxels[picked], 0, value, axis=1))
    table = np.concatenate(rows) if rows else np.zeros((0, 4))
    return table.astype(np.int16 if table.max(initial=0) <= np.iinfo(np.int16).max else np.int32)


class AxisExtremesd(MapTransform):
    """Store the ``boxes.axis_extremes`` of the foreground of a volume (C, X, Y, Z) as ``<key>_extremes``.

    Args:
        keys: whole volumes.
        above_minimum: foreground is the voxels above their channel's minimum, which are those that are not 0 after
            scaling to [0, 1] (`PercentileClip`). By default it is the voxels that are not 0.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, the scan has no foreground; the message names the file.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import AxisExtremesd
        >>> image = torch.zeros(1, 5, 6, 7)
        >>> image[:, 1:3, 2:4, 3:6] = 1
        >>> points = AxisExtremesd(keys="image")({"image": image})["image_extremes"]  # (N, 3)
        >>> points.amin(dim=0).tolist(), points.amax(dim=0).tolist()
        ([1, 2, 3], [2, 3, 5])
    """

    def __init__(self, keys: KeysCollection, above_minimum: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.above_minimum = above_minimum

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            lowest = None
            if self.above_minimum and not tissue_is_raised(result[key]):
                lowest = as_volume(result[key]).as_subclass(torch.Tensor).flatten(1).amin(dim=1)
            result[f"{key}_extremes"] = torch.from_numpy(foreground_extremes(result[key], lowest))
        return result


class ClassVoxelsd(MapTransform):
    """Store voxels of every foreground class of a label (1, X, Y, Z) as ``<key>_voxels``, for class-aware crops.

    The entry is an int16 tensor (N, 4) with rows (class, x, y, z), at most ``max_per_class`` equally spaced ones of
    each class; int32 where a class is too large for int16.

    Args:
        keys: labels of class indices.
        max_per_class: rows per class.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, the label has another shape, such as one channel per class, or values that are not whole;
            the message names the file.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import ClassVoxelsd
        >>> label = torch.zeros(1, 5, 6, 7)
        >>> label[0, 1, 2, 3], label[0, 4, 5, 6] = 1, 2
        >>> ClassVoxelsd(keys="label")({"label": label})["label_voxels"].tolist()  # class, x, y, z
        [[1, 1, 2, 3], [2, 4, 5, 6]]
    """

    def __init__(self, keys: KeysCollection, max_per_class: int = 2000, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.max_per_class = max_per_class

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[f"{key}_voxels"] = torch.from_numpy(voxels_of_classes(result[key], self.max_per_class))
        return result
