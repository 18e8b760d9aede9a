# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How long the stages of an adaptation are: all of them by one factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapseg_components.plans.recipes import Stage

__all__ = ["epochs_of_length", "of_length", "settings_of_stage"]

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
        ``max_epochs`` and ``val_interval`` as far as the settings have them as numbers; empty for a factor of 1.

    Examples:
        >>> from mapseg_components.plans.length import of_length
        >>> of_length({"max_epochs": 16, "val_interval": 5, "seed": 0}, 0.25)
        {'max_epochs': 4, 'val_interval': 4}
        >>> of_length({"max_epochs": 16, "val_interval": 5}, 1.0)
        {}
    """
    epochs, interval = settings.get("max_epochs"), settings.get("val_interval")
    if length == 1 or not isinstance(epochs, int):
        return {}
    epochs = epochs_of_length(epochs, length)
    return {"max_epochs": epochs, **({"val_interval": min(interval, epochs)} if isinstance(interval, int) else {})}


def settings_of_stage(
    stage: Stage, config: Mapping[str, Any], asked: Mapping[str, Any], length: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the recipe and the factor of length set of a stage.

    Args:
        stage: of a recipe.
        config: of the stage, merged, with what the user asked for.
        asked: settings of the user, which the recipe's do not replace.
        length: factor of the epochs.

    Returns:
        ``planned`` (``max_epochs`` and ``val_interval`` before the factor), and the settings.
    """
    own = {name: scaled(config[name], factor) for name, factor in stage.scale.items()} | dict(stage.settings)
    own = {name: value for name, value in own.items() if name not in asked}
    whole = {**config, **own}
    return {name: whole.get(name) for name in ("max_epochs", "val_interval")}, own | of_length(whole, length)


def scaled(value: float, factor: float) -> float:
    """A setting times a factor; of whole numbers, a whole number and 1 at least."""
    return max(round(value * factor), 1) if isinstance(value, int) else value * factor
