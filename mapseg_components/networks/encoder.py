# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The residual 3D encoder that pretraining and segmentation share (MAPSeg, arXiv 2303.09373, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.utils import ensure_tuple_rep
from torch import nn

from mapseg_components.networks.recomputation import Recomputable

__all__ = ["Features", "ResidualBlock", "ResidualEncoder", "deepest", "group_norm"]

Features = torch.Tensor | Sequence[torch.Tensor]  # of an encoder: one tensor, or all levels, the deepest first


def deepest(features: Features) -> torch.Tensor:
    """The features that pass and view share and compare: those of the deepest level."""
    return features if isinstance(features, torch.Tensor) else features[0]


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to ``groups`` that divides the channels."""
    return nn.GroupNorm(math.gcd(channels, groups), channels)


class ResidualBlock(Recomputable):
    """conv1, then (conv2, conv3) plus skip, then ReLU; a conv is GroupNorm, Conv3d without bias, ReLU.

    The third conv has no ReLU before the sum. With ``stride > 1`` the first conv is a patch embedding: its kernel
    equals its stride.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first conv, one number or one per axis.
        norm_groups: groups of each GroupNorm (fewer where the channels do not divide).

    Shape:
        (B, in_channels, X, Y, Z) to (B, out_channels, X / stride, Y / stride, Z / stride).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import ResidualBlock
        >>> block = ResidualBlock(in_channels=1, out_channels=8, stride=(4, 4, 1), norm_groups=4)
        >>> block(torch.rand(1, 1, 8, 12, 5)).shape
        torch.Size([1, 8, 2, 3, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int] | int, norm_groups: int) -> None:
        super().__init__()
        strides = ensure_tuple_rep(stride, 3)
        embed = any(s > 1 for s in strides)
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size=strides if embed else 3,
            stride=strides,
            padding=0 if embed else 1,
            bias=False,
        )
        self.norm2 = group_norm(out_channels, norm_groups)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm3 = group_norm(out_channels, norm_groups)
        self.conv3 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.relu(self.conv1(self.norm1(x)))
        x = self.relu(self.conv2(self.norm2(skip)))
        x = self.conv3(self.norm3(x))
        return self.relu(x + skip)


class ResidualEncoder(nn.Module):
    """A stack of residual blocks; the first one reduces the grid by ``stride``, all others keep it.

    Args:
        in_channels: image channels.
        width: channels of every block (512 in the paper).
        depth: number of blocks (8 in the paper).
        stride: reduction of the grid, one number or one per axis (4 in the paper); thick-slice stacks want less
            reduction along the slices, e.g. ``(4, 4, 1)``.
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, X, Y, Z) to (B, width, X / stride, Y / stride, Z / stride). Any spatial size that the
        stride divides.

    Raises:
        ValueError: in a call, the stride does not divide the image.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import ResidualEncoder
        >>> encoder = ResidualEncoder(in_channels=1, width=8, depth=2, stride=(4, 4, 1))
        >>> encoder(torch.rand(1, 1, 8, 12, 5)).shape
        torch.Size([1, 8, 2, 3, 5])
    """

    def __init__(
        self, in_channels: int, width: int, depth: int, stride: Sequence[int] | int = 4, norm_groups: int = 32
    ) -> None:
        super().__init__()
        self.stride: tuple[int, ...] = ensure_tuple_rep(stride, 3)
        self.width = width
        self.blocks = nn.ModuleList(
            ResidualBlock(
                in_channels=in_channels if index == 0 else width,
                out_channels=width,
                stride=self.stride if index == 0 else 1,
                norm_groups=norm_groups,
            )
            for index in range(depth)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for axis, stride in enumerate(self.stride):
            if image.shape[2 + axis] % stride != 0:
                raise ValueError(
                    f"image of spatial shape {list(image.shape[2:])} is not divisible by the encoder's stride "
                    f"{list(self.stride)}: choose a patch size that the stride divides, or pad the image"
                )
        for block in self.blocks:
            image = block(image)
        return image
