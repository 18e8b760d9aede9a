# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipes: the stages of a method, as a file in the adaptation bundle's folder ``recipes`` says."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mapseg_components.errors import ConfigError
from mapseg_components.plans.sizes import SHORT
from mapseg_components.shipped_files import bundles_folder

__all__ = ["PACKAGE", "Recipe", "Stage", "read_recipe", "recipe_for", "recipe_names", "scaled"]

ADAPTATION = "mapseg_adaptation"
TRANSLATION = "cosmos_translation"
# kinds of stages; PACKAGE is the folder of a package that was given as well
MORE_OF_ANY_ORDER, LESS_AFTER_IT = 1.5, 0.5  # epochs of a source stage in any order, and of those after it
INITIAL = "initial_model"  # argument, entry of the plan, and folder of the weights that the source is learnt from
INITIAL_WEIGHTS = f"{INITIAL}/weights.pt"
FROM_INITIAL = {"max_epochs": 1 / 3, "learning_rate": 0.5}  # factors of the stage that begins with them
EQUAL_CLASSES = {"class_weight_power": 0.0}  # its setting: small structures are known, and need no weight to be found
LAST_AS_WELL = {"val_interval": 4}  # of 12 and 8 epochs, whose last ones have the lowest rates
TRAINING, PSEUDO_LABELS, PACKAGE, FEDERATION = "training", "pseudo_labels", "package", "federation"
INVERTS = "any_contrast.yaml"
ANY_ORDER = "any_order.yaml"
LABEL_MAPS = "label_maps.yaml"
SOURCE_ALONE = "source_only.yaml"  # overlay of a stage that learns the source alone
HANDOVER = "handover.yaml"  # of a stage that has a package alone of the source
METHOD, METHOD_OF_LABEL_MAPS, METHOD_OF_PACKAGE = "mapseg", "label_maps", "test_time"  # unless the user names one


