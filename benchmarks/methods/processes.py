# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Commands as a user types them, each on a processor core of its own, with what they used."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trees import tree_seconds
from mapseg_components.files import readable

__all__ = ["StoppedError", "Usage", "last_line", "run_mapseg"]

FAULT = "mapseg: this is a bug"  # the line before says which
POLL_SECONDS = 0.25
USED_SECONDS = 5.0  # between two looks at what was used
GRACE_SECONDS = 120.0  # a stage saves its state within


class StoppedError(Exception):
    """The benchmark was asked to end while a command ran."""


@dataclass(frozen=True)
class Usage:
    """What a command used.

    Args:
        code: exit code; negative for a signal.
        processor_seconds: user and system time of all its processes.
        peak_bytes: resident memory of its largest process.
        over: whether it was ended because it had used what it was allowed.
    """

    code: int
    processor_seconds: float
    peak_bytes: int
    over: bool = False


def run_mapseg(
    words: Sequence[str],
    log: Path,
    core: int | None = None,
    limit: float | None = None,
    stop: threading.Event | None = None,
    on_used: Callable[[float], None] | None = None,
) -> Usage:
    """Run ``mapseg`` with one thread; what it prints is added to a log.

    Args:
        words: its arguments.
        log: file.
        core: number of the processor core that all its processes stay on.
        limit: processor seconds after which it gets SIGTERM.
        stop: gets it SIGTERM when set.
        on_used: called now and then with the processor seconds so far.

    Raises:
        StoppedError: ``stop`` was set; the command has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mapseg_components.commands", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C comes once, through here
        )
        if core is not None:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {core})
        asked_at, over, looked_at = None, False, time.monotonic()
        while True:
            found, status, used = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            if time.monotonic() - looked_at > USED_SECONDS:
                looked_at, spent = time.monotonic(), tree_seconds(process.pid)
                if on_used is not None:
                    on_used(spent)
                over = over or (limit is not None and spent > limit)
            if asked_at is None and (over or (stop is not None and stop.is_set())):
                asked_at = time.monotonic()
                process.send_signal(signal.SIGTERM)
            elif asked_at is not None and time.monotonic() - asked_at > GRACE_SECONDS:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    spent = used.ru_utime + used.ru_stime
    if on_used is not None:
        on_used(spent)
    if asked_at is not None and not over and code:
        raise StoppedError
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(code, spent, used.ru_maxrss * unit, over and code != 0)


def last_line(log: Path, code: int, folder: Path) -> str:
    """The last line of a log, by which a command says why it failed; paths below the benchmark's folder are short."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    before = lines[-2:-1] if lines and lines[-1].startswith(FAULT) else []
    said = readable("; ".join([*before, *lines[-1:]])).replace(f"{folder}/", "")[:400] or "it printed nothing"
    return f"{said} (exit code {code}; {log.relative_to(folder)})"
