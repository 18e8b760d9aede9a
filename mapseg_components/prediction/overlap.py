# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Three stages for each of several items: while one item is worked on, the next is read and the one before written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

__all__ = ["in_stages"]

Item = TypeVar("Item")


def in_stages(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    work: Callable[[Item, Any], Any],
    write: Callable[[Item, Any], None],
    overlap: bool = True,
) -> None:
    """Read, work on and write each item, in their order.

    With overlap there are at most three items at a time: one that was read or is being read, one in work, one being
    written; ``work`` stays in the thread of the caller, the other two have one of their own. MONAI's ``ThreadBuffer``
    is no choice here: what its source raises ends the iteration, and the items that are left are lost.

    Args:
        items: what to do.
        read: gives ``work`` its second argument.
        work: gives ``write`` its second argument.
        write: the last stage.
        overlap: ``False``: one item after the other, in the thread of the caller.

    Raises:
        BaseException: what a stage raises. Nothing new is started then, and what is being read or written is waited
            for: an item is written as a whole, or not at all.
    """
    if not overlap:
        for item in items:
            write(item, work(item, read(item)))
        return
    following: Future[Any] | None = None
    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        try:
            for number, item in enumerate(items):
                value = (following or reader.submit(read, item)).result()
                following = reader.submit(read, items[number + 1]) if number + 1 < len(items) else None
                value = work(item, value)
                if written is not None:
                    written.result()
                written = writer.submit(write, item, value)
                del value  # the writer's alone: these are gigabytes
            if written is not None:
                written.result()
        finally:
            finish([each for each in (following, written) if each is not None])


def finish(futures: Sequence[Future[Any]]) -> None:
    """Wait for what was submitted, however often Ctrl-C or SIGTERM asks to end; the last of them is raised then."""
    stopped: BaseException | None = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            stopped = error
    if stopped is not None:
        raise stopped
