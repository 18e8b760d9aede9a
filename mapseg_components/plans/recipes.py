# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipes: the stages of a method, as a file in the adaptation bundle's folder ``recipes`` says."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mapseg_components.errors import ConfigError
from mapseg_components.shipped_files import bundles_folder

__all__ = ["Recipe", "Stage", "read_recipe", "recipe_names", "scaled"]

ADAPTATION = "mapseg_adaptation"
INVERTS = "any_contrast.yaml"


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        name: of its folder below ``stages``.
        bundle: whose ``train.json`` it runs.
        overlays: of that bundle, after the recipe's own.
        paths: settings that are files or folders below ``stages``, of earlier stages or of this one.
        settings: further ones.
        optional: whether ``mapseg adapt --pretraining False`` leaves it out.
        contrasts: overlay of the adaptation bundle for random contrasts of the source, unless they are off.
        scale: factors of settings, so that a stage is as long as a share of what the preset says.
        only_as_is: whether it is left out where the target is shown bright for dark, and without random contrasts.
    """

    name: str
    bundle: str = ADAPTATION
    overlays: tuple[str, ...] = ()
    paths: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    contrasts: str = INVERTS
    scale: dict[str, float] = field(default_factory=dict)
    only_as_is: bool = False


@dataclass(frozen=True)
class Recipe:
    """A method as a user chooses it.

    Args:
        name: of the file.
        title: one line.
        source: whether the source's scans must be at hand while the target is learnt from.
        dimensions: 2, 3 or both.
        measured: what was measured, in one line.
        overlays: of the adaptation bundle, in all its stages and in the bundle that is made.
        order: weights below ``stages`` by whose confidence it is found out, once their stage is done, whether the
            target is bright where the source is dark.
        stages: in their order.
        models: ``source_only`` and ``adapted``: weights below ``stages`` that are compared and kept.
    """

    name: str
    title: str
    source: bool
    dimensions: tuple[int, ...]
    measured: str
    stages: tuple[Stage, ...]
    models: dict[str, str]
    overlays: tuple[str, ...] = ()
    order: str | None = None

    @property
    def inverts(self) -> bool:
        """Whether every model has seen the source bright for dark as well."""
        return all(stage.contrasts == INVERTS for stage in self.stages if not stage.optional)

    def without_contrasts(self) -> Recipe:
        """Without the stages that are for a target as it is alone; their weights are those of the stage before."""
        kept: list[Stage] = []
        instead: dict[str, str] = {}
        for stage in self.stages:
            if stage.only_as_is:
                instead[stage.name] = kept[-1].name
            else:
                kept.append(stage)

        def moved(paths: dict[str, str]) -> dict[str, str]:
            parts = {name: path.partition("/") for name, path in paths.items()}
            return {name: "".join([instead.get(first, first), *rest]) for name, (first, *rest) in parts.items()}

        stages = tuple(replace(stage, paths=moved(stage.paths)) for stage in kept)
        return replace(self, stages=stages, models=moved(self.models))


def recipes_folder() -> Path:
    """Where the recipes lie."""
    return bundles_folder() / ADAPTATION / "recipes"


def recipe_names() -> list[str]:
    """Methods that ``mapseg adapt --method`` knows; MAPSeg first."""
    return sorted((path.stem for path in recipes_folder().glob("*.yaml")), key=lambda name: (name != "mapseg", name))


def read_recipe(name: str) -> Recipe:
    """The recipe of a method.

    Raises:
        ConfigError: there is none of that name, or its file is not a recipe.
    """
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"method {name!r} is unknown{hint}, expected one of {known}: see mapseg methods")
    path = recipes_folder() / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = tuple(
            Stage(**{key: tuple(value) if key == "overlays" else value for key, value in stage.items()})
            for stage in content.pop("stages")
        )
        lists = {key: tuple(content[key]) for key in ("overlays", "dimensions") if key in content}
        return Recipe(**{**content, **lists, "name": name, "stages": stages})
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no recipe ({error}): see the others beside it") from error


def scaled(value: float, factor: float) -> float:
    """A setting times a factor; of whole numbers, a whole number and 1 at least."""
    return max(round(value * factor), 1) if isinstance(value, int) else value * factor
