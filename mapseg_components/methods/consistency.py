# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Methods for any segmenter of one image: supervised, mean teacher and masked image consistency."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mapseg_components.keys import IMAGE, LABEL, SOURCE, TARGET
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.labels import ArgmaxLabels, mean_of, tissue_of
from mapseg_components.structures import IGNORED

__all__ = ["MaskedConsistency", "MeanTeacher", "Supervised"]

Change = Callable[[torch.Tensor], torch.Tensor]


class Supervised:
    """The labelled source alone: the baseline, and the source side of the others here.

    Args:
        loss: called with logits (B, classes, X, Y, Z) and label (B, 1, X, Y, Z), e.g. MONAI's ``DiceCELoss``.

    Examples:
        >>> import torch
        >>> from monai.losses import DiceCELoss
        >>> from mapseg_components.methods import Supervised
        >>> method = Supervised(DiceCELoss(to_onehot_y=True, softmax=True))
        >>> sample = {"image": torch.rand(1, 1, 4, 4, 4), "label": torch.ones(1, 1, 4, 4, 4)}
        >>> [sorted(one.inputs) for one in method.passes({"source": sample, "target": {}})]
        [['image']]
    """

    selection: tuple[str, ...] = ()

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss
        self.weights: dict[str, float] = {"source": 1.0}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """One pass over the source's images."""
        if SOURCE not in batch:
            return []
        image, label = batch[SOURCE][IMAGE], batch[SOURCE][LABEL]
        return [Pass({IMAGE: image}, lambda output: {"source": self.loss(output["logits"], label)})]


class MeanTeacher(Supervised):
    """The student's probabilities on a changed target image near the teacher's on the image as it is.

    Mean squared error of probabilities; the teacher is an average of students (Tarvainen and Valpola 2017,
    arXiv 1703.01780; for domain adaptation in segmentation Perone et al. 2019, arXiv 1811.06042).

    Args:
        loss: see `Supervised`.
        labels: of the teacher.
        change: from the target's image (B, C, X, Y, Z) to what the student sees; it keeps every voxel's place.
        weight: of the target's term.

    Examples:
        >>> from mapseg_components.contrast import RandomContrast
        >>> from mapseg_components.methods import MeanTeacher
        >>> MeanTeacher(loss=None, labels=None, change=RandomContrast(noise=0.05), weight=10.0).weights
        {'source': 1.0, 'target': 10.0}
    """

    selection = ("target",)

    def __init__(self, loss: nn.Module, labels: ArgmaxLabels, change: Change, weight: float = 1.0) -> None:
        super().__init__(loss)
        self.labels = labels
        self.change = change
        self.weights["target"] = weight

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """The source's pass, and one over the changed target."""
        passes = super().passes(batch)
        if TARGET in batch and self.labels.active:
            image = batch[TARGET][IMAGE]
            passes.append(Pass({IMAGE: self.change(image)}, self._target_terms(image)))
        return passes

    def _target_terms(self, image: torch.Tensor) -> Callable[[Tensors], dict[str, torch.Tensor]]:
        expected = self.labels.probabilities(image=image)["logits"]
        counted = tissue_of(image) if self.labels.ignore_outside else None

        def terms(output: Tensors) -> dict[str, torch.Tensor]:
            return {"target": mean_of((output["logits"].float().softmax(1) - expected).square().sum(1), counted)}

        return terms


class MaskedConsistency(MeanTeacher):
    """The student's labels of a masked target image are the teacher's of the whole one (MIC, arXiv 2212.01322).

    The pseudo-label loss of each image is weighted by the share of its voxels whose probability exceeds
    ``confidence_threshold``. The Score reads it without this weight, which a teacher that is unsure of everything would
    make 0.

    Args:
        loss: see `Supervised`.
        labels: of the teacher.
        change: hides parts of the image, e.g. ``mapseg_components.masking.BlockMask``.
        weight: of the target's term.
        confidence_threshold: 0.968 in the paper; 0 weights all images alike.
        pseudo_loss: of pseudo labels, by default ``loss``.

    Examples:
        >>> from mapseg_components.masking import BlockMask
        >>> from mapseg_components.methods import MaskedConsistency
        >>> MaskedConsistency(loss=None, labels=None, change=BlockMask(0.7, 8)).selection
        ('target_all',)
    """

    selection = ("target_all",)

    def __init__(
        self,
        loss: nn.Module,
        labels: ArgmaxLabels,
        change: Change,
        weight: float = 1.0,
        confidence_threshold: float = 0.968,
        pseudo_loss: nn.Module | None = None,
    ) -> None:
        super().__init__(loss, labels, change, weight)
        self.pseudo_loss = loss if pseudo_loss is None else pseudo_loss
        self.weights["target_all"] = 0.0
        self.confidence_threshold = confidence_threshold

    def _target_terms(self, image: torch.Tensor) -> Callable[[Tensors], dict[str, torch.Tensor]]:
        label, confidence = self.labels(image=image)["logits"]
        sure = (confidence > self.confidence_threshold).float()
        counted = label != IGNORED
        shares = (sure * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

        def terms(output: Tensors) -> dict[str, torch.Tensor]:
            pairs = zip(output["logits"].split(1), label.split(1))
            losses = torch.stack([self.pseudo_loss(logits, own) for logits, own in pairs])
            return {"target": (shares * losses).mean(), "target_all": losses.detach().mean()}

        return terms
