# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What an earlier ``mapseg predict`` finished in a folder, for a run that goes on there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.data.volumes import read_volumes_csv
from mapseg_components.errors import ConfigError, DataError

__all__ = ["Earlier", "read_earlier"]

REMEDY = "choose another output folder, or overwrite"


@dataclass(frozen=True)
class Earlier:
    """Finished scans of an earlier run.

    Args:
        scans: case id to what the manifest says of it. volumes: case id to its rows of the table.
    """

    scans: dict[str, dict[str, Any]]
    volumes: dict[str, list[dict[str, Any]]]


def read_earlier(
    manifest: Path, table: Path, settings: Mapping[str, Any], weights: Sequence[Mapping[str, Any]]
) -> Earlier:
    """The scans that a manifest calls done and that have their volumes.

    Args:
        manifest, table: files of the earlier run.
        settings, weights: of this run, as its manifest will have them.

    Raises:
        ConfigError: the earlier run had other settings or weights, or its files cannot be read.
    """
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        before, members, scans = found["settings"], [one["sha256"] for one in found["weights"]], found["scans"]
        rows = read_volumes_csv(table)
        done = {str(scan["case"]): dict(scan) for scan in scans if scan["status"] == "done"}
    except (DataError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{manifest} or {table.name} is not of an earlier run ({error!r}): {REMEDY}") from error
    changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    changed += ["weights"] if members != [one["sha256"] for one in weights] else []
    if changed:
        raise ConfigError(
            f"{manifest.parent} holds results of other settings ({', '.join(changed[:5])}): repeat them, {REMEDY}"
        )
    volumes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        volumes.setdefault(row["case"], []).append(row)
    return Earlier({case: scan for case, scan in done.items() if case in volumes}, volumes)
