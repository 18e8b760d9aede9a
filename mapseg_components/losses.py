# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses of MAPSeg (arXiv 2303.09373, Eqs. 1-10), and their weighted sum with every term named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, MaskedDiceLoss
from torch import nn

from mapseg_components.errors import ConfigError

__all__ = [
    "AdaptationLoss",
    "LocalGlobalCosineLoss",
    "MaskedReconstructionLoss",
    "SegmentationLoss",
    "WeightAnchor",
]


class SegmentationLoss(nn.Module):
    """``L_seg`` = mean cross-entropy - mean soft Dice over the foreground classes (Eq. 1); its lower bound is -1.

    Dice is computed over the whole batch (one ratio per class) by MONAI's ``DiceLoss``, in float32 whatever
    the logits' type.

    Args:
        include_absent: count a class that the batch's labels do not hold as Dice of about 0, as the authors' code
            does. By default it is left out of the Dice mean.
        class_weights: weight of each class in the cross-entropy, background first; equal (``None``) in the paper. The
            weighted mean is taken, so that the scale of the weights does not matter.
        smooth: added to numerator and denominator of each Dice ratio.
    """

    def __init__(
        self, include_absent: bool = False, class_weights: Sequence[float] | None = None, smooth: float = 1e-5
    ) -> None:
        super().__init__()
        self.include_absent = include_absent
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        settings: dict[str, Any] = {
            "include_background": False,
            "to_onehot_y": True,
            "softmax": True,
            "batch": True,
            "reduction": "none",
            "smooth_nr": smooth,
            "smooth_dr": smooth,
        }
        self.dice = DiceLoss(**settings)
        self.masked_dice = MaskedDiceLoss(**settings)

    def forward(self, logits: torch.Tensor, label: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, C, X, Y, Z).
            label: (B, 1, X, Y, Z), class indices of any number type.
            valid: boolean (B, 1, X, Y, Z); voxels that are ``False`` count nowhere. All count by default.

        Raises:
            ValueError: shapes disagree.
        """
        if logits.ndim != 5 or label.shape != (logits.shape[0], 1, *logits.shape[2:]):
            raise ValueError(
                f"label has shape {tuple(label.shape)}, expected {(logits.shape[0], 1, *logits.shape[2:])} "
                f"for logits of shape {tuple(logits.shape)}"
            )
        logits, label = plain(logits).float(), plain(label).long()
        valid = None if valid is None else plain(valid)
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if valid is None:
            cross_entropy = F.cross_entropy(logits, label[:, 0], weights)
            dice = 1.0 - self.dice(logits, label).flatten()
        else:
            per_voxel = F.cross_entropy(logits, label[:, 0], weights, reduction="none") * valid[:, 0]
            share = valid.float() if weights is None else weights[label] * valid
            cross_entropy = per_voxel.sum() / share.sum().clamp(min=1e-6)
            dice = 1.0 - self.masked_dice(logits, label, mask=valid.float()).flatten()
        if self.include_absent:
            return cross_entropy - dice.mean()
        counted = label if valid is None else label.masked_fill(~valid, 0)
        present = torch.zeros(logits.shape[1], dtype=torch.bool, device=label.device)
        present = present.index_fill_(0, counted.flatten(), True)[1:]
        # neither bincount nor indexing: no wait for the device, and a batch without foreground gives 0
        return cross_entropy - torch.where(present, dice, 0.0).sum() / present.sum().clamp(min=1)


class MaskedReconstructionLoss(nn.Module):
    """Mean squared error over the hidden voxels of a batch (section 3.2)."""

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scalar loss.

        Args:
            reconstruction: (B, C, X, Y, Z).
            image: (B, C, X, Y, Z), in [0, 1].
            mask: boolean (B, 1, X, Y, Z), ``True`` = hidden.
        """
        error = (plain(reconstruction).float() - plain(image).float()).square()
        hidden = plain(mask).expand_as(error)
        return torch.where(hidden, error, 0.0).sum() / hidden.sum().clamp(min=1)


