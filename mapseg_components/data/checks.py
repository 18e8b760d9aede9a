# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks of what a run will read, before it starts: one call each, one error with all findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.data.audit import APART, Audit, names_of
from mapseg_components.data.datalist import SECTIONS
from mapseg_components.keys import IMAGE
from mapseg_components.scans.findings import raise_findings

__all__ = [
    "check_datalist",
    "check_labelled_scans",
    "check_pretraining_data",
    "check_scan",
    "check_scans",
    "check_target_data",
    "check_training_data",
]


def check_scan(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read a scan to its end and refuse what cannot be segmented; negative values are allowed.

    Returns:
        its shape and affine.

    Raises:
        DataError: see `read_nifti`; or NaN or infinite voxels, no contrast, or no orientation.
    """
    audit = Audit()
    facts = audit.scan(str(path), "keep", "negative_values")
    audit.close()
    assert facts is not None
    return facts.shape, np.array(facts.affine)


def check_datalist(datalist: str | Path, sections: Sequence[str] = tuple(SECTIONS)) -> dict[str, list[dict[str, Any]]]:
    """Load the sections that a datalist has and refuse duplicates and leaks between them. No scan is opened.

    Equal case ids in source and target are allowed: they are often numbered alike. A scan may be in
    ``target_training`` and in ``target_test``.

    Returns:
        section to cases.

    Raises:
        ConfigError: there is no datalist, it has no ``source_training``, or a section is empty.
        DataError: a case id occurs twice in a section, or in source training and validation; or a file occurs twice.
    """
    audit = Audit()
    cases = audit.datalist(datalist, sections)
    audit.close()
    return cases


def check_training_data(
    datalist: str | Path,
    labels: Mapping[str, int] | Sequence[int],
    dropped_labels: Sequence[int] = (),
    source_negative_values: str | None = None,
    target_negative_values: str | None = None,
    sections: Sequence[str] = APART,
    given: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    label_maps: bool | None = None,
    **options: Any,
) -> None:
    """Check all that a training run will read, before it starts; target labels are not read.

    Args:
        datalist: see `load_datalist`.
        labels: kept label values, or a mapping of structure name to value.
        dropped_labels: the other values, or ``"others"`` for any.
        source_negative_values: see `NegativeValues`; ``None`` refuses negative voxels.
        target_negative_values: the same for the target.
        sections: what is looked at, by default both sides; a stage that reads one side names its sections.
        given: cases in place of the datalist's, see `given_cases`.
        label_maps: whether the run makes its source images from label maps, as its datalist must say then; ``None``
            allows both.
        options: see `Audit`.

    Raises:
        ConfigError, DataError or ResourceError: what is wrong, one finding a line, each with its file and remedy;
            `DataError` if the findings are of several kinds.
    """
    policies = source_negative_values, target_negative_values
    Audit(**options).training(datalist, labels, dropped_labels, *policies, sections, given, label_maps).close()


def check_pretraining_data(
    datalist: str | Path,
    negative_values: str | None = None,
    **options: Any,
) -> None:
    """Check the scans that pretraining will read; no label is read. Arguments and errors as `check_training_data`."""
    Audit(**options).pretraining(datalist, negative_values).close()


def check_target_data(datalist: str | Path, negative_values: str | None = None, **options: Any) -> None:
    """Check what a site without source data will read. Arguments and errors as `check_training_data`."""
    Audit(**options).target(datalist, negative_values).close()


def check_labelled_scans(
    cases: Sequence[Mapping[str, Any]],
    labels: Mapping[str, int] | Sequence[int],
    dropped_labels: Sequence[int] = (),
    negative_values: str | None = None,
    **options: Any,
) -> None:
    """Check scans and label maps before an evaluation. Arguments and errors as `check_training_data`."""
    Audit(**options).labelled(cases, labels, dropped_labels, negative_values).close()


def check_scans(cases: Sequence[Mapping[str, Any]], negative_values: str | None = "keep") -> None:
    """Check scans, all or none; labels are not read. To go on without the bad ones see `ScanAudit`.

    Raises:
        ConfigError: there is none.
        DataError: two would write the same file, or what `check_scan` finds.
    """
    raise_findings(names_of(cases))
    audit = Audit()
    for case in cases:
        audit.scan(case[IMAGE], negative_values, "negative_values")
    audit.close()
