# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses of MAPSeg (arXiv 2303.09373, Eqs. 1, 2, 4), of translated slices, and of samples of logits (BUDA-Seg)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, MaskedDiceLoss
from monai.networks import one_hot
from torch import nn

from mapseg_components.structures import IGNORED

__all__ = [
    "ClassShareLoss",
    "LeavingOut",
    "LocalGlobalCosineLoss",
    "MaskedReconstructionLoss",
    "SegmentationLoss",
    "SliceDiceLoss",
    "SquaredDiceLoss",
    "sampled_loss",
]

SMALLEST = 1e-8  # share of a class in a logarithm
SURE = 30.0  # logit that leaves no doubt


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

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import SegmentationLoss
        >>> label = torch.tensor([0, 1, 1, 2]).reshape(1, 1, 4, 1, 1)
        >>> logits = 20.0 * torch.nn.functional.one_hot(label[:, 0]).movedim(-1, 1)  # (1, 3, 4, 1, 1)
        >>> round(SegmentationLoss()(logits, label).item(), 3)  # the lower bound
        -1.0
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
            valid: boolean (B, 1, X, Y, Z); voxels that are ``False`` count nowhere. All count by default, but for those
                whose label is `mapseg_components.structures.IGNORED`.

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
        label, valid = without_ignored(label, valid)
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


class SquaredDiceLoss(nn.Module):
    """1 - 2 sum(P Y) / (sum P^2 + sum Y^2), sums per class over the batch, then the mean over all classes.

    MONAI's ``DiceLoss`` with ``squared_pred``, background included, in float32. A class that is nowhere in the labels
    adds 1, without a gradient.

    Args:
        smooth: added to each denominator.

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import SquaredDiceLoss
        >>> label = torch.tensor([0, 1]).reshape(1, 1, 2, 1, 1)
        >>> round(SquaredDiceLoss()(torch.zeros(1, 2, 2, 1, 1), label).item(), 4)  # 1 - 2 * 0.5 / (0.5 + 1)
        0.3333
    """

    def __init__(self, smooth: float = 1e-5) -> None:
        super().__init__()
        self.dice = DiceLoss(squared_pred=True, batch=True, smooth_nr=0.0, smooth_dr=smooth)

    def forward(self, logits: torch.Tensor, label: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Scalar loss.

        Args:
            logits: (B, C, ...).
            label: (B, 1, ...), class indices of any number type.
            valid: boolean (B, 1, ...); voxels that are ``False`` count nowhere, not as background either. All count by
                default, but for those whose label is `mapseg_components.structures.IGNORED`.
        """
        label = plain(label)
        counted = label != IGNORED if valid is None else (label != IGNORED) & plain(valid)
        truth = one_hot(label.where(counted, torch.zeros_like(label)), num_classes=logits.shape[1])
        return self.dice(plain(logits).float().softmax(dim=1) * counted, truth * counted)


def sampled_loss(
    loss: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    uncertainty: torch.Tensor | None,
    samples: int,
    *args: torch.Tensor,
) -> torch.Tensor:
    """Mean loss of ``samples`` draws O + e V, where e is standard normal at each voxel and class (BUDA-Seg).

    The network has run once; what grows with the number of draws is the output's memory alone.

    Args:
        loss: called with logits and ``args``.
        logits: O, (B, C, ...).
        uncertainty: V, of the same shape.
        samples: K; with 0 the loss of O itself, and no random number is drawn.
        args: passed on, the label first.

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import SquaredDiceLoss, sampled_loss
        >>> loss, logits = SquaredDiceLoss(), torch.rand(1, 3, 4, 5, 6)
        >>> label = logits.argmax(1, keepdim=True)
        >>> plain, sure = loss(logits, label), sampled_loss(loss, logits, torch.zeros_like(logits), 4, label)
        >>> torch.allclose(plain, sure)  # without uncertainty all draws are the logits
        True
    """
    if not samples or uncertainty is None:
        return loss(logits, *args)
    logits, uncertainty = plain(logits).float(), plain(uncertainty).float()
    return torch.stack(
        [loss(torch.addcmul(logits, torch.randn_like(logits), uncertainty), *args) for _ in range(samples)]
    ).mean()


class MaskedReconstructionLoss(nn.Module):
    """Mean squared error over the hidden voxels of a batch (section 3.2).

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import MaskedReconstructionLoss
        >>> image, mask = torch.zeros(1, 1, 2, 3, 4), torch.zeros(1, 1, 2, 3, 4, dtype=torch.bool)
        >>> mask[..., 0] = True
        >>> reconstruction = torch.where(mask, 0.5, 9.0)  # errors of visible voxels do not count
        >>> MaskedReconstructionLoss()(reconstruction, image, mask).item()
        0.25
    """

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

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import LocalGlobalCosineLoss
        >>> loss, features = LocalGlobalCosineLoss(), torch.rand(2, 8, 3, 4, 5)
        >>> abs(round(loss(features, 2 * features).item(), 3)), round(loss(features, -features).item(), 3)
        (0.0, 2.0)
    """

    def forward(self, local_features: torch.Tensor, context_features: torch.Tensor) -> torch.Tensor:
        """Scalar loss; both inputs (B, W, x, y, z)."""
        local, context = plain(local_features).float().flatten(2), plain(context_features).float().flatten(2)
        return (1.0 - F.cosine_similarity(local, context, dim=2)).mean()


class ClassShareLoss(nn.Module):
    """Divergence of the predicted shares of the classes in unlabelled views from those in labelled ones.

    After Bateson et al. 2021 (source-free domain adaptation with a prior on class ratios, arXiv 2108.03152):
    KL(labelled || predicted), where predicted shares are mean probabilities over all voxels of a batch. Raw shares are
    those of the background nearly alone, and a small structure could vanish at no cost. By the chain rule the
    divergence is the sum of one between background and structures, and, times the share of all structures, of one among
    the structures; this loss leaves that factor out, so that the structures' proportions count as much. Its gradient
    is linear in the labelled shares (of background and structures, and of each structure among them): the mean over
    steps is that of the mean shares, and a labelled batch may be as small as one scan.

    Both must show the same part of the body, whole: views of a scan, not patches, whose shares depend on where they
    are. It pulls each batch to the mean shares of the source: a weak prior, for small weights.

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import ClassShareLoss
        >>> label = torch.tensor([0, 0, 1, 2]).reshape(1, 1, 4, 1, 1)
        >>> shares = torch.tensor([0.5, 0.25, 0.25]).log().reshape(1, 3, 1, 1, 1).expand(2, -1, 4, 5, 6)
        >>> abs(round(ClassShareLoss()(shares, label).item(), 5))
        0.0
    """

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Scalar loss, 0 or more; 0 too where the labels hold no structure.

        Args:
            logits: (B, C, X, Y, Z), of unlabelled views.
            label: (B', 1, X', Y', Z'), class indices of labelled views.
        """
        label = plain(label)
        counted = (label != IGNORED).float().sum().clamp(min=1)
        expected = torch.stack([(label == number).float().sum() / counted for number in range(logits.shape[1])])
        found = plain(logits).float().softmax(dim=1).mean(dim=(0, 2, 3, 4))
        wholes = [torch.stack([shares[0], shares[1:].sum()]) for shares in (expected, found)]
        parts = [shares[1:] / whole[1].clamp(min=SMALLEST) for shares, whole in zip((expected, found), wholes)]
        return torch.where(wholes[0][1] > 0, divergence(*wholes) + divergence(*parts), 0.0 * found.sum())


class LeavingOut(nn.Module):
    """A loss that knows no ignored voxels, such as MONAI's ``DiceCELoss``, for labels that have some.

    There the label is taken as background and the logits as sure of it: they add nothing, and get no gradient; a mean
    over voxels counts them as perfect.

    Args:
        loss: called with logits (B, classes, X, Y, Z) and label (B, 1, X, Y, Z).

    Examples:
        >>> import torch
        >>> from monai.losses import DiceCELoss
        >>> from mapseg_components.losses import LeavingOut
        >>> loss = LeavingOut(DiceCELoss(to_onehot_y=True, softmax=True, include_background=False))
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]]).view(1, 2, 2, 1, 1)
        >>> round(loss(logits, torch.tensor([255, 1]).view(1, 1, 2, 1, 1)).item(), 3)
        0.0
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Scalar loss."""
        found, valid = without_ignored(plain(label), None)
        if valid is None:
            return self.loss(logits, label)
        sure = torch.full_like(plain(logits), -SURE)
        sure[:, :1] = SURE
        return self.loss(torch.where(valid, plain(logits), sure), found)


def answers_at_once(values: torch.Tensor) -> bool:
    """Whether asking for a value waits for no device."""
    return values.device.type == "cpu"


def without_ignored(label: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels with background where they are ignored, and where they count: ``None`` for everywhere.

    Args:
        label: class indices of any shape; `mapseg_components.structures.IGNORED` counts nowhere.
        valid: of the same shape, ``False`` where a voxel does not count anyway.
    """
    ignored = label == IGNORED
    if answers_at_once(label) and not bool(ignored.any()):
        return label, valid
    return label.masked_fill(ignored, 0), ~ignored if valid is None else valid & ~ignored


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of two distributions (N,); a share of 0 is expected at no cost."""
    return (torch.xlogy(expected, expected) - expected * found.clamp(min=SMALLEST).log()).sum()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without metadata: MONAI's ``MetaTensor`` of a batch refuses to be flattened."""
    return tensor.as_subclass(torch.Tensor)


