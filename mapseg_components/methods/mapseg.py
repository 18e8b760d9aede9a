# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""MAPSeg: masked pseudo-labelling of a patch and of its global view (arXiv 2303.09373, sections 3.3 to 3.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from mapseg_components.contrast import Change, changed_alike
from mapseg_components.errors import ConfigError
from mapseg_components.keys import BOX, GLOBAL_IMAGE, GLOBAL_LABEL, IMAGE, LABEL, SOURCE, TARGET
from mapseg_components.losses import ClassShareLoss, LocalGlobalCosineLoss, SegmentationLoss, plain, sampled_loss
from mapseg_components.masking import BlockMask
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.buda_seg import require_samples, uncertainty_of
from mapseg_components.methods.labels import ArgmaxLabels, PseudoLabel

__all__ = ["MAPSeg"]

MASKED = "_masked"
PRIOR = "target_prior"


class MAPSeg:
    """Source labels and the teacher's pseudo labels, on clean and on masked pairs of patch and global view.

    Terms are named ``<side>_<what>`` and, for the masked pass, ``..._masked``: ``source_local``,
    ``source_local_masked``, ``source_global``, ``source_global_masked``, ``source_cosine``,
    ``source_cosine_masked``, and the same with ``target``.

    Source side, in every setting (Eqs. 8 and 9): beta, gamma and delta for the clean and for the masked pass.
    Target side: Eq. 8 has the masked pass only, with weights 1, 2 gamma, 2 delta. With ``target_clean`` each is
    shared half and half by the masked and the clean pass; with beta = 0.5 that is Eq. 10. Without ``target_masked`` the
    clean pass is the only one. The Score reads the target's local segmentation term of the masked pass (section 3.7),
    if there is one: the clean one falls when pseudo labels repeat themselves, unless the student sees another contrast.

    Args:
        labels: pseudo labels of the target; ``None`` trains on the source alone.
        mask_ratio: share of hidden blocks (0.7 in the paper).
        local_block_size: voxels per side of a hidden block of the local patch (8), one number or one per axis.
        global_block_size: of the global view (4).
        mask_value: what a hidden voxel shows, see ``masking.hide``; 0 in the paper.
        beta: weight of the local segmentation terms (0.5 in the paper).
        gamma: weight of the global segmentation terms (0.05 in the paper).
        delta: weight of the cosine terms (0.025 in the paper).
        target_clean: whether the target side has clean terms too.
        target_masked: whether the target side has masked terms (the paper). Without them the clean terms are all.
        change: what the student sees of the target instead of the scan as it is, which the teacher labels: a change of
            intensities such as `mapseg_components.contrast.RandomContrast`, drawn once for patch and global view.
            ``None`` (the paper) changes nothing. Masks hide blocks of the changed images.
        source_masked: whether the source side has masked terms (the paper). Without them the clean terms take their
            share too, at half the cost.
        loss: of source terms, by default `SegmentationLoss`.
        pseudo_loss: of pseudo-label terms, by default `SegmentationLoss` without class weights: weighting the rare
            classes of pseudo labels would feed their false positives back.
        confidence_threshold: v1's tau, in [0, 1]; pseudo-label terms are weighted by eta, the share of voxels whose
            maximum probability exceeds it. Off (``None``) by default.
        ignore_unsure: leave voxels whose maximum probability does not exceed this threshold out of the pseudo-label
            terms (they count nowhere, and never as background). Off (``None``) by default.
        prior_weight: weight of ``target_prior``, the divergence of the class shares of the student's global views of
            the target from those of the source's labels of its views, see `ClassShareLoss`. It needs the source in
            the same batch, and global views. 0 (the paper): there is no such term.
        global_view: whether samples have one (the paper). Without it the local terms are all: for scans that a patch
            holds nearly whole, such as short-axis stacks of the heart.
        samples: compare pseudo labels with so many draws of the logits by the network's uncertainty head, as
            `BUDASeg` does; 0 (the paper): with the logits.

    Raises:
        ConfigError: a threshold is no probability, a weight is negative, or a mask setting is unknown; there is a prior
            without global views; or, in a call, the global view is missing, or there is a prior and no source.

    Examples:
        >>> from mapseg_components.methods import MAPSeg
        >>> method = MAPSeg(labels=None, source_masked=False)
        >>> method.weights["source_local"], method.weights["target_local_masked"]
        (1.0, 1.0)
        >>> method.selection
        ('target_local_masked',)
    """

    def __init__(
        self,
        labels: ArgmaxLabels | None,
        mask_ratio: float = 0.7,
        local_block_size: Sequence[int] | int = 8,
        global_block_size: Sequence[int] | int = 4,
        mask_value: float | str = 0.0,
        beta: float = 0.5,
        gamma: float = 0.05,
        delta: float = 0.025,
        target_clean: bool = False,
        target_masked: bool = True,
        change: Change | None = None,
        source_masked: bool = True,
        loss: nn.Module | None = None,
        pseudo_loss: nn.Module | None = None,
        confidence_threshold: float | None = None,
        ignore_unsure: float | None = None,
        prior_weight: float = 0.0,
        global_view: bool = True,
        samples: int = 0,
    ) -> None:
        require_samples(samples)
        if not 0.0 <= prior_weight < float("inf"):
            raise ConfigError(f"prior_weight is {prior_weight}, expected 0 for off or a number above it")
        if prior_weight and not global_view:
            raise ConfigError("prior_weight is set without global views, whose class shares it compares: set it to 0")
        for name, value in {"confidence_threshold": confidence_threshold, "ignore_unsure": ignore_unsure}.items():
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}, expected a probability between 0 and 1, or null for off")
        self.labels = labels
        self.hide_local = BlockMask(mask_ratio, local_block_size, mask_value)
        self.hide_global = BlockMask(mask_ratio, global_block_size, mask_value)
        self.loss = SegmentationLoss() if loss is None else loss
        self.pseudo_loss = SegmentationLoss() if pseudo_loss is None else pseudo_loss
        self.cosine = LocalGlobalCosineLoss()
        self.shares = ClassShareLoss()
        self.confidence_threshold = confidence_threshold
        self.ignore_unsure = ignore_unsure
        self.endings = {
            SOURCE: ("", MASKED) if source_masked else ("",),
            TARGET: ("",) if not target_masked else ("", MASKED) if target_clean else (MASKED,),
        }
        self.change = change
        self.global_view = global_view
        self.samples = samples
        self.selection = (f"target_local{self.endings[TARGET][-1]}",)
        self.weights: dict[str, float] = {}
        shares = {"local": (beta, 1.0)}
        if global_view:
            shares |= {"global": (gamma, 2 * gamma), "cosine": (delta, 2 * delta)}
        for kind, (source, target) in shares.items():
            for side, weight in ((SOURCE, 2 * source), (TARGET, target)):
                endings = self.endings[side]
                self.weights |= {f"{side}_{kind}{ending}": weight / len(endings) for ending in endings}
        if prior_weight:
            endings = self.endings[TARGET]
            self.weights |= {f"{PRIOR}{ending}": prior_weight / len(endings) for ending in endings}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """Clean and masked pairs with source labels or fresh pseudo labels.

        Args:
            batch: both sides have ``image``, ``global_image`` (B, C, X, Y, Z) and ``box`` (B, 3, 2), the patch in
                voxels of the view; the source has ``label`` and ``global_label`` as well. Nothing of the view without
                ``global_view``.
        """
        passes = []
        if SOURCE in batch:
            side = batch[SOURCE]
            passes += self._clean_and_masked(SOURCE, self._inputs(SOURCE, side), side[LABEL], side.get(GLOBAL_LABEL))
        if TARGET in batch and self.labels is not None and self.labels.active:
            inputs = self._inputs(TARGET, batch[TARGET])
            labels = self.labels(**inputs)
            if self.change is not None:
                images = [key for key in (IMAGE, GLOBAL_IMAGE) if key in inputs]
                inputs |= dict(zip(images, changed_alike(self.change, *(inputs[key] for key in images))))
            passes += self._clean_and_masked(TARGET, inputs, labels["logits"], labels.get("global_logits"))
            passes = self._with_prior(passes, batch)
        return passes

    def _inputs(self, name: str, side: Tensors) -> dict[str, torch.Tensor]:
        """What the network is shown of a side."""
        if not self.global_view:
            return {IMAGE: side[IMAGE]}
        return {key: with_view(name, side)[key] for key in (IMAGE, GLOBAL_IMAGE, BOX)}

    def _clean_and_masked(
        self,
        side: str,
        inputs: Tensors,
        label: torch.Tensor | PseudoLabel,
        global_label: torch.Tensor | PseudoLabel | None,
    ) -> list[Pass]:
        passes = []
        for ending in self.endings[side]:
            seen = dict(inputs)
            if ending == MASKED:
                seen[IMAGE] = self.hide_local(inputs[IMAGE])
                if self.global_view:
                    seen[GLOBAL_IMAGE] = self.hide_global(inputs[GLOBAL_IMAGE])

            def terms(output: Tensors, ending: str = ending) -> dict[str, torch.Tensor]:
                uncertainty = partial(uncertainty_of, output, self.samples)
                found = {f"{side}_local{ending}": self._segmentation(output["logits"], label, uncertainty("logits"))}
                if global_label is not None:
                    features = (output["local_features"], output["context_features"])
                    found[f"{side}_global{ending}"] = self._segmentation(
                        output["global_logits"], global_label, uncertainty("global_logits")
                    )
                    found[f"{side}_cosine{ending}"] = self.cosine(*features)
                return found

            passes.append(Pass(seen, terms))
        return passes

    def _with_prior(self, passes: list[Pass], batch: Mapping[str, Tensors]) -> list[Pass]:
        """The same passes; those of the target have the prior's term as well, if it has a weight."""
        endings = [ending for ending in self.endings[TARGET] if f"{PRIOR}{ending}" in self.weights]
        if not endings:
            return passes
        if SOURCE not in batch:
            raise ConfigError(
                "prior_weight is set, and there is no source whose labels have shares of the classes (test-time, or a "
                "site of a federation): set prior_weight to 0; share_limits.yaml watches shares without a source"
            )
        label = batch[SOURCE][GLOBAL_LABEL]

        def added(one: Pass, ending: str) -> Pass:
            def terms(output: Tensors) -> dict[str, torch.Tensor]:
                return {**one.terms(output), f"{PRIOR}{ending}": self.shares(output["global_logits"], label)}

            return Pass(one.inputs, terms)

        first = len(passes) - len(endings)
        return passes[:first] + [added(one, ending) for one, ending in zip(passes[first:], endings)]

    def _segmentation(
        self,
        logits: torch.Tensor,
        label: torch.Tensor | PseudoLabel,
        uncertainty: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(label, PseudoLabel):
            return self.loss(logits, label)
        confidence = plain(label.confidence)
        counted = () if self.ignore_unsure is None else (confidence > self.ignore_unsure,)
        loss = sampled_loss(self.pseudo_loss, logits, uncertainty, self.samples, label.label, *counted)
        if self.confidence_threshold is not None:
            loss = loss * (confidence > self.confidence_threshold).float().mean()
        return loss


def with_view(name: str, side: Tensors) -> Tensors:
    """The same samples. Raises `ConfigError` if they have no global view."""
    if GLOBAL_IMAGE not in side:
        raise ConfigError(
            f"the {name} has {sorted(side)} and no {GLOBAL_IMAGE!r}, which MAPSeg compares patches with: set "
            "global_view to true, with a network that takes it, or choose a method of one image (mapseg methods)"
        )
    return side
