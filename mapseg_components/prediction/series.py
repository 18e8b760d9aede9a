# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""DICOM series as scans of ``mapseg predict``: what is written of them names modality, number and a checksum only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.data.sources import find_series
from mapseg_components.errors import ConfigError
from mapseg_components.keys import CASE_ID, IMAGE
from mapseg_components.scans.dicom import Series, has_dicom, read_series
from mapseg_components.scans.findings import Finding
from mapseg_components.transforms.saving import write_verified

__all__ = ["convert", "series_cases", "series_record", "without_path"]


def series_cases(
    source: Path, output: Path
) -> tuple[list[dict[str, Any]], dict[str, Series], list[Finding], dict[Path, str]]:
    """DICOM series at any depth of a folder as cases, whose files `convert` has yet to write.

    Args:
        source: the folder; of a NIfTI file there are none.
        output: is not looked into.

    Returns:
        cases by name; case id to series; what was found and cannot be used; files without a scan, with the reason.

    Raises:
        ConfigError: ``source`` is one DICOM file.
    """
    if source.is_file():
        if has_dicom(source):
            raise ConfigError(f"{source} is one DICOM file: name the folder of its series")
        return [], {}, [], {}
    found, findings, known = find_series(source, leave_out=output)
    cases = [{IMAGE: f"{series.name}.nii", CASE_ID: series.name} for series in found]
    return cases, {series.name: series for series in found}, findings, known


def convert(series: Series, path: Path) -> list[str]:
    """Write a series as NIfTI, in int16 if that holds its values, else in float32; it is read back and compared.

    Returns:
        what was done to its values beyond rescaling.

    Raises:
        DataError: the series is no volume, see `read_series`.
        ResourceError: memory or disk do not suffice.
    """
    scan = read_series(series)
    with np.errstate(invalid="ignore"):  # NaN and what int16 does not hold stay float32
        whole = scan.voxels.astype(np.int16)
    voxels = whole if np.array_equal(whole, scan.voxels) else scan.voxels
    write_verified(path, voxels, scan.affine, path)
    return list(scan.notes)


def series_record(series: Series) -> dict[str, Any]:
    """What the manifest says of a series."""
    number, files = series.number, len(series.files)
    return {"number": number, "modality": series.modality, "files": files, "uid_sha256": series.uid_sha256}


def without_path(command: Sequence[str], path: Path) -> list[str]:
    """A command without the path of the input, which may hold a patient's name."""
    words = [word.removeprefix("--input=") for word in command]
    return [
        f"{'--input=' if word != one else ''}INPUT" if Path(one) == path else word for word, one in zip(command, words)
    ]
