# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a hand-over package may say: plain values, and a network of a short list. Nothing in it is executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from monai.networks import nets
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalUNet, TwoHeadDynUNet

__all__ = ["NETWORKS", "faults_of_fragment", "faults_of_value", "network_of", "plain"]

# none of these reads a file or a server, whatever its arguments are
OF_MONAI = (nets.AttentionUnet, nets.BasicUNet, nets.DynUNet, nets.SegResNet, nets.SwinUNETR, nets.UNet, nets.VNet)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mapseg_components.networks.GlobalLocalDeepLabV3": GlobalLocalDeepLabV3,
    "mapseg_components.networks.GlobalLocalUNet": GlobalLocalUNet,
    "mapseg_components.networks.TwoHeadDynUNet": TwoHeadDynUNet,
    **{f"{prefix}{kind.__name__}": kind for kind in OF_MONAI for prefix in ("", "monai.networks.nets.")},
}
"""Names that ``_target_`` may have, word for word."""
MARKS = ("$", "@", "%")  # an expression, a reference and a macro of MONAI's configs
LARGEST, LARGEST_SIZE, LONGEST, DEEPEST = 10**6, 8192, 64, 6


def faults_of_value(value: Any, path: str, largest: float = LARGEST, depth: int = 0) -> Iterator[str]:
    """Names of the parts of a JSON value that no setting has: NaN, expressions, huge numbers, deep nests.

    Args:
        value: numbers, texts, lists and mappings.
        path: its name, ``a#b``.
        largest: amount that a number may have.
        depth: of nesting.
    """
    if isinstance(value, (dict, list)):
        if depth == DEEPEST or len(value) > LONGEST:
            yield path
            return
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from faults_of_value(one, f"{path}#{key}", largest, depth + 1)
    elif isinstance(value, str):
        if not value.isprintable() or len(value) > 200 or value.startswith(MARKS):
            yield path
    elif value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= largest):
        yield path


def faults_of_fragment(fragment: Any, path: str = "network") -> Iterator[str]:
    """Names of the parts of a network's config that are no network of `NETWORKS`, or no plain values.

    Args:
        fragment: a component as MONAI's configs write it: ``_target_`` and its arguments.
        path: its name.
    """
    if not isinstance(fragment, Mapping):
        yield path
        return
    if fragment.get("_target_") not in NETWORKS:
        yield f"{path}#_target_"
    for key, value in fragment.items():
        if str(key).startswith("_"):
            if key != "_target_":
                yield f"{path}#{key}"
            continue
        yield from faults_of_value(value, f"{path}#{key}", LARGEST_SIZE)
        yield from components(value, f"{path}#{key}")


def components(value: Any, path: str) -> Iterator[str]:
    """Names of mappings with a ``_target_`` inside a value: a component within a component is made nowhere."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield f"{path}#_target_"
        for key, one in value.items():
            yield from components(one, f"{path}#{key}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from components(one, f"{path}#{number}")


def network_of(fragment: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """A network from its fragment, which was checked before.

    Args:
        fragment: see `faults_of_fragment`.
        device: ``"meta"`` makes it without memory for its weights.

    Raises:
        ConfigError: its arguments make no network.
    """
    kind = NETWORKS[fragment["_target_"]]
    try:
        with torch.device(device):
            return kind(**{key: value for key, value in fragment.items() if key != "_target_"})
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the package's network cannot be made ({reason}): ask for another package") from error


def plain(value: Any) -> Any:
    """A setting as JSON has it: sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
