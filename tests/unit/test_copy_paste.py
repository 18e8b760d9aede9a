# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Copy-paste: each voxel of a mixed image is compared with the label of the scan it is of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.losses import DiceCELoss

from mapseg_components.contrast import inverted
from mapseg_components.errors import ConfigError
from mapseg_components.losses import SegmentationLoss
from mapseg_components.masking import draw_box_mask
from mapseg_components.methods import ArgmaxLabels, CopyPaste
from tests.unit.test_methods import SIZES, Saying, batch_of


def method_of(said, active=True, **options):
    network = Saying({"logits": said})
    labels = ArgmaxLabels(SimpleNamespace(active=active, network=network))
    return CopyPaste(SegmentationLoss(), labels, **options), network


def pair():
    batch = {"source": batch_of(0), "target": batch_of(1, labels=False)}
    batch["target"]["image"] = batch["target"]["image"] + 2.0  # told apart from the source by its range
    return batch


@pytest.mark.parametrize("share", [0.3, 2 / 3])
@pytest.mark.parametrize("sides", [(4, 8, 12), (9, 7, 1)])
def test_a_box_has_its_share_of_each_side_at_any_place(share, sides):
    torch.manual_seed(0)
    mask = draw_box_mask(200, sides, share)
    assert mask.shape == (200, 1, *sides) and mask.dtype == torch.bool
    for axis, size in enumerate(sides):
        seen = mask.amax(dim=[other for other in range(1, 5) if other != axis + 2])  # (200, size)
        assert set(seen.sum(1).tolist()) == {max(1, round(share * size))}
        assert seen.any(0).all()  # every plane is in some box
        assert (seen.int().diff(dim=1).clamp(min=0).sum(1) <= 1).all()  # one piece
    assert mask.flatten(1).sum(1).unique().tolist() == [torch.tensor([max(1, round(share * s)) for s in sides]).prod()]


def test_the_two_mixed_images_hold_every_voxel_of_both_patches_once():
    batch = pair()
    method, network = method_of(torch.zeros(SIZES))
    clean, inward, outward = method.passes(batch)
    assert torch.equal(clean.inputs["image"], batch["source"]["image"])
    assert torch.equal(network.shown[0], batch["target"]["image"])  # the teacher sees the whole patch as it is
    in_box = inward.inputs["image"] < 2
    assert torch.equal(in_box, outward.inputs["image"] >= 2) and 0 < in_box.float().mean() < 0.5
    for mixed, of_source in ((inward, in_box), (outward, ~in_box)):
        assert torch.equal(mixed.inputs["image"][of_source], batch["source"]["image"][of_source])
        assert torch.equal(mixed.inputs["image"][~of_source], batch["target"]["image"][~of_source])


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_each_side_is_compared_with_its_own_labels_where_its_voxels_are(threshold):
    batch, said = pair(), torch.randn(SIZES, generator=torch.Generator().manual_seed(4))
    method, _ = method_of(said, ignore_unsure=threshold)
    _, inward, outward = method.passes(batch)
    logits = torch.randn(SIZES, generator=torch.Generator().manual_seed(5))
    box, label = inward.inputs["image"] < 2, batch["source"]["label"]
    sure = said.softmax(1).amax(1, keepdim=True) > (threshold or 0)
    pseudo, loss = said.argmax(1, keepdim=True), SegmentationLoss()
    expected = {"source_box": loss(logits, label, box), "target_around": loss(logits, pseudo, ~box & sure)}
    torch.testing.assert_close(inward.terms({"logits": logits}), expected)
    expected = {"source_around": loss(logits, label, ~box), "target_box": loss(logits, pseudo, box & sure)}
    torch.testing.assert_close(outward.terms({"logits": logits}), expected)


def test_where_both_patches_and_labels_are_equal_nothing_is_mixed():
    """A law: the source pasted into itself is the source."""
    batch = pair()
    batch["target"]["image"] = batch["source"]["image"].clone()
    method, _ = method_of(torch.zeros(SIZES))
    for one in method.passes(batch):
        assert torch.equal(one.inputs["image"], batch["source"]["image"])


def test_the_student_may_see_another_contrast_of_the_target_alone():
    batch = {"source": batch_of(0), "target": batch_of(1, labels=False)}
    method, network = method_of(torch.zeros(SIZES), change=inverted)
    _, inward, outward = method.passes(batch)
    assert torch.equal(network.shown[0], batch["target"]["image"])
    both = inward.inputs["image"] + outward.inputs["image"]
    torch.testing.assert_close(both, batch["source"]["image"] + inverted(batch["target"]["image"]))


def test_boxes_come_from_the_generator_of_checkpoints():
    images = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        images.append(method_of(torch.zeros(SIZES))[0].passes(pair())[1].inputs["image"])
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_the_target_waits_for_the_teacher_and_faults_are_named():
    waiting, _ = method_of(torch.zeros(SIZES), active=False)
    assert len(waiting.passes(pair())) == 1
    method, _ = method_of(torch.zeros(SIZES))
    with pytest.raises(ConfigError, match="there is no source"):
        method.passes({"target": pair()["target"]})
    batch = pair()
    batch["target"]["image"] = batch["target"]["image"][:1]
    with pytest.raises(ConfigError, match="give both one batch_size and patch_size"):
        method.passes(batch)
    with pytest.raises(ConfigError, match="DiceCELoss cannot leave voxels out"):
        CopyPaste(DiceCELoss(), None)
    for share in (0.0, 1.0, 7):
        with pytest.raises(ConfigError, match="box_share is"):
            CopyPaste(SegmentationLoss(), None, box_share=share)
    with pytest.raises(ConfigError, match="ignore_unsure is 95"):
        CopyPaste(SegmentationLoss(), None, ignore_unsure=95)
