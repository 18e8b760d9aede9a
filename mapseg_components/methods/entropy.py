# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation without the source by sure predictions (after Tent, Wang et al., ICLR 2021, arXiv 2006.10726)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, TARGET
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.labels import mean_of, tissue_of

__all__ = ["EntropyMinimization", "norm_parameters"]


class EntropyMinimization:
    """Mean entropy of the predicted probabilities of target images, nothing else.

    Train the scales and shifts of the normalization layers alone, `norm_parameters`: with all weights free, one class
    everywhere is the surest prediction. It goes that way in the end in any case: few steps, a small learning rate.

    Args:
        ignore_outside: leave out voxels of images that are 0, for scans whose tissue is known, see
            `mapseg_components.data.tissue_is_known`.

    Examples:
        >>> import torch
        >>> from mapseg_components.methods import EntropyMinimization
        >>> image = torch.rand(1, 1, 4, 4, 4)
        >>> only = EntropyMinimization().passes({"target": {"image": image}})[0]
        >>> round(only.terms({"logits": torch.zeros(1, 2, 4, 4, 4)})["target_entropy"].item(), 4)  # ln 2
        0.6931
    """

    alone = (TARGET,)
    selection = ("target_entropy",)

    def __init__(self, ignore_outside: bool = False) -> None:
        self.ignore_outside = ignore_outside
        self.weights = {"target_entropy": 1.0}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """One pass over the target's images."""
        if TARGET not in batch:
            return []

        counted = tissue_of(batch[TARGET][IMAGE]) if self.ignore_outside else None

        def terms(output: Tensors) -> dict[str, torch.Tensor]:
            logarithms = output["logits"].float().log_softmax(dim=1)
            return {"target_entropy": mean_of(-(logarithms.exp() * logarithms).sum(dim=1), counted)}

        return [Pass({IMAGE: batch[TARGET][IMAGE]}, terms)]


def norm_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of a network's normalization layers, for the optimizer.

    Args:
        network: layers whose class is named ``...Norm...`` count: PyTorch's, MONAI's and this package's.

    Raises:
        ConfigError: there are none that can be trained.

    Examples:
        >>> from torch import nn
        >>> from mapseg_components.methods import norm_parameters
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True))
        >>> [tuple(one.shape) for one in norm_parameters(network)]
        [(4,), (4,)]
    """
    found: dict[Any, nn.Parameter] = {}
    for module in network.modules():
        if "Norm" in type(module).__name__:
            found |= {id(one): one for one in module.parameters(recurse=False)}
    if not found:
        raise ConfigError(
            f"{type(network).__name__} has no normalization layer with parameters, and entropy minimization trains "
            "nothing else: choose a network with affine normalization, or another method"
        )
    return list(found.values())
