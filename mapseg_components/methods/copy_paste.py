# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Boxes of source patches pasted into target patches and back (BCP, Bai et al., CVPR 2023, arXiv 2305.00673)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn

from mapseg_components.contrast import Change
from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, LABEL, SOURCE, TARGET
from mapseg_components.masking import draw_box_mask
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.consistency import Supervised
from mapseg_components.methods.labels import ArgmaxLabels

__all__ = ["CopyPaste"]


class CopyPaste(Supervised):
    """The source's labels and the teacher's, in images that are half of the source and half of the target.

    Once the teacher exists there are two mixed images for each pair of a source and a target patch: a box of the source
    patch in the target patch, and the box of the target patch in the source patch. Voxels of the source are compared
    with their labels, those of the target with pseudo labels of the whole target patch, each in a loss of its own. So
    the network sees a border between the two and must use one rule on both of its sides. Beside them, unlike in the
    paper, the source patch as it is; and pseudo labels are not reduced to their largest component.

    Patches only: a global view would show neither of the two scans.

    Args:
        loss: of source voxels, e.g. `SegmentationLoss`; called with logits, label and ``valid``, the voxels that count.
        labels: of the teacher.
        box_share: of each side of a patch that the box has (2/3 in the paper), at a random place in each sample.
        weight: of the target's voxels against the source's (0.5 in the paper).
        pseudo_loss: of target voxels, by default ``loss``.
        change: of the target patch's intensities before it is mixed, which the student sees; the teacher labels it as
            it is. ``None`` (the paper) changes nothing.
        ignore_unsure: target voxels whose probability does not exceed this threshold count nowhere; ``None`` for off.

    Raises:
        ConfigError: a loss knows no ``valid``, or a share is out of bounds; or, in a call, there is no source, or the
            patches of the two sides differ in their sizes.

    Examples:
        >>> from mapseg_components.losses import SegmentationLoss
        >>> from mapseg_components.methods import CopyPaste
        >>> sorted(CopyPaste(SegmentationLoss(), labels=None).weights)
        ['source', 'source_around', 'source_box', 'target_around', 'target_box']
    """

    selection = ("target_around", "target_box")

    alone = (SOURCE,)

    def __init__(
        self,
        loss: nn.Module,
        labels: ArgmaxLabels,
        box_share: float = 2 / 3,
        weight: float = 0.5,
        pseudo_loss: nn.Module | None = None,
        change: Change | None = None,
        ignore_unsure: float | None = None,
    ) -> None:
        super().__init__(loss)
        self.labels = labels
        self.pseudo_loss = loss if pseudo_loss is None else pseudo_loss
        for one in (self.loss, self.pseudo_loss):
            if "valid" not in inspect.signature(one.forward).parameters:
                name = type(getattr(one, "loss", one)).__name__
                raise ConfigError(
                    f"{name} cannot leave voxels out (no argument 'valid'), which copy-paste needs: use "
                    "mapseg_components.losses.SegmentationLoss, without dice_ce.yaml"
                )
        draw_box_mask(0, (1, 1, 1), box_share)  # refuses a bad share before any data is read
        if ignore_unsure is not None and not 0.0 <= ignore_unsure <= 1.0:
            raise ConfigError(f"ignore_unsure is {ignore_unsure}, expected a probability between 0 and 1, or null")
        self.box_share = box_share
        self.change = change
        self.ignore_unsure = ignore_unsure
        self.weights |= {"source_box": 0.5, "source_around": 0.5, "target_box": weight, "target_around": weight}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """The source's pass, and two over mixed images."""
        passes = super().passes(batch)
        if TARGET not in batch or not self.labels.active:
            return passes
        if SOURCE not in batch:
            raise ConfigError(
                "copy-paste mixes source and target patches, and there is no source (test-time, or a site of a "
                "federation): choose MAPSeg there"
            )
        source, label, target = batch[SOURCE][IMAGE], batch[SOURCE][LABEL], batch[TARGET][IMAGE]
        if source.shape != target.shape:
            raise ConfigError(
                f"source patches are {tuple(source.shape)}, target patches {tuple(target.shape)}, expected equal "
                "sizes: give both one batch_size and patch_size"
            )
        pseudo, confidence = self.labels(image=target)["logits"]
        sure = torch.ones_like(confidence, dtype=torch.bool)
        if self.ignore_unsure is not None:
            sure = confidence > self.ignore_unsure
        seen = target if self.change is None else self.change(target)
        box = draw_box_mask(len(source), source.shape[2:], self.box_share).to(source.device)

        def mixed(of_source: torch.Tensor, names: tuple[str, str]) -> Pass:
            def terms(output: Tensors) -> dict[str, torch.Tensor]:
                return {
                    names[0]: self.loss(output["logits"], label, of_source),
                    names[1]: self.pseudo_loss(output["logits"], pseudo, ~of_source & sure),
                }

            return Pass({IMAGE: torch.where(of_source, source, seen)}, terms)

        return [
            *passes,
            mixed(box, ("source_box", "target_around")),
            mixed(~box, ("source_around", "target_box")),
        ]
