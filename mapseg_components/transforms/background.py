# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The background around the body, which a network that makes images must leave as it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from mapseg_components.errors import DataError
from mapseg_components.transforms.inputs import as_volume, scan_name

__all__ = ["RestoreBackgroundd", "background_of"]


def background_of(image: torch.Tensor) -> torch.Tensor:
    """Voxels at the minimum of a volume (C, X, Y, Z), in all channels, that are connected with its border by faces.

    Dark voxels within the body are none. Along an axis of one voxel there is no border.

    Args:
        image: (C, X, Y, Z).

    Returns:
        boolean (X, Y, Z).

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms.background import background_of
        >>> ring = torch.ones(1, 5, 6, 1)
        >>> ring[0, 0], ring[0, 2, 2] = 0.0, 0.0
        >>> int(background_of(ring).sum())  # the first row, not the hole
        6
    """
    voxels = np.asarray(as_volume(image).as_subclass(torch.Tensor).detach().cpu())
    lowest = (voxels == voxels.min(axis=(1, 2, 3), keepdims=True)).all(axis=0)
    border = np.zeros_like(lowest)
    for axis, side in enumerate(lowest.shape):
        if side > 1:
            np.moveaxis(border, axis, 0)[[0, -1]] = True
    return torch.from_numpy(ndimage.binary_propagation(border & lowest, mask=lowest))


class RestoreBackgroundd(MapTransform):
    """Set a network's output to 0 where the scan is background, see `background_of`.

    A translated scan keeps its empty surroundings, by which foreground is found and percentiles are taken.

    Args:
        keys: volumes (C, X, Y, Z).
        image_key: the scan on the same grid.
        enabled: whether anything is done.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, volume and scan have other sides.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RestoreBackgroundd
        >>> scan = torch.tensor([0.0, 0.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> case = RestoreBackgroundd("pred")({"image": scan, "pred": torch.full((1, 4, 1, 1), 0.5)})
        >>> case["pred"].flatten().tolist()
        [0.0, 0.0, 0.5, 0.5]
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        image_key: str = "image",
        enabled: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.enabled = enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if not self.enabled:
            return result
        for key in self.key_iterator(result):
            background = background_of(result[self.image_key])
            volume = as_volume(result[key])
            if tuple(volume.shape[1:]) != tuple(background.shape):
                raise DataError(
                    f"{scan_name(volume)}: an output of {tuple(volume.shape[1:])} voxels and a scan of "
                    f"{tuple(background.shape)}: bring both to one grid first"
                )
            result[key] = torch.where(background.to(volume.device), torch.zeros_like(volume), volume)
        return result
