# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM as a request to end a run, which the run answers when its state can be saved."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine

__all__ = ["EndRequest"]

REPEATED_S = 2.0  # schedulers and torchrun send a signal several times; a person who insists waits


class EndRequest:
    """Notes the first SIGINT or SIGTERM instead of ending the process.

    Another one, two seconds later or more and not within `protected`, has its usual effect.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._noted_at = 0.0
        self._protected = False
        self._before: dict[int, Any] = {}

    def end_with(self, engine: Engine) -> None:
        """Restore the usual effect of the signals whenever the engine's ``run`` ends, also by an error.

        The method of this engine is wrapped: Ignite's ``EXCEPTION_RAISED`` does not reach a handler if one before it
        raises, as MONAI's ``StatsHandler`` does.
        """
        run = engine.run

        @functools.wraps(run)
        def restoring(*arguments: Any, **options: Any) -> Any:
            try:
                return run(*arguments, **options)
            finally:
                self.restore()

        engine.run = restoring  # type: ignore[method-assign]

    def install(self) -> None:
        """Note signals from now on. Without effect in a thread, where Python allows no signal handlers."""
        self.restore()
        self._number = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals their usual effect again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def number(self) -> int | None:
        """The signal that some process of the run has received, if any; all processes must ask, and agree on it."""
        number = self._number or 0
        if idist.get_world_size() > 1:
            number = int(idist.all_reduce(number, op="MAX"))
        return number or None

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Context in which no signal ends the process."""
        self._protected = True
        try:
            yield
        finally:
            self._protected = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > REPEATED_S and not self._protected:
            self.restore()
            signal.raise_signal(number)
