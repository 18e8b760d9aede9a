# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A federation as a stage of ``mapseg adapt``: the target's scans divided among sites, rounds and steps."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.configs import parser_of
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_json
from mapseg_components.plans.recipes import ADAPTATION, FEDERATION, Recipe
from mapseg_components.shipped_files import bundles_folder

__all__ = ["check_federation", "federation_names", "federation_settings", "rounds_of", "sites_of"]

CONFIG = "federated.json"
WIRING = {"imports", "run", "federation", "privacy"}
WIRING |= {"share_statistics", "statistics_min_scans"}  # of a job between real sites
SITES, SERVER = "sites", "server"
NAME = re.compile(r"\w[\w.-]*")  # of a folder


def federation_names() -> set[str]:
    """Names of the settings of a federation."""
    return set(ConfigParser.load_config_file(config_path(CONFIG))) - WIRING


def config_path(name: str) -> Path:
    """A config of the adaptation bundle."""
    return bundles_folder() / ADAPTATION / "configs" / name


def sites_of(
    cases: Sequence[Mapping[str, Any]],
    wanted: int | Mapping[str, Sequence[str]],
    seed: int,
    held_out: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[Mapping[str, Any]]]:
    """Target scans of each site.

    Args:
        cases: scans to adapt on.
        wanted: number of sites, among which the scans are dealt out by the seed; or names of sites with the
            ``case_id`` of each scan, which must name every scan once.
        seed: of the division into so many sites.
        held_out: scans that no site trains on, and that may be named all the same.

    Raises:
        ConfigError: there are more sites than scans, a site has no scan or a name that is none, a scan is unknown,
            missing or at two sites.

    Examples:
        >>> from mapseg_components.plans.federation import sites_of
        >>> cases = [{"case_id": name} for name in "abcde"]
        >>> [len(part) for part in sites_of(cases, 2, seed=0).values()]
        [3, 2]
        >>> sorted(sites_of(cases, {"berlin": ["a", "b"], "lyon": ["c", "d", "e"]}, seed=0))
        ['berlin', 'lyon']
    """
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= len(cases):
            raise ConfigError(
                f"settings: sites is {wanted}, and there are {len(cases)} target scans to adapt on: expected 1 to "
                f"{len(cases)} sites"
            )
        order = random.Random(seed).sample(range(len(cases)), len(cases))
        parts = [sorted(order[number::wanted]) for number in range(wanted)]
        return {f"site_{number}": [cases[index] for index in part] for number, part in enumerate(parts, start=1)}
    if not isinstance(wanted, Mapping) or not all(isinstance(ids, (list, tuple)) for ids in wanted.values()):
        raise ConfigError(
            f"settings: sites is {wanted!r}, expected a number, or a mapping of names to lists of case_id, such as "
            '{"berlin": ["scan1", "scan2"], "lyon": ["scan3"]}'
        )
    wrong = [name for name in wanted if not NAME.fullmatch(str(name)) or name == SERVER]
    if wrong:
        raise ConfigError(f"settings: sites has {wrong}, expected names of letters and digits, and none of {SERVER!r}")
    named = [str(case) for ids in wanted.values() for case in ids]
    known, apart = {case["case_id"]: case for case in cases}, {case["case_id"] for case in held_out}
    problems = {
        "unknown": sorted({*named} - {*known} - apart),
        "at no site": [case for case in known if case not in named],
        "at two sites": sorted({case for case in named if named.count(case) > 1}),
    }
    found = [f"{what}: {cases}" for what, cases in problems.items() if cases]
    if found:
        raise ConfigError(f"settings: sites must name every target scan once by its case_id; {'; '.join(found)}")
    split = {str(name): [known[str(case)] for case in ids if str(case) in known] for name, ids in wanted.items()}
    empty = [name for name, part in split.items() if not part]
    if empty or not split:
        raise ConfigError(
            f"settings: sites {empty} have no scan to adapt on (held out are {sorted(apart)}): give each one more, or "
            "set held_out to 0"
        )
    return split


def federation_settings(
    content: Mapping[str, Any], config: Mapping[str, Any], asked: Mapping[str, Any], seed: int, output: Path
) -> dict[str, Any]:
    """Settings of a federation that takes as many steps on the source as the centralized adaptation of a config.

    Rounds are epochs, so that a factor of the epochs is one of the rounds. All sites together take as many steps in a
    round as the server, if none of these numbers is asked for.

    Args:
        content: of the run's datalist.
        config: of the stage: ``max_epochs`` and ``epoch_length`` of the centralized adaptation; ``rounds`` and
            ``sites`` as the recipe has them.
        asked: settings of the user.
        seed: see `sites_of`.
        output: folder of the stage, where the datalist of each site is written.

    Raises:
        ConfigError: see `sites_of` and `rounds_of`.
    """
    cases = content["target_training"]
    wanted = asked[SITES] if SITES in asked else min(config[SITES], len(cases))
    split = sites_of(cases, wanted, seed, content.get("target_heldout", ()))
    rounds = rounds_of(config["max_epochs"], config["epoch_length"], asked.get("rounds", config["rounds"]))
    own = {name: "$None" if value is None else value for name, value in asked.items() if name in federation_names()}
    server_steps = max(round(config["max_epochs"] * config["epoch_length"] / rounds), 1)
    datalists = {name: output / "datalists" / f"{name}.json" for name in split}
    for name, path in datalists.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json({"target_training": split[name]}, path)
    return {
        "server_steps": "@epoch_length",
        "client_steps": max(round(server_steps / len(split)), 1),
        **own,
        SITES: {name: str(path) for name, path in datalists.items()},
        "rounds": "@max_epochs",
        "max_epochs": rounds,
        "epoch_length": server_steps,
    }


def rounds_of(max_epochs: Any, epoch_length: Any, rounds: Any) -> int:
    """Rounds of a federation as long as a centralized adaptation, with a step in each at least.

    Args:
        max_epochs: of the adaptation; epoch_length likewise.
        rounds: as asked for.

    Raises:
        ConfigError: a length is no number.
    """
    lengths = [max_epochs, epoch_length, rounds]
    if not all(type(length) is int and length > 0 for length in lengths):
        raise ConfigError(f"max_epochs, epoch_length and rounds are {lengths}, expected whole numbers above 0")
    return int(min(rounds, max_epochs * epoch_length))


def check_federation(
    recipe: Recipe,
    asked: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    seed: int,
) -> None:
    """Refuse settings of a federation before any stage; nothing where the recipe has none.

    Raises:
        ConfigError: see `sites_of` and `mapseg_components.federated.Plan`.
    """
    for stage in recipe.stages:
        if stage.kind != FEDERATION:
            continue
        wanted = asked[SITES] if SITES in asked else min(stage.settings[SITES], len(cases))
        number = len(sites_of(cases, wanted, seed, held_out))
        if asked.get("min_sites", 1) > number:
            raise ConfigError(f"min_sites is {asked['min_sites']}, and there are {number} sites: lower it")
        config = ConfigParser.load_config_files([config_path("train.json"), config_path(CONFIG)])
        own = {name: value for name, value in {**stage.settings, **asked}.items() if name in config}
        try:
            parser_of(config | own).get_parsed_content("federation").aggregation()
        except Exception as error:  # MONAI wraps what a component refuses
            cause = error.__cause__ or error
            if isinstance(cause, ConfigError):
                raise cause from error
            raise ConfigError(
                f"the federation's settings cannot be used ({type(cause).__name__}: {cause}): correct {sorted(own)}"
            ) from error
