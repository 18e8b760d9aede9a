# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Running out of memory, said with the knobs that help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mapseg_components.errors import ResourceError

__all__ = ["naming_memory_errors"]

MESSAGES_OF_TORCH = ("can't allocate memory", "out of memory", "not enough memory")


@contextlib.contextmanager
def naming_memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Context in which exhausted memory, of the machine or of the GPU, becomes a `ResourceError`.

    Args:
        what: was being done, with its sizes. remedy: the settings to lower.
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
    """One line; the cause keeps what torch says."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ResourceError(f"out of memory in {what} ({reason[:200]}): lower {remedy}")
