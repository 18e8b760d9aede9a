# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes of one slice, which 2D images are here, as the images that they are: a CPU convolves those several times
faster, since it works along the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["SliceConv3d", "as_slices"]


class SliceConv3d(nn.Conv3d):
    """PyTorch's ``Conv3d``, which takes a volume of one slice as an image; weights are the same.

    Shape:
        (B, C, X, Y, Z) as of ``Conv3d``; Z is 1 for an image.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks.slices import SliceConv3d
        >>> convolution = SliceConv3d(1, 2, kernel_size=3, padding=1)
        >>> image = torch.rand(1, 1, 8, 6, 1)
        >>> torch.allclose(convolution(image), torch.nn.Conv3d.forward(convolution, image), atol=1e-5)
        True
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[4] != 1:
            return self._conv_forward(input, self.weight, self.bias)
        weight = self.weight[:, :, :, :, self.kernel_size[2] // 2]  # beside the slice there is padding alone
        found = F.conv2d(
            input.squeeze(4),
            weight,
            self.bias,
            (self.stride[0], self.stride[1]),
            (int(self.padding[0]), int(self.padding[1])),
            (self.dilation[0], self.dilation[1]),
            self.groups,
        )
        return found.unsqueeze(4)


def as_slices(network: nn.Module) -> nn.Module:
    """The same network, whose convolutions are `SliceConv3d`; those that would not keep a single slice stay.

    Args:
        network: changed in place.
    """
    for module in network.modules():
        if type(module) is nn.Conv3d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            if module.padding[2] == module.dilation[2] * (module.kernel_size[2] // 2) and module.kernel_size[2] % 2:
                module.__class__ = SliceConv3d
    return network
