# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Mean probabilities of several weights of one network, and of a scan and its mirror image."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from mapseg_components.checkpoints import load_weights
from mapseg_components.errors import ConfigError
from mapseg_components.networks.heads import shows_both

__all__ = ["AveragingInferer"]


class AveragingInferer(Inferer):
    """Run an inferer with several weights, and on mirrored scans as well, and average the probabilities.

    It wraps another inferer, so that the evaluator and the rest of a bundle's config stay as they are. MONAI's
    ``EnsembleEvaluator`` would replace the evaluator and keep the logits of all members at once.

    Args:
        inferer: runs one member.
        weights: files of further weights of the evaluator's network; all members count equally.
        flip_axes: spatial axes (0 to 2) that are mirrored together for a second pass of each member; empty for none.
        every_flip: a pass for each combination of these axes, 8 for all three (nnU-Net), instead of the two.

    Raises:
        ConfigError: an axis is no spatial axis.

    Examples:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> from mapseg_components.inferers import AveragingInferer
        >>> scan = torch.rand(1, 1, 4, 5, 6)
        >>> network = lambda image: torch.cat([torch.zeros_like(image), image], dim=1)
        >>> logits = AveragingInferer(SimpleInferer(), flip_axes=[0])(scan, network)  # scan and mirror image agree
        >>> torch.allclose(logits, network(scan).log_softmax(dim=1), atol=1e-6)
        True
    """

    def __init__(
        self,
        inferer: Inferer,
        weights: Sequence[str | os.PathLike[str]] = (),
        flip_axes: Sequence[int] = (),
        every_flip: bool = False,
    ) -> None:
        super().__init__()
        if not set(flip_axes) <= {0, 1, 2}:
            raise ConfigError(f"flip_axes is {list(flip_axes)}, expected axes from 0 to 2")
        self.inferer = inferer
        self.weights = list(weights)
        self.flip_axes = list(dict.fromkeys(flip_axes))
        self.every_flip = every_flip
        self._others: list[nn.Module] | None = None

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Logarithm of the mean probabilities: its softmax gives them, its argmax the label.

        Args:
            inputs: (B, C, X, Y, Z).
            network: the first member; the others are copies of it with other weights.
            args: passed on to the inferer.
            kwargs: passed on to the inferer.

        Returns:
            (B, classes, X, Y, Z), float32; of a network that shows both heads the mean absolute uncertainty after them.

        Raises:
            CheckpointError: weights do not fit the network.
            ConfigError: the network's output is no tensor of two channels or more. Else as the inferer.
        """
        if self._others is None:
            self._others = [self._member(network, path) for path in self.weights]
        axes_of_input = [axis + 2 for axis in self.flip_axes]
        counts = [*range(len(axes_of_input) + 1)] if self.every_flip else sorted({0, len(axes_of_input)})
        views = [axes for number in counts for axes in itertools.combinations(axes_of_input, number)]
        total, count = None, 0
        uncertainty: Any = 0.0
        for member in (network, *self._others):
            for axes in views:
                logits = self.inferer(torch.flip(inputs, axes) if axes else inputs, member, *args, **kwargs)
                require_classes(logits)
                logits = torch.flip(logits, axes) if axes else logits
                if shows_both(network):
                    logits, raw = logits.chunk(2, dim=1)
                    uncertainty = uncertainty + raw.abs()
                probabilities = torch.softmax(logits, dim=1)
                total = probabilities if total is None else total.add_(probabilities)
                count += 1
        assert total is not None
        mean = total.div_(count).clamp_(min=torch.finfo(total.dtype).tiny).log_()
        return torch.cat([mean, uncertainty / count], dim=1) if shows_both(network) else mean

    def _member(self, network: Any, path: str | os.PathLike[str]) -> nn.Module:
        member = copy.deepcopy(network)
        load_weights(member, path)
        return member.eval()


def require_classes(logits: Any) -> None:
    """Refuse an output that is not logits of two channels or more. Raises `ConfigError`."""
    if not isinstance(logits, torch.Tensor):
        raise ConfigError(
            f"the inferer returned a {type(logits).__name__}, and the mean is one of logits: wrap the network in a "
            "function that returns its logits alone"
        )
    if logits.shape[1] < 2:
        raise ConfigError(
            "the network has one output channel, whose softmax is always 1: train it with two, background and structure"
        )
