# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How long the stages of an adaptation are: all of them by one factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mapseg_components.errors import ConfigError

__all__ = ["check_length", "epochs_of_length", "of_length", "planned_length"]

FEWEST_EPOCHS = 2  # with one epoch, a schedule that rises and falls is at its lowest rate throughout


def epochs_of_length(epochs: int, length: float) -> int:
    """Epochs of a stage by a factor: a whole number, two at least where the stage has them.

    Args:
        epochs: as planned.
        length: factor.

    Examples:
        >>> from mapseg_components.plans.length import epochs_of_length
        >>> [epochs_of_length(36, length) for length in (0.01, 0.5, 1, 1.51)]
        [2, 18, 36, 54]
    """
    return max(round(epochs * length), min(FEWEST_EPOCHS, epochs))


def of_length(settings: Mapping[str, Any], length: float) -> dict[str, Any]:
    """Settings that make a stage longer or shorter by a factor.

    Args:
        settings: of the stage; ``val_interval`` is lowered where no epoch would be validated otherwise.
        length: factor.

    Returns:
        ``max_epochs`` and ``val_interval`` as far as the settings have them as numbers; empty where neither changes.

    Examples:
        >>> from mapseg_components.plans.length import of_length
        >>> of_length({"max_epochs": 16, "val_interval": 5, "seed": 0}, 0.25)
        {'max_epochs': 4, 'val_interval': 4}
        >>> of_length({"max_epochs": 16, "val_interval": 5}, 1.0)
        {}
        >>> of_length({"max_epochs": 8, "val_interval": 10}, 1.0)  # of a stage that a recipe has halved
        {'max_epochs': 8, 'val_interval': 8}
    """
    epochs, interval = settings.get("max_epochs"), settings.get("val_interval")
    if not isinstance(epochs, int) or (length == 1 and not (isinstance(interval, int) and interval > epochs)):
        return {}
    epochs = epochs_of_length(epochs, length)
    return {"max_epochs": epochs, **({"val_interval": min(interval, epochs)} if isinstance(interval, int) else {})}


def planned_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``max_epochs`` and ``val_interval`` of a stage's settings, ``None`` where there is none."""
    return {name: settings.get(name) for name in ("max_epochs", "val_interval")}


def check_length(length: float) -> None:
    """Refuse a factor that is none. Raises `ConfigError`."""
    if not 0 < length < math.inf:
        raise ConfigError(f"length is {length}, expected a factor above 0")
