# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How a network runs, whatever it computes: device, activations kept or computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Recomputable", "prepare_network"]


class Recomputable(nn.Module):
    """A module that can forget its activations and compute them again in the backward pass (activation checkpointing).

    Results, gradients and random state are those of the plain module. TorchScript compiles ``forward`` and never sees
    the switch.
    """

    recompute = False
    """Whether the next training pass forgets its activations, see `prepare_network`."""

    def __call__(self, *args: Any) -> Any:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def prepare_network(
    network: nn.Module, device: torch.device | str, activation_checkpointing: bool = False
) -> nn.Module:
    """Put a network on a device and set how it runs; neither changes what it computes, or its keys.

    Args:
        network: changed in place.
        device: where to.
        activation_checkpointing: compute the activations of residual blocks and decoders again in the backward pass:
            a fraction of the memory for one more forward pass.

    Returns:
        the network.
    """
    for module in network.modules():
        if isinstance(module, Recomputable):
            module.recompute = activation_checkpointing
    return network.to(torch.device(device))
