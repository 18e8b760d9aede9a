# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmenters with two heads: logits, and an uncertainty of each logit (BUDA-Seg)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks.slices import as_slices

__all__ = ["TwoHeadDynUNet", "TwoHeads", "both_heads", "has_uncertainty"]

VARIANCES = (None, "free", "softplus")
START = 1.0  # V of a network that has not learnt it


class TwoHeads(nn.Module):
    """Mixin of a segmenter whose last layer has twice the channels: logits O first, then the uncertainty V of each.

    Called as any network it gives O alone, so that inference, exports, hand-over and federation need not know of V, and
    one file of weights serves all. `both_heads` is the same network, which gives O and V as channels of one tensor. V
    starts as 1 at every voxel and gets no gradient from a loss of O: supervised training is that of a plain network.

    A class that uses it makes its last layer with `channels` outputs, calls `set_heads` with that layer, and returns
    `shown` of its output.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import TwoHeads, both_heads
        >>> class OneLayer(TwoHeads):
        ...     def __init__(self, classes, variance):
        ...         super().__init__()
        ...         self.layer = torch.nn.Conv3d(1, self.channels(classes, variance), 1)
        ...         self.set_heads(variance, self.layer)
        ...     def forward(self, image):
        ...         return self.shown(self.layer(image))
        >>> network, image = OneLayer(3, "softplus"), torch.rand(1, 1, 4, 5, 6)
        >>> network(image).shape[1], both_heads(network)(image).shape[1]
        (3, 6)
    """

    @staticmethod
    def channels(classes: int, variance: str | None) -> int:
        """Output channels of the last layer. Raises `ConfigError` for an unknown ``variance``, see `set_heads`."""
        if variance not in VARIANCES:
            raise ConfigError(
                f"variance is {variance!r}, expected 'free', 'softplus', or null for a network without uncertainty"
            )
        return classes if variance is None else 2 * classes

    def set_heads(self, variance: str | None, *layers: nn.Module, spatial_dims: int = 3) -> None:
        """Note the kind of V, and let V start.

        Args:
            variance: ``"free"``, V is the last layer's output as it is, of either sign (the paper); ``"softplus"``, it
                is made positive; ``None``, there is no V.
            layers: the last one, whose second half of the channels is V, and those of deep supervision.
            spatial_dims: 2 or 3.
        """
        self.variance, self.both, self.channel_axis = variance, False, -1 - spatial_dims
        if variance is not None:
            start = START if variance == "free" else math.log(math.expm1(START))  # V is 1 either way
            for layer in layers:
                start_second_half(layer, start)

    def shown(self, output: torch.Tensor) -> torch.Tensor:
        """O, or O and V, of the last layer's output (B, 2 classes, ...)."""
        if self.variance is None:
            return output
        logits, uncertainty = torch.chunk(output, 2, dim=self.channel_axis)
        if not self.both:
            return logits
        if self.variance == "softplus":
            uncertainty = F.softplus(uncertainty)
        return torch.cat([logits, uncertainty], dim=self.channel_axis)


class TwoHeadDynUNet(TwoHeads, DynUNet):
    """MONAI's ``DynUNet`` with an uncertainty of each logit.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: classes, background included.
        args: further arguments of ``DynUNet``, by place or by name.
        variance: see `TwoHeads`; with ``None`` the weights have names and shapes of ``DynUNet``.
        kwargs: likewise.

    Shape:
        (B, in_channels, X, Y, Z) to logits (B, out_channels, X, Y, Z), or as ``DynUNet`` with deep supervision.

    Raises:
        ConfigError: ``variance`` is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import TwoHeadDynUNet, both_heads
        >>> network = TwoHeadDynUNet(3, 1, 4, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], variance="free")
        >>> image = torch.rand(1, 1, 8, 12, 16)
        >>> network(image).shape, both_heads(network)(image).shape
        (torch.Size([1, 4, 8, 12, 16]), torch.Size([1, 8, 8, 12, 16]))
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *args: Any,
        variance: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, in_channels, self.channels(out_channels, variance), *args, **kwargs)
        deep = self.deep_supervision_heads if self.deep_supervision else []
        self.set_heads(variance, self.output_block, *deep, spatial_dims=spatial_dims)
        as_slices(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See `TwoHeads`; DynUNet's own, written out since TorchScript knows no ``super()``."""
        output = self.output_block(self.skip_layers(image))
        if self.training and self.deep_supervision:
            output = torch.stack([output] + [F.interpolate(one, output.shape[2:]) for one in self.heads], dim=1)
        return self.shown(output)


def start_second_half(layer: nn.Module, value: float) -> None:
    """Let the second half of a layer's output channels be a value everywhere."""
    convolutions = [one for one in layer.modules() if isinstance(one, nn.modules.conv._ConvNd)]
    last = convolutions[-1]
    axis = 1 if last.transposed else 0
    if last.bias is None:
        raise ConfigError(f"{type(last).__name__} has no bias, which the uncertainty starts with: give it one")
    with torch.no_grad():
        last.weight.chunk(2, dim=axis)[1].zero_()
        last.bias.chunk(2)[1].fill_(value)


def has_uncertainty(network: nn.Module) -> bool:
    """Whether a network has an uncertainty head.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import has_uncertainty
        >>> has_uncertainty(torch.nn.Conv3d(1, 4, 3))
        False
    """
    return isinstance(network, TwoHeads) and network.variance is not None


def shows_both(network: Any) -> bool:
    """Whether a network, or a function in the place of one, gives logits and uncertainty, see `both_heads`."""
    return isinstance(network, TwoHeads) and bool(network.both)


def both_heads(network: nn.Module) -> nn.Module:
    """The same network, which gives logits and uncertainty: (B, 2 classes, ...) wherever it gave (B, classes, ...).

    Args:
        network: it and its weights are shared, not copied; it goes on giving logits alone.

    Raises:
        ConfigError: it has no uncertainty head.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import GlobalLocalUNet, both_heads
        >>> network = GlobalLocalUNet(1, 3, filters=[8, 16], kernel_size=[3, 3], strides=[2, 2], variance="free")
        >>> logits, uncertainty = both_heads(network)(torch.rand(1, 1, 8, 12, 16)).chunk(2, dim=1)
        >>> tuple(uncertainty.shape), uncertainty.unique().tolist()  # it starts as 1
        ((1, 3, 8, 12, 16), [1.0])
    """
    if not has_uncertainty(network):
        raise ConfigError(
            f"{type(network).__name__} has no uncertainty head: it was made without; train a model with the setting "
            "uncertainty, such as mapseg adapt --method buda_seg does"
        )
    view = copy.copy(network)  # modules and parameters are shared
    view.both = True
    return view
