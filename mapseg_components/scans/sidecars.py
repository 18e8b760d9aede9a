# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The JSON file beside a prepared scan: where it came from, what was done in which order, and its two grids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.errors import ConfigError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.scans.findings import fault

__all__ = ["Grid", "Sidecar", "digest_of", "read_sidecar", "write_sidecar"]

FORMAT = 1  # raise it when the meaning of an entry changes


@dataclass(frozen=True)
class Grid:
    """Voxels per axis, and the affine (4, 4) from voxel index to mm in RAS+, in full precision."""

    shape: tuple[int, ...]
    affine: list[list[float]]


@dataclass(frozen=True)
class Sidecar:
    """Content of the file.

    Args:
        source: ``file`` (a name without its folder), ``kind``, ``sha256``; for DICOM, the series number.
        settings: of the command.
        label_source: as ``source``, of the label map, or ``None``.
        native: grid of the source.
        prepared: grid of the result.
        steps: what was done, in order: each has ``step`` and its parameters.
        results: ``image`` and perhaps ``label``, each with ``file`` and ``sha256``.
        versions: of the software.
    """

    source: dict[str, Any]
    settings: dict[str, Any]
    label_source: dict[str, Any] | None = None
    native: Grid | None = None
    prepared: Grid | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)


def write_sidecar(sidecar: Sidecar, path: Path) -> None:
    """Write it, whole or not at all. Raises `ResourceError`."""
    content = {key: vars(value) if isinstance(value, Grid) else value for key, value in vars(sidecar).items()}
    write_json({"format": FORMAT, **content}, path)


def read_sidecar(path: str | Path) -> Sidecar:
    """What `write_sidecar` wrote.

    Raises:
        ConfigError: there is none, it cannot be read, or it is not what `write_sidecar` of this version wrote.
    """
    remedy = "name the .json file beside the prepared scan, or prepare the scan again"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fault(path, f"cannot be read as a sidecar ({error})", remedy, ConfigError) from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise fault(path, f"no sidecar of a prepared scan in format {FORMAT}", remedy, ConfigError)
    try:
        return Sidecar(
            source=dict(content["source"]),
            settings=dict(content["settings"]),
            label_source=None if content["label_source"] is None else dict(content["label_source"]),
            native=grid_from(content["native"]),
            prepared=grid_from(content["prepared"]),
            steps=[dict(step) for step in content["steps"]],
            results={
                role: {key: str(entry[key]) for key in ("file", "sha256")} for role, entry in content["results"].items()
            },
            versions=dict(content["versions"]),
        )
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise fault(path, "a sidecar with missing or wrong entries", remedy, ConfigError) from error


def grid_from(content: Any) -> Grid | None:
    """Grid of a sidecar's entry. Raises `ValueError` and the like if it is none."""
    if content is None:
        return None
    affine = np.array(content["affine"], dtype=float).reshape(4, 4)
    shape = tuple(int(side) for side in content["shape"])
    if len(shape) != 3 or min(shape) < 1 or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError("no grid")
    return Grid(shape, affine.tolist())


def digest_of(files: Sequence[Path]) -> str:
    """sha256 of a file; of several, sha256 of theirs, sorted, so that neither names nor order matter."""
    digests = sorted(sha256_of(path) for path in files)
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
