# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A teacher that is an exponential moving average of the student (mean teacher; MAPSeg, Eq. 3)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.errors import ConfigError

__all__ = ["EMATeacher"]

logger = logging.getLogger(__name__)


class EMATeacher:
    """Teacher weights ``theta <- decay * theta + (1 - decay) * phi`` after each optimizer step of the student phi.

    The teacher is copied from the student when the warm-up ends and is active from then on. Its buffers are copied
    from the student at each step (as values, never as shared memory) and it always stays in evaluation mode: no
    dropout while it labels.

    Attach it to a trainer (it is a handler): it starts with the epoch after the warm-up and moves once per optimizer
    step. It takes ``IterationEvents.MODEL_COMPLETED`` for one, as MAPSeg's and MONAI's trainers fire it (in MONAI's the
    iterations that only accumulate gradients are left out); of an Ignite engine that does not have this event each
    iteration counts. A loop without an engine calls `start` once and `update` after each step.

    Args:
        student: the network in training. A ``DistributedDataParallel`` or ``DataParallel`` wrapper is looked through.
        warmup_epochs: epochs before the teacher exists; 0 starts it at once.
        decay_schedule: pairs ``[until_step, decay]``, counted in updates since the teacher exists; the last
            ``until_step`` is ``None``. The paper's large-scale schedule is ``[[1000, 0.999], [None, 0.9999]]``,
            its small-scale one ``[[1000, 0.99], [3000, 0.999], [None, 0.9999]]``. ``ema_decay`` is the share kept.

    Raises:
        ConfigError: the schedule is not increasing, has no end, or a decay is outside [0, 1].

    Examples:
        >>> import torch
        >>> from mapseg_components.handlers import EMATeacher
        >>> student = torch.nn.ParameterList([torch.tensor(0.0)])
        >>> teacher = EMATeacher(student, warmup_epochs=0, decay_schedule=[[None, 0.75]])
        >>> teacher.start()
        >>> student[0].data = torch.tensor(4.0)  # an optimizer step
        >>> teacher.update()
        >>> teacher.network[0].item()  # 0.75 * 0 + 0.25 * 4
        1.0
    """

    def __init__(
        self, student: nn.Module, warmup_epochs: int, decay_schedule: Sequence[Sequence[float | None]]
    ) -> None:
        ends = [end for end, _ in decay_schedule]
        increasing = all(a is not None and b is not None and a < b for a, b in zip(ends, ends[1:-1]))
        if not ends or ends[-1] is not None or None in ends[:-1] or not increasing:
            raise ConfigError(
                f"decay_schedule {decay_schedule} must name increasing steps and end with null, "
                "e.g. [[1000, 0.999], [null, 0.9999]]"
            )
        if not all(0.0 <= decay <= 1.0 for _, decay in decay_schedule):  # type: ignore[operator]
            raise ConfigError(f"decay_schedule {decay_schedule} has a decay outside [0, 1], the share that is kept")
        wrapped = isinstance(student, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        self.student: nn.Module = student.module if wrapped else student
        self.network = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.warmup_epochs = warmup_epochs
        self.decay_schedule = [(end, float(decay)) for end, decay in decay_schedule]  # type: ignore[arg-type]
        self.active = False
        self.steps = 0
        self._steps_before = 0  # at the end of the last epoch

    def attach(self, engine: Engine) -> None:
        """Start with the epoch after the warm-up, update after each optimizer step."""
        stepped = IterationEvents.MODEL_COMPLETED
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_after_warmup)
        engine.add_event_handler(
            stepped if engine.has_registered_events(stepped) else Events.ITERATION_COMPLETED, self._update_if_active
        )
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._warn_if_still)

    def start(self) -> None:
        """Copy the student, weights and buffers, to where it is now, and become active."""
        for own, weight in zip(self.network.parameters(), self.student.parameters()):
            own.data = own.data.to(weight.device)
        for own, buffer in zip(self.network.buffers(), self.student.buffers()):
            own.data = own.data.to(buffer.device)
        self.network.load_state_dict(self.student.state_dict())
        self.network.eval()
        self.active = True
        self.steps = 0

    def decay(self, ahead: int = 0) -> float:
        """Share of the teacher that the next update keeps, or one of those after it (``ahead``)."""
        return next(decay for end, decay in self.decay_schedule if end is None or self.steps + ahead < end)

    def followed(self, updates: int) -> float:
        """Share of the way to a student that stands still which the next updates take the teacher."""
        return 1.0 - math.prod(self.decay(ahead) for ahead in range(updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the teacher towards the student by one step."""
        kept = self.decay()
        teacher, student = list(self.network.parameters()), [p.detach() for p in self.student.parameters()]
        torch._foreach_lerp_(teacher, student, 1.0 - kept)
        for own, buffer in zip(self.network.buffers(), self.student.buffers()):
            own.copy_(buffer)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, step count and whether the teacher is active."""
        return {"network": self.network.state_dict(), "steps": self.steps, "active": self.active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.steps, self.active = state["steps"], state["active"]

    def _start_after_warmup(self, engine: Engine) -> None:
        if not self.active and engine.state.epoch > self.warmup_epochs:
            self.start()
            logger.info(f"The teacher starts with epoch {engine.state.epoch}.")

    def _update_if_active(self, engine: Engine) -> None:
        if self.active and ends_a_step(engine):
            self.update()

    def _warn_if_still(self, engine: Engine) -> None:
        if self.active and self.steps == self._steps_before:
            logger.warning(
                f"Epoch {engine.state.epoch}: the teacher did not move, the trainer fired no MODEL_COMPLETED: fire it "
                "after each optimizer step, or call the teacher's update()."
            )
        self._steps_before = self.steps


def ends_a_step(engine: Engine) -> bool:
    """Whether the iteration of a trainer ended with an optimizer step; MONAI's accumulates gradients without a word."""
    every = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length
    position = engine.state.iteration if length is None else (engine.state.iteration - 1) % length + 1
    return position % every == 0 or position == length
