# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random block masks, drawn at block resolution. ``True`` always means hidden.

Source: MAPSeg (arXiv 2303.09373), section 3.2: 70 % of the 8^3 blocks of a local patch and of the 4^3 blocks of a
global view are hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mapseg_components.errors import ConfigError

__all__ = [
    "BlockMask",
    "block_grid",
    "check_mask_value",
    "draw_block_mask",
    "draw_box_mask",
    "expand_block_mask",
    "hide",
]

MEAN = "mean"


def block_grid(spatial_shape: Sequence[int], block_size: Sequence[int] | int) -> tuple[int, ...]:
    """Number of blocks per axis.

    Args:
        spatial_shape: voxels per axis.
        block_size: voxels per block side, one number or one per axis.

    Raises:
        ConfigError: a block does not divide the image.

    Examples:
        >>> from mapseg_components.masking import block_grid
        >>> block_grid((96, 96, 24), (8, 8, 4))
        (12, 12, 6)
    """
    blocks = (block_size,) * len(spatial_shape) if isinstance(block_size, int) else tuple(block_size)
    if len(blocks) != len(spatial_shape) or any(b < 1 or s % b for s, b in zip(spatial_shape, blocks)):
        raise ConfigError(
            f"mask block size {blocks} does not divide the image {tuple(spatial_shape)}: "
            "choose a block size that divides the patch size on every axis"
        )
    return tuple(s // b for s, b in zip(spatial_shape, blocks))


def draw_block_mask(
    batch: int, grid: Sequence[int], mask_ratio: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one independent mask per sample, with the same exact number of hidden blocks in each.

    Args:
        batch: number of samples B.
        grid: blocks per axis, see `block_grid`.
        mask_ratio: share of hidden blocks, in [0, 1]; ``round(mask_ratio * blocks)`` are hidden.
        generator: source of randomness; torch's global CPU generator by default.

    Returns:
        boolean (B, 1, *grid) on the generator's device (CPU by default).

    Raises:
        ConfigError: the ratio is outside [0, 1].

    Examples:
        >>> from mapseg_components.masking import draw_block_mask
        >>> mask = draw_block_mask(batch=2, grid=(5, 4, 1), mask_ratio=0.7)
        >>> tuple(mask.shape), mask.flatten(1).sum(dim=1).tolist()  # 14 of 20 blocks in each sample
        ((2, 1, 5, 4, 1), [14, 14])
    """
    if not 0.0 <= mask_ratio <= 1.0:
        raise ConfigError(f"mask_ratio is {mask_ratio}, expected a share between 0 and 1")
    blocks = 1
    for side in grid:
        blocks *= int(side)
    device = generator.device if generator is not None else None
    order = torch.rand(batch, blocks, generator=generator, device=device).argsort(dim=1)
    return (order < round(mask_ratio * blocks)).view(batch, 1, *grid)


def draw_box_mask(batch: int, spatial_shape: Sequence[int], share: float) -> torch.Tensor:
    """Draw a box for each sample, anywhere in the image; it has the same share of every side.

    Args:
        batch: number of samples B.
        spatial_shape: voxels per axis.
        share: of each side, above 0 and below 1; a side of one voxel is whole.

    Returns:
        boolean (B, 1, *spatial_shape) on the CPU, ``True`` = in the box; drawn from torch's global CPU generator.

    Raises:
        ConfigError: the share is out of bounds.

    Examples:
        >>> from mapseg_components.masking import draw_box_mask
        >>> mask = draw_box_mask(batch=2, spatial_shape=(6, 9, 1), share=2 / 3)
        >>> tuple(mask.shape), mask.flatten(1).sum(dim=1).tolist()  # 4 x 6 x 1 voxels in each sample
        ((2, 1, 6, 9, 1), [24, 24])
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"box_share is {share}, expected a share of each side above 0 and below 1")
    mask = torch.ones(batch, 1, *spatial_shape, dtype=torch.bool)
    for axis, size in enumerate(spatial_shape):
        side = max(1, round(share * size))
        starts = (torch.rand(batch, 1) * (size - side + 1)).long()
        places = torch.arange(size)
        inside = (places >= starts) & (places < starts + side)
        mask = mask & inside.view(batch, 1, *(size if other == axis else 1 for other in range(len(spatial_shape))))
    return mask


def expand_block_mask(mask: torch.Tensor, spatial_shape: Sequence[int]) -> torch.Tensor:
    """Enlarge a mask from block to voxel resolution.

    Args:
        mask: (..., *grid), see `draw_block_mask`.
        spatial_shape: voxels per axis of the image.

    Returns:
        (..., *spatial_shape).

    Examples:
        >>> import torch
        >>> from mapseg_components.masking import expand_block_mask
        >>> expand_block_mask(torch.tensor([[True, False]]), (2, 4)).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    first = mask.ndim - len(spatial_shape)
    for axis, size in enumerate(spatial_shape):
        mask = mask.repeat_interleave(size // mask.shape[first + axis], dim=first + axis)
    return mask


def check_mask_value(value: float | str) -> float | str:
    """The value that replaces hidden voxels, unchanged, see `hide`.

    Args:
        value: a finite number or ``"mean"``.

    Raises:
        ConfigError: it is neither.

    Examples:
        >>> from mapseg_components.masking import check_mask_value
        >>> check_mask_value("mean")
        'mean'
        >>> check_mask_value("median")
        Traceback (most recent call last):
        mapseg_components.errors.ConfigError: mask_value is 'median', expected ...
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number and value != MEAN:
        raise ConfigError(f"mask_value is {value!r}, expected a number (0 in the paper) or {MEAN!r}")
    return value


def hide(image: torch.Tensor, mask: torch.Tensor, value: float | str = 0.0) -> torch.Tensor:
    """Image with hidden voxels replaced.

    Args:
        image: (..., X, Y, Z), in [0, 1] with background 0.
        mask: boolean, of the image's shape or broadcast to it, ``True`` = hidden.
        value: of hidden voxels: a number (0 in the paper, which is also the value of background), or ``"mean"``, the
            mean of all voxels of the same channel of the sample.

    Returns:
        the image's shape and type.

    Examples:
        >>> import torch
        >>> from mapseg_components.masking import hide
        >>> image = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 4)
        >>> mask = torch.tensor([True, False, False, False])
        >>> hide(image, mask).tolist(), hide(image, mask, "mean").tolist()
        ([[[0.0, 2.0, 3.0, 6.0]]], [[[3.0, 2.0, 3.0, 6.0]]])
    """
    if value == MEAN:
        return torch.where(mask, image.mean(dim=(-3, -2, -1), keepdim=True), image)
    return image.masked_fill(mask, float(value))


class BlockMask:
    """Hide random blocks of a batch of images, anew in each call.

    Args:
        mask_ratio: share of hidden blocks.
        block_size: voxels per side of a block, one number or one per axis.
        mask_value: see `hide`.

    Raises:
        ConfigError: the mask value is unknown; or, in a call, a block does not divide the image, or the ratio is no
            share.

    Examples:
        >>> import torch
        >>> from mapseg_components.masking import BlockMask
        >>> hidden = BlockMask(mask_ratio=0.75, block_size=4)(torch.ones(2, 1, 8, 8, 8))
        >>> hidden.mean().item()
        0.25
    """

    def __init__(self, mask_ratio: float, block_size: Sequence[int] | int, mask_value: float | str = 0.0) -> None:
        self.mask_ratio = mask_ratio
        self.block_size = block_size
        self.mask_value = check_mask_value(mask_value)

    def draw(self, image: torch.Tensor) -> torch.Tensor:
        """A mask for each image: boolean (B, 1, X, Y, Z), ``True`` = hidden, for images (B, C, X, Y, Z)."""
        mask = draw_block_mask(len(image), block_grid(image.shape[2:], self.block_size), self.mask_ratio)
        return expand_block_mask(mask.to(image.device, non_blocking=True), image.shape[2:])

    def hide(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Image with the hidden voxels of a mask replaced."""
        return hide(image, mask, self.mask_value)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, C, X, Y, Z) with a share of their blocks hidden."""
        return self.hide(image, self.draw(image))
