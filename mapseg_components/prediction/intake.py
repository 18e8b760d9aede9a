# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans before the network sees them: what an earlier run finished, DICOM series converted, all checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapseg_components.checkpoints import load_weights
from mapseg_components.data.datalist import stem as stem_of
from mapseg_components.errors import ConfigError, DataError, MAPSegError
from mapseg_components.keys import CASE_ID, IMAGE
from mapseg_components.prediction.inputs import Inputs
from mapseg_components.prediction.journal import Journal
from mapseg_components.prediction.places import Output
from mapseg_components.prediction.records import Earlier, Prediction
from mapseg_components.prediction.series import convert, series_record
from mapseg_components.scans.facts import stamp_of
from mapseg_components.scans.files import is_scan
from mapseg_components.scans.findings import Finding
from mapseg_components.scans.segmentation import reference_headers
from mapseg_components.session import progress

__all__ = ["Kept", "Todo", "begun", "taken_over", "unreadable", "usable"]

logger = logging.getLogger(__name__)

Todo = tuple[Prediction, Mapping[str, Any]]  # and its case
WRITTEN = ("label_map", "probabilities", "uncertainty", "preview", "segmentation")


def begun(inputs: Inputs, source: Path, claimed: bool) -> list[Prediction]:
    """Predictions of the cases of an input, of which nothing is done yet.

    Args:
        inputs: what the input has.
        source: the input.
        claimed: files in their places are, or may be, this command's.
    """
    found = []
    for case in inputs.cases:
        series = inputs.series.get(case[CASE_ID])
        if series is None:
            scan = os.path.relpath(case[IMAGE], source) if inputs.has_dicom else case[IMAGE]
            found.append(Prediction(case[CASE_ID], scan, stamp=stamp_of(case[IMAGE]), claimed=claimed))
            continue
        stamps = [stamp_of(file) or [0, 0] for file in series.files]
        one = Prediction(case[CASE_ID], f"series {series.number}", series=series_record(series), claimed=claimed)
        one.stamp = [sum(size for size, _ in stamps), max(changed for _, changed in stamps)]
        one.place = os.path.relpath(series.folder, source)
        found.append(one)
    return found


@dataclass(frozen=True)
class Kept:
    """What a run keeps of an earlier one.

    Args:
        predictions: of this run, those of the earlier one in the places of what it finished.
        cases: ids of what it finished.
        volumes: their rows of the table.
    """

    predictions: list[Prediction]
    cases: list[str]
    volumes: list[dict[str, Any]]


def taken_over(predictions: Sequence[Prediction], earlier: Earlier | None, output: Output) -> Kept:
    """Keep what an earlier run finished: of scans that have not changed since, and of those not in the input now.

    Raises:
        ConfigError: a result would replace a file that the earlier run did not claim.
    """
    if earlier is None:
        return Kept(list(predictions), [], [])
    done = {case: one for case, one in earlier.scans.items() if one.status == "done" and case in earlier.volumes}
    found: list[Prediction] = []
    kept: list[str] = []
    unclaimed: list[Path] = []
    for one in predictions:
        place, before = output.places[one.case], earlier.scans.get(one.case)
        found.append(one)
        if before is None or not (before.claimed or before.status == "done"):
            unclaimed += [path for path in place.files(one.series is not None) if os.path.lexists(path)]
            continue
        one.claimed = True
        wanted: list[Path | None] = [place.label_map, place.sidecar]
        wanted += [place.probabilities] if before.probabilities else []  # by the same settings
        wanted += [place.uncertainty] if output.uncertainties else []
        wanted += [place.segmentation] if output.segmentations else []
        same = all(getattr(before, name) == getattr(one, name) for name in ("scan", "stamp", "series"))
        if one.case in done and same and all(path.is_file() for path in wanted if path is not None):
            named = {key: str(getattr(place, key)) for key in WRITTEN if getattr(before, key) is not None}
            found[-1] = replace(before, place=one.place, **named)
            kept.append(one.case)
    if unclaimed:
        more = f" and {len(unclaimed) - 1} more" if len(unclaimed) > 1 else ""
        raise ConfigError(f"{unclaimed[0]}{more} would be replaced, and the earlier run did not write it: move it away")
    gone = sorted(set(done) - {one.case for one in predictions})
    kept += gone
    logger.info(f"{len(kept)} scans are kept as an earlier run finished them.")
    return Kept([*found, *(done[case] for case in gone)], kept, [row for case in kept for row in earlier.volumes[case]])


def unreadable(findings: Sequence[Finding], source: Path) -> list[Prediction]:
    """What becomes of folders, or files, that could not be read as scans; but for NIfTI their paths are in no file."""
    found = []
    for number, finding in enumerate(findings, start=1):
        one = Prediction(f"unreadable_{number}", "part of the input", "failed", kind=finding.kind)
        one.message, one.place = f"{finding.what}: {finding.remedy}", os.path.relpath(finding.file or source, source)
        if is_scan(finding.file):
            one.case, one.scan, one.place = stem_of(Path(finding.file)), one.place, ""
        found.append(one)
    return found


def usable(inputs: Inputs, journal: Journal, output: Output, quiet: bool) -> list[Todo]:
    """Load the weights, convert DICOM series, check all scans; why one cannot be used is noted in the journal.

    Args:
        inputs: what the input has.
        journal: its predictions begin with those of the cases, in their order.
        output: where results go.
        quiet: no progress bars.

    Returns:
        what is to be segmented, each with its case, whose image is the file to read.

    Raises:
        CheckpointError: the weights do not fit the bundle's network.
    """
    bundle = journal.bundle
    cases = [
        {**case, IMAGE: str(journal.staging / case[IMAGE])} if case[CASE_ID] in inputs.series else case
        for case in inputs.cases
    ]
    bundle["cases"] = cases
    scans = bundle["scans"]
    scans.progress = lambda items: progress(items, "reading", quiet)
    bundle["initialize"]
    load_weights(bundle["network_def"], bundle["weights"])
    todo = [pair for pair in zip(journal.predictions, cases) if pair[0].status != "done"]  # by an earlier run
    for one, case in progress([pair for pair in todo if pair[0].series], "converting", quiet):
        series = inputs.series[one.case]
        try:
            if output.segmentations:
                reference_headers(series)
            one.notes = convert(series, Path(case[IMAGE]))
        except MAPSegError as error:
            journal.failed(one, error, str(series))
        for note in one.notes:
            logger.warning(f"{one.place}, {one.scan}: {note}")
    scans.cases = [case for one, case in todo if one.status != "failed"]
    try:
        passed = {case[CASE_ID] for case in scans.usable}
    except MAPSegError as error:
        logger.debug(f"no scan is usable: {error}")
        passed = set()
    for one, case in todo:
        if one.status != "failed" and one.case not in passed:
            refused(one, case, scans.findings)
    for finding in inputs.findings:
        logger.error(str(finding))
    return [(one, case) for one, case in todo if one.case in passed]


def refused(one: Prediction, case: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Note what the check of the scans found in one of them."""
    errors = [finding for finding in findings if finding.severity == "error" and finding.file == case[IMAGE]]
    one.status = "failed"
    one.message = "; ".join(f"{finding.what}: {finding.remedy}" for finding in errors) or "it could not be used"
    one.kind = errors[0].kind if len({finding.kind for finding in errors}) == 1 else DataError
