# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``mapseg adapt`` as its record keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mapseg_components.commands.prepare import prepare as prepare_scans
from mapseg_components.errors import ConfigError
from mapseg_components.plans.arguments import read_mapping
from mapseg_components.plans.rounds import REQUIRED

__all__ = ["comparable", "preparation"]

NOT_ASKED = {"input", "output", "labels", "series", "overwrite", "quiet", "verbose"}  # of mapseg prepare


def comparable(request: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result of a run so far, of its arguments: pseudo labels to come may be kept by another rule."""
    settings = {name: value for name, value in (request["settings"] or {}).items() if name != REQUIRED}
    kept = {name: value for name, value in request.items() if name not in ("device", "num_threads")}
    return kept | {"settings": settings or None}


def preparation(given: str | Mapping[str, Any] | None, label_maps: bool = False) -> dict[str, Any] | None:
    """Options of ``mapseg prepare`` that decide its results. Raises `ConfigError` for others, and for label maps."""
    if label_maps and given is not None:
        raise ConfigError("prepare is for scans, and the source is label maps alone: run mapseg prepare on the target")
    options = read_mapping("prepare", given)
    known = set(inspect.signature(prepare_scans).parameters) - NOT_ASKED
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ConfigError(f"prepare has {unknown}, expected options among {sorted(known)}")
    return options