@dataclass(frozen=True)
class Stage:
    """One training, the segmentation of the target's scans for pseudo labels, or a hand-over package.

    Args:
        name: of its folder below ``stages``.
        bundle: whose ``train.json`` it runs.
        overlays: of that bundle, after the recipe's own.
        paths: settings that are files or folders below ``stages``, of earlier stages or of this one.
        settings: further ones.
        optional: whether ``mapseg adapt --pretraining False`` leaves it out.
        contrasts: overlay of the adaptation bundle for random contrasts of the source, unless they are off; may be
            ``None``.
        scale: factors of settings, so that a stage is as long as a share of what the preset says.
        short: further such factors, in the presets of few steps alone.
        only_as_is: whether it is left out where the target is shown bright for dark, and without random contrasts.
        fixed: further settings that hold whatever the user asks for.
        kind: ``training``, or ``pseudo_labels``: the scans of ``target_training`` are segmented by `weights`, those
            that lack a structure are left out, and ``pseudo/datalist.json`` names the others with their label maps; or
            ``package``: a hand-over package is written of weights that an earlier stage has trained; or ``federation``:
            the target's scans are divided among simulated sites, see `mapseg_components.plans.federation`.
        weights: files below ``stages`` that make pseudo labels, together if there are several; of a stage of each round
            those of the first, the adapted model of the round before in later ones.
        each_round: whether it is repeated, see `mapseg_components.plans.rounds`.
        fold: number of its part of the source's cases, which it is validated on, and how many parts there are; ``None``
            for the run's own division.
        member: number among several trainings of one kind, the first is 0; others begin with another seed.
    """

    name: str
    bundle: str = ADAPTATION
    overlays: tuple[str, ...] = ()
    paths: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    contrasts: str | None = INVERTS
    scale: dict[str, float] = field(default_factory=dict)
    only_as_is: bool = False
    short: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    kind: str = TRAINING
    weights: tuple[str, ...] = ()
    each_round: bool = False
    fold: tuple[int, int] | None = None
    member: int = 0

    def factors(self, preset: str) -> dict[str, float]:
        """Factors of settings in a preset."""
        return self.scale | (self.short if preset in SHORT else {})


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
        presets: preset to overlays of the adaptation bundle that come before `overlays`, for a method that has a
            network of its own on large machines.
        mirrors: whether scans are mirrored along the axes that the plan allows.
        rounds: how often the stages of each round are repeated, unless the user sets it; ``None`` where there are none.
        folds: models that make the pseudo labels together, each with its own part of the source for validation, unless
            the user sets it.
        needs: what else must be so, in one sentence without a full stop.
        fails: where it is known to fail, likewise.
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
    presets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mirrors: bool = False
    rounds: int | None = None
    folds: int = 1
    needs: str = ""
    fails: str = ""

    @property
    def inverts(self) -> bool:
        """Whether every model has seen the source bright for dark as well."""
        return self.of_label_maps or all(stage.contrasts == INVERTS for stage in self.stages if not stage.optional)

    @property
    def learns_source_alone(self) -> bool:
        """Whether no stage learns from the target."""
        return all(SOURCE_ALONE in stage.overlays for stage in self.stages)

    @property
    def of_label_maps(self) -> bool:
        """Whether the source is label maps alone."""
        return any(LABEL_MAPS in stage.overlays for stage in self.stages)

    def from_label_maps(self) -> Recipe:
        """The same method for a source of label maps alone.

        Raises:
            ConfigError: a stage of another bundle needs images of the source.
        """
        if self.of_label_maps:
            return self
        others = [stage.name for stage in self.stages if stage.bundle != ADAPTATION and not stage.optional]
        if others:
            raise ConfigError(
                f"source_label_maps: stages {others} of method {self.name!r} need images of the source: take "
                "another method, such as label_maps"
            )
        stages = (
            replace(stage, overlays=(LABEL_MAPS, *stage.overlays)) if stage.bundle == ADAPTATION else stage
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))

    def without_source(self) -> Recipe:
        """The same method from a hand-over package in the folder `PACKAGE`: stages that learn the source are left out.

        Raises:
            ConfigError: the method needs the source's scans while it learns from the target.
        """
        if self.source:
            others = ", ".join(name for name in recipe_names() if not read_recipe(name).source)
            raise ConfigError(
                f"method {self.name} needs the source's scans while it learns from the target, and a package has none: "
                f"methods without them are {others}; or give the source in the place of the package"
            )
        stages = (
            replace(stage, paths={**stage.paths, "handover_dir": PACKAGE}, contrasts=None)
            for stage in self.stages
            if HANDOVER in stage.overlays
        )
        weights = f"{PACKAGE}/weights.pt"
        return replace(self, stages=tuple(stages), order=weights, models={**self.models, "source_only": weights})

    @property
    def first(self) -> tuple[Stage, ...]:
        """The stage that learns the source from the start; several where one of them is to be chosen."""
        first, *others = [stage for stage in self.stages if not stage.optional]
        return (first, *itertools.takewhile(lambda stage: stage.member > 0, others))

    def with_source_models(self, number: int) -> Recipe:
        """With so many source models to choose from, in the place of the first one."""
        (origin,) = self.first
        place = self.stages.index(origin)
        names = [f"{origin.name}_{one + 1}" for one in range(1, number)]
        members = [
            replace(origin, name=name, member=one, paths=paths_of(origin.paths, {origin.name: name}))
            for one, name in enumerate(names, start=1)
        ]
        return replace(self, stages=(*self.stages[: place + 1], *members, *self.stages[place + 1 :]))

    def with_source_model(self, name: str) -> Recipe:
        """With one of several source models, by the name of its stage: the others are left out."""
        others = {stage.name for stage in self.first} - {name}
        return self.moved(dict.fromkeys(others, name))

    def moved(self, instead: Mapping[str, str]) -> Recipe:
        """Without some stages; what they would have made is another one's, by name."""

        def of(stage: Stage) -> Stage:
            weights = paths_of(dict(zip(stage.weights, stage.weights)), instead)
            return replace(stage, paths=paths_of(stage.paths, instead), weights=tuple(weights.values()))

        order = None if self.order is None else paths_of({"order": self.order}, instead)["order"]
        kept = tuple(of(stage) for stage in self.stages if stage.name not in instead)
        return replace(self, stages=kept, models=paths_of(self.models, instead), order=order)

    def in_any_order(self) -> Recipe:
        """With the source in contrasts of any order, from the stage on that is for a target as it is alone.

        That stage is half as long again as the preset says, and those after it have half of their epochs: such
        contrasts take more steps to learn than two orders do, and bring more than adaptation does in the same minutes
        (docs/decisions/0017-size-and-order.md). Stages after a translation learn the target's own contrast, and stay.
        """
        first = next((number for number, stage in enumerate(self.stages) if stage.only_as_is), len(self.stages))
        stages = [*self.stages[:first]]
        translated = False
        for stage in self.stages[first:]:
            translated |= stage.bundle == TRANSLATION
            scale = stage.scale
            if stage.only_as_is:
                scale = scale | {"max_epochs": MORE_OF_ANY_ORDER}
            elif not translated:
                scale = scale | {"max_epochs": LESS_AFTER_IT * scale.get("max_epochs", 1.0)}
            contrasts = ANY_ORDER if stage.contrasts and not translated else stage.contrasts
            stages.append(replace(stage, contrasts=contrasts, only_as_is=False, scale=scale))
        return replace(self, stages=tuple(stages))

    def from_initial_model(self) -> Recipe:
        """With the source learnt from a model of any contrast (`INITIAL_WEIGHTS`), in contrasts of any order.

        That stage is short, and one for a target as it is alone is not needed: neither is the order of the target's
        intensities looked for. Stages after it have half of their epochs, as those of `in_any_order`.
        """
        if self.order is None:
            return self  # it is so already
        kept = self.without_contrasts()
        stages = []
        for stage in kept.stages:
            contrasts = stage.contrasts and ANY_ORDER
            if stage in kept.first:
                own = {
                    "paths": stage.paths | {"initial_weights": INITIAL_WEIGHTS},
                    "scale": stage.scale | FROM_INITIAL,
                    "settings": stage.settings | EQUAL_CLASSES | LAST_AS_WELL,
                }
                stages.append(replace(stage, contrasts=contrasts, **own))
            else:
                scale = stage.scale | {"max_epochs": LESS_AFTER_IT * stage.scale.get("max_epochs", 1.0)}
                settings = stage.settings | (LAST_AS_WELL if stage.kind == TRAINING else {})
                stages.append(replace(stage, contrasts=contrasts, scale=scale, settings=settings))
        return replace(kept, stages=tuple(stages), order=None)

    def without_contrasts(self) -> Recipe:
        """Without the stages that are for a target as it is alone; their weights are those of the stage before."""
        instead: dict[str, str] = {}
        last = ""
        for stage in self.stages:
            if stage.only_as_is:
                instead[stage.name] = last
            else:
                last = stage.name
        return self.moved(instead)


