# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Label-free model selection on the target: the Score (MAPSeg, arXiv 2303.09373, section 3.7)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler
from torch import nn

from mapseg_components.checkpoints import weights_of, write_atomic
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_json
from mapseg_components.handlers.share_limits import ShareLimits
from mapseg_components.keys import TARGET_LOSS

__all__ = ["ScoreCheckpoint", "TeacherValidation"]

logger = logging.getLogger(__name__)

STATE = ("best_score", "best_source_dice", "best_name", "epochs_without_gain", "_loss_sum", "_loss_count")


class Activity(Protocol):
    """Something that is active or not yet, such as a teacher."""

    active: bool


class TeacherValidation(ValidationHandler):
    """MONAI's ``ValidationHandler`` that waits until the teacher exists.

    Args:
        interval: validate every so many epochs.
        validator: the evaluator of the teacher's network.
        teacher: see `EMATeacher`.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai.engines import SupervisedEvaluator
        >>> from mapseg_components.handlers import TeacherValidation
        >>> trainer, teacher = Engine(lambda engine, batch: None), SimpleNamespace(active=False)
        >>> validator = SupervisedEvaluator("cpu", [{"image": torch.rand(1, 1, 4, 5, 6)}], torch.nn.Identity())
        >>> TeacherValidation(interval=1, validator=validator, teacher=teacher).attach(trainer)
        >>> trainer.run([0], max_epochs=1).epoch, validator.state.epoch  # it has not run
        (1, 0)
        >>> teacher.active = True
        >>> trainer.run([0], max_epochs=2).epoch, validator.state.epoch
        (2, 2)
    """

    def __init__(self, interval: int, validator: Evaluator, teacher: Activity) -> None:
        super().__init__(interval=interval, validator=validator)
        self.teacher = teacher

    def __call__(self, engine: Engine) -> None:
        if self.teacher.active:
            super().__call__(engine)


