# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Decoders of MAPSeg: reconstruction for pretraining; ASPP and segmentation head for adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import nn

from mapseg_components.networks.encoder import ResidualBlock, group_norm
from mapseg_components.networks.recomputation import Recomputable

__all__ = ["ASPP", "ReconstructionDecoder", "SegmentationHead"]


def pointwise_conv(features: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """A 1x1x1 convolution, on a CPU as a matrix product.

    On one thread of a CPU, PyTorch would use a general algorithm that copies its input. On a GPU this is PyTorch's
    convolution.

    Args:
        features: (B, I, X, Y, Z).
        weight: (O, I) with any further axes of length 1.
        bias: (O,) or ``None``.

    Returns:
        (B, O, X, Y, Z).
    """
    matrix = weight.flatten(1)
    if features.is_cuda:
        return F.conv3d(features, matrix[:, :, None, None, None], bias)
    rows, shape = features.flatten(2), features.shape
    matrices = matrix.expand(shape[0], matrix.shape[0], matrix.shape[1])
    output = torch.bmm(matrices, rows) if bias is None else torch.baddbmm(bias[:, None], matrices, rows)
    return output.view(shape[0], matrix.shape[0], shape[2], shape[3], shape[4])


class PatchUpsample(nn.ConvTranspose3d):
    """Transposed conv whose kernel equals its stride, computed as a 1x1x1 conv to the voxels of each block.

    Equal to ``nn.ConvTranspose3d`` up to rounding, with the same parameters, and on a CPU faster.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the output.
        stride: voxels of a block, one number per axis.

    Shape:
        (B, in_channels, x, y, z) to (B, out_channels, x * stride, y * stride, z * stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=tuple(stride), stride=tuple(stride))

    def forward(self, input: torch.Tensor, output_size: Optional[list[int]] = None) -> torch.Tensor:
        batch, _, x, y, z = input.shape
        i, j, k = self.weight.shape[2:]
        weight, bias = self.weight.flatten(1).t(), self.bias
        blocks = pointwise_conv(input, weight, None if bias is None else bias.repeat_interleave(i * j * k))
        grid = blocks.reshape(batch, self.out_channels, i, j, k, x, y, z).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return grid.reshape(batch, self.out_channels, x * i, y * j, z * k)


class ReconstructionDecoder(Recomputable):
    """Features back to an image in [0, 1]: transposed conv, one residual block, GroupNorm, 3x3x3 conv, sigmoid.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the image.
        stride: the encoder's stride, undone by the transposed conv.
        channels: channels after the transposed conv and after the residual block (32 and 16 in the paper).
        norm_groups: groups of the residual block's GroupNorms; the last GroupNorm has a quarter of them.

    Shape:
        (B, in_channels, x, y, z) to (B, out_channels, x * stride, y * stride, z * stride).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import ReconstructionDecoder
        >>> decoder = ReconstructionDecoder(in_channels=8, out_channels=1, stride=(4, 4, 1), channels=(4, 2))
        >>> decoder(torch.rand(1, 8, 2, 3, 5)).shape
        torch.Size([1, 1, 8, 12, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Sequence[int] | int,
        channels: tuple[int, int] = (32, 16),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        strides = ensure_tuple_rep(stride, 3)
        self.upsample = PatchUpsample(in_channels, channels[0], strides)
        self.block = ResidualBlock(channels[0], channels[1], stride=1, norm_groups=norm_groups)
        self.norm = group_norm(channels[1], max(norm_groups // 4, 1))
        self.conv = nn.Conv3d(channels[1], out_channels, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(self.norm(self.block(self.upsample(features)))))


class FoldingConv3d(nn.Conv3d):
    """Conv3d that takes half its input channels as both halves of them.

    ``W [x, x] = (W1 + W2) x``: the same up to rounding for half the arithmetic, and both halves get its gradient.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if 2 * input.shape[1] == self.in_channels:
            first, second = weight.chunk(2, dim=1)
            weight = first + second
        if self.kernel_size == (1, 1, 1):  # of stride 1, as all here
            return pointwise_conv(input, weight, self.bias)
        return self._conv_forward(input, weight, self.bias)


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, norm_groups: int, dilation: tuple[int, ...] = (1, 1, 1)
) -> nn.Sequential:
    """Conv3d without bias that keeps the grid, GroupNorm, ReLU. Half the input channels are used as both halves."""
    padding = tuple(d * (kernel_size // 2) for d in dilation)
    return nn.Sequential(
        FoldingConv3d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        group_norm(out_channels, norm_groups),
        nn.ReLU(inplace=True),
    )


class ASPP(Recomputable):
    """Atrous spatial pyramid pooling in 3D (DeepLabV3, arXiv 1706.05587) with GroupNorm.

    Parallel branches: 1x1x1; one 3x3x3 per dilation; global average pool, 1x1x1, upsampled. They are concatenated
    and projected by a 1x1x1 conv, followed by dropout.

    Args:
        in_channels: channels of the input.
        out_channels: channels of each branch and of the output.
        dilations: dilation of each 3x3x3 branch, one number or one per axis (4, 8, 16 in the paper).
        dropout: dropout after the projection (0.1 in the paper).
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, x, y, z) to (B, out_channels, x, y, z). An input of half the channels is used as both halves.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import ASPP
        >>> aspp = ASPP(in_channels=8, out_channels=4, dilations=[1, (2, 2, 1)]).eval()
        >>> features = torch.rand(1, 4, 5, 6, 7)
        >>> aspp(features).shape
        torch.Size([1, 4, 5, 6, 7])
        >>> torch.allclose(aspp(features), aspp(torch.cat([features, features], dim=1)), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int | Sequence[int]] = (4, 8, 16),
        dropout: float = 0.1,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm_relu(in_channels, out_channels, 1, norm_groups)])
        for dilation in dilations:
            self.branches.append(
                conv_norm_relu(in_channels, out_channels, 3, norm_groups, dilation=ensure_tuple_rep(dilation, 3))
            )
        # one voxel is left: a group of a single channel would be normalised to a constant
        pool_groups = min(norm_groups, max(out_channels // 2, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool3d(1), conv_norm_relu(in_channels, out_channels, 1, pool_groups))
        self.project = nn.Sequential(
            conv_norm_relu((len(dilations) + 2) * out_channels, out_channels, 1, norm_groups), nn.Dropout(dropout)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(features)
        outputs = [branch(features) for branch in self.branches]
        outputs.append(pooled.expand(-1, -1, features.shape[2], features.shape[3], features.shape[4]))
        return self.project(torch.cat(outputs, dim=1))


class ClassLogits(nn.Conv3d):
    """1x1x1 Conv3d that runs in float32 under autocast: logits rounded to bfloat16 tie, which changes labels.

    In a scripted network autocast decides.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting() or input.is_meta:
            return pointwise_conv(input, self.weight, self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return pointwise_conv(input.to(self.weight.dtype), self.weight, self.bias)


class SegmentationHead(Recomputable):
    """Features to class logits at full resolution.

    Transposed conv, GroupNorm, ReLU, 3x3x3 conv, GroupNorm, ReLU, 1x1x1 conv; the last in float32 under autocast.

    Args:
        in_channels: channels of the features.
        num_classes: output channels, background included.
        stride: the encoder's stride, undone by the transposed conv.
        channels: channels at full resolution (64 in the paper). They dominate the cost of a narrow network.
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, x, y, z) to (B, num_classes, x * stride, y * stride, z * stride).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import SegmentationHead
        >>> head = SegmentationHead(in_channels=8, num_classes=3, stride=(4, 4, 1), channels=4)
        >>> head(torch.rand(1, 8, 2, 3, 5)).shape
        torch.Size([1, 3, 8, 12, 5])
    """

    def __init__(
        self, in_channels: int, num_classes: int, stride: Sequence[int] | int, channels: int = 64, norm_groups: int = 8
    ) -> None:
        super().__init__()
        strides = ensure_tuple_rep(stride, 3)
        self.layers = nn.Sequential(
            PatchUpsample(in_channels, channels, strides),
            group_norm(channels, norm_groups),
            nn.ReLU(inplace=True),
            conv_norm_relu(channels, channels, 3, norm_groups),
            ClassLogits(channels, num_classes, kernel_size=1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)
