# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What handlers read from the output of any engine: loss terms of a trainer, label maps of an evaluator."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from mapseg_components.errors import ConfigError
from mapseg_components.keys import TOTAL_LOSS

__all__ = ["affine_of", "cases_of", "free_name", "label_map_of", "loss_terms"]


def loss_terms(engine: Engine) -> dict[str, torch.Tensor]:
    """The scalars of a trainer's output, which MONAI stores per batch or, decollated, for each item.

    Raises:
        ConfigError: there is no ``loss`` among them.
    """
    output = engine.state.output
    first = output[0] if isinstance(output, (list, tuple)) and output else output
    terms = {}
    if isinstance(first, Mapping):
        for name, value in first.items():
            if isinstance(value, numbers.Number) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                terms[str(name)] = torch.as_tensor(value).detach().as_subclass(torch.Tensor).reshape(())
    if TOTAL_LOSS not in terms:
        found = sorted(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
        raise ConfigError(f"the trainer's output is {found}, expected a mapping with the scalar {TOTAL_LOSS!r}")
    return terms


def cases_of(engine: Engine) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each case of an evaluator's batch with its output.

    Raises:
        ConfigError: they are not decollated.
    """
    batch, output = engine.state.batch, engine.state.output
    if not (isinstance(batch, list) and isinstance(output, list) and len(batch) == len(output)):
        raise ConfigError(
            f"the evaluator has a {type(batch).__name__} as batch and a {type(output).__name__} as output, expected "
            "lists of as many cases: leave decollate of MONAI's evaluator at True"
        )
    return list(zip(batch, output))


def label_map_of(case: Mapping[str, Any], key: str, classes: int) -> torch.Tensor:
    """A label map (X, Y, Z), int64 on the CPU, of a case.

    Raises:
        ConfigError: it is missing, has more than one channel, or values that are not classes.
    """
    if key not in case:
        raise ConfigError(f"the evaluator's output has {sorted(map(str, case))}, expected {key!r} among them")
    label_map = torch.as_tensor(case[key]).detach().as_subclass(torch.Tensor).cpu()
    if label_map.ndim != 4 or len(label_map) != 1:
        raise ConfigError(
            f"{key} has shape {tuple(label_map.shape)}, expected a label map (1, X, Y, Z): take the argmax in "
            "postprocessing (AsDiscreted) before this handler reads it"
        )
    indices = label_map[0].long()
    low, high = float(label_map.min()), float(label_map.max())
    if not torch.equal(indices.to(label_map.dtype), label_map[0]) or low < 0 or high >= classes:
        raise ConfigError(
            f"{key} has values from {low:g} to {high:g}, expected whole numbers from 0 to {classes - 1}: name all "
            "structures, and take the argmax before"
        )
    return indices


def affine_of(case: Mapping[str, Any], key: str) -> torch.Tensor:
    """Affine (4, 4) of an entry. Raises `ConfigError` where it has none."""
    if not isinstance(case[key], MetaTensor) or case[key].affine.shape != (4, 4):
        raise ConfigError(f"{key} is a {type(case[key]).__name__} without voxel size, expected a MetaTensor of a scan")
    return case[key].affine.cpu()


def free_name(known: Mapping[str, Any], name: str) -> str:
    """A name that is not in use: ``a``, then ``a (2)``."""
    count, result = 1, name
    while result in known:
        count += 1
        result = f"{name} ({count})"
    return result
