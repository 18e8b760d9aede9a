# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, ValidationHandler, from_engine
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.handlers import EMATeacher, ScoreCheckpoint
from mapseg_components.keys import TARGET_LOSS


class Fake:
    """An evaluator that 'ran' in each epoch with a given metric."""

    def __init__(self):
        self.state = SimpleNamespace(epoch=0, key_metric_name="dice", metrics={})


def run(tmp_path, epochs, active_from=1, **options):
    """epochs: list of (student Dice, teacher Dice, target losses of the epoch)."""
    student, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(student.weight, 1.0)
    nn.init.constant_(teacher.weight, 2.0)
    evaluators = {"student": Fake(), "teacher": Fake()}
    activity = SimpleNamespace(active=False)
    score = ScoreCheckpoint(
        str(tmp_path),
        {"student": (student, evaluators["student"]), "teacher": (teacher, evaluators["teacher"])},
        activity,
        **options,
    )
    losses = iter([loss for _, _, values in epochs for loss in values])
    trainer = Engine(lambda engine, batch: [{TARGET_LOSS: next(losses)} if activity.active else {}])
    seen = []

    @trainer.on(Events.EPOCH_STARTED)
    def begin(engine):
        activity.active = engine.state.epoch >= active_from
        student_dice, teacher_dice, _ = epochs[engine.state.epoch - 1]
        for name, value in {"student": student_dice, "teacher": teacher_dice}.items():
            evaluators[name].state.epoch = engine.state.epoch if value is not None else -1
            evaluators[name].state.metrics = {"dice": value}

    score.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(engine.state.metrics.get("score")))
    trainer.run(range(max(len(values) for *_, values in epochs)), max_epochs=len(epochs))
    record = tmp_path / "model_selection.json"
    return score, seen, json.loads(record.read_text()) if record.is_file() else {}


def test_score_is_dice_minus_half_the_mean_target_loss(tmp_path):
    _, seen, record = run(tmp_path, [(0.6, 0.5, [-0.2, -0.6])])
    assert seen == [pytest.approx(0.6 - 0.5 * -0.4)]
    assert record["model.pt"] == pytest.approx(
        {"weights": "student", "epoch": 1, "score": 0.8, "target_loss": -0.4}
        | {"source_dice_student": 0.6, "source_dice_teacher": 0.5}
    )


def test_better_of_student_and_teacher_is_written(tmp_path):
    run(tmp_path, [(0.6, 0.7, [0.0])])
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item() == 2.0


def test_no_score_before_the_teacher_exists(tmp_path):
    epochs = [(0.9, None, [0.0]), (0.95, None, [0.0]), (0.1, 0.1, [1.0])]
    _, seen, record = run(tmp_path, epochs, active_from=3)
    assert seen[:2] == [None, None]
    assert record["source_only.pt"] == {"weights": "student", "epoch": 2, "source_dice": 0.95}
    assert record["model.pt"]["epoch"] == 3  # though its Dice is far below the warm-up's


