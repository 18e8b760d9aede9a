# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg check``: read every scan once to its last byte, and report all faults and unusual scans."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mapseg_components.data import (
    SECTIONS,
    Audit,
    Finding,
    is_bids,
    refuse_existing,
)
from mapseg_components.data.audit import APART
from mapseg_components.data.datalist import labels_file, open_datalist
from mapseg_components.data.labels import read_labels
from mapseg_components.data.left_out import left_out, notes_of
from mapseg_components.data.plausibility import plausibility
from mapseg_components.data.scan_statistics import StatisticsRecord
from mapseg_components.errors import ConfigError, DataError, MAPSegError
from mapseg_components.files import require_writable, write_json, write_text
from mapseg_components.keys import IMAGE, LABEL, TISSUES
from mapseg_components.prediction.inputs import NO_DICOM, nifti_inputs
from mapseg_components.reports import answer, page, sortable_table, text_table
from mapseg_components.session import listed, working
from mapseg_components.transforms import AssumeOrientation, FillNonFinite, NegativeValues

__all__ = ["CheckReport", "check"]

SEVERITIES = ("error", "warning", "note")
JSON, HTML = "check.json", "check.html"
HEADS = {"shape": "shape (voxels)", "spacing_mm": "spacing (mm)", "lowest": "lowest value", "highest": "highest value"}
GUESSES = (
    "Errors stop a run. Warnings and notes are guesses from the set as a whole: an unusual scan may be right, and a "
    "usual one wrong."
)
SIDE = {
    "source_training": "source",
    "source_validation": "source",
    "target_training": "target",
    "target_heldout": "target",
    "target_labelled": "target",
    "target_test": "target",
}


