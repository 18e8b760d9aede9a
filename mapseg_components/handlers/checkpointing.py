# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Load weights at the start; save the state of training, resume it, and stop cleanly on a signal."""

from __future__ import annotations

import json
import logging
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite
import ignite.distributed as idist
import monai
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mapseg_components.checkpoints import (
    fingerprint,
    load_weights,
    random_state,
    read_checked,
    restore_random_state,
    weights_of,
    write_atomic,
)
from mapseg_components.configs import require_same_settings, running_settings
from mapseg_components.errors import CheckpointError
from mapseg_components.files import set_aside
from mapseg_components.handlers.signals import EndRequest

__all__ = ["TrainingCheckpoint", "WeightsLoader"]

logger = logging.getLogger(__name__)

FORMAT = 1
FILES_OF_A_RUN = ("last.pt", "previous.pt", "model.pt", "source_only.pt", "model_selection.json")
LENGTHS = ("total_steps", "total_iters", "T_0", "T_max", "milestones")  # of a schedule, by PyTorch's names
START_ANEW = "choose another ckpt_dir, or set resume to false to start anew"


class WeightsLoader:
    """Load weights into a network when the engine starts, and log how many of its tensors were loaded.

    It loads every tensor below the prefix or raises; tensors that do not match are never skipped. When training
    resumes, the resumed state replaces all weights: then nothing is loaded, and the file need not exist any more.

    Args:
        load_path: a state_dict file; ``None`` loads nothing, which is logged.
        network: receives the weights.
        prefix: load only names that begin with it, e.g. ``"encoder."`` to take the encoder of a pretrained
            ``MultiScaleMAE``; empty loads the whole network.
        resume_path: the file that training resumes from, if it exists; ``None`` if it does not resume.

    Raises:
        CheckpointError: when the engine starts, if the file is missing, damaged or of another network.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import WeightsLoader
        >>> network, engine = torch.nn.Linear(1, 1), Engine(lambda engine, batch: None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.tensor([[7.0]]), "bias": torch.zeros(1)}, f"{folder}/model.pt")
        ...     WeightsLoader(f"{folder}/model.pt", network).attach(engine)
        ...     state = engine.run([0])
        >>> network.weight.item()
        7.0
    """

    def __init__(
        self, load_path: str | None, network: nn.Module, prefix: str = "", resume_path: str | None = None
    ) -> None:
        self.load_path = load_path
        self.network = network
        self.prefix = prefix
        self.resume_path = resume_path

    def attach(self, engine: Engine) -> None:
        """Load at ``Events.STARTED``."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.resume_path is not None and Path(self.resume_path).is_file():
            return
        what = f"{self.prefix.rstrip('.') or 'network'}"
        if self.load_path is None:
            logger.info(f"No weights file is configured: the {what} starts from random weights.")
            return
        count = load_weights(self.network, self.load_path, self.prefix)
        logger.info(f"Loaded the {what} from {self.load_path}: {count} of {count} tensors (100 % coverage).")


class TrainingCheckpoint:
    """Save the complete state of training, resume from it, and stop cleanly on Ctrl-C and SIGTERM.

    The state is written after each epoch, every ``save_steps`` optimizer steps, and on a signal: the current iteration
    is finished, the state written, and the process exits with code 130 (Ctrl-C) or 143 (SIGTERM); a validation that
    runs is finished first. A second signal, two seconds later or more and not while the state is being written, ends
    the process at once.

    The file is replaced as a whole and read back; the one before it is kept as ``previous.pt`` in the same folder. Only
    the first process of a distributed run writes. Attach it after the handlers that load initial weights and before
    those that act on epochs, so that the resumed state takes precedence.

    A resumed run equals an uninterrupted one bit for bit on a CPU, at the end of an epoch and in the middle of one, if
    its data loader is in ``save_dict`` and can continue there (`mapseg_components.data.EpochLoader`).

    Args:
        path: the resume file.
        save_dict: named objects with ``state_dict`` and ``load_state_dict``: network, optimizer, scheduler, teacher,
            score, history, loader. Their states must hold tensors and plain values only.
        resume: continue from ``path`` if it exists; otherwise training starts anew, and what an earlier run left in the
            folder is renamed to ``<name>.earlier``.
        weights_path: where to write the network's weights alone after each epoch; ``None`` for nowhere.
        weights: the network for ``weights_path`` and for the fingerprint.
        save_steps: also save every so many optimizer steps; ``None`` for the ends of epochs only.

    Raises:
        CheckpointError: on resume, if the file is damaged (the message names the previous one), belongs to another
            network (both fingerprints and the first tensors), or does not hold exactly the named objects.
        ConfigError: on resume, if settings have changed that make it another training.
        ResourceError: the file cannot be written; the old one is untouched.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import TrainingCheckpoint
        >>> def train(path, max_epochs):
        ...     epochs, network = [], torch.nn.Linear(1, 1)
        ...     engine = Engine(lambda engine, batch: epochs.append(engine.state.epoch))
        ...     TrainingCheckpoint(path, {"network": network}).attach(engine)
        ...     engine.run([0], max_epochs=max_epochs)
        ...     return epochs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train(f"{folder}/last.pt", max_epochs=2), train(f"{folder}/last.pt", max_epochs=3)
        ([1, 2], [3])
    """

    def __init__(
        self,
        path: str,
        save_dict: Mapping[str, Any],
        resume: bool = True,
        weights_path: str | None = None,
        weights: nn.Module | None = None,
        save_steps: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name("previous.pt")
        self.save_dict = dict(save_dict)
        self.resume = resume
        self.weights_path = weights_path
        self.weights = weights
        self.save_steps = save_steps
        self.network = self.save_dict.get("network", weights)
        self._engine: Engine | None = None
        self._settings: dict[str, Any] = {}
        self._end = EndRequest()
        self._steps = 0

    def attach(self, engine: Engine) -> None:
        """Load when training starts, save from then on."""
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.STARTED, self._start)
        self._end.end_with(engine)

    def _start(self, engine: Engine) -> None:
        # handlers run in the order of their attachment: attached when training starts, these run last
        if not engine.has_event_handler(self._end_of_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_of_epoch)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_of_iteration)
        self._engine = engine
        self._end.install()

    def _end_of_iteration(self, engine: Engine) -> None:
        optimization = getattr(engine, "optimization", None)
        within_step = optimization is not None and optimization.pending
        if within_step or engine.state.iteration % engine.state.epoch_length == 0:
            return  # gradients that are not applied yet cannot be resumed; the end of an epoch saves anyway
        self._steps += 1
        number = self._end.number
        if number is not None or (self.save_steps is not None and self._steps % self.save_steps == 0):
            self._save(engine, epoch=engine.state.epoch - 1)
        self._exit(number, engine)

    def _end_of_epoch(self, engine: Engine) -> None:
        if self.weights_path is not None and self.weights is not None and idist.get_rank() == 0:
            # before the state: a run that was stopped in between writes them again
            write_atomic(weights_of(self.weights), self.weights_path)
        self._save(engine, epoch=engine.state.epoch)
        self._exit(self._end.number, engine)

    def _exit(self, number: int | None, engine: Engine) -> None:
        if number is None:
            return
        idist.barrier()  # the end of one process makes torchrun end the others: not before the state is written
        if idist.get_rank() == 0:
            logger.warning(
                f"{signal.Signals(number).name}: saved {self.path} at iteration {engine.state.iteration}; "
                "the same command goes on from there."
            )
        raise SystemExit(128 + number)

    def _save(self, engine: Engine, epoch: int) -> None:
        own: dict[str, Any] = {"random": random_state()}
        own |= {name: thing.state_dict() for name, thing in self.save_dict.items() if differs_by_process(thing)}
        processes = [own]
        if idist.get_world_size() > 1:
            processes = [{} for _ in range(idist.get_world_size())]
            dist.all_gather_object(processes, own)
        if idist.get_rank() != 0:
            return
        state = {name: thing.state_dict() for name, thing in self.save_dict.items()}
        if hasattr(engine, "optimization"):
            state["scaler"] = engine.optimization.scaler.state_dict()
        state["run"] = {
            "format": FORMAT,
            "fingerprint": fingerprint(self.network) if self.network is not None else "",
            "settings": json.dumps(self._settings),
            "versions": {"torch": str(torch.__version__), "monai": monai.__version__, "ignite": ignite.__version__},
            "epoch": epoch,
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "processes": processes,
        }
        with self._end.protected():
            write_atomic(state, self.path, keep_previous=self.previous)

    def _load(self, engine: Engine) -> None:
        if self._engine is engine:
            return  # run again in this process, as a client does in each round: the state in memory is the newest
        self._settings = running_settings()  # they stay the same from here on
        path = self._file_to_resume()
        if path is None:
            return
        state = self._read(path)
        self._require_this_run(path, state, engine)
        run, processes = state["run"], state["run"]["processes"]
        own = processes[idist.get_rank()] if idist.get_rank() < len(processes) else {}
        if hasattr(engine, "optimization"):
            engine.optimization.scaler.load_state_dict(state["scaler"])
        # schedules last, after the optimizers whose rates they set
        for name, thing in sorted(self.save_dict.items(), key=lambda part: isinstance(part[1], LRScheduler)):
            restore = put_back_schedule if isinstance(thing, LRScheduler) else put_back
            restore(thing, own.get(name, state[name]), f"{path}: its {name!r}")
        engine.state.epoch, engine.state.iteration = run["epoch"], run["iteration"]
        if own:
            restore_random_state(own["random"])
        if len(processes) != idist.get_world_size():
            logger.warning(
                f"{path} was written by {len(processes)} processes, now there are {idist.get_world_size()}: "
                "training goes on, but with other draws."
            )
        logger.info(f"Resumed from {path} after iteration {run['iteration']} (epoch {run['epoch']} is complete).")

    def _file_to_resume(self) -> Path | None:
        if not self.resume:
            self._set_aside()
            return None
        if not self.path.is_file() and self.previous.is_file():
            logger.warning(f"There is no {self.path}: going on from {self.previous}, the save before it.")
            return self.previous
        return self.path if self.path.is_file() else None

    def _set_aside(self) -> None:
        """Rename what an earlier run left, so that none of it is taken for this run's."""
        if idist.get_rank() != 0:
            return
        found = set_aside(self.path.with_name(name) for name in FILES_OF_A_RUN)
        if found:
            logger.warning(
                f"resume is false: renamed {[path.name for path in found]} of {self.path.parent} to *.earlier."
            )

    def _read(self, path: Path) -> Any:
        try:
            return read_checked(path)
        except CheckpointError as error:
            if path == self.path and self.previous.is_file():
                raise CheckpointError(
                    f"{error}; the save before it is {self.previous}: move {path.name} away to go on from there"
                ) from error
            raise

    def _require_this_run(self, path: Path, state: Any, engine: Engine) -> None:
        """Refuse the state of another run: other parts, network, settings or length of an epoch."""
        expected = {*self.save_dict, "run", *(["scaler"] if hasattr(engine, "optimization") else [])}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"{path} is no resume file of this run (found {found}, expected {sorted(expected)}): {START_ANEW}"
            )
        run = state["run"]
        if run["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {run['format']}, this version reads {FORMAT}: "
                f"finish the run with the version that started it, or {START_ANEW}"
            )
        if self.network is not None and run["fingerprint"] != fingerprint(self.network):
            raise CheckpointError(
                f"{path} is of another network: fingerprint {run['fingerprint']}, expected "
                f"{fingerprint(self.network)} ({differing_shapes(state.get('network', {}), self.network)}): "
                f"use the network settings it was trained with, or {START_ANEW}"
            )
        require_same_settings(json.loads(run["settings"]), self._settings, path)
        if run["epoch_length"] != engine.state.epoch_length:
            raise CheckpointError(
                f"{path} was written with {run['epoch_length']} iterations an epoch, this run has "
                f"{engine.state.epoch_length}: keep epoch_length, or {START_ANEW}"
            )


