# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The contract of a method: which passes an iteration makes, and what each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

__all__ = ["Method", "Pass"]

Tensors = Mapping[str, torch.Tensor]


class Pass(NamedTuple):
    """One forward pass of the network in training, and the losses of its output."""

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the network, each (B, ...)."""
    terms: Callable[[Tensors], dict[str, torch.Tensor]]
    """From the network's named outputs for these inputs to named, unweighted, scalar losses."""


class Method(Protocol):
    """How a network learns from labelled source samples and unlabelled target samples.

    `mapseg_components.engines.AdaptationTrainer` runs it: it calls `passes` once per iteration, runs the passes (as one
    batch or one after the other), and steps along the gradient of the weighted sum of all terms. A method is any object
    with these three members; ``examples/new_method.py`` is a complete one. A class that needs both sides in one batch,
    or one side alone, says so by ``alone``, the sides it learns from by themselves: ``("source",)``, ``("target",)`` or
    (without it) both. In a federation server and sites have one side each.
    """

    weights: Mapping[str, float]
    """Weight of each term in the total loss."""
    selection: Sequence[str]
    """Terms whose mean is the target loss of the Score, see `mapseg_components.handlers.ScoreCheckpoint`."""

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """The passes of one iteration.

        Args:
            batch: ``source`` (with ``image`` and ``label``) and ``target`` (with ``image``), one of them or both.
                Images are (B, C, X, Y, Z) in [0, 1] with background 0, labels (B, 1, X, Y, Z), all on the network's
                device. A crop with a global view adds its entries.
        """
