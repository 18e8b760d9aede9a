# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory format of features, and 1x1x1 convolutions that keep it."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F

__all__ = ["in_layout_of", "is_channels_last", "pointwise_conv"]


def is_channels_last(features: torch.Tensor) -> bool:
    """Whether features (B, C, X, Y, Z) are in ``channels_last_3d`` and not also contiguous."""
    if features.dim() != 5 or features.is_contiguous():
        return False
    return features.is_contiguous(memory_format=torch.channels_last_3d)


def in_layout_of(features: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The features in ``channels_last_3d`` if ``other`` is; else unchanged."""
    return features.contiguous(memory_format=torch.channels_last_3d) if is_channels_last(other) else features


def pointwise_conv(features: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """A 1x1x1 convolution, on a CPU as a matrix product in the features' memory format.

    On one thread of a CPU, PyTorch uses a general algorithm that copies its input into another memory format. On a GPU
    this is PyTorch's convolution.

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
    if is_channels_last(features):
        return F.linear(features.permute(0, 2, 3, 4, 1), matrix, bias).permute(0, 4, 1, 2, 3)
    rows, shape = features.flatten(2), features.shape
    matrices = matrix.expand(shape[0], matrix.shape[0], matrix.shape[1])
    output = torch.bmm(matrices, rows) if bias is None else torch.baddbmm(bias[:, None], matrices, rows)
    return output.view(shape[0], matrix.shape[0], shape[2], shape[3], shape[4])
