# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""GroupNorm that is exact in ``channels_last_3d``, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mapseg_components.networks.layout import is_channels_last

__all__ = ["GroupNorm", "group_norm"]

PIECE = 2**16
"""Numbers of a piece of features: it and what is made of it stay in a core's cache."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm, as exact for features in ``channels_last_3d`` on a CPU as in PyTorch's own memory format.

    PyTorch 2.13 computes the variance of such features as the mean of squares less the square of the mean, each summed
    one by one in float32: of 96x96x96 voxels whose mean is 20 to 40 times their spread, output and gradient are off by
    more than a thousandth. Here moments are taken around the mean of small pieces and put together in float64, which
    leaves a hundred-thousandth. Everywhere else, in a scripted or compiled network and without weight or bias as well,
    this is PyTorch's own. In ``channels_last_3d`` it has no second derivative.

    Shape:
        (B, C, ...) to the same, in the same memory format.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        ours = input.device.type == "cpu" and is_channels_last(input) and not torch.compiler.is_compiling()
        if ours and self.weight is not None and self.bias is not None:
            return ChannelsLastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(input)


def group_norm(channels: int, groups: int) -> GroupNorm:
    """GroupNorm with the largest number of groups up to ``groups`` that divides the channels."""
    return GroupNorm(math.gcd(channels, groups), channels)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """The function of `GroupNorm`: per sample a pass over the pieces for the sums and one to apply them."""

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        output = torch.empty_like(features)
        moments = []
        for rows, written in zip(rows_of(features), rows_of(output)):
            mean, variance = channel_moments(rows)
            center = over_group(mean, groups)
            scale = (over_group(variance + (mean - center).square(), groups) + eps).rsqrt()
            moments.append(torch.stack([center, scale]))
            write_affine(written, bias - center * scale * weight, (rows, scale * weight))
        ctx.save_for_backward(features, weight, torch.stack(moments))
        ctx.groups = groups
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight, moments = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        result = torch.empty_like(features)
        of_weight, of_bias = [], []
        for rows, slopes, written, (center, scale) in zip(
            rows_of(features), rows_of(gradient), rows_of(result), moments
        ):
            total, product = slope_sums(rows, slopes)
            product = scale * (product - center * total)
            of_bias.append(total)
            of_weight.append(product)
            level = over_group(weight * total, ctx.groups) / len(rows)
            tilt = over_group(weight * product, ctx.groups) / len(rows) * scale
            write_affine(written, scale * (tilt * center - level), (rows, -scale * tilt), (slopes, scale * weight))
        gradients = [torch.stack(sums).sum(0).to(weight.dtype) for sums in (of_weight, of_bias)]
        return result, *gradients, None, None


def rows_of(features: torch.Tensor) -> torch.Tensor:
    """Features in ``channels_last_3d`` as (B, voxels, C), a view."""
    return features.permute(0, 2, 3, 4, 1).flatten(1, 3)


def over_group(values: torch.Tensor, groups: int) -> torch.Tensor:
    """The mean of each group of (C,), for every channel."""
    return values.view(groups, -1).mean(1).repeat_interleave(len(values) // groups)


def piece_length(rows: torch.Tensor) -> int:
    """Voxels of a piece of (voxels, C)."""
    return max(PIECE // rows.shape[1], 1)


def pieces(*rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same pieces of several (voxels, C), one after the other."""
    step = piece_length(rows[0])
    for start in range(0, len(rows[0]), step):
        yield tuple(tensor[start : start + step] for tensor in rows)


def scratch(rows: torch.Tensor, sums: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for one piece, and for so many sums of every piece: (voxels of a piece, C) and (pieces, sums, C).

    It is taken at once: small blocks, one after another, would settle in the gaps that large tensors leave, and split
    them.
    """
    voxels, channels = piece_length(rows), rows.shape[1]
    count = -(-len(rows) // voxels)
    working = torch.promote_types(rows.dtype, torch.float32)
    return torch.empty(voxels, channels, dtype=working), torch.empty(count, sums, channels, dtype=working)


def channel_moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel of (voxels, C), float64."""
    room, sums = scratch(rows, 2)
    for (piece,), (mean, squares) in zip(pieces(rows), sums):
        torch.mean(piece, 0, dtype=sums.dtype, out=mean)
        rest = torch.sub(piece, mean, out=room[: len(piece)])
        torch.sum(rest.square_(), 0, out=squares)
    count = torch.full((len(sums), 1), float(len(room)), dtype=torch.float64)
    count[-1] = len(rows) - len(room) * (len(sums) - 1)
    means, squares = sums.double().unbind(1)
    center = (count * means).sum(0) / len(rows)
    return center, (squares + count * (means - center).square()).sum(0) / len(rows)


def slope_sums(rows: torch.Tensor, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the voxels of the slopes, and of the slopes times the features; (C,), float64."""
    room, sums = scratch(rows, 2)
    for (piece, slope), (total, product) in zip(pieces(rows, slopes), sums):
        torch.sum(slope, 0, dtype=sums.dtype, out=total)
        # a product of two bfloat16 into float32 would be rounded to bfloat16 on the way
        torch.sum(room[: len(piece)].copy_(piece).mul_(slope), 0, out=product)
    total, product = sums.double().sum(0)
    return total, product


def write_affine(written: torch.Tensor, constant: torch.Tensor, *parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    """``constant + rows * factor + ...`` into (voxels, C); constant and factors are (C,), float64."""
    working = torch.promote_types(written.dtype, torch.float32)
    room = None if written.dtype == working else scratch(written, 0)[0]
    constant, factors = constant.to(working), [factor.to(working) for _, factor in parts]
    for target, *each in pieces(written, *(rows for rows, _ in parts)):
        out = target if room is None else room[: len(target)]
        torch.addcmul(constant, each[0], factors[0], out=out)
        for piece, factor in zip(each[1:], factors[1:]):
            out.addcmul_(piece, factor)
        if out is not target:
            target.copy_(out)
