# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedTrainer

from mapseg_components.errors import ConfigError
from mapseg_components.losses import (
    AdaptationLoss,
    LocalGlobalCosineLoss,
    MaskedReconstructionLoss,
    SegmentationLoss,
    WeightAnchor,
)

BETA, GAMMA, DELTA = 0.5, 0.05, 0.025


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


def all_terms(loss):
    return {name: torch.tensor(float(number)) for number, name in enumerate(loss.weights, start=1)}


def test_equation_8():
    loss = AdaptationLoss(BETA, GAMMA, DELTA)
    t = {name: float(value) for name, value in all_terms(loss).items()}
    expected = BETA * (t["source_local"] + t["source_local_masked"]) + t["target_local_masked"]
    expected += GAMMA * (t["source_global"] + t["source_global_masked"]) + 2 * GAMMA * t["target_global_masked"]
    expected += DELTA * (t["source_cosine"] + t["source_cosine_masked"]) + 2 * DELTA * t["target_cosine_masked"]
    assert loss(all_terms(loss)).item() == pytest.approx(expected, rel=1e-6)
    assert loss.passes("target") == ("_masked",) and loss.passes("source") == ("", "_masked")


def test_target_clean_with_half_beta_is_equation_10():
    loss = AdaptationLoss(BETA, GAMMA, DELTA, target_clean=True)
    target = {name: weight for name, weight in loss.weights.items() if name.startswith("target")}
    expected = {"local": BETA, "global": GAMMA, "cosine": DELTA}
    assert target == pytest.approx({f"target_{k}{end}": w for k, w in expected.items() for end in ("", "_masked")})


@pytest.mark.parametrize("side", ["source", "target"])
def test_one_side_equals_equation_9_or_10_written_out(side):
    """Numbers from logits and features to the weighted sum, computed a second time in numpy."""
    generator = torch.Generator().manual_seed(3)
    loss, sizes = AdaptationLoss(BETA, GAMMA, DELTA, target_clean=True), (2, 3, 4, 5, 6)
    labels = [torch.randint(0, 3, (2, 1, 4, 5, 6), generator=generator) for _ in range(2)]
    confidences = [torch.rand(2, 1, 4, 5, 6, generator=generator) for _ in range(2 if side == "target" else 0)]
    terms, expected = {}, 0.0
    for ending in ("", "_masked"):
        logits = [torch.randn(sizes, generator=generator) for _ in range(2)]
        features = [torch.randn(2, 4, 2, 3, 3, generator=generator) for _ in range(2)]
        terms.update(loss.terms((side, ending), (*logits, *features), *labels, *confidences))
        expected += BETA * numpy_segmentation_loss(logits[0], labels[0])
        expected += GAMMA * numpy_segmentation_loss(logits[1], labels[1])
        local, context = (feature.double().flatten(2).numpy() for feature in features)
        norms = np.linalg.norm(local, axis=2) * np.linalg.norm(context, axis=2)
        expected += DELTA * np.mean(1 - (local * context).sum(2) / norms)
    assert len(terms) == 6 and loss(terms).item() == pytest.approx(expected, abs=1e-5)


def test_anchor_is_half_the_squared_distance_and_pulls_back():
    network = torch.nn.Linear(3, 2)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    loss = AdaptationLoss(anchor=WeightAnchor(network, start, 0.25))
    assert loss.penalties()["anchor"].item() == 0.0
    with torch.no_grad():
        network.weight += 2.0
    terms = loss.penalties()
    assert terms["anchor"].item() == pytest.approx(6 * 4 / 2)
    loss(terms).backward()
    torch.testing.assert_close(network.weight.grad, torch.full((2, 3), 0.25 * 2.0))
    assert AdaptationLoss(anchor=WeightAnchor(network, None, 0.0)).penalties() == {}


@pytest.mark.parametrize(
    "weights, strength, words",
    [
        (None, 0.1, "set initial_weights"),
        ({}, 0.1, "weight is absent in initial_weights, expected \\(2, 3\\)"),
        ({"weight": torch.zeros(2, 4)}, 0.1, "weight is \\(2, 4\\) in initial_weights"),
        (None, -1.0, "anchor_weight is -1.0, expected 0"),
        (None, float("nan"), "anchor_weight is nan"),
    ],
)
def test_an_anchor_needs_the_networks_weights(weights, strength, words):
    with pytest.raises(ConfigError, match=words):
        WeightAnchor(torch.nn.Linear(3, 2), weights, strength)


def test_source_without_masked_terms_keeps_its_total_weight():
    full, half = AdaptationLoss(), AdaptationLoss(source_masked=False)
    for kind in ("local", "global", "cosine"):
        total = full.weights[f"source_{kind}"] + full.weights[f"source_{kind}_masked"]
        assert half.weights[f"source_{kind}"] == pytest.approx(total)
    assert half.passes("source") == ("",)


def test_confidence_options_weigh_and_ignore():
    torch.manual_seed(0)
    logits, features = torch.randn(1, 3, 2, 2, 4), torch.rand(1, 2, 2, 2, 2)
    label = torch.randint(0, 3, (1, 1, 2, 2, 4))
    confidence = torch.full((1, 1, 2, 2, 4), 0.99)
    confidence[..., 1:] = 0.5  # a quarter is sure
    output = (logits, logits, features, features)

    def local(**options):
        loss = AdaptationLoss(**options)
        return loss.terms(("target", "_masked"), output, label, label, confidence, confidence)["target_local_masked"]

    plain = SegmentationLoss()(logits, label)
    assert local().item() == pytest.approx(plain.item(), abs=1e-6)
    assert local(confidence_threshold=0.95).item() == pytest.approx(0.25 * plain.item(), abs=1e-6)
    sure = SegmentationLoss()(logits[..., :1], label[..., :1])
    assert local(ignore_unsure=0.95).item() == pytest.approx(sure.item(), abs=1e-5)
    with pytest.raises(ConfigError, match="ignore_unsure is 95"):
        AdaptationLoss(ignore_unsure=95)


def test_pseudo_labels_are_not_class_weighted():
    loss = AdaptationLoss(segmentation=SegmentationLoss(class_weights=[1.0, 50.0]))
    logits, label = torch.randn(1, 2, 3, 3, 3), torch.randint(0, 2, (1, 1, 3, 3, 3))
    output, sure = (logits, logits, logits, logits), torch.ones(1, 1, 3, 3, 3)
    source = loss.terms(("source", ""), output, label, label)["source_local"]
    target = loss.terms(("target", ""), output, label, label, sure, sure)["target_local"]
    assert target.item() == pytest.approx(SegmentationLoss()(logits, label).item())
    assert source.item() != pytest.approx(target.item())


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
    output = (logits, logits, features, features + 1)

    def pseudo(*given):
        loss = AdaptationLoss(confidence_threshold=0.4, ignore_unsure=0.5)
        return torch.stack(list(loss.terms(("target", "_masked"), given[:4], *given[4:]).values())).sum()

    cases = [
        (SegmentationLoss(), (logits, label)),
        (SegmentationLoss(class_weights=[1.0, 2.0, 3.0]), (logits, label, image > 0.5)),
        (MaskedReconstructionLoss(), (image, image + 0.1, image > 0.5)),
        (LocalGlobalCosineLoss(), (features, features**2)),
        (pseudo, (*output, label, label, confidence, confidence)),
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
