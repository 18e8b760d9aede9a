# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory that is kept for the next tensor, and running out of it, said with the knobs that help."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from mapseg_components.errors import ResourceError

__all__ = ["keep_freed_memory", "memory_of", "naming_memory_errors", "require_memory"]

MESSAGES_OF_TORCH = ("can't allocate memory", "out of memory", "not enough memory")
# parameters of glibc's mallopt (malloc.h), and the values to which its own adaptation leads with large tensors
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
RETURNED = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
_keeps = False

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_of(device: torch.device | str) -> int | None:
    """Bytes that a device could give this process: what is free on a GPU, else all physical memory (of a container,
    its limit); ``None`` where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        found = min(found, int(CGROUP_LIMIT.read_text()))
    return found


def require_memory(needed: int, device: torch.device | str, what: str, remedy: str) -> None:
    """Refuse what cannot fit, before it is allocated.

    Args:
        needed: bytes that are needed.
        device: where they are needed.
        what: what needs them, with its name and sizes.
        remedy: what the user can do about it.

    Raises:
        ResourceError: the device has less.
    """
    available = memory_of(device)
    if available is not None and needed > available:
        found = f"{needed / 2**30:.1f} GiB on {device}, which has {available / 2**30:.1f} GiB"
        raise ResourceError(f"{what} needs {found}: {remedy}")


def keep_freed_memory(keep: bool = True) -> bool:
    """Let glibc keep what tensors on the CPU free, instead of returning each large block to the system.

    PyTorch frees its activations after each step and allocates them again in the next. glibc returns large blocks to the
    system, which clears every page before it hands it out again: up to a third of a step's time on a CPU. Results stay
    the same. The process keeps its peak memory, and about half as much again for gaps between tensors.

    Args:
        keep: ``False``: undo it; without an earlier call nothing changes.

    Returns:
        whether it took effect: not without glibc (mallopt, https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    global _keeps
    if not keep and not _keeps:
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = [libc.mallopt(name, value) for name, value in (KEPT if keep else RETURNED).items()]
        if not keep:
            libc.malloc_trim(0)
    except (AttributeError, OSError):
        return False
    _keeps = keep
    return all(done)


@contextlib.contextmanager
def naming_memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Context in which exhausted memory, of the machine or of the GPU, becomes a `ResourceError`.

    Args:
        what: what was being done, with its sizes.
        remedy: the settings to lower.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise memory_error(what, remedy, error) from error
    except RuntimeError as error:
        if isinstance(error, ResourceError) or not any(message in str(error) for message in MESSAGES_OF_TORCH):
            raise
        raise memory_error(what, remedy, error) from error


def memory_error(what: str, remedy: str, error: BaseException) -> ResourceError:
    """A `ResourceError` of one line; the full text of torch stays in the cause."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ResourceError(f"out of memory in {what} ({reason[:200]}): lower {remedy}")
