# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-training on two labelled domains: COSMOS (Shin et al., crossMoDA 2021), Eq. 8."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from monai.losses import DeepSupervisionLoss
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, LABEL, SOURCE, TARGET
from mapseg_components.methods.base import Pass, Tensors

__all__ = ["SelfTraining", "deep_weights"]

DEEP = re.compile(r"deep_(\d+)")


class SelfTraining:
    """Sum of two means: the loss on source scans that look like the target, and on target scans with pseudo labels.

    The batches of both sides are equally large whatever the number of scans, so that each domain has half of the loss
    however many scans a filter of the pseudo labels leaves. A side that a batch does not have is left out: without the
    target it is supervised training.

    Outputs of deep supervision (``deep_1``, ``deep_2``, ..., see `mapseg_components.networks.PlainPass`) join the loss
    by themselves, with `deep_weights`.

    Args:
        loss: of the source, called with logits (B, classes, X, Y, Z) and label (B, 1, X, Y, Z).
        pseudo_loss: of the target's pseudo labels, by default ``loss``.
        target_weight: of the target's term; 1 in the paper.

    Examples:
        >>> import torch
        >>> from monai.losses import DiceCELoss
        >>> from mapseg_components.methods import SelfTraining
        >>> method = SelfTraining(DiceCELoss(to_onehot_y=True, softmax=True))
        >>> sample = {"image": torch.rand(1, 1, 4, 5, 6), "label": torch.ones(1, 1, 4, 5, 6)}
        >>> len(method.passes({"source": sample, "target": sample})), method.weights
        (2, {'source': 1.0, 'target': 1.0})
    """

    alone = (SOURCE,)  # a target without label maps teaches nothing
    selection = (TARGET,)

    def __init__(self, loss: nn.Module, pseudo_loss: nn.Module | None = None, target_weight: float = 1.0) -> None:
        self.losses = {SOURCE: loss, TARGET: loss if pseudo_loss is None else pseudo_loss}
        self.weights: dict[str, float] = {SOURCE: 1.0, TARGET: target_weight}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """One pass over the images of each side.

        Args:
            batch: both sides have ``image`` (B, C, X, Y, Z) and ``label`` (B, 1, X, Y, Z).

        Raises:
            ConfigError: a side has no labels.
        """
        for side, samples in batch.items():
            if LABEL not in samples:
                raise ConfigError(
                    f"the {side} has {sorted(samples)} and no {LABEL!r}: self-training learns from label maps on both "
                    "sides; name a datalist with target_labelled, as a stage of pseudo labels writes it"
                )
        return [Pass({IMAGE: batch[side][IMAGE]}, self._terms(side, batch[side][LABEL])) for side in batch]

    def _terms(self, side: str, label: torch.Tensor) -> Callable[[Tensors], dict[str, torch.Tensor]]:
        def terms(output: Tensors) -> dict[str, torch.Tensor]:
            found = sorted((int(match[1]), name) for name in output if (match := DEEP.fullmatch(name)))
            if not found:
                return {side: self.losses[side](output["logits"], label)}
            outputs = [output["logits"], *(output[name] for _, name in found)]
            supervised = DeepSupervisionLoss(self.losses[side], weights=deep_weights(len(outputs)))
            return {side: supervised(outputs, label.float())}

        return terms


def deep_weights(outputs: int) -> list[float]:
    """Weights of a network's outputs in deep supervision, the one of full resolution first: halved at each, sum 1.

    As in nnU-Net (Isensee et al. 2021); those of MONAI's ``DeepSupervisionLoss`` by itself do not add up to 1, and the
    learning rate would depend on their number.

    Args:
        outputs: number of them.

    Examples:
        >>> from mapseg_components.methods import deep_weights
        >>> [round(weight, 3) for weight in deep_weights(3)]
        [0.571, 0.286, 0.143]
    """
    halved = [0.5**number for number in range(outputs)]
    return [weight / sum(halved) for weight in halved]