def put_back(thing: Any, state: Any, name: str) -> None:
    """Load the state of one part. Raises `CheckpointError` if it does not fit; ``name`` is for the message."""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name} does not fit this run ({reason}): keep the settings it was trained with, or {START_ANEW}"
        ) from error


def put_back_schedule(schedule: LRScheduler, state: Mapping[str, Any], name: str) -> None:
    """Load the state of a schedule whose optimizer is loaded. Where it is to end in another epoch than the run that is
    resumed, which ``max_epochs`` may say, its rates are those that it has in the epoch reached.

    Raises `CheckpointError` if it does not fit; ``name`` is for the message.
    """
    lengths = [key for key in LENGTHS if key in schedule.state_dict()]
    if all(schedule.state_dict()[key] == state.get(key) for key in lengths):
        put_back(schedule, state, name)
        return
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr()):
        group["lr"] = rate
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps of the schedule without one of the optimizer
            for _ in range(state["last_epoch"]):
                schedule.step()
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{name} does not fit this run ({error}): raise max_epochs, or {START_ANEW}") from error


def differing_shapes(state: Mapping[str, torch.Tensor], network: nn.Module) -> str:
    """The first tensors of a state whose name or shape is not that of a network."""
    expected = network.state_dict()
    names = [*expected, *(name for name in state if name not in expected)]
    shapes = {n: [str(tuple(w[n].shape)) if n in w else "absent" for w in (state, expected)] for n in names}
    differing = [f"{n} {found}, expected {wanted}" for n, (found, wanted) in shapes.items() if found != wanted]
    return "; ".join(differing[:5]) + (" ..." if len(differing) > 5 else "")


def differs_by_process(thing: Any) -> bool:
    """Whether each process of a distributed run has a separate state."""
    return getattr(thing, "differs_by_process", False)
