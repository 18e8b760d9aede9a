# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What `TargetDiagnostics` logs, on label maps that are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import nn

from mapseg_components.handlers import TargetDiagnostics
from mapseg_components.transforms.inputs import MASK_FILE


class Known(nn.Module):
    """A network that only has a name for its logits."""

    def __init__(self, label_map, classes=3, height=10.0):
        super().__init__()
        self.logits = height * nn.functional.one_hot(label_map, classes).movedim(-1, 0)[None].float()


def looked(scans, teacher, student, active=True, epochs=1):
    diagnostics = TargetDiagnostics(
        [{"image": scan} for scan in scans],
        ["first", "second"],
        lambda image, network: network.logits,
        SimpleNamespace(active=active),
        teacher,
        student,
        interval=1,
        device="cpu",
    )
    engine = Engine(lambda engine, batch: None)
    diagnostics.attach(engine)
    engine.run([0], max_epochs=epochs)
    return engine.state.metrics


def label_map(first, second):
    found = torch.zeros(3, 4, 5, dtype=torch.long)
    found.view(-1)[: first + second] = torch.tensor([1] * first + [2] * second)
    return found


def test_sizes_are_those_of_the_teacher_in_ml():
    affine = torch.diag(torch.tensor([-2.0, 1.5, 4.0, 1.0]))
    scans = [MetaTensor(torch.rand(1, 3, 4, 5), affine=affine) for _ in range(2)]
    seen = looked(scans, Known(label_map(10, 3)), Known(label_map(5, 0)))
    assert seen["target_ml_first"] == pytest.approx(10 * 12 / 1000)
    assert seen["target_ml_second"] == pytest.approx(3 * 12 / 1000)
    assert seen["target_agreement_teacher_student"] == pytest.approx((2 * 5 / 15 + 0) / 2)
    assert seen["target_confident_share"] == 1.0 and not any("voxels" in key for key in seen)


def test_what_a_mask_leaves_out_has_no_volume():
    image = torch.rand(1, 3, 4, 5) + 0.1
    image.view(-1)[:6] = 0
    for mask, first in (({}, 10), ({MASK_FILE: "mask.nii.gz"}, 4)):
        seen = looked([MetaTensor(image, meta=mask)], Known(label_map(10, 3)), Known(label_map(10, 3)))
        assert next(value for name, value in seen.items() if name.endswith("_first")) == pytest.approx(first * 0.001)


def test_scans_without_an_affine_are_counted_in_voxels():
    seen = looked([torch.rand(1, 3, 4, 5)], Known(label_map(10, 3)), Known(label_map(10, 3)), epochs=2)
    assert seen["target_voxels_first"] == 10 and not any("_ml_" in key for key in seen)
    assert seen["target_agreement_previous"] == 1.0


def test_unsure_voxels_are_not_confident_and_nothing_is_told_without_a_teacher():
    network = Known(label_map(10, 3), height=1.0)
    assert looked([torch.rand(1, 3, 4, 5)], network, network)["target_confident_share"] == 0.0
    assert looked([torch.rand(1, 3, 4, 5)], network, network, active=False) == {}
