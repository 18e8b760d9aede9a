# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What is compared: methods as they come, an oracle, or one method with named changes of its settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.methods.report import ORACLE
from benchmarks.methods.task import checked_arguments, mapping_of, read_mapping_file
from mapseg_components.errors import ConfigError
from mapseg_components.plans.bundle import check_names
from mapseg_components.plans.recipes import read_recipe

__all__ = ["Variant", "of_methods", "read_knobs", "slug"]


@dataclass(frozen=True)
class Variant:
    """A method as it is run.

    Args:
        name: in tables.
        method: recipe of ``mapseg adapt``.
        settings: on top of the task's.
        arguments: of ``mapseg adapt``, on top of the task's.
        oracle: whether it learns labelled target scans in the place of the source's.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    oracle: bool = False


def of_methods(names: list[str], oracle: str | None) -> list[Variant]:
    """Methods as they come, and last the oracle by the recipe of a name. Raises `ConfigError` for an unknown one."""
    found = [Variant(read_recipe(name).name, name) for name in dict.fromkeys(names)]
    return [*found, Variant(ORACLE, read_recipe(oracle).name, oracle=True)] if oracle else found


def read_knobs(path: Path) -> list[Variant]:
    """Variants of one method, of a YAML or JSON file with ``method`` and ``variants``; the first is compared with.

    Raises:
        ConfigError: the file is of another form, or a method or setting is unknown.
    """
    content = read_mapping_file(path)
    if set(content) != {"method", "variants"}:
        raise ConfigError(f"{path} has {sorted(content)}, expected method and variants")
    recipe = read_recipe(str(content["method"]))
    found = []
    for name, change in mapping_of(content["variants"], f"{path}, variants").items():
        origin = f"{path}, {name}"
        change = mapping_of(change or {}, origin)
        unknown = sorted(set(change) - {"settings", "arguments"})
        if unknown:
            raise ConfigError(f"{origin} has {unknown}, expected settings and arguments")
        settings = mapping_of(change.get("settings") or {}, f"{origin}, settings")
        check_names(settings, recipe)
        arguments = checked_arguments(change.get("arguments") or {}, path)
        found.append(Variant(str(name), recipe.name, settings, arguments))
    if len(found) < 2 or len({slug(one.name) for one in found}) < len(found):
        raise ConfigError(f"{path} has the variants {[one.name for one in found]}, expected two or more, named apart")
    return found


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^\w.+-]+", "_", name)
