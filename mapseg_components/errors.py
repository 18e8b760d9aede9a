# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause. Each message says what, which file or key, found versus expected, and the remedy.

``str(error)`` is one line; ``exit_code`` is what a command line should end with (``monai.bundle run`` gives 1 for all).
"""

from __future__ import annotations

from typing import Any


class MAPSegError(Exception):
    """Base of all errors below."""

    exit_code = 1
    # the same as records, where checks of the data made it: `mapseg_components.data.Finding`
    findings: tuple[Any, ...] = ()


class ConfigError(MAPSegError, ValueError):
    """A setting is unknown, missing or inconsistent with another one."""

    exit_code = 2


class DataError(MAPSegError, ValueError):
    """A scan, label map or datalist cannot be used as it is."""

    exit_code = 3


class CheckpointError(MAPSegError, RuntimeError):
    """A weights or checkpoint file is missing, unreadable or belongs to another network."""

    exit_code = 4


class NonFiniteError(MAPSegError, ArithmeticError):
    """A loss, score or network output became NaN or infinite."""

    exit_code = 5


class ResourceError(MAPSegError, OSError):
    """Memory or disk is exhausted, a folder cannot be written, or another run is using it."""

    exit_code = 6


class FederationError(MAPSegError, RuntimeError):
    """A site's update, or what a server sent, was refused; or a round had too few sites. The message names the site."""

    exit_code = 7


def user_error(error: BaseException | None) -> MAPSegError | None:
    """The error of this package that another one came from, if any."""
    while error is not None and not isinstance(error, MAPSegError):
        error = error.__cause__ or error.__context__
    return error
