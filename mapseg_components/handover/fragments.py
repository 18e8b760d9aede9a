# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a hand-over package may say: plain values, and networks of known packages. Nothing in it is executed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from monai.bundle import ConfigComponent
from torch import nn

from mapseg_components.errors import ConfigError

__all__ = ["faults_of_fragment", "faults_of_value", "network_of", "plain"]

ALLOWED = ("mapseg_components.networks.", "monai.networks.nets.")
MARKS = ("$", "@", "%")  # an expression, a reference and a macro of MONAI's configs
LARGEST, LONGEST, DEEPEST = 10**6, 200, 6


def faults_of_value(value: Any, path: str, depth: int = 0) -> Iterator[str]:
    """Names of the parts of a JSON value that no setting has: NaN, expressions, huge numbers, deep nests.

    Args:
        value: numbers, texts, lists and mappings.
        path: its name, ``a#b``.
        depth: of nesting.
    """
    if isinstance(value, (dict, list)):
        if depth == DEEPEST or len(value) > LONGEST:
            yield path
            return
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from faults_of_value(one, f"{path}#{key}", depth + 1)
    elif isinstance(value, str):
        if not value.isprintable() or len(value) > LONGEST or value.startswith(MARKS):
            yield path
    elif value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= LARGEST):
        yield path


def faults_of_fragment(fragment: Any, path: str = "network") -> Iterator[str]:
    """Names of the parts of a network's config that are no network of MONAI or of this package, or no plain values.

    Args:
        fragment: a component as MONAI's configs write it: ``_target_`` and its arguments.
        path: its name.
    """
    if not isinstance(fragment, Mapping) or "_target_" not in fragment:
        yield path
        return
    yield from faults_of_value(fragment, path)
    for name, part in components(fragment, path):
        target = part["_target_"]
        if not isinstance(target, str) or not full_name(target).startswith(ALLOWED):
            yield f"{name}#_target_"
        yield from (f"{name}#{key}" for key in part if str(key).startswith("_") and key != "_target_")


def components(fragment: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The components of a fragment, however deep, with their names."""
    if isinstance(fragment, Mapping):
        if "_target_" in fragment:
            yield path, fragment
        for key, value in fragment.items():
            yield from components(value, f"{path}#{key}")
    elif isinstance(fragment, list):
        for number, value in enumerate(fragment):
            yield from components(value, f"{path}#{number}")


def full_name(target: str) -> str:
    """Module and class of a target, of which MONAI's configs may name the class alone, such as ``DynUNet``."""
    if "." in target:
        return target
    return str(ConfigComponent({"_target_": target}, id="").resolve_module_name())


def network_of(fragment: Mapping[str, Any]) -> nn.Module:
    """A network from its fragment, which was checked before.

    Raises:
        ConfigError: its arguments make no network.
    """
    arguments = {
        key: network_of(value) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in fragment.items()
    }
    try:
        network = ConfigComponent(arguments, id="network").instantiate()
    except Exception as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), "")
        raise ConfigError(f"the package's network cannot be made ({reason}): ask for another package") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"the package's network is a {type(network).__name__}, expected a torch.nn.Module")
    return network


def plain(value: Any) -> Any:
    """A setting as JSON has it: sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
