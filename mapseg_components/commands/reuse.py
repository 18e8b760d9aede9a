# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages that another run of ``mapseg adapt`` has trained already: taken over where all that decides them is equal."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError

__all__ = ["identity_of", "runs_to_reuse", "take_over"]

OWN_FOLDER = "RUN"  # stands for the run's folder in what is compared


def runs_to_reuse(given: str | Sequence[str] | None) -> list[Path]:
    """Folders of runs.

    Args:
        given: paths, or text with commas between them.

    Raises:
        ConfigError: one holds no run of ``mapseg adapt``.
    """
    names = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given or [])
    folders = [Path(name).absolute() for name in names if name]
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise ConfigError(f"reuse names {folder}, which holds no run of mapseg adapt (run.json): correct the path")
    return folders


def identity_of(
    stage: str,
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Mapping[str, str],
    cases: Iterable[Mapping[str, Any]],
) -> str | None:
    """Checksum of all that decides what a training gives.

    Args:
        stage: name.
        folder: of the run.
        record: content of its ``run.json``, with the identities of the stages before in ``identities``.
        config: settings of the stage, all overlays applied, without those of `files`.
        files: settings that are files of earlier stages or of this one, relative to the folder of stages.
        cases: of the datalist that it reads.

    Returns:
        ``None`` where an earlier stage that it builds on has none, such as one of pseudo labels.
    """
    known = {**record.get("identities", {}), stage: OWN_FOLDER}
    before = {name: (known.get(Path(path).parts[0]), path) for name, path in files.items()}
    if any(identity is None for identity, _ in before.values()):
        return None
    images = []
    for case in cases:
        for path in (value for value in case.values() if isinstance(value, str) and Path(value).is_file()):
            state = Path(path).stat()
            images.append([path, state.st_size, state.st_mtime_ns])
    request = record["request"]
    content = {
        "config": config,
        "before": before,
        "cases": images,
        "versions": record["versions"],
        "threads": request["num_threads"],
        "device": request["device"],
    }
    text = json.dumps(content, sort_keys=True, default=str).replace(str(folder), OWN_FOLDER)
    return hashlib.sha256(text.encode()).hexdigest()


def take_over(stage: str, identity: str | None, output: Path, runs: Sequence[Path]) -> tuple[Path, dict] | None:
    """Copy a finished stage of another run, if one of them has the same.

    Args:
        stage: name.
        identity: see `identity_of`.
        output: folder of the stage here; nothing is taken over where there is one already.
        runs: folders of other runs.

    Returns:
        the run it is from, and its record; ``None`` if there is none.
    """
    if identity is None or output.exists():
        return None
    for run in runs:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if stage not in record.get("done", ()) or record.get("identities", {}).get(stage) != identity:
            continue
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{stage}.", dir=output.parent) as unfinished:
            copy = Path(unfinished) / stage
            shutil.copytree(run / "stages" / stage, copy)
            copy.rename(output)
        return run, record
    return None
