# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The stages of one run of ``mapseg adapt`` in a process of its own, while this one does something else."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mapseg_components.errors import MAPSegError
from mapseg_components.session import stoppable, working

if TYPE_CHECKING:
    from mapseg_components.commands.adapt import Adaptation

__all__ = ["training_beside"]


@contextlib.contextmanager
def training_beside(run: Adaptation) -> Iterator[Callable[[], None]]:
    """Context in which the stages of a run are trained by another process; yields a function that waits for their end.

    Where the context is left before, by an error or a signal, the other process is stopped as SIGTERM stops the command
    line: its state is saved. A signal of the terminal reaches it by this process alone, and it does not outlive it.

    Args:
        run: not begun, or to go on; it has its record after the wait.

    Raises:
        MAPSegError: by the function: of a stage, or the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=train, args=(run, sender))
    process.start()
    sender.close()

    def wait() -> None:
        try:
            error = receiver.recv()
        except EOFError:
            process.join()
            error = MAPSegError(f"the training in {run.folder} ended with exit code {process.exitcode}")
        if error is not None:
            raise error
        process.join()
        run.record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))

    try:
        yield wait
    finally:
        process.terminate()
        process.join()
        receiver.close()


def train(run: Adaptation, sender: multiprocessing.connection.Connection) -> None:
    """What the other process does; it sends the error of a stage, or ``None``."""
    if hasattr(os, "setsid"):
        os.setsid()
    end_with_parent()
    error: Any = None
    with stoppable(), working(run.request["num_threads"], quiet=True):
        try:
            run.train()
        except MAPSegError as raised:
            error = raised
        sender.send(error)


def end_with_parent() -> None:
    """Let SIGTERM reach this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
