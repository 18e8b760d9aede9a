# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation without the source by rounds of pseudo labels and uncertain logits (BUDA-Seg, Li et al.)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mapseg_components.contrast import Change
from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, TARGET
from mapseg_components.losses import SquaredDiceLoss, sampled_loss
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.labels import ArgmaxLabels
from mapseg_components.structures import IGNORED

__all__ = ["BUDASeg", "uncertainty_of"]

SIZE = "target_uncertainty"


class BUDASeg:
    """Pseudo labels for K draws of the student's logits, O + e V, of one forward pass.

    Where a pseudo label is wrong, a student that cannot say so must learn it; with a large V it need not. Labels are
    hard, those of `mapseg_components.handlers.PseudoLabelRounds`, which labels by the weights of the last round's end.
    Source: Li, Toussaint, Evans, Liu, "Unsupervised Domain Adaptation for Cerebellum Segmentation".

    ``target_uncertainty``, the mean of abs(V) over voxels and classes, is in the history, and so is the mean over the
    voxels where student and pseudo label agree (``..._agree``) and where they differ (``..._differ``), where there are
    such. An uncertainty that is useful is larger where they differ; one that goes to 0 has stopped to matter.

    Args:
        labels: of the teacher.
        samples: K. With 0 the method is plain pseudo labelling, and V is not learnt.
        variance_penalty: weight of ``target_uncertainty`` in the loss; 0 (the paper) for none.
        change: what the student sees instead of the image that the teacher labels, see `MAPSeg`; ``None`` (the paper)
            for the same.
        loss: of one draw, called with logits and label, by default `SquaredDiceLoss` (the paper). It leaves out voxels
            whose label is `mapseg_components.structures.IGNORED`, as the logged figures do.

    Raises:
        ConfigError: an argument is out of range; or, in a call, the network has no uncertainty head.

    Examples:
        >>> from mapseg_components.methods import BUDASeg
        >>> BUDASeg(labels=None, samples=4).weights["target"]
        1.0
    """

    alone = (TARGET,)
    selection = ("target",)

    def __init__(
        self,
        labels: ArgmaxLabels,
        samples: int = 4,
        variance_penalty: float = 0.0,
        change: Change | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        require_samples(samples)
        if not 0.0 <= variance_penalty < float("inf"):
            raise ConfigError(f"variance_penalty is {variance_penalty}, expected 0 for none or a number above it")
        self.labels = labels
        self.samples = samples
        self.change = change
        self.loss = SquaredDiceLoss() if loss is None else loss
        self.weights = {"target": 1.0, SIZE: variance_penalty, f"{SIZE}_agree": 0.0, f"{SIZE}_differ": 0.0}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """One pass over the target's images; a source is left alone."""
        if TARGET not in batch or not self.labels.active:
            return []
        image = batch[TARGET][IMAGE]
        label = self.labels(image=image)["logits"].label

        def terms(output: Tensors) -> dict[str, torch.Tensor]:
            uncertainty = uncertainty_of(output, self.samples)
            found = {"target": sampled_loss(self.loss, output["logits"], uncertainty, self.samples, label)}
            if uncertainty is not None:
                found |= sizes(uncertainty, output["logits"].argmax(1, keepdim=True) == label, label != IGNORED)
            return found

        return [Pass({IMAGE: image if self.change is None else self.change(image)}, terms)]


def require_samples(samples: int) -> None:
    """Refuse a number of draws below 0. Raises `ConfigError`."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ConfigError(f"samples is {samples!r}, expected a whole number, 0 for plain pseudo labels")


def uncertainty_of(output: Tensors, samples: int, logits: str = "logits") -> torch.Tensor | None:
    """V of named logits among a network's outputs; ``None`` if it has none and none is needed.

    Args:
        output: of the network.
        samples: K.
        logits: name of O.

    Raises:
        ConfigError: there is no V to draw samples by.

    Examples:
        >>> import torch
        >>> from mapseg_components.methods import uncertainty_of
        >>> uncertainty_of({"logits": torch.zeros(1, 2, 4, 4, 4)}, samples=0) is None
        True
    """
    name = logits.replace("logits", "uncertainty")
    if samples and name not in output:
        raise ConfigError(
            f"samples is {samples}, and the network has no uncertainty head: set uncertainty to true in the stage that "
            "trains it first (with a hand-over package: ask for one of such a network), or samples to 0"
        )
    return output.get(name)


def sizes(uncertainty: torch.Tensor, agree: torch.Tensor, counted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean of abs(V) over voxels, and over those of agreement and of difference where there are such.

    Args:
        uncertainty: (B, C, ...).
        agree: boolean (B, 1, ...).
        counted: boolean (B, 1, ...).
    """
    size = uncertainty.float().abs().mean(1, keepdim=True)
    found = {SIZE: (size * counted).sum() / counted.sum().clamp(min=1)}
    for name, where in {f"{SIZE}_agree": agree & counted, f"{SIZE}_differ": ~agree & counted}.items():
        if where.any():
            found[name] = size.detach()[where].mean()
    return found
