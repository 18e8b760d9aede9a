# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a process and all those below it use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil

__all__ = ["tree_bytes", "tree_seconds"]


def tree_seconds(process: int) -> float:
    """Processor seconds of a process, of those below it, and where the system counts them of those waited for."""
    seconds = 0.0
    for one in tree(process):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            times = one.cpu_times()
            waited = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            seconds += times.user + times.system + waited
    return seconds


def tree_bytes(process: int) -> int:
    """Resident bytes of a process and those below it; pages that they share are counted once for each."""
    total = 0
    for one in tree(process):
        with contextlib.suppress(psutil.Error):
            total += one.memory_info().rss
    return total


def tree(process: int) -> Iterator[psutil.Process]:
    """A process and those below it; none where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process)
        yield root
        yield from root.children(recursive=True)
