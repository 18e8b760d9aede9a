# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A teacher of rounds of pseudo labels: it stands still, and takes the student's weights between rounds."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mapseg_components.checkpoints import weights_of
from mapseg_components.errors import ConfigError
from mapseg_components.handlers.ema_teacher import EMATeacher

__all__ = ["PseudoLabelRounds"]

PLACE = ("last_epoch", "_step_count", "_last_lr", "T_cur")  # of a schedule, by PyTorch's names; not its length

logger = logging.getLogger(__name__)


class PseudoLabelRounds(EMATeacher):
    """The student's weights, buffers included, of the beginning of a round; the same for all steps of the round.

    Its labels are those that would be predicted for the whole target between rounds, made for each patch when it is
    shown. The epochs after the warm-up are shared evenly among the rounds; with fewer epochs than rounds each epoch is
    a round.

    Args:
        student: see `EMATeacher`.
        rounds: T.
        warmup_epochs: see `EMATeacher`.
        reinitialise: at the beginning of each further round the student begins again with the weights that it had in
            the first, the optimizer forgets its moments, and the schedule starts anew. By default all of them go on.
        optimizer: of the student, for ``reinitialise``.
        lr_scheduler: of the optimizer, for ``reinitialise``: each round learns at the rates of the first.

    Raises:
        ConfigError: there is no round, or no optimizer to begin again with.

    Examples:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import PseudoLabelRounds
        >>> student = torch.nn.ParameterList([torch.tensor(0.0)])
        >>> teacher, labelled_by = PseudoLabelRounds(student, rounds=2), []
        >>> def step(engine, batch):
        ...     labelled_by.append(teacher.network[0].item())
        ...     student[0].data += 1  # an optimizer step
        >>> trainer = Engine(step)
        >>> teacher.attach(trainer)
        >>> trainer.run([0, 1], max_epochs=4).epoch, labelled_by
        (4, [0.0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 4.0])
    """

    def __init__(
        self,
        student: nn.Module,
        rounds: int,
        warmup_epochs: int = 0,
        reinitialise: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> None:
        super().__init__(student, warmup_epochs, [[None, 1.0]])
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ConfigError(f"label_rounds is {rounds!r}, expected a whole number, 1 or more")
        if reinitialise and optimizer is None:
            raise ConfigError("reinitialise needs the student's optimizer, which begins again with it: set optimizer")
        self.rounds = rounds
        self.reinitialise = reinitialise
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.round = 0
        self.first: dict[str, torch.Tensor] = {}  # the student's weights in the first round, for ``reinitialise``
        self.rates: dict[str, Any] = {}  # where the schedule stands in it, and settings of the optimizer

    def round_of(self, epoch: int, epochs: int) -> int:
        """Number of the round, from 1, that an epoch (from 1) of so many belongs to; 0 in the warm-up."""
        if epoch <= self.warmup_epochs:
            return 0
        length = max(epochs - int(self.warmup_epochs), 1)
        return 1 + (epoch - int(self.warmup_epochs) - 1) * min(self.rounds, length) // length

    @torch.no_grad()
    def update(self) -> None:
        """Count a step; weights and buffers stand still."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """As `EMATeacher`, with the round, and what the first one began with if it is needed."""
        return {**super().state_dict(), "round": self.round, "first": self.first, "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.round, self.first = state.get("round", 0), state.get("first", {})
        self.rates = state.get("rates", {})

    def _start_after_warmup(self, engine: Engine) -> None:
        number = self.round_of(engine.state.epoch, engine.state.max_epochs or 1)
        if number <= self.round:
            return  # within a round, also of a run that was resumed in its first epoch
        steps, first = self.steps, self.round == 0
        self.start()
        self.round, self.steps = number, steps
        logger.info(f"Round {number} of {self.rounds}: pseudo labels of the weights before epoch {engine.state.epoch}.")
        if self.reinitialise:
            self._begin_again(first)

    def _begin_again(self, first: bool) -> None:
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        if first:
            self.first = weights_of(self.student)
            stands = {} if self.lr_scheduler is None else self.lr_scheduler.state_dict()
            kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            self.rates = copy.deepcopy({"at": {key: stands[key] for key in PLACE if key in stands}, "groups": kept})
            return
        self.student.load_state_dict(self.first)
        self.optimizer.state.clear()
        if self.lr_scheduler is not None and self.rates:  # a run that began before they were kept has none
            cycle = {"T_i": self.lr_scheduler.T_0} if hasattr(self.lr_scheduler, "T_0") else {}  # the first one
            self.lr_scheduler.load_state_dict(copy.deepcopy(self.rates["at"]) | cycle)
            for group, first_group in zip(groups, self.rates["groups"]):
                group.update(first_group)
