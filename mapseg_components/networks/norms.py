# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's GroupNorm and InstanceNorm for features in ``channels_last_3d`` on a CPU, where PyTorch's own are slow: its
GroupNorm in the backward pass, its InstanceNorm by turning features into its own format and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["ChannelsLastGroupNorm", "ChannelsLastInstanceNorm", "set_norms"]

SMALLEST = 2**18  # values of features: below, calling a dozen operations costs more than is gained


class _Normalise(torch.autograd.Function):
    """Normalise each group of channels of each sample, and scale each channel.

    Features are looked at as rows of one line of voxels with all their channels, so that sums over rows and products
    with one value per channel are long loops over memory as it lies. The variance is that of centred features.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        samples, channels, *_, length = features.shape
        rows = _rows(features)
        count = features[0].numel() // groups

        def of_groups(sums: torch.Tensor) -> torch.Tensor:
            """One value per sample and channel, the mean over the channel's group, from sums of rows."""
            grouped = sums.view(samples, length, groups, -1).sum(dim=(1, 3)) / count
            return grouped.repeat_interleave(channels // groups, dim=1)

        centred = rows - _line(of_groups(rows.sum(dim=1)), length)
        inverse = (of_groups(centred.square().sum(dim=1)) + eps).rsqrt()
        ctx.save_for_backward(centred, inverse, weight)
        ctx.groups, ctx.count, ctx.shape = groups, count, features.shape
        found = torch.empty_like(features)  # no view, so that an activation may work in place
        torch.addcmul(_line(bias[None], length), centred, _line(inverse * weight, length), out=_rows(found))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred, inverse, weight = ctx.saved_tensors
        samples, channels, *_, length = ctx.shape
        gradient = _rows(gradients[0])
        sums = gradient.sum(dim=1).view(samples, length, channels).sum(dim=1)
        products = (gradient * centred).sum(dim=1).view(samples, length, channels).sum(dim=1)

        def of_groups(values: torch.Tensor) -> torch.Tensor:
            """The mean over each group's voxels, for each of its channels."""
            grouped = (values * weight).view(samples, ctx.groups, -1).sum(dim=2) / ctx.count
            return grouped.repeat_interleave(channels // ctx.groups, dim=1)

        shift = _line(-inverse * of_groups(sums), length)
        slope = _line(-(inverse**3) * of_groups(products), length)
        found = torch.addcmul(shift, centred, slope).addcmul_(gradient, _line(inverse * weight, length))
        found = found.view(samples, *ctx.shape[2:], channels).permute(0, 4, 1, 2, 3)
        return found, None, (products * inverse).sum(dim=0), sums.sum(dim=0), None


def _rows(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, X, Y, Z) as (B, XY, ZC), without a copy where they are in ``channels_last_3d``."""
    samples, channels, *_, length = features.shape
    return features.permute(0, 2, 3, 4, 1).reshape(samples, -1, length * channels)


def _line(values: torch.Tensor, length: int) -> torch.Tensor:
    """Values (B, C) for each voxel of a row, (B, 1, ZC)."""
    return values.repeat(1, length).unsqueeze(1)


def fits(features: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether features are such that this module's way is the faster one, or as fast."""
    return (
        not torch.jit.is_tracing()
        and features.numel() >= SMALLEST
        and weight is not None
        and features.device.type == "cpu"
        and features.dtype == weight.dtype
        and features.dtype in (torch.float32, torch.float64)  # sums of half precision would be of half precision
        and features.dim() == 5
        and features.shape[1] > 1
        and features.is_contiguous(memory_format=torch.channels_last_3d)
        and not features.is_contiguous()
    )


class ChannelsLastGroupNorm(nn.GroupNorm):
    """PyTorch's ``GroupNorm``, with a faster backward pass of volumes in ``channels_last_3d`` on a CPU.

    Shape:
        (B, C, X, Y, Z) to the same, in the same memory format.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks.norms import ChannelsLastGroupNorm
        >>> norm = ChannelsLastGroupNorm(2, 4)
        >>> features = torch.rand(1, 4, 6, 6, 6).to(memory_format=torch.channels_last_3d)
        >>> torch.allclose(norm(features), torch.nn.functional.group_norm(features, 2), atol=1e-5)
        True
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and fits(input, self.bias):  # with a bias there is a weight
            return _Normalise.apply(input, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(input)


class ChannelsLastInstanceNorm(nn.InstanceNorm3d):
    """PyTorch's ``InstanceNorm3d`` without running statistics, faster for such volumes in both passes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if fits(input, self.bias):
            return _Normalise.apply(input, self.num_features, self.weight, self.bias, self.eps)
        return super().forward(input)


def set_norms(network: nn.Module) -> nn.Module:
    """The same network with the norms of this module; its weights and their names stay.

    Args:
        network: changed in place.
    """
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = ChannelsLastInstanceNorm
    return network
