# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What each method compares with what, and with which weight."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.losses import SegmentationLoss
from mapseg_components.masking import BlockMask
from mapseg_components.methods import (
    ArgmaxLabels,
    EntropyMinimization,
    MAPSeg,
    MaskedConsistency,
    MeanTeacher,
    Supervised,
    norm_parameters,
)
from tests.unit.test_losses import numpy_segmentation_loss

BETA, GAMMA, DELTA = 0.5, 0.05, 0.025
SIZES = (2, 3, 4, 8, 12)


def labels_of(logits, active=True):
    """Pseudo labels by a teacher that always says the same."""
    return ArgmaxLabels(
        SimpleNamespace(active=active, network=Saying({"logits": logits, "global_logits": logits.flip(2)}))
    )


class Saying(nn.Module):
    """A network that gives the same for every image, and remembers the image."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.shown = outputs, []

    def forward(self, image, global_image=None, box=None):
        self.shown.append(image.clone())
        return self.outputs


def batch_of(seed, labels=True):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 1, *SIZES[2:], generator=generator)
    batch = {"image": image, "global_image": image.flip(3), "box": torch.zeros(2, 3, 2)}
    if labels:
        batch["label"] = torch.randint(0, 3, image.shape, generator=generator)
        batch["global_label"] = torch.randint(0, 3, image.shape, generator=generator)
    return batch


def output_of(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(SIZES, generator=generator) for _ in range(2)]
    features = [torch.randn(2, 4, 2, 3, 3, generator=generator) for _ in range(2)]
    return dict(zip(("logits", "global_logits", "local_features", "context_features"), (*logits, *features)))


def total(method, terms):
    return sum(method.weights[name] * float(term) for name, term in terms.items())


@pytest.mark.parametrize(
    "options, source, target",
    [
        ({}, {"": BETA, "_masked": BETA}, {"_masked": 1.0}),  # Eq. 8
        ({"target_clean": True}, {"": BETA, "_masked": BETA}, {"": BETA, "_masked": BETA}),  # Eqs. 9 and 10
        ({"source_masked": False}, {"": 2 * BETA}, {"_masked": 1.0}),
    ],
)
def test_weights_are_those_of_the_equations(options, source, target):
    method = MAPSeg(None, beta=BETA, gamma=GAMMA, delta=DELTA, **options)
    expected = {}
    for side, endings in {"source": source, "target": target}.items():
        for ending, local in endings.items():
            expected[f"{side}_local{ending}"] = local
            expected[f"{side}_global{ending}"] = local * GAMMA / BETA
            expected[f"{side}_cosine{ending}"] = local * DELTA / BETA
    assert method.weights == pytest.approx(expected)
    assert method.selection == ("target_local_masked",)  # section 3.7, whether there is a clean pass or not


@pytest.mark.parametrize("side", ["source", "target"])
def test_one_side_equals_equation_9_or_10_written_out(side):
    """Numbers from logits and features to the weighted sum, computed a second time in numpy."""
    said = torch.randn(SIZES, generator=torch.Generator().manual_seed(5))
    method = MAPSeg(labels_of(said), local_block_size=4, beta=BETA, gamma=GAMMA, delta=DELTA, target_clean=True)
    batch = batch_of(3, labels=side == "source")
    labels = [batch["label"], batch["global_label"]] if side == "source" else [said.argmax(1, keepdim=True)] * 2
    labels[1] = labels[1] if side == "source" else said.flip(2).argmax(1, keepdim=True)
    passes, terms, expected = method.passes({side: batch}), {}, 0.0
    for number, one in enumerate(passes):
        output = output_of(number)
        terms.update(one.terms(output))
        expected += BETA * numpy_segmentation_loss(output["logits"], labels[0])
        expected += GAMMA * numpy_segmentation_loss(output["global_logits"], labels[1])
        local, context = (output[f"{name}_features"].double().flatten(2).numpy() for name in ("local", "context"))
        norms = np.linalg.norm(local, axis=2) * np.linalg.norm(context, axis=2)
        expected += DELTA * np.mean(1 - (local * context).sum(2) / norms)
    assert len(terms) == 6 and total(method, terms) == pytest.approx(expected, abs=1e-5)


def test_confidence_options_weigh_and_ignore():
    torch.manual_seed(0)
    said = torch.zeros(1, 3, 4, 8, 12)
    said[:, 1] = 0.1  # no voxel is sure
    said[..., :3] *= 100  # but a quarter
    output = {name: torch.randn(1, 3, 4, 8, 12) for name in ("logits", "global_logits")}
    output |= {"local_features": torch.rand(1, 2, 2, 2, 2), "context_features": torch.rand(1, 2, 2, 2, 2)}
    batch = {
        "image": torch.rand(1, 1, 4, 8, 12),
        "global_image": torch.rand(1, 1, 4, 8, 12),
        "box": torch.zeros(1, 3, 2),
    }
    label = said.argmax(1, keepdim=True)

    def local(**options):
        (one,) = MAPSeg(labels_of(said), local_block_size=4, **options).passes({"target": batch})
        return one.terms(output)["target_local_masked"].item()

    plain = SegmentationLoss()(output["logits"], label).item()
    assert local() == pytest.approx(plain, abs=1e-6)
    assert local(confidence_threshold=0.95) == pytest.approx(0.25 * plain, abs=1e-6)
    sure = SegmentationLoss()(output["logits"][..., :3], label[..., :3]).item()
    assert local(ignore_unsure=0.95) == pytest.approx(sure, abs=1e-5)
    with pytest.raises(ConfigError, match="ignore_unsure is 95"):
        MAPSeg(None, ignore_unsure=95)


def test_pseudo_labels_are_not_class_weighted():
    said = torch.randn(SIZES)
    method = MAPSeg(labels_of(said), local_block_size=4, loss=SegmentationLoss(class_weights=[1.0, 50.0, 1.0]))
    output, batch = output_of(0), batch_of(1)
    batch["label"] = said.argmax(1, keepdim=True)
    source, _, target = method.passes({"source": batch, "target": batch})
    found, weighted = target.terms(output)["target_local_masked"], source.terms(output)["source_local"]
    assert found.item() == pytest.approx(SegmentationLoss()(output["logits"], batch["label"]).item())
    assert weighted.item() != pytest.approx(found.item())


DICE = DiceCELoss(to_onehot_y=True, softmax=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: MAPSeg(labels, local_block_size=4),
        lambda labels: MeanTeacher(DICE, labels, change=BlockMask(0.5, 4)),
        lambda labels: MaskedConsistency(DICE, labels, change=BlockMask(0.5, 4)),
    ],
)
def test_the_target_waits_for_the_teacher(make):
    batch = {"source": batch_of(0), "target": batch_of(1, labels=False)}
    said = torch.randn(SIZES)
    before, after = (make(labels_of(said, active)).passes(batch) for active in (False, True))
    assert len(after) > len(before) > 0
    names = {name for one in after for name in one.terms(output_of(0))}
    assert {name.split("_")[0] for name in names} == {"source", "target"}
    assert names <= set(make(labels_of(said)).weights)


def test_consistency_is_with_the_teacher_on_the_whole_image():
    """The student sees the masked image, its labels come from the whole one."""
    said = torch.randn(SIZES)
    network = Saying({"logits": said})
    labels = ArgmaxLabels(SimpleNamespace(active=True, network=network))
    batch, output = batch_of(1, labels=False), output_of(2)
    sure = said.softmax(1).amax(1) > 0.6
    of_images = [DICE(output["logits"][[n]], said.argmax(1, keepdim=True)[[n]]).item() for n in range(len(said))]
    for method, expected in (
        (
            MaskedConsistency(DICE, labels, BlockMask(0.5, 4), confidence_threshold=0.6),
            np.mean([float(own.float().mean()) * loss for own, loss in zip(sure, of_images)]),  # Eq. 8 of the paper
        ),
        (
            MeanTeacher(DICE, labels, BlockMask(0.5, 4)),
            ((output["logits"].softmax(1) - said.softmax(1)) ** 2).sum(1).mean().item(),
        ),
    ):
        (one,) = method.passes({"target": batch})
        assert torch.equal(network.shown[-1], batch["image"])
        assert ((one.inputs["image"] == 0).float().mean() - 0.5).abs() < 0.01
        assert one.terms(output)["target"].item() == pytest.approx(expected, rel=1e-5)


def test_supervised_looks_at_the_source_alone():
    (one,) = Supervised(DICE).passes({"source": batch_of(0), "target": batch_of(1)})
    assert set(one.inputs) == {"image"} and Supervised(DICE).selection == ()
    assert Supervised(DICE).passes({"target": batch_of(1)}) == []


def test_entropy_is_lowest_where_a_class_is_sure():
    (one,) = EntropyMinimization().passes({"source": batch_of(0), "target": batch_of(1)})
    sure = torch.tensor([100.0, 0, 0]).view(1, 3, 1, 1, 1).expand(SIZES)
    assert one.terms({"logits": sure})["target_entropy"].item() == pytest.approx(0.0, abs=1e-6)
    even = one.terms({"logits": torch.zeros(SIZES)})["target_entropy"].item()
    assert even == pytest.approx(np.log(3), rel=1e-6)


@pytest.mark.parametrize("name", ["entropy", "mean teacher"])
def test_what_lies_outside_the_tissue_takes_no_part(name):
    batch, output = batch_of(1, labels=False), output_of(2)["logits"]
    batch["image"][..., :2] = 0
    said = torch.randn(SIZES)
    teacher = SimpleNamespace(active=True, network=Saying({"logits": said}))

    def term(ignore, logits):
        labels = ArgmaxLabels(teacher, ignore_outside=ignore)
        method = EntropyMinimization(ignore) if name == "entropy" else MeanTeacher(DICE, labels, lambda image: image)
        (one,) = method.passes({"target": batch})
        return next(iter(one.terms({"logits": logits}).values())).item()

    other = output.clone()
    other[..., :2] = torch.randn(other[..., :2].shape) * 9
    assert term(True, output) == pytest.approx(term(True, other), rel=1e-6)
    assert term(False, output) != pytest.approx(term(False, other), rel=1e-2)
    inside = output[..., 2:].softmax(1)
    expected = -(inside * inside.log()) if name == "entropy" else (inside - said[..., 2:].softmax(1)).square()
    assert term(True, output) == pytest.approx(expected.sum(1).mean().item(), rel=1e-5)


def test_only_scales_and_shifts_of_normalization_are_trained():
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 2, 1), nn.GroupNorm(1, 2)
    )
    found = norm_parameters(network)
    assert [tuple(one.shape) for one in found] == [(4,), (4,), (2,), (2,)]
    with pytest.raises(ConfigError, match="no normalization layer"):
        norm_parameters(nn.Conv3d(1, 1, 1))