class LocalGlobalCosineLoss(nn.Module):
    """1 - cosine similarity of local and context features, over space, per channel; mean over channels and batch.

    The paper's Eq. 4 divides by the larger of the two norms, which is no cosine; the authors' code uses the cosine.
    """

    def forward(self, local_features: torch.Tensor, context_features: torch.Tensor) -> torch.Tensor:
        """Scalar loss; both inputs (B, W, x, y, z)."""
        local, context = plain(local_features).float().flatten(2), plain(context_features).float().flatten(2)
        return (1.0 - F.cosine_similarity(local, context, dim=2)).mean()


class WeightAnchor:
    """Half the squared distance of a network's parameters to given weights, against forgetting them.

    Its gradient is ``phi - phi_0``: weight decay towards ``phi_0`` (L2-SP, Li et al., ICML 2018). Not in the paper.

    Args:
        network: whose parameters are held; named as in ``weights``.
        weights: a state_dict, or ``None`` if ``strength`` is 0.
        strength: weight of the term in the loss; 0 for none, then ``weights`` is not looked at.

    Raises:
        ConfigError: the strength is negative, or there are no weights, or not those of this network.
    """

    def __init__(self, network: nn.Module, weights: Mapping[str, torch.Tensor] | None, strength: float) -> None:
        if not 0.0 <= strength < float("inf"):
            raise ConfigError(f"anchor_weight is {strength}, expected 0 (off) or a positive number")
        self.strength = strength
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if strength == 0:
            return
        if weights is None:
            raise ConfigError(
                f"anchor_weight is {strength}, but there are no weights to stay near: set initial_weights"
            )
        for name, parameter in network.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                found = tuple(weights[name].shape) if name in weights else "absent"
                raise ConfigError(
                    f"anchor_weight is {strength}, but {name} is {found} in initial_weights, "
                    f"expected {tuple(parameter.shape)}: use the network settings that these weights were trained with"
                )
            self._pairs.append((parameter, weights[name].detach().clone()))

    def __call__(self) -> torch.Tensor:
        """Scalar term, not multiplied by its strength."""
        self._pairs = [(parameter, weight.to(parameter.device)) for parameter, weight in self._pairs]
        return torch.stack([(parameter - weight).square().sum() for parameter, weight in self._pairs]).sum() / 2