def test_without_validation_the_score_is_minus_the_target_loss_and_the_teacher_is_written(tmp_path):
    """Test-time and federated: no evaluator, so student and teacher tie; no unmeasured Dice is recorded."""
    candidates = {"student": (nn.Linear(1, 1), None), "teacher": (nn.Linear(1, 1), None)}
    score = ScoreCheckpoint(str(tmp_path), candidates, SimpleNamespace(active=True), loss_weight=1.0, patience=2)
    losses = iter([0.5, -0.5, -0.25, 0.0, 9.0])
    trainer = Engine(lambda engine, batch: [{TARGET_LOSS: next(losses)}])
    score.attach(trainer)
    assert trainer.run(range(1), max_epochs=5).epoch == 4  # two epochs without a better Score
    record = json.loads((tmp_path / "model_selection.json").read_text())
    assert record == {"model.pt": {"weights": "teacher", "epoch": 2, "score": 0.5, "target_loss": -0.5}}
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(found["weight"], candidates["teacher"][0].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_score_is_never_best(tmp_path, bad):
    score, _, record = run(tmp_path, [(0.5, 0.5, [bad]), (0.3, 0.3, [0.0]), (0.9, 0.9, [bad])])
    assert record["model.pt"]["epoch"] == 2 and score.best_score == pytest.approx(0.3)


def test_nan_dice_of_one_candidate_leaves_the_other(tmp_path):
    _, _, record = run(tmp_path, [(math.nan, 0.4, [0.0])])
    assert record["model.pt"]["weights"] == "teacher"


def test_epochs_without_validation_change_nothing(tmp_path):
    _, _, record = run(tmp_path, [(0.5, 0.5, [0.0]), (None, None, [-9.0])])
    assert record["model.pt"]["epoch"] == 1


def test_a_run_that_selected_nothing_says_so(tmp_path, caplog):
    run(tmp_path, [(None, None, [0.0])])
    assert "No weights were selected in 1 epochs" in caplog.text and not list(tmp_path.iterdir())


def test_patience_counts_scores_only(tmp_path):
    epochs = [(0.9, None, [0.0])] * 3 + [(0.5, 0.5, [0.0])] + [(0.4, 0.4, [0.0])] * 5
    score, seen, _ = run(tmp_path, epochs, active_from=4, patience=2)
    assert len(seen) == 6 and score.epochs_without_gain == 2


def test_a_resumed_run_without_patience_left_ends_at_once(tmp_path):
    score, _, _ = run(tmp_path, [(0.5, 0.5, [0.0])] * 5, patience=2)
    again = ScoreCheckpoint(str(tmp_path), {}, patience=2)
    again.load_state_dict(score.state_dict())
    trainer = Engine(lambda engine, batch: [{}])
    again.attach(trainer)
    assert trainer.run(range(2), max_epochs=9).epoch == 0


def test_state_survives_a_round_trip(tmp_path):
    score, _, _ = run(tmp_path, [(0.5, 0.6, [0.0])])
    other = ScoreCheckpoint(str(tmp_path), {})
    other.load_state_dict(score.state_dict())
    assert other.best_score == score.best_score == pytest.approx(0.6)


class Level(nn.Module):
    """Predicts a set level everywhere, so that the Dice of an epoch is known."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return (image < self.level).float() + 0.0 * self.level


def supervised(folder, levels, metric=True, decollate=True, teacher=False, validate=True, **options):
    """An ordinary MONAI trainer whose network has one of these levels in each epoch."""
    image = torch.linspace(0, 1, 10).view(1, 1, 10)
    data = [{"image": image, "label": (image < 0.5).float()}]
    network = Level()
    evaluator = SupervisedEvaluator(
        "cpu",
        data,
        network,
        key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))} if metric else None,
    )
    mean_teacher = EMATeacher(network, 0, [[None, 0.9]]) if teacher else None
    score = ScoreCheckpoint(str(folder), {"student": (network, evaluator)}, mean_teacher, **options)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=len(levels),
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=nn.MSELoss(),
        decollate=decollate,
        train_handlers=[
            *([mean_teacher] if teacher else []),
            *([ValidationHandler(1, evaluator)] if validate else []),
            score,
        ],
    )

    def set_level(engine):
        network.level.data.fill_(levels[engine.state.epoch - 1])

    trainer.add_event_handler(Events.EPOCH_STARTED, set_level)
    trainer.run()
    return trainer


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("decollate", [True, False])
def test_on_monais_trainer_the_score_is_the_metric(tmp_path, decollate, teacher):
    trainer = supervised(tmp_path, [0.2, 0.5, 0.9], decollate=decollate, teacher=teacher)
    record = json.loads((tmp_path / "model_selection.json").read_text())
    assert record == {"model.pt": {"weights": "student", "epoch": 2, "score": 1.0, "source_dice_student": 1.0}}
    assert torch.load(tmp_path / "model.pt", weights_only=True)["level"].item() == 0.5
    assert trainer.state.metrics["score"] < 1 and "target_loss" not in trainer.state.metrics


def test_of_a_source_stage_the_better_of_student_and_average_is_kept_as_source_only(tmp_path):
    supervised(tmp_path, [0.2, 0.5, 0.9], teacher=True, source_only=True)
    record = json.loads((tmp_path / "model_selection.json").read_text())
    assert record == {"source_only.pt": {"weights": "student", "epoch": 2, "source_dice": 1.0}}
    score = ScoreCheckpoint(str(tmp_path), {"student": (Level(), None), "teacher": (Level(), None)}, source_only=True)
    engine = Engine(lambda engine, batch: None)
    engine.run([0], max_epochs=7)
    score._keep_source_only(engine, {"student": 0.6, "teacher": 0.7})
    score._keep_source_only(engine, {"student": float("nan"), "teacher": 0.65})
    record = json.loads((tmp_path / "model_selection.json").read_text())
    assert record["source_only.pt"] == {"weights": "teacher", "epoch": 7, "source_dice": 0.7}


def test_patience_ends_monais_trainer(tmp_path):
    assert supervised(tmp_path, [0.5, 0.4, 0.3, 0.2, 0.1], patience=2).state.epoch == 3


def test_an_evaluator_without_a_key_metric_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"'student' has no key metric.*key_val_metric"):
        supervised(tmp_path, [0.5], metric=False)
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_never_validates_is_told_so(tmp_path, caplog):
    supervised(tmp_path, [0.5], validate=False)
    assert "name the handlers that validate before ScoreCheckpoint" in caplog.text


@pytest.mark.parametrize("output", [0.5, None, [], {"loss": 0.5}, [{"loss": 0.5}], (0.1, 0.2)])
def test_any_output_of_a_trainer_will_do(tmp_path, output):
    evaluator = Fake()
    trainer = Engine(lambda engine, batch: output)
    score = ScoreCheckpoint(str(tmp_path), {"student": (nn.Linear(1, 1), evaluator)})
    evaluator.state.epoch, evaluator.state.metrics = 1, {"dice": 0.7}
    score.attach(trainer)
    trainer.run(range(2), max_epochs=1)
    assert json.loads((tmp_path / "model_selection.json").read_text())["model.pt"]["score"] == 0.7


def test_without_metric_and_target_loss_nothing_is_selected(tmp_path, caplog):
    trainer = Engine(lambda engine, batch: 0.5)
    ScoreCheckpoint(str(tmp_path), {"student": (nn.Linear(1, 1), None)}).attach(trainer)
    trainer.run(range(2), max_epochs=1)
    assert "No weights were selected" in caplog.text and not list(tmp_path.iterdir())
