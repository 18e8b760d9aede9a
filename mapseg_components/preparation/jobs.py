# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan with its settings and results: whether it is done, and what stands in its way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.data.sources import Source
from mapseg_components.errors import ConfigError
from mapseg_components.files import sha256_of
from mapseg_components.preparation.settings import Settings
from mapseg_components.scans.dicom import Series
from mapseg_components.scans.findings import Finding, raise_findings
from mapseg_components.scans.sidecars import digest_of, read_sidecar

__all__ = ["Job", "identity_of", "plan", "refuse_replacing"]

ENDING = ".nii.gz"


@dataclass(frozen=True)
class Job:
    """One scan with the paths of its results."""

    source: Source
    output: Path
    settings: Settings

    @property
    def image(self) -> Path:
        """Prepared scan."""
        return self.output / f"{self.source.name}{ENDING}"

    @property
    def label(self) -> Path | None:
        """Prepared label map."""
        return None if self.source.label_name is None else self.output / f"{self.source.label_name}{ENDING}"

    @property
    def sidecar(self) -> Path:
        """Record beside the prepared scan."""
        return self.output / f"{self.source.name}.json"

    @property
    def results(self) -> dict[str, Path]:
        """Role to path, as in `Sidecar.results`."""
        return {"image": self.image, **({} if self.label is None else {"label": self.label})}


def refuse_replacing(jobs: Sequence[Job]) -> None:
    """No result may take the place of a source. Raises `ConfigError`."""
    inputs = set()
    for job in jobs:
        files = job.source.image.files if isinstance(job.source.image, Series) else (job.source.image,)
        inputs |= {os.path.realpath(file) for file in (*files, job.source.label) if file is not None}
    for job in jobs:
        for path in (*job.results.values(), job.sidecar):
            if os.path.realpath(path) in inputs:
                raise ConfigError(f"{path} is a scan of the input: choose another output")


def plan(jobs: Sequence[Job], overwrite: bool) -> list[tuple[Job, bool]]:
    """Each job, and whether it is done. Raises `ConfigError` with all results in the way, unless ``overwrite``."""
    planned, findings = [], []
    for job in jobs:
        done, obstacle = state_of(job)
        if obstacle:
            remedy = "set overwrite to true, or choose another output"
            findings.append(Finding("error", str(job.image), obstacle, remedy, ConfigError))
        planned.append((job, done))
    if not overwrite:
        raise_findings(findings)
    return planned


def state_of(job: Job) -> tuple[bool, str]:
    """Whether a job is done, and if it is not, what stands in its way."""
    there = [path for path in job.results.values() if os.path.lexists(path)]
    if not os.path.lexists(job.sidecar):
        return False, "exists, and no sidecar says how it was made" if there else ""
    try:
        sidecar = read_sidecar(job.sidecar)
    except ConfigError as error:
        return False, f"its sidecar is of no use ({error})"
    wanted = job.settings.as_json()
    differing = [
        f"{key} {sidecar.settings.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if sidecar.settings.get(key) != value
    ]
    if differing:
        return False, f"was prepared with {', '.join(differing)}"
    try:
        same = (identity_of(job.source.image), identity_of(job.source.label)) == (sidecar.source, sidecar.label_source)
        if not same:
            return False, "was prepared from a file with other content, or another name"
        if set(sidecar.results) != set(job.results) or len(there) < len(job.results):
            return False, ""
        changed = [p.name for role, p in job.results.items() if sha256_of(p) != sidecar.results[role]["sha256"]]
    except OSError:  # a source or result that cannot be read: preparing it will say so
        return False, ""
    return (False, f"was changed since: {', '.join(changed)}") if changed else (True, "")


def identity_of(file: Path | Series | None) -> dict[str, Any] | None:
    """What a sidecar says about a source; nothing about a person that the file names of the input do not say."""
    if file is None:
        return None
    if isinstance(file, Series):
        return {
            "file": file.folder.resolve().name,
            "kind": "dicom",
            "series_number": file.number,
            "modality": file.modality,
            "slices": len(file.files),
            "sha256": digest_of(file.files),
        }
    return {"file": file.name, "kind": "nifti", "sha256": sha256_of(file)}