class ScoreCheckpoint:
    """Keep the best weights by ``Score = source validation Dice - loss_weight * mean target loss of the epoch``.

    The target loss is the trainer's output ``target_loss``, so that no target label is needed: the terms that the
    method names for selection; for MAPSeg the local segmentation term of the masked pass, section 3.7 of the paper.
    The Score exists only from the epoch in which the teacher is active; student and teacher are both candidates and the
    better one is written to ``model.pt``, its name and figures to ``model_selection.json``. Before that the epoch with
    the best source validation Dice is written to ``source_only.pt``. A Score that is NaN or infinite is logged and
    never becomes the best.

    On a trainer without that output, such as MONAI's ``SupervisedTrainer``, there is no target loss: the Score is the
    evaluator's key metric, larger is better.

    Attach it to the trainer after the handlers that validate.

    Args:
        save_dir: folder of the files.
        candidates: name to ``(network, evaluator)``. The first one is the student. The evaluator is ``None`` where
            there is no validation data (test-time and federated): the Dice counts as 0, every candidate has the same
            Score, and the last one, the teacher, is written.
        teacher: see `EMATeacher`; ``None`` if there is none: then every epoch that is validated has a Score.
        loss_weight: weight of the target loss (0.5 in the paper).
        patience: stop after so many epochs with a Score but no better one; ``None`` for never.
        source_only: there is no Score in the whole run, which learns the source alone: ``source_only.pt`` is of the
            better of both candidates, and an active teacher is the average of the student's last weights.
        limits: of the structures' shares on the target, see `ShareLimits`: then a Score exists only in epochs in which
            `TargetDiagnostics` has looked, for the candidates that are within limits. ``None`` for none.
        latest: keep the last weights that have a finite Score, not the best: where a method changes what it learns
            from, such as rounds of pseudo labels, losses of different epochs do not compare. There is no patience then.

    Sets on the trainer's state:
        ``metrics["source_dice_<name>"]``, ``metrics["target_loss"]`` and ``metrics["score"]``.

    Raises:
        ConfigError: when the run starts, if an evaluator has no key metric.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import ScoreCheckpoint
        >>> trainer = Engine(lambda engine, batch: {"loss": 1.0, "target_loss": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ScoreCheckpoint(folder, {"student": (torch.nn.Linear(1, 1), None)}).attach(trainer)
        ...     state = trainer.run([0, 1])
        ...     json.loads(Path(folder, "model_selection.json").read_text())["model.pt"]
        {'weights': 'student', 'epoch': 1, 'score': -0.25, 'target_loss': 0.5}
    """

    differs_by_process = True  # each process sums the losses that it sees

    def __init__(
        self,
        save_dir: str,
        candidates: Mapping[str, tuple[nn.Module, Evaluator]],
        teacher: Activity | None = None,
        loss_weight: float = 0.5,
        patience: int | None = None,
        source_only: bool = False,
        limits: ShareLimits | None = None,
        latest: bool = False,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.candidates = dict(candidates)
        self.teacher = teacher
        self.loss_weight = loss_weight
        self.patience = patience
        self.source_only = source_only
        self.limits = limits
        self.latest = latest
        self.best_score = -math.inf
        self.best_source_dice = -math.inf
        self.best_name = ""
        self.epochs_without_gain = 0
        self._loss_sum = 0.0
        self._loss_count = 0

    def attach(self, engine: Engine) -> None:
        """Average the target loss over an epoch, score at its end; a resumed run may have no patience left."""
        engine.add_event_handler(Events.STARTED, self._require_metrics)
        engine.add_event_handler(Events.STARTED, self._end_without_patience)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._accumulate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._score)
        engine.add_event_handler(Events.COMPLETED, self._warn_if_empty)

    def state_dict(self) -> dict[str, Any]:
        """Best figures and name so far, and the sum of this epoch."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in STATE:
            setattr(self, name, state[name])

    def _require_metrics(self, engine: Engine) -> None:
        for name, (_, evaluator) in self.candidates.items():
            if evaluator is not None and getattr(evaluator.state, "key_metric_name", None) is None:
                raise ConfigError(
                    f"the evaluator of candidate {name!r} has no key metric to select weights by: give it "
                    "key_val_metric, e.g. MONAI's MeanDice"
                )

    def _warn_if_empty(self, engine: Engine) -> None:
        if not math.isfinite(max(self.best_score, self.best_source_dice)):
            logger.warning(
                f"No weights were selected in {engine.state.epoch} epochs: no epoch was validated before the Score was "
                "taken, or every figure was NaN. Lower val_interval, name the handlers that validate before "
                "ScoreCheckpoint, or look at the losses in history.jsonl."
            )

    def _reset(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length == 0:  # else it was resumed within the epoch
            self._loss_sum, self._loss_count = 0.0, 0

    def _accumulate(self, engine: Engine) -> None:
        output = engine.state.output
        losses = output[0] if isinstance(output, (list, tuple)) and output else output
        if isinstance(losses, Mapping) and TARGET_LOSS in losses:
            self._loss_sum += float(losses[TARGET_LOSS])
            self._loss_count += 1

    def _score(self, engine: Engine) -> None:
        dice = {name: self._source_dice(name, engine.state.epoch) for name in self.candidates}
        dice = {name: value for name, value in dice.items() if value is not None}
        for name, value in dice.items():
            engine.state.metrics[f"source_dice_{name}"] = value
        if not self.source_only and (self.teacher is None or self.teacher.active):
            self._select_by_score(engine, dice)
        else:
            self._keep_source_only(engine, dice)

    def _keep_source_only(self, engine: Engine, dice: Mapping[str, float]) -> None:
        finite = {name: value for name, value in dice.items() if math.isfinite(value)}
        name = max(reversed(finite), key=lambda key: finite[key], default="")
        value = finite.get(name, -math.inf)
        if value > self.best_source_dice:
            self.best_source_dice = value
            self._write("source_only", name, {"epoch": engine.state.epoch, "source_dice": value})

    def _select_by_score(self, engine: Engine, dice: Mapping[str, float]) -> None:
        loss_sum, loss_count = (
            float(idist.all_reduce(torch.tensor(float(value)))) for value in (self._loss_sum, self._loss_count)
        )
        figures = {f"source_dice_{name}": value for name, value in dice.items()}
        if loss_count:
            engine.state.metrics["target_loss"] = figures["target_loss"] = loss_sum / loss_count
        if not dice:
            if any(evaluator is not None for _, evaluator in self.candidates.values()):
                return  # not an epoch of validation
            dice = dict.fromkeys(self.candidates, 0.0)
        if self.limits is not None:
            if self.limits.reason is not None:
                self._record({"stopped": {"epoch": engine.state.epoch, "reason": self.limits.reason}})
            dice = {name: value for name, value in dice.items() if name not in self.limits.refused}
            if self.limits.reason is not None or not dice or not self.limits.looked_in(engine.state.epoch):
                return
        # max() does not order NaN: a candidate without a finite Dice comes last, a tie goes to the later candidate
        name = max(reversed(dice), key=lambda key: dice[key] if math.isfinite(dice[key]) else -math.inf)
        score = dice[name]
        if loss_count:
            score -= self.loss_weight * figures["target_loss"]
        elif not figures:
            score = math.nan  # nothing was measured
        engine.state.metrics["score"] = score
        if not math.isfinite(score):
            logger.warning(f"Epoch {engine.state.epoch}: the Score is {score}; it cannot become the best.")
        elif score > self.best_score or self.latest:
            self.best_score, self.best_name, self.epochs_without_gain = score, name, 0
            self._write("model", name, {"epoch": engine.state.epoch, "score": score, **figures})
            what = "the latest" if self.latest else "best Score so far"
            logger.info(f"Epoch {engine.state.epoch}: {what}, {score:.4f}, by the {name}.")
            return
        self.epochs_without_gain += 1
        self._end_without_patience(engine)

    def _end_without_patience(self, engine: Engine) -> None:
        if self.patience is not None and self.epochs_without_gain >= self.patience:
            logger.info(f"No better Score in {self.epochs_without_gain} validations: training ends.")
            engine.terminate()

    def _source_dice(self, name: str, epoch: int) -> float | None:
        """Key metric of a candidate's evaluator, if it ran in this epoch."""
        evaluator = self.candidates[name][1]
        if evaluator is None or evaluator.state.epoch != epoch or evaluator.state.key_metric_name is None:
            return None
        value = evaluator.state.metrics.get(evaluator.state.key_metric_name)
        return None if value is None else float(value)

    def _write(self, stem: str, name: str, figures: Mapping[str, Any]) -> None:
        if idist.get_rank() != 0:
            return
        write_atomic(weights_of(self.candidates[name][0]), self.save_dir / f"{stem}.pt")
        self._record({f"{stem}.pt": {"weights": name, **figures}})

    def _record(self, entries: Mapping[str, Any]) -> None:
        """Add entries to ``model_selection.json``."""
        if idist.get_rank() != 0:
            return
        record = self.save_dir / "model_selection.json"
        content = json.loads(record.read_text()) if record.is_file() else {}
        write_json({**content, **entries}, record)