class SliceDiceLoss(nn.Module):
    """``1 - Dice`` of slices, over the structures that each slice has, the segmentation loss of COSMOS (crossMoDA).

    A slice without a structure counts nowhere: its Dice would say nothing of the slice that is segmented.

    Args:
        smooth: added to numerator and denominator of each Dice ratio.

    Examples:
        >>> import torch
        >>> from mapseg_components.losses import SliceDiceLoss
        >>> label = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).view(2, 1, 2, 2)  # the second slice is empty
        >>> logits = torch.zeros(2, 3, 2, 2)  # each class is as likely as another
        >>> round(SliceDiceLoss()(logits, label).item(), 3)  # 1 - 2 * (2/3) / (2 + 4/3)
        0.6
    """

    def __init__(self, smooth: float = 1e-5) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            reduction="none",
            smooth_nr=smooth,
            smooth_dr=smooth,
        )

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Scalar loss, the mean over slices of the mean over their structures; 0 if no slice has one.

        Args:
            logits: (B, C, X, Y).
            label: (B, 1, X, Y), class indices of any number type.
        """
        logits, label = plain(logits).float(), plain(label).long()
        loss = self.dice(logits, label).flatten(1)  # (B, C - 1)
        classes = torch.arange(1, logits.shape[1], device=label.device)
        present = (label.flatten(1)[:, :, None] == classes).any(dim=1)
        of_slices = torch.where(present, loss, 0.0).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return of_slices.sum() / present.any(dim=1).sum().clamp(min=1)
