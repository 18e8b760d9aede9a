# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``mapseg predict`` and ``mapseg check`` find in their input: scans, what cannot be used, and all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapseg_components.data import Finding, bids_scans, is_bids, load_scans
from mapseg_components.data.audit import names_of
from mapseg_components.data.datalist import scans_below
from mapseg_components.data.left_out import LeftOut, in_one_line, left_out, scans_and_label_maps
from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE
from mapseg_components.prediction.series import series_cases
from mapseg_components.scans.dicom import Series
from mapseg_components.scans.files import FORMATS, is_picture, is_scan
from mapseg_components.scans.findings import raise_findings

__all__ = ["Inputs", "inputs_of", "nifti_inputs"]

OF_BIDS = "not among the scans that were chosen, sub-*/[ses-*/]anat/*_{}.nii[.gz]"
NO_DICOM = "DICOM: mapseg prepare converts it, mapseg predict reads it"


@dataclass(frozen=True)
class Inputs:
    """What an input has.

    Args:
        cases: scans.
        series: case id to DICOM series.
        findings: what cannot be used, each an error.
        left_out: all else that lies there.
    """

    cases: list[dict[str, Any]]
    series: dict[str, Series] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    with_dicom: bool = False

    @property
    def has_dicom(self) -> bool:
        """Whether there is DICOM, readable or not, so that the input's path may name a person."""
        return bool(self.series or self.with_dicom or [one for one in self.findings if not is_scan(one.file)])


def inputs_of(source: Path, modality: str | None, output: Path, derivative: bool) -> Inputs:
    """Scans, DICOM series at any depth, and the rest of what ``mapseg predict`` is given.

    Args:
        source: a scan, a folder or a BIDS dataset.
        modality: of a BIDS dataset.
        output: is not looked into.
        derivative: whether ``source`` is a BIDS dataset.

    Raises:
        ConfigError: there is nothing to segment, or a modality for what is no BIDS dataset.
        DataError: results of two scans would have one name.
    """
    if derivative:
        return nifti_inputs(source, modality, output)
    if modality is not None:
        raise ConfigError(f"modality is {modality!r}, but {source} is no BIDS dataset: leave it out")
    if not source.exists():
        raise ConfigError(f"{source} does not exist: correct the path of the scans")
    cases, series, findings, known = series_cases(source, output)
    scans, maps = scans_of(source)
    if cases and not source.is_file():  # images beside DICOM are pictures of it
        scans = [case for case in scans if not is_picture(case[IMAGE])]
    scans, unnamed = named_well(scans)
    findings = [*unnamed, *findings]
    taken = [case[IMAGE] for case in scans] + [file for one in series.values() for file in one.files]
    left = left_out(source, [*taken, *(finding.file for finding in findings)], known, output)
    if not (scans or cases or findings):
        raise ConfigError(
            f"{source} has no NIfTI scan or image ({FORMATS}){'' if maps else scans_below(source)}, and no DICOM "
            f"series: correct the path{in_one_line(left, source)}"
        )
    return Inputs([*scans, *cases], series, findings, left, with_dicom=bool(known))


def nifti_inputs(source: Path, modality: str | None, output: Path | None = None) -> Inputs:
    """NIfTI scans of a file, a folder or a BIDS dataset, and the rest of what lies there.

    Raises:
        ConfigError: there is none.
        DataError: results of two scans would have one name.
    """
    if is_bids(source):
        cases, unnamed = named_well(bids_scans(source, modality))
        taken = [*(case[IMAGE] for case in cases), *(finding.file for finding in unnamed)]
        left = left_out(source, taken, results=output, nifti=OF_BIDS.format(modality or "*"), dicom=NO_DICOM)
        return Inputs(cases, findings=unnamed, left_out=left)
    scans, maps = scans_of(source)
    cases, unnamed = named_well(scans)
    taken = [*(case[IMAGE] for case in cases), *(finding.file for finding in unnamed)]
    left = left_out(source, taken, results=output, dicom=NO_DICOM)
    if not (cases or unnamed):
        raise ConfigError(
            f"{source} has no NIfTI scan or image ({FORMATS}){'' if maps else scans_below(source)}: correct the path "
            f"(mapseg prepare converts DICOM){in_one_line(left, source)}"
        )
    return Inputs(cases, findings=unnamed, left_out=left)


def scans_of(source: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """NIfTI scans of a folder, or one file as it is; and what are label maps by their names."""
    cases = load_scans(source)
    return (cases, []) if source.is_file() else scans_and_label_maps(cases, IMAGE)


def named_well(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Cases whose results can be named, and an error for each other one. Raises `DataError` for two of one name."""
    found = names_of(cases) if cases else []
    raise_findings(finding for finding in found if not finding.file)
    unnamed = {finding.file for finding in found}
    return [case for case in cases if case[IMAGE] not in unnamed], list(found)
