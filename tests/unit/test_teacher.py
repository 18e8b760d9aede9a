# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.networks.nets import UNet
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.handlers import EMATeacher
from mapseg_components.methods import ArgmaxLabels
from mapseg_components.networks import PlainPass


class OneWeight(nn.Module):
    """A weight and a buffer that the test moves by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, image):
        return {"logits": torch.cat([self.dropout(image) * self.weight, 1 - image], dim=1)}


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
    label, confidence = ArgmaxLabels(teacher)(image=image)["logits"]
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


def unet(classes=3):
    torch.manual_seed(0)
    return UNet(3, in_channels=1, out_channels=classes, channels=(4, 8), strides=(2,), norm="batch")


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_follows_the_steps_of_an_ordinary_trainer(every):
    """Five iterations of MONAI's trainer, two epochs: a step each, or after 2, 4 and the last one."""
    student = unet()
    teacher = EMATeacher(student, 1, [[None, 0.75]])
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=[{"image": torch.rand(2, 1, 8, 12, 16), "label": torch.rand(2, 3, 8, 12, 16)}] * 5,
        network=student,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        accumulation_steps=every,
        train_handlers=[teacher],
    )
    expected = []

    def average(engine):
        weights = [p.detach().clone() for p in student.parameters()]
        if engine.state.epoch == 1:
            expected[:] = weights
        elif every == 1 or engine.state.iteration - 5 in (2, 4, 5):
            expected[:] = [0.75 * own + 0.25 * weight for own, weight in zip(expected, weights)]

    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, average)
    trainer.run()
    assert teacher.steps == (5 if every == 1 else 3)
    for own, weight in zip(teacher.network.parameters(), expected):
        torch.testing.assert_close(own, weight)
    assert not teacher.network.training and student.training
    for own, buffer in zip(teacher.network.buffers(), student.buffers()):
        assert torch.equal(own, buffer)


def test_each_iteration_of_a_plain_engine_is_a_step():
    student = OneWeight()
    teacher = EMATeacher(student, 0, [[None, 0.5]])

    def iteration(engine, batch):
        with torch.no_grad():
            student.weight += 1

    engine = Engine(iteration)
    teacher.attach(engine)
    engine.run(range(3))
    assert teacher.steps == 3 and teacher.network.weight.item() == pytest.approx(0.5 * 0.5 * 0.5 + 0.5 * 0.5 * 2 + 1.5)


def test_a_teacher_that_no_event_moves_says_so(caplog):
    engine = Engine(lambda engine, batch: None)
    engine.register_events(*IterationEvents)
    EMATeacher(OneWeight(), 0, [[None, 0.5]]).attach(engine)
    with caplog.at_level(logging.WARNING):
        engine.run(range(2))
    assert "the teacher did not move" in caplog.text and "update()" in caplog.text


def test_wrappers_of_a_student_are_looked_through(tiny_network):
    teacher = EMATeacher(nn.DataParallel(tiny_network), 0, [[None, 0.5]])
    assert teacher.student is tiny_network and set(teacher.network.state_dict()) == set(tiny_network.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_starts_where_its_student_is():
    student = OneWeight()
    teacher = EMATeacher(student, 0, [[None, 0.5]])
    student.cuda()
    teacher.start()
    teacher.update()
    assert teacher.network.weight.is_cuda and teacher.network.count.is_cuda


def test_what_a_teacher_cannot_label_is_refused():
    image = torch.rand(2, 1, 8, 12, 16)
    label, confidence = ArgmaxLabels(EMATeacher(PlainPass(unet()), 0, [[None, 0.9]]))(image=image)["logits"]
    assert label.shape == confidence.shape == image.shape
    with pytest.raises(ConfigError, match=r"network UNet does not take \['image'\].*training_pass"):
        ArgmaxLabels(EMATeacher(unet(), 0, [[None, 0.9]]))(image=image)
    with pytest.raises(ConfigError, match=r"logits have shape \(2, 1, 8, 12, 16\).*background as a class"):
        ArgmaxLabels(EMATeacher(PlainPass(unet(1)), 0, [[None, 0.9]]))(image=image)
