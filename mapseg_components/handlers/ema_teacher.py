# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The teacher of masked pseudo-labelling: an exponential moving average of the student (MAPSeg, Eq. 3)."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks import GlobalLocalPass

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
        student: the network in training: a ``GlobalLocalPass``, a network with its parts ``encode``, ``context`` and
            ``decode``, or any segmenter of one image; see `pseudo_label`. A ``DistributedDataParallel`` or
            ``DataParallel`` wrapper is looked through.
        warmup_epochs: epochs before the teacher exists; 0 starts it at once.
        decay_schedule: pairs ``[until_step, decay]``, counted in updates since the teacher exists; the last
            ``until_step`` is ``None``. The paper's large-scale schedule is ``[[1000, 0.999], [None, 0.9999]]``,
            its small-scale one ``[[1000, 0.99], [3000, 0.999], [None, 0.9999]]``. ``ema_decay`` is the share kept.

    Raises:
        ConfigError: the schedule is not increasing, has no end, or a decay is outside [0, 1].
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

    @overload
    def pseudo_label(self, local_image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def pseudo_label(
        self, local_image: torch.Tensor, global_image: torch.Tensor, local_box: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...

    @torch.no_grad()
    def pseudo_label(
        self,
        local_image: torch.Tensor,
        global_image: torch.Tensor | None = None,
        local_box: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Labels of clean target images: the class of highest probability.

        Args:
            local_image: (B, C, X, Y, Z). global_image: (B, C, X', Y', Z'). local_box: (B, 3, 2). Without the last two
                the image stands alone, as any segmenter takes it.

        Returns:
            local label, global label (integer), local confidence, global confidence (the highest probability);
            each (B, 1, X, Y, Z) of its image. Of one image: its label, its confidence.

        Raises:
            ConfigError: the network takes no pairs, or its output is not logits of two classes or more.
        """
        if global_image is None and local_box is not None:
            raise ConfigError("local_box belongs to a global_image: give both for a pair, none for one image")
        if global_image is None:
            logits = [self._logits(local_image)]
        else:
            logits = self._pair_logits(local_image, global_image, local_box)
        labels, confidences = [], []
        for one in logits:
            if not isinstance(one, torch.Tensor) or one.ndim < 3 or one.shape[1] < 2:
                found = tuple(one.shape) if isinstance(one, torch.Tensor) else type(one).__name__
                raise ConfigError(
                    f"the teacher's output is {found}, expected logits (B, classes, X, Y, Z) with background as a class"
                )
            confidence, label = one.float().softmax(dim=1).max(dim=1, keepdim=True)
            labels.append(label)
            confidences.append(confidence)
        return (*labels, *confidences)

    def _logits(self, image: torch.Tensor) -> Any:
        """Of one image alone."""
        network = self.network.network if isinstance(self.network, GlobalLocalPass) else self.network
        return network(image)

    def _pair_logits(
        self, local_image: torch.Tensor, global_image: torch.Tensor, local_box: torch.Tensor | None
    ) -> Sequence[Any]:
        """Of a patch with its context, and of its global view."""
        network = self.network
        if all(hasattr(network, part) for part in ("encode", "context", "decode")):
            network = GlobalLocalPass(network)  # type: ignore[arg-type]  # called alone it returns local logits only
        pair = (local_image, global_image, local_box)
        try:
            inspect.signature(network.forward).bind(*pair)
        except TypeError:
            output = None
        else:
            output = network(*pair)
        if not isinstance(output, (tuple, list)) or len(output) < 2:
            raise ConfigError(
                f"student {type(self.network).__name__} does not take a pair (local image, global image, box) and "
                "return local and global logits: wrap it in mapseg_components.networks.GlobalLocalPass, or label one "
                "image with pseudo_label(image)"
            )
        return output[:2]

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
