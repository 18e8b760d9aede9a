# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What trainers show to network, teacher and loss: which images, hidden where, under which name."""

from __future__ import annotations

import pytest
import torch
from monai.utils import set_determinism
from torch import nn

from mapseg_components.engines import AdaptationTrainer, MAETrainer
from mapseg_components.methods import ArgmaxLabels, MAPSeg

SHAPE, BATCH, RATIO = (8, 16, 24), 3, 0.5
LOCAL_BLOCK, GLOBAL_BLOCK = (4, 4, 8), (2, 4, 4)


class Mirror(nn.Module):
    """Gives back what it is shown, so that the loss sees which voxels were hidden."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image, global_image=None, box=None):
        if global_image is None:
            return image * self.weight
        local, view = image * self.weight, global_image * self.weight
        return {"logits": local, "global_logits": view, "local_features": local, "context_features": view}


class Recorder:
    """A loss that remembers what it compares."""

    def __init__(self):
        self.seen = []

    def __call__(self, logits, label):
        self.seen.append((logits.detach(), label))
        return logits.mean()


class Teacher(nn.Module):
    """Labels by a threshold, and remembers what it was shown."""

    active = True

    def __init__(self):
        super().__init__()
        self.shown = None

    @property
    def network(self):
        return self

    def forward(self, image, global_image, box):
        self.shown = image.clone(), global_image.clone()
        logits, view = (torch.cat([0.75 - one, one - 0.75], dim=1) for one in self.shown)
        return {"logits": logits, "global_logits": view}


def side(seed):
    """Images without a 0 or 1, so that a hidden voxel differs from what it was; labels that tell the sides apart."""
    generator = torch.Generator().manual_seed(seed)
    local, view = (torch.rand(BATCH, 1, *SHAPE, generator=generator) / 2 + 0.5 - seed / 100 for _ in range(2))
    labels = {"label": torch.full_like(local, seed).long(), "global_label": torch.full_like(view, seed).long()}
    return {"image": local, "global_image": view, "box": torch.zeros(BATCH, 3, 2), **labels}


def adapt(batched, **options):
    """The batch, the teacher, and by side and ending of each pass what patch and view were compared with."""
    set_determinism(0)
    network, teacher, loss = Mirror(), Teacher(), Recorder()
    batch = {"source": side(1), "target": {k: v for k, v in side(2).items() if "label" not in k}}
    labels = ArgmaxLabels(teacher)
    method = MAPSeg(labels, RATIO, LOCAL_BLOCK, GLOBAL_BLOCK, loss=loss, pseudo_loss=loss, **options)
    AdaptationTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        method=method,
        batched_passes=batched,
    ).run()
    names = [(side_, ending) for side_ in ("source", "target") for ending in method.endings[side_]]
    seen = {name: tuple(zip(*loss.seen[2 * n : 2 * n + 2])) for n, name in enumerate(names)}
    assert len(loss.seen) == 2 * len(names)
    return batch, teacher, seen


def blocks(hidden, size):
    """(B, blocks, voxels of a block) of a mask (B, 1, X, Y, Z)."""
    for axis, side_ in enumerate(size):
        hidden = hidden.unfold(2 + axis, side_, side_)
    return hidden.flatten(5).flatten(1, 4)


def check_mask(hidden, size, other):
    """An exact share of whole blocks of one size, and not of the other one, drawn for each sample."""
    by_block = blocks(hidden, size)
    assert torch.equal(by_block.any(2), by_block.all(2)), "a block is hidden in part"
    assert (by_block.all(2).sum(1) == round(RATIO * by_block.shape[1])).all()
    if other > size:  # larger on every axis: blocks of that size would pass so far
        assert not torch.equal(blocks(hidden, other).any(2), blocks(hidden, other).all(2)), "blocks are too large"
    for one in range(BATCH):
        for two in range(one):
            assert not torch.equal(hidden[one], hidden[two]), "samples share a mask"


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"target_clean": True}, {"source_masked": False}])
def test_each_pass_shows_what_its_name_says(batched, options):
    batch, _, seen = adapt(batched, **options)
    assert ("target", "_masked") in seen and ("source", "") in seen
    assert (("target", "") in seen) == ("target_clean" in options)
    assert (("source", "_masked") in seen) == ("source_masked" not in options)
    for (name, ending), (images, _) in seen.items():
        given = [batch[name]["image"], batch[name]["global_image"]]
        hidden = [image != whole for image, whole in zip(images, given)]
        if not ending:
            assert not hidden[0].any() and not hidden[1].any(), f"the clean {name} pass is masked"
            continue
        check_mask(hidden[0], LOCAL_BLOCK, GLOBAL_BLOCK)
        check_mask(hidden[1], GLOBAL_BLOCK, LOCAL_BLOCK)
        assert not torch.equal(*hidden)


@pytest.mark.parametrize("batched", [True, False])
def test_the_teacher_labels_clean_images_and_both_passes_get_its_labels(batched):
    batch, teacher, seen = adapt(batched, target_clean=True)
    target = batch["target"]["image"], batch["target"]["global_image"]
    assert all(torch.equal(shown, given) for shown, given in zip(teacher.shown, target))
    for ending in ("", "_masked"):
        labels = seen["target", ending][1]
        assert all(torch.equal(label, (image > 0.75).long()) for label, image in zip(labels, target))
        own = seen["source", ending][1]
        assert len(own) == 2 and all((label == 1).all() for label in own)


@pytest.mark.parametrize("batched", [True, False])
def test_the_autoencoder_sees_masked_images_and_is_compared_to_whole_ones(batched):
    set_determinism(0)
    network, batch, seen = Mirror(), side(1), []

    def loss(reconstruction, image, mask):
        seen.append((reconstruction.detach(), image, mask))
        return reconstruction.mean()

    MAETrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=loss,
        mask_ratio=RATIO,
        local_block_size=LOCAL_BLOCK,
        global_block_size=GLOBAL_BLOCK,
        batched_passes=batched,
    ).run()
    for (shown, image, mask), key, sizes in zip(
        seen, ("image", "global_image"), ((LOCAL_BLOCK, GLOBAL_BLOCK), (GLOBAL_BLOCK, LOCAL_BLOCK))
    ):
        assert torch.equal(image, batch[key]) and torch.equal(shown != image, mask)
        check_mask(mask, *sizes)
