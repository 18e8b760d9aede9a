# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One step of pretraining and one of adaptation: separate calls, float32, the losses as the paper's equations read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "adaptation_losses",
    "adaptation_step",
    "ema_update",
    "mae_losses",
    "mae_step",
    "patchify",
    "plain_network",
    "unpatchify",
]

BETA, GAMMA, DELTA = 0.5, 0.05, 0.025
PREFIX = {"local": "", "global": "global_"}  # of the keys of a batch, by scale
MASK_RATIO = 0.7

Batch = Mapping[str, torch.Tensor]
"""``image``, ``global_image`` (B, 1, P, P, P), ``box`` (B, 3, 2); the source has both labels as well."""


def patchify(image: torch.Tensor, block: int) -> torch.Tensor:
    """(1, X, Y, Z) to (blocks, voxels of a block)."""
    x, y, z = (side // block for side in image.shape[1:])
    parts = image.reshape(x, block, y, block, z, block).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(x * y * z, block**3)


def unpatchify(patches: torch.Tensor, shape: torch.Size, block: int) -> torch.Tensor:
    """The inverse of `patchify` for an image of ``shape`` (1, X, Y, Z)."""
    x, y, z = (side // block for side in shape[1:])
    return patches.reshape(x, y, z, block, block, block).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def random_mask(image: torch.Tensor, block: int) -> torch.Tensor:
    """Whether each block of (1, X, Y, Z) is hidden, 1 or 0: the blocks that come last in a random order."""
    count = patchify(image, block).shape[0]
    shuffle = torch.rand(count, device=image.device).argsort()
    restore = shuffle.argsort()
    mask = torch.ones(count, device=image.device)
    mask[: count - round(MASK_RATIO * count)] = 0
    return mask[restore]


def hide(image: torch.Tensor, masks: list[torch.Tensor], block: int) -> torch.Tensor:
    """(B, 1, X, Y, Z) with the hidden blocks at 0, sample by sample."""
    hidden = [
        unpatchify(patchify(one, block) * (1 - mask)[:, None], one.shape, block) for one, mask in zip(image, masks)
    ]
    return torch.stack(hidden)


def plain_network(network: nn.Module) -> nn.Module:
    """A copy with the same weights, in PyTorch's own modules."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for own in (nn.Conv3d, nn.ConvTranspose3d):
            if isinstance(module, own):
                module.__class__ = own
    return network


def mae_losses(
    network: nn.Module, batch: Batch, blocks: Mapping[str, int], masks: Mapping[str, list[torch.Tensor]] | None = None
) -> torch.Tensor:
    """Mean squared error of the hidden blocks, local plus global, each its own call.

    Args:
        network: image with hidden blocks to reconstruction.
        batch: see `Batch`.
        blocks: voxels per side of a block, for ``local`` and ``global``.
        masks: of each sample, to repeat a step; drawn by default.
    """
    total = torch.zeros((), device=batch["image"].device)
    for scale in ("local", "global"):
        image, block = batch[f"{PREFIX[scale]}image"], blocks[scale]
        drawn = [random_mask(one, block) for one in image] if masks is None else masks[scale]
        output = network(hide(image, drawn, block))
        errors = [(patchify(o, block) - patchify(i, block)).square().mean(dim=1) for o, i in zip(output, image)]
        total = total + sum((error * mask).sum() for error, mask in zip(errors, drawn)) / sum(m.sum() for m in drawn)
    return total


def mae_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, blocks: Mapping[str, int]) -> float:
    """One step of pretraining; returns the loss."""
    network.train()
    optimizer.zero_grad()
    loss = mae_losses(network, batch, blocks)
    loss.backward()
    optimizer.step()
    return loss.item()


def segmentation_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Eq. 1: mean cross-entropy minus mean soft Dice of the foreground classes that the label holds."""
    cross_entropy = F.cross_entropy(logits, label)
    probabilities = logits.softmax(dim=1)
    truth = F.one_hot(label, logits.shape[1]).permute(0, 4, 1, 2, 3).float()
    axes = (0, 2, 3, 4)
    both, either = (probabilities * truth).sum(axes), probabilities.sum(axes) + truth.sum(axes)
    dice = ((2 * both + 1e-5) / (either + 1e-5))[1:]
    present = truth.sum(axes)[1:] > 0
    return cross_entropy - (dice[present].mean() if present.any() else 0.0)


def cosine_loss(local: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """1 - cosine over space, per channel (Eq. 4 as a cosine)."""
    return (1 - F.cosine_similarity(local.flatten(2), context.flatten(2), dim=2)).mean()


def crop_features(features: torch.Tensor, box: torch.Tensor, image_size: int) -> torch.Tensor:
    """The part of the global features (B, C, n, n, n) under the patch's box, on as fine a grid."""
    grids = []
    for ends in box / image_size:  # shares of the global view
        axes = []
        for (start, stop), side in zip(ends, features.shape[2:]):
            steps = (torch.arange(side, device=features.device, dtype=features.dtype) + 0.5) / side
            axes.append(2 * (start + steps * (stop - start)) - 1)
        x, y, z = torch.meshgrid(*axes, indexing="ij")
        grids.append(torch.stack([z, y, x], dim=-1))
    return F.grid_sample(features, torch.stack(grids), padding_mode="border", align_corners=False)


class PlainOutput(NamedTuple):
    """Of a pair: logits and features of the patch and of the global view."""

    local_logits: torch.Tensor
    global_logits: torch.Tensor
    local_features: torch.Tensor
    context: torch.Tensor


def forward(network: Any, image: torch.Tensor, global_image: torch.Tensor, box: torch.Tensor) -> PlainOutput:
    """Local and global image through the network, one call each."""
    global_features = network.encode(global_image)
    local_features = network.encode(image)
    context = crop_features(global_features, box, global_image.shape[2])
    local_logits = network.decode(local_features, context)
    global_logits = network.decode(global_features, global_features)
    return PlainOutput(local_logits, global_logits, local_features, context)


def adaptation_losses(
    network: Any,
    teacher: Any,
    source: Batch,
    target: Batch,
    blocks: Mapping[str, int],
    masks: Mapping[str, list[torch.Tensor]] | None = None,
    target_clean: bool = False,
) -> torch.Tensor:
    """Eq. 8, or with ``target_clean`` the target's terms shared half and half by the masked and the clean pass.

    Args:
        network: with ``encode`` and ``decode``.
        teacher: likewise, in evaluation mode.
        source: labelled `Batch`.
        target: `Batch` without labels.
        blocks: voxels per side of a hidden block, for ``local`` and ``global``.
        masks: ``source_local``, ``source_global``, ``target_local``, ``target_global``; drawn by default.
        target_clean: the option of that name.
    """

    def masked(side: str, scale: str, image: torch.Tensor) -> torch.Tensor:
        drawn = [random_mask(one, blocks[scale]) for one in image] if masks is None else masks[f"{side}_{scale}"]
        return hide(image, drawn, blocks[scale])

    def terms(side: str, batch: Batch, hidden: bool, labels: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        images = [batch["image"], batch["global_image"]]
        if hidden:
            images = [masked(side, scale, image) for scale, image in zip(("local", "global"), images)]
        output = forward(network, images[0], images[1], batch["box"])
        local_loss = segmentation_loss(output.local_logits, labels[0])
        global_loss = segmentation_loss(output.global_logits, labels[1])
        return [local_loss, global_loss, cosine_loss(output.local_features, output.context)]

    truth = (source["label"][:, 0].long(), source["global_label"][:, 0].long())
    clean, hidden = terms("source", source, False, truth), terms("source", source, True, truth)
    loss = sum(weight * (a + b) for weight, a, b in zip((BETA, GAMMA, DELTA), clean, hidden))
    with torch.no_grad():
        output = forward(teacher, target["image"], target["global_image"], target["box"])
        pseudo = (output.local_logits.argmax(dim=1), output.global_logits.argmax(dim=1))
    weights = (1.0, 2 * GAMMA, 2 * DELTA)
    of_target = terms("target", target, True, pseudo)
    if target_clean:
        of_target = [(a + b) / 2 for a, b in zip(of_target, terms("target", target, False, pseudo))]
    return loss + sum(weight * term for weight, term in zip(weights, of_target))


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, kept: float) -> None:
    """theta <- kept * theta + (1 - kept) * phi, parameter by parameter."""
    for own, other in zip(teacher.parameters(), student.parameters()):
        own.copy_(kept * own + (1 - kept) * other)


def adaptation_step(
    network: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Batch,
    target: Batch,
    blocks: Mapping[str, int],
    target_clean: bool = False,
) -> float:
    """One step of adaptation, the teacher's update included; returns the loss."""
    network.train()
    teacher.eval()
    optimizer.zero_grad()
    loss = adaptation_losses(network, teacher, source, target, blocks, target_clean=target_clean)
    loss.backward()
    optimizer.step()
    ema_update(teacher, network, 0.999)
    return loss.item()