class AdaptationLoss(nn.Module):
    """The terms of one side of adaptation, and the weights that Eqs. 8, 9 and 10 give them.

    Terms are named ``<side>_<what>`` and, for the masked pass, ``..._masked``: ``source_local``,
    ``source_local_masked``, ``source_global``, ``source_global_masked``, ``source_cosine``,
    ``source_cosine_masked``, and the same with ``target``.

    Source side, in every setting (Eqs. 8 and 9): beta, gamma and delta for the clean and for the masked pass.
    Target side: Eq. 8 has the masked pass only, with weights 1, 2 gamma, 2 delta. With ``target_clean`` each is
    shared half and half by the masked and the clean pass; with beta = 0.5 that is Eq. 10.

    Args:
        beta: weight of the local segmentation terms (0.5 in the paper).
        gamma: weight of the global segmentation terms (0.05 in the paper).
        delta: weight of the cosine terms (0.025 in the paper).
        target_clean: whether the target side has clean terms too.
        source_masked: whether the source side has masked terms (the paper). Without them the clean terms take their
            share too, at half the cost.
        segmentation: of source terms, by default `SegmentationLoss`.
        pseudo_segmentation: of pseudo-label terms, by default `SegmentationLoss` without class weights: weighting
            the rare classes of pseudo labels would feed their false positives back.
        confidence_threshold: v1's tau, in [0, 1]; pseudo-label terms are weighted by eta, the share of voxels whose
            maximum probability exceeds it. Off (``None``) by default.
        ignore_unsure: leave voxels whose maximum probability does not exceed this threshold out of the pseudo-label
            terms (they count nowhere, and never as background). Off (``None``) by default.
        anchor: adds the term ``anchor``, see `WeightAnchor`. Off (``None``, or strength 0) by default.
    """

    def __init__(
        self,
        beta: float = 0.5,
        gamma: float = 0.05,
        delta: float = 0.025,
        target_clean: bool = False,
        source_masked: bool = True,
        segmentation: nn.Module | None = None,
        pseudo_segmentation: nn.Module | None = None,
        confidence_threshold: float | None = None,
        ignore_unsure: float | None = None,
        anchor: WeightAnchor | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"confidence_threshold": confidence_threshold, "ignore_unsure": ignore_unsure}.items():
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}, expected a probability between 0 and 1, or null for off")
        self.target_clean = target_clean
        self.segmentation = SegmentationLoss() if segmentation is None else segmentation
        self.pseudo_segmentation = SegmentationLoss() if pseudo_segmentation is None else pseudo_segmentation
        self.cosine = LocalGlobalCosineLoss()
        self.confidence_threshold = confidence_threshold
        self.ignore_unsure = ignore_unsure
        self.anchor = anchor if anchor is not None and anchor.strength > 0 else None
        kinds = {"local": (beta, 1.0), "global": (gamma, 2 * gamma), "cosine": (delta, 2 * delta)}
        self.weights: dict[str, float] = {}
        for kind, (source, target) in kinds.items():
            self.weights[f"source_{kind}"] = source if source_masked else 2 * source
            if source_masked:
                self.weights[f"source_{kind}_masked"] = source
            self.weights[f"target_{kind}_masked"] = target / 2 if target_clean else target
            if target_clean:
                self.weights[f"target_{kind}"] = target / 2
        if self.anchor is not None:
            self.weights["anchor"] = self.anchor.strength

    def passes(self, side: str) -> tuple[str, ...]:
        """Name endings of the passes that a side needs, e.g. ``("", "_masked")``; "" is the clean pass."""
        return tuple(end for end in ("", "_masked") if f"{side}_local{end}" in self.weights)

    def terms(
        self,
        name: tuple[str, str],
        output: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        local_label: torch.Tensor,
        global_label: torch.Tensor,
        local_confidence: torch.Tensor | None = None,
        global_confidence: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The three unweighted terms of one pass.

        Args:
            name: side ("source" or "target") and ending of the pass ("" or "_masked").
            output: local logits, global logits (B, C, ...), local features, context features (B, W, ...).
            local_label: (B, 1, X, Y, Z), labels or pseudo labels; global_label: likewise.
            local_confidence: (B, 1, X, Y, Z), maximum probability of the teacher; global_confidence: likewise.
                Given for pseudo labels only.
        """
        side, end = name
        local_logits, global_logits, local_features, context_features = output
        return {
            f"{side}_local{end}": self._segmentation(local_logits, local_label, local_confidence),
            f"{side}_global{end}": self._segmentation(global_logits, global_label, global_confidence),
            f"{side}_cosine{end}": self.cosine(local_features, context_features),
        }

    def penalties(self) -> dict[str, torch.Tensor]:
        """The unweighted terms of an iteration that belong to no pass."""
        return {} if self.anchor is None else {"anchor": self.anchor()}

    def forward(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of named terms.

        Raises:
            KeyError: a term has no weight.
        """
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _segmentation(self, logits: torch.Tensor, label: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
        if confidence is None:
            return self.segmentation(logits, label)
        confidence = plain(confidence)
        valid = None if self.ignore_unsure is None else confidence > self.ignore_unsure
        loss = self.pseudo_segmentation(logits, label, valid)
        if self.confidence_threshold is not None:
            loss = loss * (confidence > self.confidence_threshold).float().mean()
        return loss


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without metadata: MONAI's ``MetaTensor`` of a batch refuses to be flattened."""
    return tensor.as_subclass(torch.Tensor)