def paths_of(paths: Mapping[str, str], instead: Mapping[str, str]) -> dict[str, str]:
    """Paths below ``stages``, where other stages have made what some of these name."""
    parts = {key: path.partition("/") for key, path in paths.items()}
    return {key: "".join([instead.get(first, first), *rest]) for key, (first, *rest) in parts.items()}


def scaled(value: float, factor: float) -> float:
    """A setting times a factor; of whole numbers, a whole number and 1 at least."""
    return max(round(value * factor), 1) if isinstance(value, int) else value * factor


def recipes_folder() -> Path:
    """Where the recipes lie."""
    return bundles_folder() / ADAPTATION / "recipes"


def recipe_names() -> list[str]:
    """Methods that ``mapseg adapt --method`` knows; MAPSeg first."""
    return sorted((path.stem for path in recipes_folder().glob("*.yaml")), key=lambda name: (name != "mapseg", name))


def read_recipe(name: str | None) -> Recipe:
    """The recipe of a method, of MAPSeg for ``None``.

    Raises:
        ConfigError: there is none of that name, or its file is not a recipe.
    """
    known = recipe_names()
    name = METHOD if name is None else name
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"method {name!r} is unknown{hint}, expected one of {known}: see mapseg methods")
    path = recipes_folder() / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = tuple(
            Stage(**{key: tuple(value) if key in ("overlays", "weights") else value for key, value in stage.items()})
            for stage in content.pop("stages")
        )
        if "presets" in content:
            content["presets"] = {preset: tuple(names) for preset, names in content["presets"].items()}
        lists = {key: tuple(content[key]) for key in ("overlays", "dimensions") if key in content}
        return Recipe(**{**content, **lists, "name": name, "stages": stages})
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no recipe ({error}): see the others beside it") from error


def recipe_for(method: str | None, label_maps: bool = False, package: bool = False) -> Recipe:
    """The recipe of a method, as the source allows it.

    Args:
        method: ``None`` for the one that suits: MAPSeg, of label maps ``label_maps``, of a package ``test_time``.
        label_maps: the source is label maps alone.
        package: the source is a hand-over package alone.

    Raises:
        ConfigError: there is none of that name, or it needs images of the source.
    """
    if package:
        return read_recipe(method or METHOD_OF_PACKAGE).without_source()
    recipe = read_recipe(METHOD_OF_LABEL_MAPS if label_maps and method in (None, METHOD) else method)
    return recipe.from_label_maps() if label_maps else recipe
