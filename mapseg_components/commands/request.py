# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``mapseg adapt`` as its record keeps them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapseg_components.commands.prepare import prepare as prepare_scans
from mapseg_components.configs import OF_ROUNDS
from mapseg_components.errors import ConfigError
from mapseg_components.plans.arguments import read_mapping
from mapseg_components.plans.rounds import REQUIRED

__all__ = ["comparable", "preparation", "resumed"]

# arguments that records of earlier versions lack, and what these did
ADDED = {"held_out": 0, "length": 1.0, "adaptation_length": None, "source_label_maps": False, "package": None}
ADDED |= {"source_models": 1, "match_size": False, "initial_model": False}
NOT_ASKED = {"input", "output", "labels", "series", "overwrite", "quiet", "verbose"}  # of mapseg prepare


def comparable(request: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result of a run so far, of its arguments: pseudo labels to come may be kept by another rule, and
    rounds of a federation to come may be closed by another one."""
    free = {REQUIRED, *OF_ROUNDS}
    settings = {name: value for name, value in (request["settings"] or {}).items() if name not in free}
    kept = {name: value for name, value in request.items() if name not in ("device", "num_threads")}
    return kept | {"settings": settings or None}


def resumed(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on.

    Args:
        path: its ``run.json``.
        request: arguments of this call.

    Raises:
        ConfigError: they are others than the run's.
    """
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["request"] = ADDED | saved["request"]
    before, now = (comparable(one) for one in (saved["request"], json.loads(json.dumps(request))))
    changed = [f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ConfigError(
            f"{path.parent} holds a run with other arguments ({'; '.join(changed)}): repeat them, or choose a new "
            "folder"
        )
    return {**saved, "request": request}


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
