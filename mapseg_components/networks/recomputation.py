# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How a network runs: device, activations kept or computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Recomputable", "prepare_network"]


class Recomputable(nn.Module):
    """A module that can drop its activations and compute them again in the backward pass (activation checkpointing).

    Results, gradients and random state are those of the plain module. TorchScript compiles ``forward`` alone, without
    this behaviour.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import Recomputable
        >>> class Square(Recomputable):
        ...     def forward(self, x):
        ...         return x * x
        >>> square, x = Square(), torch.tensor(3.0, requires_grad=True)
        >>> square.recompute = True
        >>> square(x).backward()
        >>> x.grad.item()
        6.0
    """

    recompute = False
    """Whether the next training pass computes its activations again, see `prepare_network`."""

    def __call__(self, *args: Any) -> Any:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def prepare_network(
    network: nn.Module, device: torch.device | str, activation_checkpointing: bool = False
) -> nn.Module:
    """Put a network on a device and set how it runs; its results and the names of its weights stay the same.

    Args:
        network: changed in place.
        device: where it will run.
        activation_checkpointing: compute the activations of residual blocks and decoders again in the backward pass:
            a fraction of the memory for one more forward pass.

    Returns:
        the network.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import MultiScaleMAE, prepare_network
        >>> network = MultiScaleMAE(in_channels=1, width=8, depth=1, decoder_channels=(4, 2))
        >>> network = prepare_network(network, "cpu", activation_checkpointing=True)
        >>> network.encoder.blocks[0].recompute
        True
    """
    for module in network.modules():
        if isinstance(module, Recomputable):
            module.recompute = activation_checkpointing
    return network.to(torch.device(device))
