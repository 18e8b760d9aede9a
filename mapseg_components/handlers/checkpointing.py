# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Load weights at the start; save and resume the state of training at epoch boundaries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from mapseg_components.checkpoints import load_weights, random_state, read_checked, restore_random_state, write_atomic
from mapseg_components.errors import CheckpointError

__all__ = ["TrainingCheckpoint", "WeightsLoader"]

logger = logging.getLogger(__name__)


class WeightsLoader:
    """Load weights into a network when the engine starts, and say how many of its tensors were covered.

    Unlike a loader that skips what does not match, it covers everything below the prefix or raises.

    Args:
        load_path: a state_dict file; ``None`` loads nothing and says so.
        network: receives the weights.
        prefix: load only names that begin with it, e.g. ``"encoder."`` to take the encoder of a pretrained
            ``MultiScaleMAE``; empty loads the whole network.

    Raises:
        CheckpointError: when the engine starts, if the file is missing, damaged or of another network.
    """

    def __init__(self, load_path: str | None, network: nn.Module, prefix: str = "") -> None:
        self.load_path = load_path
        self.network = network
        self.prefix = prefix

    def attach(self, engine: Engine) -> None:
        """Load at ``Events.STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        what = f"{self.prefix.rstrip('.') or 'network'}"
        if self.load_path is None:
            logger.info(f"No weights file is configured: the {what} starts from random weights.")
            return
        count = load_weights(self.network, self.load_path, self.prefix)
        logger.info(f"Loaded the {what} from {self.load_path}: {count} of {count} tensors (100 % coverage).")


class TrainingCheckpoint:
    """Save everything that training needs after each epoch, and continue from there.

    Attach it after the handlers that load initial weights and before those that act on epochs, so that a resumed
    state wins. The file is replaced atomically; only the first process of a distributed run writes.

    Args:
        path: the resume file.
        save_dict: named objects with ``state_dict`` and ``load_state_dict``: network, optimizer, scheduler, teacher,
            score. Their states must hold tensors and plain values only.
        resume: continue from ``path`` if it exists; otherwise training starts anew and the file is overwritten.
        weights_path: where to write the network's weights alone after each epoch; ``None`` for nowhere.
        weights: the network for ``weights_path``.

    Raises:
        CheckpointError: on resume, if the file does not hold exactly the named objects or belongs to another network.
    """

    def __init__(
        self,
        path: str,
        save_dict: Mapping[str, Any],
        resume: bool = True,
        weights_path: str | None = None,
        weights: nn.Module | None = None,
    ) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)
        self.resume = resume
        self.weights_path = weights_path
        self.weights = weights

    def attach(self, engine: Engine) -> None:
        """Load at ``Events.STARTED``, save at ``Events.EPOCH_COMPLETED`` (after all other handlers of the epoch)."""
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.STARTED, self._attach_save)

    def _attach_save(self, engine: Engine) -> None:
        # handlers run in the order of their attachment: attached when training starts, this one runs last
        if not engine.has_event_handler(self._save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _load(self, engine: Engine) -> None:
        if not self.resume or not self.path.is_file():
            return
        state = read_checked(self.path)
        expected = {*self.save_dict, "epoch", "epoch_length", "random_state"}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"{self.path} is no resume file of this run (found {found}, expected {sorted(expected)}): "
                "move it away, or set resume to false to start anew"
            )
        if state["epoch_length"] != engine.state.epoch_length:
            raise CheckpointError(
                f"{self.path} was written with {state['epoch_length']} iterations an epoch, this run has "
                f"{engine.state.epoch_length}: keep epoch_length, or set resume to false to start anew"
            )
        for name, thing in self.save_dict.items():
            try:
                thing.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(
                    f"{self.path}: its {name!r} does not fit this run ({reason}): "
                    "keep the settings it was trained with, or set resume to false to start anew"
                ) from error
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * state["epoch_length"]
        restore_random_state(state["random_state"])
        logger.info(f"Resumed from {self.path} after epoch {state['epoch']} of {engine.state.max_epochs}.")

    def _save(self, engine: Engine) -> None:
        if idist.get_rank() != 0:
            return
        state = {name: thing.state_dict() for name, thing in self.save_dict.items()}
        state.update(epoch=engine.state.epoch, epoch_length=engine.state.epoch_length, random_state=random_state())
        write_atomic(state, self.path)
        if self.weights_path is not None and self.weights is not None:
            write_atomic(self.weights.state_dict(), self.weights_path)
