# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the stages of a method read of a user's settings, as their merged configs say before anything is trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from mapseg_components.configs import parser_of
from mapseg_components.errors import ConfigError
from mapseg_components.keys import SOURCE, TARGET
from mapseg_components.plans.bundle import check_network, configs_of, settled
from mapseg_components.plans.federation import rounds_of
from mapseg_components.plans.length import epochs_of_length
from mapseg_components.plans.recipes import (
    ADAPTATION,
    FEDERATION,
    TRAINING,
    Recipe,
    Stage,
    recipe_for,
    recipe_names,
    scaled,
)
from mapseg_components.plans.rounds import options_of, written_out
from mapseg_components.sides import axis_across

__all__ = ["check_effects", "check_epochs", "check_parties", "check_plan", "merged_config", "read_by"]

ROOTS = ("initialize", "run")  # of a config: what MONAI evaluates
PLACES = ("ckpt_dir", "output_dir")  # of a stage, whatever a user sets
SHARES, OF_PACKAGE = "prior_weight", "handover.yaml"  # a setting that the source answers; an overlay that has none
NAME = re.compile(r"[@%](\w+(?:#\w+)*)")  # a reference or a macro
Plan = Mapping[str, Any]


def check_plan(recipe: Recipe, plan: Plan, request: Mapping[str, Any], changed: Recipe | None = None) -> None:
    """Refuse what the stages of a method could not do, or would not look at, before the first of them.

    Args:
        recipe: the method.
        plan: see `mapseg_components.plans.bundle.write_bundle`; request likewise.
        changed: the method as the plan changes it.

    Raises:
        ConfigError: scans cannot be mirrored for ``symmetric``; see `check_epochs`, `check_windows`,
            `check_effects`, `check_parties`, and `check_network` of `mapseg_components.plans.bundle`.
    """
    if request["symmetric"]:
        axis_across("symmetric", plan["labels"], plan["settings"]["working_directions"])
    check_epochs(recipe, plan, request)  # stages that the plan makes shorter are validated by their last epoch
    for check in (check_network, check_windows, check_effects, check_parties):
        check(changed or recipe, plan, request)


def read_by(config: Mapping[str, Any], roots: Sequence[str] = ROOTS) -> set[str]:
    """Settings of a merged config that are reached from its roots by references and macros, one after the other.

    Args:
        config: as MONAI merges it, nothing in it evaluated.
        roots: names in it.

    Examples:
        >>> from mapseg_components.plans.effects import read_by
        >>> config = {"run": ["$@trainer.run()"], "trainer": {"steps": "@steps"}, "steps": 3, "views": 2}
        >>> sorted(read_by(config))
        ['initialize', 'run', 'steps', 'trainer']
    """
    seen: set[str] = set()
    left = [*roots]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += names_in(part_of(config, name))
    return {name.partition("#")[0] for name in seen}


def names_in(value: Any) -> Iterator[str]:
    """Names that a part of a config refers to; none where it is disabled."""
    if isinstance(value, str):
        yield from NAME.findall(value)
    elif isinstance(value, Mapping) and value.get("_disabled_") is not True:
        for one in value.values():
            yield from names_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from names_in(one)


def part_of(config: Any, name: str) -> Any:
    """The part of a config of that name (``a#b#0``); ``None`` if there is none."""
    for key in name.split("#"):
        if isinstance(config, Mapping):
            config = config.get(key)
        elif isinstance(config, (list, tuple)) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            return None
    return config


