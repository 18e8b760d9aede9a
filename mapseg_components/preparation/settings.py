# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What decides the voxels of a prepared scan, checked before any scan is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mapseg_components.errors import ConfigError
from mapseg_components.transforms.n4 import MASKS
from mapseg_components.transforms.orientation import check_axcodes

__all__ = ["Settings", "checked_settings"]

CT_POLICIES = ("keep", "hu")


@dataclass(frozen=True)
class Settings:
    """What decides the voxels of a result; the arguments of `prepare` of the same names."""

    spacing: tuple[float | None, ...] | None
    bias_correction: bool | None
    bias_mask: str
    bias_shrink: int
    bias_iterations: tuple[int, ...]
    bias_convergence: float
    ct: str | None
    assume_orientation: str | None

    def as_json(self) -> dict[str, Any]:
        """As it stands in a sidecar."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def checked_settings(
    spacing: float | Sequence[float | None] | None,
    bias_correction: bool | None,
    ct: str | None,
    assume_orientation: str | None,
    bias_mask: str,
    bias_shrink: int,
    bias_iterations: str | Sequence[int],
    bias_convergence: float,
) -> Settings:
    """Settings that make sense. Raises `ConfigError`."""
    if bias_correction not in (None, True, False):
        raise ConfigError(f"bias_correction is {bias_correction!r}, expected true, false or null")
    if ct is not None and ct not in CT_POLICIES:
        raise ConfigError(f"ct is {ct!r}, expected one of {CT_POLICIES} or null")
    if ct is not None and bias_correction:
        raise ConfigError(f"bias_correction is for MR, and ct is {ct!r}: set one of them to null")
    check_axcodes(assume_orientation)
    if bias_mask not in MASKS:
        raise ConfigError(f"bias_mask is {bias_mask!r}, expected one of {MASKS}")
    if not is_whole(bias_shrink) or bias_shrink < 1:
        raise ConfigError(f"bias_shrink is {bias_shrink!r}, expected a whole number from 1")
    if isinstance(bias_iterations, str) and all(part.strip().isdigit() for part in bias_iterations.split(",")):
        bias_iterations = [int(part) for part in bias_iterations.split(",")]
    if not isinstance(bias_iterations, (tuple, list)) or not bias_iterations or not all(map(is_whole, bias_iterations)):
        raise ConfigError(f"bias_iterations is {bias_iterations!r}, expected a list of whole numbers")
    if min(bias_iterations) < 1:
        raise ConfigError(f"bias_iterations is {bias_iterations!r}, expected numbers from 1")
    if not is_number(bias_convergence) or not bias_convergence >= 0:
        raise ConfigError(f"bias_convergence is {bias_convergence!r}, expected a number from 0")
    return Settings(
        spacing=three_sides(spacing),
        bias_correction=bias_correction,
        bias_mask=bias_mask,
        bias_shrink=bias_shrink,
        bias_iterations=tuple(bias_iterations),
        bias_convergence=float(bias_convergence),
        ct=ct,
        assume_orientation=assume_orientation,
    )


def three_sides(spacing: Any) -> tuple[float | None, ...] | None:
    """Spacing of each axis. Raises `ConfigError`."""
    if isinstance(spacing, str):
        spacing = [parsed(part) for part in spacing.split(",")]
        spacing = spacing[0] if len(spacing) == 1 else spacing
    sides = (spacing,) * 3 if spacing is None or is_number(spacing) else spacing
    if not isinstance(sides, (tuple, list)) or len(sides) != 3:
        raise ConfigError(f"spacing is {spacing!r}, expected mm: one number, or three (None keeps an axis)")
    if not all(side is None or (is_number(side) and 0 < side < math.inf) for side in sides):
        raise ConfigError(f"spacing is {spacing!r}, expected mm above 0 (None keeps an axis)")
    return None if spacing is None else tuple(None if side is None else float(side) for side in sides)


def parsed(text: str) -> Any:
    """A number of a text, ``None`` for none; else the text, which is refused later."""
    try:
        return None if text.strip().lower() in ("none", "null") else float(text)
    except ValueError:
        return text


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
