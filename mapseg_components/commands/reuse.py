# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages that another run of ``mapseg adapt`` has trained already: taken over where all that decides them is equal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError
from mapseg_components.files import sha256_of
from mapseg_components.session import choose_device

__all__ = ["copy_stage", "finished_in", "identity_of", "record_of", "runs_to_reuse"]

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
    sections: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str | None:
    """Checksum of all that decides what a training gives.

    Files that the run has made itself count by their content, others by size and time of change.

    Args:
        stage: name.
        folder: of the run.
        record: content of its ``run.json``, with the identities of the stages before in ``identities``.
        config: settings of the stage, all overlays applied, without those of `files`.
        files: settings that are files of earlier stages or of this one, relative to the folder of stages.
        sections: of the datalist that it reads: name to cases.

    Returns:
        ``None`` where an earlier stage that it builds on has none, such as one of pseudo labels.
    """
    known = {**record.get("identities", {}), stage: OWN_FOLDER}
    before = {name: (known.get(Path(path).parts[0]), path) for name, path in files.items()}
    if any(identity is None for identity, _ in before.values()):
        return None
    request = record["request"]
    content = {
        "config": config,
        "classes": list(config.get("labels", ())),  # their order is that of the network's
        "before": before,
        "sections": sections,
        "files": [state_of(Path(path), folder) for path in texts_of(sections) if Path(path).is_file()],
        "versions": record["versions"],
        "threads": request["num_threads"] or os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        "device": str(choose_device(request["device"])),
    }
    text = json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)  # the folder's name as it is
    for mark in '/"':  # a folder beside it may begin with the same name
        text = text.replace(f"{folder}{mark}", f"{OWN_FOLDER}{mark}")
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def texts_of(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from texts_of(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from texts_of(one)


def state_of(path: Path, folder: Path) -> list[Any]:
    """What tells a file from another one of its name."""
    if path.is_relative_to(folder):
        return [sha256_of(path)]
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def record_of(run: Path) -> dict[str, Any]:
    """``run.json`` of a run; empty where it cannot be read."""
    try:
        return dict(json.loads((run / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def finished_in(stage: str, identity: str | None, runs: Sequence[Path]) -> Path | None:
    """The first of some runs that has finished a stage with an identity; ``None`` if there is none."""
    for run in runs:
        record = record_of(run)
        same = identity is not None and record.get("identities", {}).get(stage) == identity
        if same and stage in record.get("done", ()) and (run / "stages" / stage).is_dir():
            return run
    return None


def copy_stage(run: Path, output: Path) -> None:
    """Copy a stage's folder of another run, all of it or nothing.

    Args:
        run: the other one.
        output: folder of the stage here, which is not there yet.
    """
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / "stages" / output.name, unfinished)
    unfinished.rename(output)
