# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The setting ``memory_format`` of a network that is trained."""

from __future__ import annotations

import torch
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks.norms import set_norms
from mapseg_components.precision import resolved_amp

__all__ = ["resolved_memory_format", "set_memory_format"]

AUTO = "auto"
CHANNELS_LAST = "channels_last_3d"


def resolved_memory_format(
    network: nn.Module, device: torch.device | str, memory_format: str | None, amp: str | None
) -> str | None:
    """The memory format that a value of ``memory_format`` means for a network.

    ``"auto"`` is ``"channels_last_3d"`` where that was measured to be faster: volumes in float32 on a CPU, on which
    PyTorch otherwise reorders the input and output of each convolution (docs/decisions/0006-channels-last.md).

    Args:
        network: with kernels that are flat along the last axis it is one of images.
        device: where it runs.
        memory_format: ``"channels_last_3d"``, ``"auto"`` or ``None`` for PyTorch's own.
        amp: the setting of precision, see `mapseg_components.precision.resolved_amp`.

    Returns:
        ``"channels_last_3d"`` or ``None``.

    Raises:
        ConfigError: ``memory_format`` or ``amp`` is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks.memory_format import resolved_memory_format
        >>> volumes, images = torch.nn.Conv3d(1, 4, 3), torch.nn.Conv3d(1, 4, (3, 3, 1))
        >>> [resolved_memory_format(network, "cpu", "auto", None) for network in (volumes, images)]
        ['channels_last_3d', None]
    """
    if memory_format not in {None, AUTO, CHANNELS_LAST}:
        raise ConfigError(
            f"memory_format is {memory_format!r}, expected {AUTO!r}, {CHANNELS_LAST!r} or null for PyTorch's own"
        )
    if memory_format != AUTO:
        return memory_format
    volumes = any(weight.dim() == 5 and weight.shape[4] > 1 for weight in network.parameters())
    plain = torch.device(device).type == "cpu" and resolved_amp(device, amp) is None
    return CHANNELS_LAST if volumes and plain else None


def set_memory_format(network: nn.Module, memory_format: str | None) -> nn.Module:
    """Lay out the weights of a network's 3D convolutions; its features follow them, its values stay the same.

    In ``channels_last_3d`` its norms become those of `mapseg_components.networks.norms`, which are faster there.

    Args:
        network: changed in place.
        memory_format: ``"channels_last_3d"`` or ``None`` for PyTorch's own.

    Returns:
        the network.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks.memory_format import set_memory_format
        >>> network = set_memory_format(torch.nn.Conv3d(8, 8, 3, padding=1), "channels_last_3d")
        >>> network.weight.is_contiguous(memory_format=torch.channels_last_3d)
        True
    """
    layout = torch.channels_last_3d if memory_format == CHANNELS_LAST else torch.contiguous_format
    for weight in network.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=layout)
    return set_norms(network) if memory_format == CHANNELS_LAST else network
