# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How a network runs: device, memory format, activations kept or computed again."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mapseg_components.networks.memory_format import resolved_memory_format, set_memory_format

__all__ = ["Recomputable", "prepare_network"]

logger = logging.getLogger(__name__)


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
    network: nn.Module,
    device: torch.device | str,
    activation_checkpointing: bool = False,
    memory_format: str | None = None,
    amp: str | None = None,
) -> nn.Module:
    """Put a network on a device and set how it runs; its results and the names of its weights stay the same.

    Results of another ``memory_format`` differ by rounding.

    Args:
        network: changed in place.
        device: where it will run.
        activation_checkpointing: compute the activations of residual blocks and decoders again in the backward pass:
            a fraction of the memory for one more forward pass.
        memory_format: ``"channels_last_3d"``, ``"auto"`` or ``None``, see `mapseg_components.networks.memory_format`.
        amp: precision that it will be trained in, which ``"auto"`` asks for.

    Returns:
        the network.

    Raises:
        ConfigError: ``memory_format`` or ``amp`` is unknown.

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
    network.to(torch.device(device))
    found = resolved_memory_format(network, device, memory_format, amp)
    if found != memory_format:
        logger.info(
            "memory_format %s on this %s: %s.", memory_format, torch.device(device).type, found or "PyTorch's own"
        )
    return set_memory_format(network, found)
