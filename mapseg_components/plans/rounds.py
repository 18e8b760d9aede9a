# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Rounds of self-training: the stages of a recipe written out, and the source divided for several models."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mapseg_components.errors import ConfigError
from mapseg_components.inferers.nnunet import require_nnunet
from mapseg_components.plans.recipes import PSEUDO_LABELS, Recipe, Stage

__all__ = ["check_options", "divided", "options_of", "require_engine", "written_out"]

REQUIRED = "required_structures"
ENGINE, OWN, NNUNET = "engine", "bundle", "nnunet"
# overlays of the adaptation bundle, and what the first leaves for the second
NNUNET_TRAINING, NNUNET_LABELLING, NNUNET_WEIGHTS = "nnunet.yaml", "nnunet_labels.yaml", "nnunet.pt"


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Settings of a recipe itself, with their defaults; none where it has no rounds.

    ``rounds``: how often target scans are labelled and a student is trained from them; ``folds``: models that label
    them together; ``engine``: what trains these models, ``bundle`` (as all other stages) or ``nnunet`` (nnU-Net
    itself); ``required_structures``: those without which a pseudo label is left out, by default (``None``) those that
    every label map of the source has.
    """
    own = {"rounds": recipe.rounds, "folds": recipe.folds, ENGINE: OWN, REQUIRED: None}
    return {} if recipe.rounds is None else own


def require_engine(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuse to begin, or to go on, without the package that trains the models that label. Raises `ConfigError`."""
    if recipe.rounds is not None and settings.get(ENGINE) == NNUNET:
        require_nnunet()


def check_options(
    recipe: Recipe, settings: Mapping[str, Any], labels: Mapping[str, int], labelled: Sequence[Any]
) -> None:
    """Refuse what the data does not allow.

    Args:
        recipe: see `options_of`.
        settings: of the user.
        labels: structures and their values.
        labelled: cases of the source.

    Raises:
        ConfigError: there are more folds than cases, or an unknown structure is required.
    """
    asked = options_of(recipe) | {name: settings[name] for name in options_of(recipe) if name in settings}
    if asked.get("folds", 1) > len(labelled):
        raise ConfigError(f"folds is {asked['folds']}, and the source has {len(labelled)} cases: lower it")
    required = asked.get(REQUIRED)
    if required is not None and (isinstance(required, str) or not set(required) <= set(labels)):
        raise ConfigError(f"{REQUIRED} is {required!r}, expected a list of structures among {list(labels)}")


def written_out(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe whose stages are each run once.

    Stages of each round are repeated, ``<name>_1``, ``<name>_2``, ...; a path that begins with the name of one is of
    the same round. Pseudo labels come from the stage's weights in the first round, and from the adapted model of the
    round before in others; without a round these weights are the adapted model. With folds, a training whose weights
    make pseudo labels becomes several, ``<name>_fold_1``, ``<name>_fold_2``, ...; the last round's student makes none,
    and is one network. With the engine ``nnunet`` the same trainings, and the stages that label, are nnU-Net's.

    Args:
        recipe: as its file has it.
        settings: of the user, see `options_of`.

    Raises:
        ConfigError: ``rounds`` or ``folds`` is no such number, the engine is unknown, or it would train nothing.
    """
    options = options_of(recipe)
    if not options:
        return recipe
    asked = {name: settings.get(name, value) for name, value in options.items()}
    for name, least in (("rounds", 0), ("folds", 1)):
        if type(asked[name]) is not int or asked[name] < least:
            raise ConfigError(f"settings: {name} is {asked[name]!r}, expected a whole number, {least} or more")
    if asked[ENGINE] not in (OWN, NNUNET):
        raise ConfigError(f"settings: {ENGINE} is {asked[ENGINE]!r}, expected {OWN!r} or {NNUNET!r}")
    if asked[ENGINE] == NNUNET and asked["rounds"] == 0:
        raise ConfigError(
            f"settings: rounds is 0, and {ENGINE} {NNUNET!r} trains the models that label target scans in a round: set "
            "rounds to 1 or more, or leave the engine out"
        )
    repeated = [stage for stage in recipe.stages if stage.each_round]
    names = {stage.name for stage in repeated}
    first = next(stage.weights for stage in repeated if stage.kind == PSEUDO_LABELS)

    def of_round(path: str, number: int) -> str:
        stage, slash, rest = path.partition("/")
        return f"{stage}_{number}{slash}{rest}" if stage in names else path

    stages = [stage for stage in recipe.stages if not stage.each_round]
    adapted = first
    for number in range(1, asked["rounds"] + 1):
        for stage in repeated:
            paths = {key: of_round(path, number) for key, path in stage.paths.items()}
            weights = adapted if stage.kind == PSEUDO_LABELS else ()
            name = of_round(stage.name, number)
            stages.append(replace(stage, name=name, paths=paths, weights=weights, each_round=False))
        adapted = (of_round(recipe.models["adapted"], number),)
    models = {**recipe.models, "adapted": adapted[0]}
    if asked[ENGINE] == NNUNET:
        stages = by_nnunet(stages)
    return replace(recipe, stages=tuple(folded(stages, asked["folds"])), models=models)


def labelling(stages: Sequence[Stage]) -> set[str]:
    """Names of the stages whose models make pseudo labels."""
    return {path.partition("/")[0] for stage in stages for path in stage.weights}


def by_nnunet(stages: Sequence[Stage]) -> list[Stage]:
    """Stages whose labelling models are trained and run by nnU-Net, from the same datalists and as long.

    nnU-Net has its own batch size and augmentation.
    """
    label = labelling(stages)
    result = []
    for stage in stages:
        if stage.name in label:
            own = {"scale": {}, "settings": {}, "fixed": {}, "contrasts": None}
            stage = replace(stage, overlays=(NNUNET_TRAINING,), **own)
        elif stage.weights:
            weights = tuple(f"{path.partition('/')[0]}/{NNUNET_WEIGHTS}" for path in stage.weights)
            stage = replace(stage, overlays=(NNUNET_LABELLING,), weights=weights)
        result.append(stage)
    return result


def folded(stages: Sequence[Stage], folds: int) -> list[Stage]:
    """Stages whose trainings of labelling models are done once a fold."""
    if folds == 1:
        return [*stages]
    label = labelling(stages)
    result = []
    for stage in stages:
        if stage.name in label:
            parts = [(number, folds) for number in range(1, folds + 1)]
            result += [replace(stage, name=f"{stage.name}_fold_{part[0]}", fold=part) for part in parts]
            continue
        weights = []
        for path in stage.weights:
            name, _, rest = path.partition("/")
            weights += [f"{name}_fold_{number}/{rest}" for number in range(1, folds + 1)]
        result.append(replace(stage, weights=tuple(weights)))
    return result


def divided(content: Mapping[str, Any], fold: tuple[int, int], seed: int) -> dict[str, Any]:
    """A datalist whose labelled source cases are divided anew: one part for validation, the others for training.

    Args:
        content: of a datalist.
        fold: number of the part, from 1, and how many parts there are.
        seed: of the division, the same for all parts.

    Returns:
        the same with other ``source_training`` and ``source_validation``, in the order that the cases had.
    """
    cases = [*content["source_training"], *content.get("source_validation", [])]
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    number, parts = fold
    chosen = {*order[number - 1 :: parts]}
    return {
        **content,
        "source_training": [case for index, case in enumerate(cases) if index not in chosen],
        "source_validation": [case for index, case in enumerate(cases) if index in chosen],
    }
