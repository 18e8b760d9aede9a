# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.handlers import EMATeacher


class OneWeight(nn.Module):
    """A weight and a buffer that the test moves by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, local_image, global_image, box):
        logits = torch.cat([self.dropout(local_image) * self.weight, 1 - local_image], dim=1)
        return logits, logits, None, None


def engine_that_steps(student):
    """Each iteration adds 1 to weight and buffer, as an optimizer step would."""

    def iteration(engine, batch):
        with torch.no_grad():
            student.weight += 1
            student.count += 1
        engine.fire_event(IterationEvents.MODEL_COMPLETED)

    engine = Engine(iteration)
    engine.register_events(*IterationEvents)
    return engine


def test_average_by_mental_arithmetic():
    student = OneWeight()
    teacher = EMATeacher(student, warmup_epochs=1, decay_schedule=[[2, 0.5], [None, 0.75]])
    engine = engine_that_steps(student)
    teacher.attach(engine)
    engine.run(range(3), max_epochs=1)
    assert not teacher.active and teacher.network.weight.item() == 0  # three warm-up steps did not move it
    engine.run(range(3), max_epochs=2)
    # copied at 3; then 0.5*3+0.5*4 = 3.5; 0.5*3.5+0.5*5 = 4.25; 0.75*4.25+0.25*6 = 4.6875
    assert teacher.active and teacher.steps == 3
    assert teacher.network.weight.item() == pytest.approx(4.6875)
    assert teacher.network.count.item() == 6  # a buffer is the student's own value


def test_nothing_is_shared_with_the_student():
    student = OneWeight()
    teacher = EMATeacher(student, 0, [[None, 0.5]])
    teacher.start()
    teacher.update()
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    with torch.no_grad():
        student.weight += 100
        student.count += 100
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_teacher_labels_without_dropout_and_without_gradient():
    student = OneWeight().train()
    student.weight.data += 3
    teacher = EMATeacher(student, 0, [[None, 0.9]])
    teacher.start()
    image = torch.tensor([0.1, 0.9]).view(1, 1, 1, 1, 2)
    label, _, confidence, _ = teacher.pseudo_label(image, image, None)
    assert not teacher.network.training and student.training
    assert label.flatten().tolist() == [1, 0]  # logits (0.3, 0.9) and (2.7, 0.1)
    assert confidence.flatten().tolist() == pytest.approx([torch.sigmoid(torch.tensor(x)).item() for x in (0.6, 2.6)])
    assert not confidence.requires_grad and not any(p.requires_grad for p in teacher.network.parameters())


def test_schedule_counts_updates():
    teacher = EMATeacher(OneWeight(), 0, [[1000, 0.99], [3000, 0.999], [None, 0.9999]])
    found = []
    for teacher.steps in (0, 999, 1000, 2999, 3000, 10**6):
        found.append(teacher.decay())
    assert found == [0.99, 0.99, 0.999, 0.999, 0.9999, 0.9999]


def test_the_way_that_a_teacher_takes_in_some_updates():
    student = OneWeight()
    teacher = EMATeacher(student, 0, [[2, 0.9], [None, 0.5]])
    teacher.start()
    before = next(teacher.network.parameters()).clone()
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    followed = teacher.followed(3)
    for _ in range(3):
        teacher.update()
    torch.testing.assert_close(next(teacher.network.parameters()) - before, torch.full_like(before, followed))
    assert followed == pytest.approx(1 - 0.9 * 0.9 * 0.5) and teacher.followed(1) == 0.5


@pytest.mark.parametrize("schedule", [[], [[10, 0.9]], [[10, 0.9], [5, 0.9], [None, 0.9]], [[None, 1.5]]])
def test_bad_schedule_is_refused(schedule):
    with pytest.raises(ConfigError, match="decay_schedule"):
        EMATeacher(OneWeight(), 0, schedule)


def test_state_survives_a_round_trip():
    teacher = EMATeacher(OneWeight(), 0, [[None, 0.5]])
    teacher.start()
    teacher.student.weight.data += 4
    teacher.update()
    other = EMATeacher(OneWeight(), 0, [[None, 0.5]])
    other.load_state_dict(teacher.state_dict())
    assert other.active and other.steps == 1 and other.network.weight.item() == 2