def merged_config(stage: Stage, recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a stage will run: bundle, preset, method, plan, overlays and the user's settings.

    Args:
        stage: a training, a package or a federation.
        recipe: its method.
        plan: see `mapseg_components.plans.bundle.write_bundle`; request likewise.
    """
    folder = configs_of(stage.bundle)
    merged = ConfigParser(settled(folder.parent, "train.json", recipe, plan, request))
    contrasts = [stage.contrasts] if stage.bundle == ADAPTATION and request["random_contrasts"] else []
    for overlay in filter(None, (*contrasts, *stage.overlays)):
        for key, value in ConfigParser.load_config_file(folder / overlay).items():
            merge_kv(merged, key, value)
    config, asked = merged.get(), request["settings"] or {}
    own = {name: value for name, value in stage.settings.items() if "#" not in name}
    return {**config, **own, **{name: value for name, value in asked.items() if name in config}, **stage.fixed}


def settings_read(recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> set[str]:
    """Settings that some stage of a method reads, or the method itself; of inference all, for other commands use it."""
    read = {*options_of(recipe), "val_interval", *plan["settings"]}  # of the plan, whose sizes fit any method
    read |= set(ConfigParser.load_config_file(configs_of(ADAPTATION) / "inference.json"))
    stages = {(stage.bundle, stage.overlays, stage.kind): stage for stage in recipe.stages if not stage.weights}
    for stage in stages.values():
        if request["pretraining"] or not stage.optional:
            roots = (*ROOTS, "train") if stage.kind == FEDERATION else ROOTS  # a site runs the trainer itself
            found = read_by(merged_config(stage, recipe, plan, request), roots)
            read |= found - {*stage.paths, *stage.fixed, *PLACES}
    return read


def check_epochs(recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> None:
    """Refuse a training that would choose no weights.

    Args:
        recipe: see `merged_config`; plan and request likewise.

    Raises:
        ConfigError: names the stage.
    """
    if not {"max_epochs", "val_interval"} & set(request["settings"] or {}):
        return  # stages that are shorter than an interval are validated by their last epoch
    for stage in recipe.stages:
        if stage.weights or stage.kind != TRAINING or (stage.optional and not request["pretraining"]):
            continue
        config = merged_config(stage, recipe, plan, request)
        epochs, interval = config.get("max_epochs"), config.get("val_interval")
        if not isinstance(epochs, int) or not isinstance(interval, int):
            continue
        if "max_epochs" not in (request["settings"] or {}):
            epochs = scaled(epochs, stage.factors(plan["preset"]).get("max_epochs", 1))
        if not 0 < interval <= epochs:
            raise ConfigError(
                f"settings: in stage {stage.name} max_epochs is {epochs}, val_interval {interval}, so that no epoch "
                "would be validated and no weights chosen: set val_interval to 1, or more epochs"
            )


def check_windows(recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> None:
    """Refuse windows of inference that leave gaps. Arguments as of `check_epochs`; raises `ConfigError`."""
    config = settled(configs_of(ADAPTATION).parent, "inference.json", recipe, plan, request)
    patch, stride = config["patch_size"], config["window_stride"]
    window = patch if config["window_size"] == "@patch_size" else config["window_size"]
    sides = [value if isinstance(value, list) else [value] for value in (stride, window)]
    if all(type(side) is int for value in sides for side in value):
        if not all(0 < step <= side for step, side in zip(*sides)):
            raise ConfigError(
                f"settings: window_stride is {stride}, expected 1 up to the window, {window}: windows would leave gaps"
            )


def check_effects(recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> None:
    """Refuse settings of a user that nothing of the method reads.

    Args:
        recipe: see `merged_config`; plan and request likewise.

    Raises:
        ConfigError: names the settings, and the methods that read them.
    """
    asked = set(request["settings"] or {})
    without = asked - settings_read(recipe, plan, request) if asked else set()
    if not without:
        return
    readers: dict[str, list[str]] = {name: [] for name in sorted(without)}
    for method in recipe_names():
        with contextlib.suppress(ConfigError):  # not for this source, or not with these settings
            kinds = bool(request.get("source_label_maps")), request.get("package") is not None
            other = written_out(recipe_for(method, *kinds), request["settings"])
            for name in without & settings_read(other, plan, request):
                readers[name].append(method)
    found = "; ".join(f"{name}: {', '.join(methods) or 'no method'}" for name, methods in readers.items())
    raise ConfigError(
        f"settings {sorted(readers)} have no effect, for nothing of method {recipe.name} in preset {plan['preset']} "
        f"reads them: leave them out, or take a method that does ({found})"
    )


def check_parties(recipe: Recipe, plan: Plan, request: Mapping[str, Any]) -> None:
    """Refuse what a party without the source could not do, nor any party of a federation with its method and network.

    Args:
        recipe: see `merged_config`; plan and request likewise.

    Raises:
        ConfigError: class shares are to be those of a source that is not there; or see `check_method`, `local_names`
            and `check_budget` of `mapseg_components.federated.Plan`.
    """
    for stage in recipe.stages:
        if (request["settings"] or {}).get(SHARES) and (stage.kind == FEDERATION or OF_PACKAGE in stage.overlays):
            raise ConfigError(
                f"settings: {SHARES} is {request['settings'][SHARES]!r}, and stage {stage.name} of method "
                f"{recipe.name} learns from the target without the source, whose labels have the shares: set it to 0, "
                "or take a method with the source in its last stage, such as mapseg"
            )
        if stage.kind == FEDERATION:
            config = merged_config(stage, recipe, plan, request)
            parser = parser_of(config)
            federation = parser.get_parsed_content("federation")
            own = request.get("adaptation_length")
            rounds = rounds_of(config["max_epochs"], config["epoch_length"], config["rounds"])
            federation.check_budget(epochs_of_length(rounds, request.get("length", 1.0) if own is None else own))
            for side in [TARGET, *([] if federation.server_steps == 0 else [SOURCE])]:
                federation.check_method(config["method"], side)
            if federation.local_layers:
                with torch.device("meta"):  # names are all that is asked for
                    federation.local_names(parser.get_parsed_content("network_def").state_dict())
