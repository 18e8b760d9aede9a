# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedTrainer

from mapseg_components.losses import LocalGlobalCosineLoss, MaskedReconstructionLoss, SegmentationLoss
from mapseg_components.methods import MAPSeg
from mapseg_components.methods.labels import PseudoLabel


def numpy_segmentation_loss(logits, label, include_absent=False, eps=1e-5):
    """Eq. 1 written out: mean cross-entropy minus mean foreground soft Dice over the batch."""
    logits, label = logits.double().numpy(), label[:, 0].numpy()
    exponent = np.exp(logits - logits.max(1, keepdims=True))
    p = exponent / exponent.sum(1, keepdims=True)
    cross_entropy = -np.mean(np.log(np.take_along_axis(p, label[:, None], 1)))
    dice = []
    for c in range(1, logits.shape[1]):
        y = label == c
        if y.any() or include_absent:
            dice.append((2 * (p[:, c] * y).sum() + eps) / (p[:, c].sum() + y.sum() + eps))
    return cross_entropy - (np.mean(dice) if dice else 0.0)


@pytest.mark.parametrize("include_absent", [False, True])
@pytest.mark.parametrize("classes_in_label", [2, 4])
def test_segmentation_loss_equals_numpy(include_absent, classes_in_label):
    torch.manual_seed(classes_in_label)
    logits = torch.randn(2, 4, 3, 4, 5)
    label = torch.randint(0, classes_in_label, (2, 1, 3, 4, 5))
    loss = SegmentationLoss(include_absent=include_absent)(logits, label)
    assert loss.item() == pytest.approx(numpy_segmentation_loss(logits, label, include_absent), abs=1e-5)


def test_perfect_segmentation_reaches_minus_one():
    label = torch.randint(0, 3, (1, 1, 6, 5, 4))
    logits = 60.0 * torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    assert SegmentationLoss()(logits, label).item() == pytest.approx(-1.0, abs=1e-5)


def test_background_only_is_cross_entropy_alone():
    logits, label = torch.zeros(1, 4, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3)
    assert SegmentationLoss()(logits, label).item() == pytest.approx(math.log(4), abs=1e-6)


def test_ignored_voxels_count_nowhere():
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 4, 4, 6), torch.randint(0, 3, (1, 1, 4, 4, 6))
    valid = torch.ones_like(label, dtype=torch.bool)
    valid[..., 3:] = False
    loss = SegmentationLoss()
    kept = loss(logits[..., :3], label[..., :3])
    assert loss(logits, label, valid).item() == pytest.approx(kept.item(), abs=1e-5)


def test_class_weights_are_a_weighted_mean():
    logits, label = torch.randn(1, 3, 2, 3, 4), torch.randint(0, 3, (1, 1, 2, 3, 4))
    weights = torch.tensor([1.0, 4.0, 9.0])
    share = weights[label[:, 0]]
    per_voxel = torch.nn.functional.cross_entropy(logits, label[:, 0], reduction="none")
    expected = (per_voxel * share).sum() / share.sum() - torch.nn.functional.cross_entropy(logits, label[:, 0])
    difference = SegmentationLoss(class_weights=weights.tolist())(logits, label) - SegmentationLoss()(logits, label)
    assert difference.item() == pytest.approx(expected.item(), abs=1e-5)
    valid = torch.ones_like(label, dtype=torch.bool)
    weighted = SegmentationLoss(class_weights=weights.tolist())
    assert weighted(logits, label, valid).item() == pytest.approx(weighted(logits, label).item(), abs=1e-5)


def test_bf16_logits_are_measured_in_float32():
    logits, label = torch.randn(1, 3, 4, 4, 4).bfloat16(), torch.randint(0, 3, (1, 1, 4, 4, 4))
    assert SegmentationLoss()(logits, label).dtype == torch.float32


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 5\).*expected \(1, 1, 4, 4, 4\)"):
        SegmentationLoss()(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 1, 4, 4, 5))


def test_reconstruction_counts_hidden_voxels_only():
    image, out = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    mask = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    mask[..., 0] = True
    out[0, 0, 0, 0, 0], out[0, 0, 0, 0, 1] = 2.0, 100.0  # the second one is visible
    assert MaskedReconstructionLoss()(out, image, mask).item() == pytest.approx(4.0 / 4)


def test_cosine_is_per_channel_over_space():
    local = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 2, 1, 1)
    context = torch.tensor([[0.0, 3.0], [2.0, 2.0]]).view(1, 2, 2, 1, 1)
    assert LocalGlobalCosineLoss()(local, context).item() == pytest.approx(0.5, abs=1e-6)  # 1 and 0


def batch_of_scans(*shape, whole=False):
    """A collated batch of three MetaTensors with a place of their own."""
    values = torch.rand(3, *shape)
    affines = [torch.diag(torch.tensor([1.0, 2, n, 1])) for n in (1, 2, 3)]
    scans = [MetaTensor((v * 3).floor() if whole else v, affine=a) for v, a in zip(values, affines)]
    return list_data_collate([{"x": scan} for scan in scans])["x"]


def test_batches_of_metatensors_have_the_loss_of_plain_ones():
    torch.manual_seed(0)
    logits, label, image = (
        batch_of_scans(3, 4, 6, 5),
        batch_of_scans(1, 4, 6, 5, whole=True),
        batch_of_scans(1, 4, 6, 5),
    )
    features, confidence = batch_of_scans(4, 4, 6, 5), batch_of_scans(1, 4, 6, 5)

    def pseudo(*given):
        method = MAPSeg(None, confidence_threshold=0.4, ignore_unsure=0.5)
        return method._segmentation(given[0], PseudoLabel(*given[1:]))

    cases = [
        (SegmentationLoss(), (logits, label)),
        (SegmentationLoss(class_weights=[1.0, 2.0, 3.0]), (logits, label, image > 0.5)),
        (MaskedReconstructionLoss(), (image, image + 0.1, image > 0.5)),
        (LocalGlobalCosineLoss(), (features, features**2)),
        (pseudo, (logits, label, confidence)),
    ]
    for loss, inputs in cases:
        found, expected = loss(*inputs), loss(*(one.as_tensor() for one in inputs))
        assert type(found) is torch.Tensor and found.ndim == 0 and torch.equal(found, expected)


def test_an_ordinary_trainer_trains_with_the_segmentation_loss(tiny_network):
    torch.manual_seed(0)
    data = [{"image": batch_of_scans(1, 8, 12, 16), "label": batch_of_scans(1, 8, 12, 16, whole=True)}] * 2
    losses = []

    def loss(logits, label):
        losses.append(SegmentationLoss()(logits, label))
        return losses[-1]

    optimizer = torch.optim.SGD(tiny_network.parameters(), lr=0.1)
    SupervisedTrainer(torch.device("cpu"), 3, data, tiny_network, optimizer, loss).run()
    assert float(losses[-1]) < float(losses[0])
