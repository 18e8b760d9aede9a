# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What all commands share: device, threads, how much is said, progress bars, the parts of a result."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mapseg_components import __version__
from mapseg_components.errors import ConfigError

__all__ = ["choose_device", "exit_code_of", "listed", "progress", "stoppable", "versions", "working"]

PACKAGES = ("monai", "torch", "pytorch-ignite", "itk", "nibabel", "numpy")
ENGINES = ("ignite", "monai")  # their loggers report each error that this package reports itself


@contextlib.contextmanager
def working(num_threads: int | None = None, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Context of a command: number of threads and level of logging, put back at its end.

    Args:
        num_threads: of PyTorch on the CPU; ``None`` leaves it as it is.
        quiet: errors only.
        verbose: everything.

    Raises:
        ConfigError: ``num_threads`` is no number from 1.
    """
    if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
        raise ConfigError(f"num_threads is {num_threads!r}, expected a whole number from 1")
    ours = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    levels = {"mapseg_components": ours} | dict.fromkeys(ENGINES, logging.DEBUG if verbose else logging.CRITICAL)
    before = {name: logging.getLogger(name).level for name in levels}
    threads = torch.get_num_threads()
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        yield
    finally:
        torch.set_num_threads(threads)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Context in which SIGTERM ends the process as Ctrl-C does, by an exception (exit code 143): what is to be done at
    the end is done. Without effect in a thread, and where somebody else handles the signal."""
    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and before is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def choose_device(name: str = "auto") -> torch.device:
    """Device of a name: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        ConfigError: the name is another, or there is no such GPU.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(name)):
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:<number>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = int(str(name).partition(":")[2] or 0)
    if number >= count:
        raise ConfigError(f"device is {name!r}, but PyTorch sees {count} CUDA devices: choose auto or cpu")
    return torch.device("cuda", number)


def progress(items: Any, what: str, quiet: bool = False, total: int | None = None) -> Any:
    """Progress bar on standard error; none where that is no terminal, or if quiet."""
    return tqdm(items, desc=what, total=total, disable=True if quiet else None, leave=False)


def listed(value: Any) -> list[str]:
    """Several names: a list, or text with commas between them; nothing for ``None``."""
    if value is None:
        return []
    if isinstance(value, (str, Path)):
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return [str(part) for part in value]


def exit_code_of(kinds: Sequence[type[BaseException]]) -> int:
    """Exit code for failures of several kinds: that of their kind if they share one, else 3; 0 without any."""
    codes = {getattr(kind, "exit_code", 3) for kind in kinds}
    return 0 if not codes else codes.pop() if len(codes) == 1 else 3


def versions() -> dict[str, str | None]:
    """This package, Python and the libraries that decide what comes out; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {"mapseg": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
