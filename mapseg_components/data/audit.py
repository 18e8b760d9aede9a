# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks before work starts: every finding is collected, then one error names them all."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from mapseg_components.data.datalist import SECTIONS, load_datalist, load_images
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL

__all__ = [
    "check_datalist",
    "check_labelled_scans",
    "check_pretraining_data",
    "check_scan",
    "check_scans",
    "check_training_data",
]

logger = logging.getLogger(__name__)

GEOMETRY_TOLERANCE_MM = 1e-3


def read_scan(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and affine (4, 4) of a 3D NIfTI scan; a last axis of length 1 is squeezed.

    Raises:
        DataError: the file is missing, damaged, or no 3D scan.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file: correct the datalist, or copy the scan there")
    try:
        scan = nib.load(path)
        shape = scan.shape[:3] if scan.shape[3:] == (1,) else scan.shape
        if len(shape) != 3:
            raise DataError(f"{path}: shape {scan.shape}, expected 3D: split a series into one file per volume")
        voxels = np.asanyarray(scan.dataobj).reshape(shape)
    except DataError:
        raise
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, MemoryError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as NIfTI ({reason}): copy it again") from error
    if voxels.dtype.fields is not None or np.iscomplexobj(voxels):
        raise DataError(f"{path}: voxels of type {voxels.dtype}, expected plain numbers: convert to grey values")
    if not np.isfinite(scan.affine).all() or abs(np.linalg.det(scan.affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its affine is not finite or not invertible: repair the header")
    return voxels, scan.affine


def check_scan(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read a scan to its end and refuse what cannot be segmented.

    Returns:
        its shape and affine.

    Raises:
        DataError: see `read_scan`; or NaN or infinite voxels; or no contrast.
    """
    voxels, affine = read_scan(path)
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(voxels))[0])
        raise DataError(f"{path}: {bad} voxels are NaN or infinite, the first at {first}: repair or leave the scan out")
    if voxels.min() == voxels.max():
        raise DataError(f"{path}: all voxels are {voxels.min():g}, no contrast to segment: leave the scan out")
    return voxels.shape, affine


def check_label_map(path: str | Path, known: Iterable[int], shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse a label map of another grid than its scan, or with values that nobody named.

    Raises:
        DataError: see above; the message has both shapes, or the distance in mm, or the values.
    """
    voxels, own = read_scan(path)
    if voxels.shape != shape:
        raise DataError(f"{path}: label map of shape {voxels.shape}, its scan {shape}: resample it to the scan's grid")
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape], [1])).reshape(4, -1)
    distance = float(np.abs((own - affine) @ corners)[:3].max())
    if distance > GEOMETRY_TOLERANCE_MM:
        raise DataError(
            f"{path}: its affine puts a corner {distance:.3f} mm away from where its scan has it "
            f"(tolerance {GEOMETRY_TOLERANCE_MM} mm): resample it to the scan's grid, or repair the header"
        )
    values, counts = np.unique(voxels, return_counts=True)
    unknown = [(v, n) for v, n in zip(values.tolist(), counts.tolist()) if v not in {0, *known}]
    if unknown:
        listed = ", ".join(f"{value:g} ({count} voxels)" for value, count in unknown)
        raise DataError(
            f"{path}: label map has unknown values {listed}, known are {sorted({0, *known})}: "
            "name them in labels or in dropped_labels"
        )


def check_datalist(datalist: str | Path, sections: Sequence[str] = tuple(SECTIONS)) -> dict[str, list[dict[str, Any]]]:
    """Load the sections that a datalist has and refuse duplicates and leaks between them. No scan is opened.

    Equal case ids in two sections are allowed: source and target are often numbered alike.

    Returns:
        section to cases.

    Raises:
        DataError: a case id stands twice in a section, or a file stands twice anywhere.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        try:
            found[section] = load_datalist(datalist, section)
        except ConfigError:
            if section == "source_training":
                raise
    seen: dict[str, str] = {}
    for section, cases in found.items():
        ids: set[str] = set()
        for case in cases:
            if case[CASE_ID] in ids:
                raise DataError(
                    f"{section}: case id {case[CASE_ID]!r} stands twice: set case_id, or in a folder rename a file"
                )
            ids.add(case[CASE_ID])
            real = str(Path(case[IMAGE]).resolve())
            if real in seen:
                raise DataError(f"{case[IMAGE]} stands in {seen[real]} and in {section}: keep it in one of them")
            seen[real] = section
    return found


def check_training_data(
    datalist: str | Path, labels: Mapping[str, int] | Sequence[int], dropped_labels: Sequence[int] = ()
) -> None:
    """Check all that a training run will read, before it starts; target labels are not read.

    Args:
        datalist: see `load_datalist`.
        labels: kept label values, or a mapping of structure name to value. dropped_labels: the other values.

    Raises:
        DataError: what is wrong, one finding a line, each with its file and remedy.
    """
    known = [*(labels.values() if isinstance(labels, Mapping) else labels), *dropped_labels]
    cases = check_datalist(datalist, ("source_training", "source_validation", "target_training"))
    report_findings([case for section in cases.values() for case in section], known)


def check_pretraining_data(datalist: str | Path) -> None:
    """Check the scans that pretraining will read; no label is read. Raises as `check_training_data`."""
    check_datalist(datalist, ("source_training", "target_training"))
    report_findings(load_images(datalist, ("source_training", "target_training")), [])


def check_scans(cases: Sequence[dict[str, Any]]) -> None:
    """Check scans before inference; labels are not read.

    Raises:
        DataError: there is none, two would write the same file, or what `check_scan` finds, one finding a line.
    """
    check_names(cases)
    report_findings([{IMAGE: case[IMAGE]} for case in cases], [])


def check_names(cases: Sequence[dict[str, Any]]) -> None:
    """Refuse an empty list, and cases whose results would overwrite each other. Raises `DataError`."""
    if not cases:
        raise DataError("no NIfTI scan (*.nii, *.nii.gz) found: set dataset_dir to the folder of your scans")
    names = [case[CASE_ID] for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"case ids {twice} stand twice and would overwrite each other's results: rename the files")


def check_labelled_scans(
    cases: Sequence[dict[str, Any]], labels: Mapping[str, int] | Sequence[int], dropped_labels: Sequence[int] = ()
) -> None:
    """Check scans and label maps before an evaluation. Raises as `check_training_data`."""
    check_names(cases)
    report_findings(cases, [*(labels.values() if isinstance(labels, Mapping) else labels), *dropped_labels])


def report_findings(cases: Iterable[dict[str, Any]], known: Sequence[int]) -> None:
    """Check each case, then raise one error with all findings."""
    findings = []
    for case in cases:
        try:
            shape, affine = check_scan(case[IMAGE])
            if LABEL in case:
                check_label_map(case[LABEL], known, shape, affine)
        except DataError as error:
            findings.append(str(error))
    if findings:
        raise DataError("\n".join(findings))
