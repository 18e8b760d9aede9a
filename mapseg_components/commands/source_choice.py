# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Several models of the source, trained alike from other seeds: which one does the target look most familiar to?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.commands.order import CHOICE, confidence_on_target, known_order
from mapseg_components.errors import ConfigError
from mapseg_components.plans.recipes import Recipe, Stage

__all__ = ["check_number", "choose_source", "chosen_of", "describe_choice", "is_choice_due"]

WEIGHTS = "source_only.pt"  # of a stage that learns the source


def check_number(source_models: Any, package: str | None = None) -> None:
    """Refuse what is no number of models, and several where a package has the only one. Raises `ConfigError`."""
    if isinstance(source_models, bool) or not isinstance(source_models, int) or source_models < 1:
        raise ConfigError(f"source_models is {source_models!r}, expected a whole number from 1")
    if package is not None and source_models > 1:
        raise ConfigError(
            f"source_models is {source_models}, and the package has one model of the source: leave it out"
        )


def choose_source(
    folder: Path, recipe: Recipe, record: Mapping[str, Any], request: Mapping[str, Any]
) -> dict[str, Any]:
    """The source model that is surest of its structures on target scans, without labels.

    Where the order of intensities is still to be found out, the scans are looked at bright for dark as well, and the
    order counts in which a model is surer.

    Args:
        folder: of the run, a bundle whose ``stages`` hold the models.
        recipe: of the run, with all of them.
        record: content of ``run.json``.
        request: arguments of ``mapseg adapt``.

    Returns:
        ``chosen``, the name of a stage, and ``confidence``: of each the mean largest probability of the voxels of
        structures over scans.

    Raises:
        CheckpointError: weights cannot be loaded.
        DataError: a scan cannot be read.
    """
    known = known_order(record, request)
    asks = known is None and recipe.order is not None and request["random_contrasts"]
    orders = ("as_is", "inverted") if asks else ("inverted",) if known else ("as_is",)
    confidence = {}
    for stage in recipe.first:
        found = confidence_on_target(folder, folder / "stages" / stage.name / WEIGHTS, orders)
        confidence[stage.name] = round(max(float(np.mean(values)) for values in found.values()), 4)
    return {"chosen": max(confidence, key=lambda name: confidence[name]), "confidence": confidence}


def is_choice_due(recipe: Recipe, stage: Stage, record: Mapping[str, Any]) -> bool:
    """Whether a stage of a run was the last of several source models, and none is chosen yet."""
    return CHOICE not in record and len(recipe.first) > 1 and stage.name == recipe.first[-1].name


def chosen_of(recipe: Recipe, record: Mapping[str, Any]) -> Recipe:
    """The stages that a run needs once its source model is chosen."""
    return recipe.with_source_model(record[CHOICE]["chosen"]) if CHOICE in record else recipe


def describe_choice(found: Mapping[str, Any]) -> str:
    """The choice in words, for the terminal and the report."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found["confidence"].items())
    number = len(found["confidence"])
    return f"Of {number} source models {found['chosen']} goes on; mean confidence on the target: {figures}."
