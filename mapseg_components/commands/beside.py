# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The stages of one run of ``mapseg adapt`` in a process of its own, while this one does something else."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mapseg_components.errors import MAPSegError, ResourceError
from mapseg_components.session import stoppable, working

if TYPE_CHECKING:
    from mapseg_components.commands.adapt import Adaptation

__all__ = ["main", "training_beside"]

COMMAND = "from mapseg_components.commands.beside import main; main()"


@contextlib.contextmanager
def training_beside(run: Adaptation) -> Iterator[Callable[[], None]]:
    """Context in which the stages of a run are trained by another process; yields a function that waits for their end.

    Where the context is left before, by an error or a signal, the other process is stopped as SIGTERM stops the command
    line: its state is saved. A signal of the terminal reaches it by this process alone, and it does not outlive it.

    Args:
        run: not begun, or to go on; it has its record after the wait.

    Raises:
        MAPSegError: by the function: of a stage; `ResourceError` if the process was killed.
        OSError: by the function: a file cannot be read or written.
    """
    command = [sys.executable, "-c", COMMAND]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with (
        stoppable(),
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        ) as process,
    ):
        given, answer = process.stdin, process.stdout
        assert given is not None and answer is not None
        pickle.dump(run, given)
        given.flush()  # and left open: where it is closed, here or by the end of this process, the other stops

        def wait() -> None:
            sent = answer.read()
            code = process.wait()
            if code == -signal.SIGKILL:
                raise ResourceError(f"the training in {run.folder} was killed, by the system if memory ran out")
            error = pickle.loads(sent) if sent else MAPSegError(f"the training in {run.folder} ended with code {code}")
            if error is not None:
                raise error
            run.record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))

        yield wait


def main() -> None:
    """What the other process does: it reads the run, and writes the error of a stage, or ``None``."""
    answer, sys.stdout = sys.stdout.buffer, sys.stderr
    run = pickle.load(sys.stdin.buffer)
    threading.Thread(target=stop_when_left, daemon=True).start()
    run.quiet = True
    error: Any = None
    with stoppable(), working(run.request["num_threads"], quiet=True):
        try:
            run.train()
        except (MAPSegError, OSError, MemoryError) as raised:
            error = raised
    answer.write(pickle.dumps(error))
    answer.flush()


def stop_when_left() -> None:
    """Let SIGTERM reach this process when the one that started it waits no longer, or is gone."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
