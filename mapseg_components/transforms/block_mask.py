# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random block masks for MONAI pipelines; the trainers of this package draw masks themselves, per batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, Transform

from mapseg_components.masking import block_grid, check_mask_value, draw_block_mask, expand_block_mask, hide
from mapseg_components.transforms.inputs import as_volume

__all__ = ["RandBlockMask", "RandBlockMaskd"]


class RandBlockMask(Randomizable, Transform):
    """Hide an exact share of an image's blocks (MAPSeg, section 3.2).

    Args:
        block_size: voxels per block side, one number or one per axis.
        mask_ratio: share of hidden blocks, in [0, 1].
        mask_value: value of hidden voxels, see ``masking.hide``; 0 in the paper.

    Raises:
        ConfigError: the mask value is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandBlockMask
        >>> hide = RandBlockMask(block_size=2, mask_ratio=0.25)
        >>> hidden = hide(torch.ones(1, 4, 4, 4))
        >>> tuple(hidden.shape), int((hidden == 0).sum())  # 2 of 8 blocks, 8 voxels each
        ((1, 4, 4, 4), 16)
    """

    def __init__(self, block_size: Sequence[int] | int, mask_ratio: float, mask_value: float | str = 0.0) -> None:
        self.block_size = block_size
        self.mask_ratio = mask_ratio
        self.mask_value = check_mask_value(mask_value)
        self.mask: torch.Tensor | None = None

    def randomize(self, data: Sequence[int]) -> None:
        """Draw a mask for an image of this spatial shape."""
        generator = torch.Generator().manual_seed(int(self.R.randint(2**31)))
        mask = draw_block_mask(1, block_grid(data, self.block_size), self.mask_ratio, generator)[0]
        self.mask = expand_block_mask(mask, data)

    def __call__(self, img: torch.Tensor, randomize: bool = True) -> torch.Tensor:
        """Image (C, X, Y, Z), hidden voxels replaced; the mask (1, X, Y, Z), ``True`` = hidden, is in ``self.mask``.

        Raises:
            ConfigError: a block does not divide the image, or the ratio is outside [0, 1].
        """
        img = as_volume(img)
        if randomize or self.mask is None:
            self.randomize(img.shape[1:])
        assert self.mask is not None  # drawn above
        return hide(img, self.mask.to(img.device), self.mask_value)


class RandBlockMaskd(Randomizable, MapTransform):
    """Dictionary version of `RandBlockMask`: each key has its own mask, stored as ``<key>_mask``.

    Args:
        keys: images (C, X, Y, Z).
        block_size: voxels per block side, one number or one per axis.
        mask_ratio: share of hidden blocks, in [0, 1].
        mask_value: value of hidden voxels, see ``masking.hide``.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: the mask value is unknown; or, in a call, as `RandBlockMask`.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandBlockMaskd
        >>> hide = RandBlockMaskd(keys="image", block_size=2, mask_ratio=0.25)
        >>> sample = hide({"image": torch.ones(1, 4, 4, 4)})
        >>> sorted(sample), int(sample["image_mask"].sum())
        (['image', 'image_mask'], 16)
    """

    def __init__(
        self,
        keys: KeysCollection,
        block_size: Sequence[int] | int,
        mask_ratio: float,
        mask_value: float | str = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.transform = RandBlockMask(block_size, mask_ratio, mask_value)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandBlockMaskd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key])
            result[f"{key}_mask"] = self.transform.mask
        return result