@dataclass
class CheckReport:
    """Result of `check`.

    Args:
        input: what was checked.
        files: one row per file that was read.
        findings: errors first.
    """

    input: str
    files: list[dict[str, Any]]
    findings: list[Finding]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """3 if an error was found, which would stop a run; else 0."""
        return DataError.exit_code if self.counts["error"] else 0

    def verdict(self) -> str:
        """One sentence."""
        counts = self.counts
        numbers = ", ".join(f"{counts[one]} {one}{'s' * (counts[one] != 1)}" for one in SEVERITIES)
        end = "A run would refuse these data." if counts["error"] else "No blocking finding."
        return f"{len(self.files)} file{'s' * (len(self.files) != 1)} read; {numbers}. {end}"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Findings as severity, file below the input, what, remedy."""
        return [(f.severity, below(f.file, self.input), f.what, f.remedy) for f in self.findings]

    def __str__(self) -> str:
        rows = [(s, where, f"{what}{': ' if remedy else ''}{remedy}") for s, where, what, remedy in self.rows()]
        table = text_table(("severity", "where", "what: remedy"), rows, wrap_last=True)
        return f"{table}\n\n{self.verdict()}" if rows else self.verdict()

    def html(self) -> str:
        """Self-contained page."""
        names = ("file", "set", "shape", "spacing_mm", "orientation", "lowest", "highest", "status")
        files = [
            [below(row["file"], self.input) if n == "file" else shown(row[n]) for n in names] for row in self.files
        ]
        counts = self.counts
        kind = next((severity for severity in SEVERITIES[:2] if counts[severity]), "good")
        headline = "A run would refuse these data." if counts["error"] else "No blocking finding."
        figures = [("files read", f"{len(self.files)}", ""), *((f"{one}s", f"{counts[one]}", "") for one in SEVERITIES)]
        head = [HEADS.get(name, name) for name in names]
        return page(
            f"Check of {Path(self.input).name}",
            f"{answer(kind, headline, figures, [GUESSES])}\n<h2>Findings</h2>\n{findings_table(self.rows())}\n"
            f"<h2>Files</h2>\n{sortable_table(head, files, SEVERITIES)}\n",
        )


def check(
    input: str,
    *,
    datalist: bool = False,
    labels: str | None = None,
    dropped_labels: str | None = None,
    modality: str | None = None,
    negative_values: str | None = None,
    assume_orientation: str | None = None,
    non_finite: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> CheckReport:
    """Read every scan to its last byte and report what is wrong, and what is unusual.

    Errors are what stops a training or an inference: damaged files and headers, orientation that is unknown or
    contradicts itself, voxels that are not finite, label maps that are not on their scan's grid or have unknown values,
    scans that occur twice. Warnings and notes come from the set as a whole: voxel size, field of view, CT in HU or with
    1024 added, skull-stripped or not, orientation by content, left and right, histograms of source and target.

    Args:
        input: a scan, a folder of scans, a BIDS dataset, a datalist (JSON), a folder with source/ and target/, or a
            dataset of nnU-Net or the Medical Segmentation Decathlon (folder or dataset.json).
        datalist: take a folder as one with source/ and target/, even if source/ is missing.
        labels: a JSON object of structure name to value, as text or a file, or the folder of a bundle; by default
            what the datalist says.
        dropped_labels: values of label maps that are known and not used, with commas between them; others for all
            that are not named.
        modality: of a BIDS dataset with several, e.g. T2w.
        negative_values: clip, shift or keep, as the run will have it; by default negative values are a warning.
        assume_orientation: three letters, e.g. RAS, for scans whose header names none; by default that is an error.
        non_finite: background allows NaN and infinite voxels; by default they are an error.
        output: folder for check.json and check.html; by default nothing is written.
        overwrite: replace an earlier report.
        num_threads: of the CPU.
        quiet: no progress bar, errors only.
        verbose: all that is logged, and tracebacks.

    Returns:
        the files and findings; its text is the table.

    Raises:
        ConfigError: there is nothing at input, an option is wrong, or an earlier report exists.
        ResourceError: the output folder cannot be written.
    """
    with working(num_threads, quiet, verbose):
        source = Path(input)
        if not source.exists():
            raise ConfigError(f"{source} does not exist: correct the path of the scans")
        if output is not None:
            refuse_existing([Path(output) / JSON, Path(output) / HTML], output, overwrite)
            require_writable(output)
        for transform, value in (
            (NegativeValues, negative_values),
            (AssumeOrientation, assume_orientation),
            (FillNonFinite, non_finite),
        ):
            transform(value)  # refuses what it does not know
        if modality is not None and not is_bids(source):
            raise ConfigError(f"modality is {modality!r}, but {source} is no BIDS dataset: leave it out")
        audit, record = Audit(None, "full", assume_orientation, non_finite), StatisticsRecord()
        audit.record = record
        policy = negative_values or "keep"
        if datalist or source.suffix == ".json" or is_datalist_folder(source):
            files = of_datalist(audit, record, source, labels, listed(dropped_labels), policy, quiet)
        else:
            for name, value in (("labels", labels), ("dropped_labels", dropped_labels)):
                if value is not None:
                    raise ConfigError(f"{name} is {value!r}, but {source} is no datalist: leave it out")
            files = of_scans(audit, record, source, modality, policy, quiet, None if output is None else Path(output))
        facts = {path: found for (path, with_values), found in record.known.items() if not with_values}
        groups: dict[str, list[str]] = {}
        for path, (side, is_label) in files.items():
            if not is_label:
                groups.setdefault(side, []).append(path)
        found = [*audit.findings, *plausibility(groups, record.statistics, facts, negative_values)]
        findings = sorted(dict.fromkeys(found), key=lambda f: SEVERITIES.index(f.severity))
        result = CheckReport(input, [row_of(path, *files[path], record, findings) for path in files], findings)
        if output is not None:
            write(result, Path(output))
        return result


def is_datalist_folder(folder: Path) -> bool:
    """Whether a folder has ``source``, or is a dataset of nnU-Net or the Decathlon."""
    return folder.is_dir() and ((folder / SECTIONS["source_training"]).is_dir() or open_datalist(folder) is not None)


def of_scans(
    audit: Audit,
    record: StatisticsRecord,
    source: Path,
    modality: str | None,
    policy: str,
    quiet: bool,
    output: Path | None = None,
) -> dict[str, tuple[str, bool]]:
    """Check scans without labels; returns file to its set, and whether it is a label map."""
    found = nifti_inputs(source, modality, output)
    cases = found.cases
    audit.findings += [*found.findings, *notes_of(found.left_out, source)]
    with bar(len(cases), record, quiet):
        for case in cases:
            audit.mask(case, audit.scan(case[IMAGE], policy, "negative_values"))
    return {case[IMAGE]: ("scans", False) for case in cases}


def has_target_alone(datalist: Path) -> bool:
    """Whether a datalist file names target scans and nothing of a source, as for an adaptation without one."""
    try:
        names = [*(open_datalist(datalist) or {})] if datalist.is_file() else []
    except MAPSegError:  # reported with its sections
        return False
    return "target_training" in names and not [name for name in names if name.startswith("source")]


def of_datalist(
    audit: Audit,
    record: StatisticsRecord,
    source: Path,
    labels: str | None,
    dropped: Sequence[str],
    policy: str,
    quiet: bool,
) -> dict[str, tuple[str, bool]]:
    """Check a datalist as training and evaluation would; returns as `of_scans`."""
    wanted = tuple(name for name in SECTIONS if not (has_target_alone(source) and name.startswith("source")))
    sections = audit.datalist(source, wanted)
    files = {case[IMAGE]: (SIDE[section], TISSUES in case) for section, cases in sections.items() for case in cases}
    maps = {case[LABEL]: SIDE[s] for s, cases in sections.items() for case in cases if LABEL in case}
    named = read_labels(labels or labels_of(source))
    with bar(len(files) + len(maps), record, quiet):
        known = named or {str(value): value for value in values_of(record, list(maps))}
        try:
            ignored = "others" if list(dropped) == ["others"] else [int(value) for value in dropped]
        except ValueError as error:
            raise ConfigError(f"dropped_labels is {','.join(dropped)!r}, expected whole numbers") from error
        audit.training(
            source,
            known or [],
            ignored,
            policy,
            policy,
            [name for name in (*APART, "target_heldout") if name in wanted],
        )
        if "target_test" in sections:
            audit.labelled(sections["target_test"], known, ignored, policy)
    if source.is_dir():
        reported = [labels_of(source) or "", *(finding.file for finding in audit.findings)]
        taken = [*files, *maps, *(file for file in reported if file)]
        left = left_out(source, taken, nifti="no scan or label map of the datalist", dicom=NO_DICOM)
        audit.findings += notes_of(left, source)
    if not named and maps:
        values = ", ".join(sorted(known)) or "none"
        text = f"no structures are named: all values of the label maps are taken as known ({values})"
        audit.findings.append(Finding("note", str(source), text, "name them in labels of the datalist, or by labels"))
    return {**files, **{path: (side, True) for path, side in maps.items()}}


def labels_of(source: Path) -> str | None:
    """The file beside the scans that names the labels, if there is one."""
    found = labels_file(source)
    return None if found is None else str(found)


def values_of(record: StatisticsRecord, maps: Sequence[str]) -> list[int]:
    """Whole values above 0 of all label maps that can be read."""
    found: set[int] = set()
    for path in maps:
        try:
            found |= {int(value) for value, _ in record.facts(path, True).values or () if value > 0 and value % 1 == 0}
        except MAPSegError:  # the audit reports it
            continue
    return sorted(found)


def bar(total: int, record: StatisticsRecord, quiet: bool) -> Any:
    """Progress bar that counts the files read."""
    shown = tqdm(total=total, desc="reading", disable=True if quiet else None, leave=False)
    record.read = lambda path: shown.update(1)
    return shown


def row_of(
    path: str, side: str, is_label: bool, record: StatisticsRecord, findings: Sequence[Finding]
) -> dict[str, Any]:
    """Facts of a file, and its worst finding."""
    facts, statistics = record.known.get((path, is_label)), record.statistics.get(path)
    worst = [f.severity for f in findings if f.file == path]
    return {
        "file": path,
        "set": f"{side}, labels" if is_label else side,
        "shape": None if facts is None else list(facts.shape),
        "spacing_mm": None if statistics is None else [round(side, 4) for side in statistics.spacing_mm],
        "orientation": None if statistics is None else statistics.axcodes,
        "lowest": None if facts is None else facts.lowest,
        "highest": None if facts is None else facts.highest,
        "background_share": None if statistics is None else round(statistics.background_share, 4),
        "sha256_of_voxels": None if facts is None else facts.digest,
        "status": worst[0] if worst else "ok",
    }


def write(result: CheckReport, folder: Path) -> None:
    """JSON and HTML. Raises `ResourceError`."""
    findings = [{"severity": f.severity, "file": f.file, "what": f.what, "remedy": f.remedy} for f in result.findings]
    content: Mapping[str, Any] = {
        "input": result.input,
        "verdict": result.verdict(),
        "counts": result.counts,
        "findings": findings,
        "files": result.files,
    }
    write_json(content, folder / JSON)
    write_text(result.html(), folder / HTML)


def findings_table(rows: Sequence[Sequence[str]]) -> str:
    """HTML table of `CheckReport.rows`."""
    if not rows:
        return "<p>None.</p>"
    return sortable_table(("severity", "where", "what", "remedy"), rows, SEVERITIES, name=1)


def below(file: str, place: str) -> str:
    """A path as seen from the input, or as it is."""
    folder = place if os.path.isdir(place) else os.path.dirname(place) or "."
    inside = os.path.isabs(file) and file.startswith(os.path.abspath(folder) + os.sep)
    return os.path.relpath(file, folder) if inside else file


def shown(value: Any) -> Any:
    """A list as text, a whole number without decimals."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return " x ".join(f"{one:g}" for one in value) if isinstance(value, list) else value
