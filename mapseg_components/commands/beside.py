# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The stages of one run of ``mapseg adapt`` in a process of its own, while this one does something else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mapseg_components import errors
from mapseg_components.errors import MAPSegError, ResourceError
from mapseg_components.session import stoppable, working

if TYPE_CHECKING:
    from mapseg_components.commands.adapt import Adaptation

__all__ = ["train_beside", "training_beside"]


@contextlib.contextmanager
def training_beside(run: Adaptation, code: str, given: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Context in which the stages of a run are trained by another process; yields a function that waits for their end.

    Where the context is left before, by an error or a signal, the other process is stopped as SIGTERM stops the command
    line: its state is saved. A signal of the terminal reaches it by this process alone, and it does not outlive it.

    Args:
        run: not begun, or to go on; it has its record after the wait.
        code: Python that calls `train_beside` in the other process.
        given: what makes the same run there, JSON.

    Raises:
        MAPSegError: by the function: of a stage; `ResourceError` if the process was killed, or of memory and files.
    """
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with (
        stoppable(),
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        ) as process,
    ):
        asked, answer = process.stdin, process.stdout
        assert asked is not None and answer is not None
        asked.write(json.dumps(given).encode() + b"\n")
        asked.flush()  # and left open: where it is closed, here or by the end of this process, the other stops

        def wait() -> None:
            sent = answer.read()
            ended = process.wait()
            if ended == -signal.SIGKILL:
                raise ResourceError(f"the training in {run.folder} was killed, by the system if memory ran out")
            if not sent:
                raise MAPSegError(f"the training in {run.folder} ended with exit code {ended}")
            found = json.loads(sent)
            if found:
                raise getattr(errors, found["error"], MAPSegError)(found["message"])
            run.record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))

        yield wait


def train_beside(make: Callable[[dict[str, Any]], Adaptation]) -> None:
    """What the other process does: it makes the run that it is asked for, trains it, and writes the error if any.

    Args:
        make: from what `training_beside` was given to the run.
    """
    answer, sys.stdout = sys.stdout, sys.stderr
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=stop_when_left, daemon=True).start()
    error: dict[str, str] = {}
    with stoppable():
        try:
            run = make(given)
            run.quiet = True
            with working(run.request["num_threads"], quiet=True):
                run.train()
        except MAPSegError as raised:
            error = {"error": type(raised).__name__, "message": str(raised)}
        except (OSError, MemoryError) as raised:
            error = {"error": ResourceError.__name__, "message": str(raised) or "memory ran out"}
    answer.write(json.dumps(error))
    answer.flush()


def stop_when_left() -> None:
    """Let SIGTERM reach this process when the one that started it waits no longer, or is gone."""
    while os.read(sys.stdin.fileno(), 1):  # not by sys.stdin, whose lock would be held at the end of the interpreter
        pass
    os.kill(os.getpid(), signal.SIGTERM)
