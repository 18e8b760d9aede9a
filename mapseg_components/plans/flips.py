# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Axes along which scans may be mirrored, in training and before a prediction is averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mapseg_components.errors import ConfigError
from mapseg_components.plans.sizes import SHORT
from mapseg_components.sides import ACROSS, across_body, refuse_sides, sided_names

__all__ = ["find_flips", "plan_flips"]


def plan_flips(
    names: Iterable[str], directions: Sequence[Sequence[float]] | None, patch_size: Sequence[int], preset: str
) -> list[int]:
    """Array axes along which scans are mirrored.

    An axis of several voxels, and where a structure's name has a side, one that does not run between left and right:
    in a mirrored scan such structures are exchanged. In the presets of few steps a volume is mirrored from left to
    right alone, which a body nearly is by itself; the other ways up would have to be learnt.

    Args:
        names: of all structures.
        directions: of the array axes in RAS+ (3, 3), or ``None`` for the body's own.
        patch_size: voxels per axis.
        preset: of `mapseg_components.plans.sizes.PRESETS`.

    Examples:
        >>> from mapseg_components.plans.flips import plan_flips
        >>> plan_flips(["cochlea"], None, (96, 96, 96), "paper"), plan_flips(["Kidney_L"], None, (96, 96, 96), "paper")
        ([0, 1, 2], [1, 2])
    """
    axes = [axis for axis, side in enumerate(patch_size) if side > 1]
    across = across_body(directions)
    if sided_names(names):
        axes = [axis for axis in axes if across[axis] < ACROSS]
    if preset in SHORT and min(patch_size) > 1:
        axes = [axis for axis in axes if across[axis] > 1 - ACROSS]
    return axes


def find_flips(
    labels: Mapping[str, int], planned: Mapping[str, Any], preset: str, asked: Mapping[str, Any]
) -> list[int]:
    """The axes of `plan_flips`, or those that the user asks for.

    Args:
        labels: structures and their values.
        planned: ``working_directions`` and ``patch_size``.
        preset: see `plan_flips`.
        asked: settings of the user, of which ``flip_axes`` is taken as it is.

    Raises:
        ConfigError: the setting is no list of axes, or mirrors sides that the structures' names have.
    """
    sizes = {name: asked.get(name, planned[name]) for name in ("working_directions", "patch_size")}
    if "flip_axes" not in asked:
        return plan_flips(labels, sizes["working_directions"], sizes["patch_size"], preset)
    axes = asked["flip_axes"]
    if not isinstance(axes, (list, tuple)) or not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
        raise ConfigError(f"flip_axes is {axes!r}, expected a list of axes from 0 to 2, or [] for none")
    across = across_body(sizes["working_directions"])
    if any(across[axis] >= ACROSS for axis in axes):
        refuse_sides("flip_axes", labels)
    return [*axes]
