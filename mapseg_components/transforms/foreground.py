# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a random crop must know of a whole volume, found once and cached."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from mapseg_components.boxes import axis_extremes
from mapseg_components.errors import DataError
from mapseg_components.transforms.intensity import scan_name

__all__ = ["AxisExtremesd", "ClassVoxelsd"]


class AxisExtremesd(MapTransform):
    """Store the ``boxes.axis_extremes`` of the foreground of a volume (C, X, Y, Z) as ``<key>_extremes``.

    Args:
        keys: whole volumes.
        above_minimum: foreground is what lies above its channel's minimum, which are the voxels that are not 0 once the
            volume is scaled to [0, 1] (`PercentileClip`). By default it is what is not 0.

    Raises:
        DataError: the scan has no foreground; the message names the file.
    """

    def __init__(self, keys: KeysCollection, above_minimum: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.above_minimum = above_minimum

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = torch.as_tensor(result[key]).as_subclass(torch.Tensor)
            background = image.amin(dim=(1, 2, 3), keepdim=True) if self.above_minimum else 0
            extremes = axis_extremes((image != background).any(dim=0).cpu().numpy())
            if len(extremes) == 0:
                above = "its minimum" if self.above_minimum else "0"
                raise DataError(f"{scan_name(result[key])}: no voxel above {above}, no foreground: leave the scan out")
            result[f"{key}_extremes"] = torch.from_numpy(extremes)
        return result


class ClassVoxelsd(MapTransform):
    """Store voxels of every foreground class of a label (1, X, Y, Z) as ``<key>_voxels``, for class-aware crops.

    The entry is an int16 tensor (N, 4) with rows (class, x, y, z), at most ``max_per_class`` equally spaced ones of
    each class.

    Args:
        keys: labels of class indices.
        max_per_class: rows per class.
    """

    def __init__(self, keys: KeysCollection, max_per_class: int = 2000, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.max_per_class = max_per_class

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            label = np.asarray(result[key].detach().cpu())[0].astype(np.int64)
            rows = []
            for value in np.unique(label[label > 0]):
                voxels = np.argwhere(label == value)
                picked = np.linspace(0, len(voxels) - 1, min(len(voxels), self.max_per_class)).astype(int)
                rows.append(np.insert(voxels[picked], 0, value, axis=1))
            table = np.concatenate(rows) if rows else np.zeros((0, 4))
            result[f"{key}_voxels"] = torch.from_numpy(table.astype(np.int16))
        return result
