# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One stage of a command: a bundle run in a separate process, as a user would type it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components import errors
from mapseg_components.errors import MAPSegError

__all__ = ["run_stage"]

logger = logging.getLogger(__name__)

USER_ERROR = re.compile(r"^(\w+Error): (.+)", re.MULTILINE)


def run_stage(
    title: str,
    bundle: Path,
    configs: Sequence[str],
    output: Path,
    settings: Mapping[str, Any],
    on_epoch: Callable[[int], None] | None = None,
) -> float:
    """Run a bundle's command from its folder; what it prints goes to ``log.txt`` in the output folder.

    Ctrl-C and SIGTERM are passed on; the stage saves its state, and this process ends as it does.

    Args:
        title: for messages.
        bundle: folder.
        configs: files, relative to the folder or absolute, applied left to right.
        output: where the stage writes.
        settings: overrides.
        on_epoch: called now and then with the number of finished epochs.

    Returns:
        seconds.

    Raises:
        MAPSegError: the error of the stage, with its class; the message names the log.
    """
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "monai.bundle", "run", "run", "--config_file", str([str(c) for c in configs])]
    for key, value in {"ckpt_dir": output, "output_dir": output, **settings}.items():
        command += [f"--{key}", str(value)]
    started, log = time.monotonic(), output / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=bundle, stdout=stream, stderr=subprocess.STDOUT)
        with passing_signals_to(process) as received:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=1.0)
                    break
                if on_epoch is not None:
                    on_epoch(finished_epochs(output))
    if received:
        logger.warning(f"{title} was stopped; its state is saved: the same command goes on.")
        raise SystemExit(128 + received[0])
    if code:
        raise error_of(title, log, code)
    if on_epoch is not None:
        on_epoch(finished_epochs(output))
    return time.monotonic() - started


@contextlib.contextmanager
def passing_signals_to(process: subprocess.Popen) -> Iterator[list[int]]:
    """Context in which SIGINT and SIGTERM go to a child process instead; yields the list of those received."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finished_epochs(output: Path) -> int:
    """Number of epochs in the history of a stage."""
    with contextlib.suppress(OSError):
        return (output / "history.jsonl").read_bytes().count(b"\n")
    return 0


@contextlib.contextmanager
def processor_time(record: dict[str, Any], name: str, save: Callable[[], None]) -> Iterator[None]:
    """Context that adds the processor seconds of the processes started in it, and of theirs, to those of a stage in
    ``processor_seconds`` of a record; nothing where the stage fails. Where it is stopped its ``seconds`` are added as
    well, and the record is saved."""
    before = os.times()

    def add() -> float:
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        times = record.setdefault("processor_seconds", {})
        times[name] = round(times.get(name, 0) + used, 1)
        return after.elapsed - before.elapsed

    try:
        yield
    except SystemExit:
        seconds = record.setdefault("seconds", {})
        seconds[name] = round(seconds.get(name, 0) + add(), 1)
        save()
        raise
    add()


def training_samples(config: Mapping[str, Any], epochs: int, patches: int = 1) -> int | None:
    """Patches that a stage trained on, or ``None`` where its config has expressions in place of the numbers.

    Args:
        config: of the stage.
        epochs: that it ran.
        patches: of a sample: two where one is the source's and one the target's, or where a teacher sees it as well.
    """
    sizes = config.get("epoch_length"), config.get("batch_size")
    return patches * epochs * sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None


def error_of(title: str, log: Path, code: int) -> MAPSegError:
    """The error that a stage ended with, read from the end of its log; its message may have several lines."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    found = list(USER_ERROR.finditer(text))
    kind = getattr(errors, found[-1].group(1), None) if found else None
    if isinstance(kind, type) and issubclass(kind, MAPSegError):
        return kind(text[found[-1].start(2) :])
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return errors.ResourceError(
            f"{title} was killed, by the system if memory ran out: use smaller sizes; log: {log}"
        )
    last = text.rpartition("\n")[2][:300] or "it printed nothing"
    return MAPSegError(
        f"{title} ended with exit code {code} ({last}): see {log}; if data and settings are right, this is a bug in "
        "mapseg: please report it"
    )


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``history.jsonl`` in a folder of a stage; empty without one."""
    path = folder / "history.jsonl"
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def threads(number: int | None) -> None:
    """Number of threads of the stages that follow."""
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)
