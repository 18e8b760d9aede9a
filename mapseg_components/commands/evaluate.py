# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg evaluate``: label maps against the truth, and against other label maps of the same scans."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.data import read_nifti, refuse_existing
from mapseg_components.data.datalist import stem
from mapseg_components.data.file_audit import GEOMETRY_TOLERANCE_MM
from mapseg_components.data.label_maps import ENDINGS_OF_RESULTS, label_maps, matched, without_channels
from mapseg_components.data.labels import label_mapping, named_beside
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import require_writable, write_json, write_text
from mapseg_components.metrics import FEWEST_CASES, MEAN, METRICS, agreement, compared_sets, require_scipy, summarised
from mapseg_components.reports import text_table
from mapseg_components.reports.tables import cell
from mapseg_components.scans.facts import facts_of_scan
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.findings import Finding, fault, raise_findings
from mapseg_components.scans.masks import mask_beside
from mapseg_components.scans.pictures import LOSSY, has_pixel_size
from mapseg_components.session import progress, working
from mapseg_components.shipped_files import SHIPPED, bundle_of, shipped_bundles
from mapseg_components.structures import ignored_value, listed_values, numbered, parts_of, to_whole, value_fault

__all__ = ["Evaluation", "evaluate"]

TABLE, SUMMARY = "evaluation.csv", "evaluation.json"
Parts = Mapping[str, Sequence[int]]  # structure to its values


@dataclass
class Evaluation:
    """Result of `evaluate`.

    Args:
        rows: one per case and structure: the metrics of `METRICS`, ``truth_voxels``, ``predicted_voxels``.
        summary: structure to metric to ``n``, ``mean``, ``sd``, ``median``, ``ci95``; the mean of structures last.
        versus: structure to metric to what `paired_comparison` gives; empty without a second set.
        tolerance_mm: of the surface Dice.
        cases: their number.
        exit_code: 0.
        notes: what was not compared.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, Any]]
    versus: dict[str, dict[str, Any]]
    tolerance_mm: float
    cases: int
    exit_code: int = 0
    notes: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        head = ["structure", *(title for title, _ in METRICS.values()), "n", "missed"]
        lines = []
        for name, figures in self.summary.items():
            missed = sum(row["structure"] == name and bool(row["missed"]) for row in self.rows)
            texts = [interval(figures[metric]["mean"], figures[metric]["ci95"]) for metric in METRICS]
            lines.append([name, *texts, figures["dice"]["n"], "" if name == MEAN else missed])
        text = (
            f"{text_table(head, lines)}\n\n{self.cases} cases; mean [95 % bootstrap interval over cases], "
            f"surface Dice at {self.tolerance_mm:g} mm. A structure absent from the truth is left out; one that the "
            "prediction lacks is missed: Dice 0, no distance."
        )
        if self.cases < FEWEST_CASES:
            text += f" {self.cases} cases are too few for the intervals to mean much."
        text += "".join(f"\n{note}" for note in self.notes)
        if not self.versus:
            return text
        rows = []
        for name, by_metric in self.versus.items():  # of single structures Dice alone; the rest is in the JSON file
            for metric in METRICS if name == MEAN else ["dice"]:
                one = by_metric[metric]
                p = one["note"] if one["p"] is None else f"{one['p']:.4f}"
                difference = interval(one["mean_difference"], one["ci95"], "+.3f")
                rows.append([name, METRICS[metric][0], one["n"], difference, p])
        head = ["structure", "metric", "n", "difference (first minus other)", "p (Wilcoxon)"]
        return f"{text}\n\n{text_table(head, rows)}\n\np is two-sided and not corrected for the number of tests."


def evaluate(
    pred: str,
    truth: str,
    *,
    labels: str | None = None,
    versus: str | None = None,
    tolerance_mm: float = 1.0,
    common: bool = False,
    output: str | None = None,
    overwrite: bool = False,
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Evaluation:
    """Compare label maps with the truth: Dice, surface Dice, HD95 and ASSD per case and structure.

    Distances are in mm, of PNG and TIFF images in um, or in pixels without a pixel size; what the masks of images leave
    out is left out here. Files belong together by name: scan_seg.nii.gz, scan_dseg.nii.gz, scan_pred.nii.gz or
    scan.nii.gz against scan.nii.gz (or scan_dseg.nii.gz) of the truth; nnU-Net's number of the channel (scan_0000) may
    be there or not. Means come with 95 % bootstrap intervals over cases (seed 0, 10,000 resamples).

    Args:
        pred: a label map, or a folder of them (also a BIDS derivative).
        truth: the same for the true label maps.
        labels: a JSON object of structure name to value, as text or a file (also a datalist, or dataset.json of nnU-Net
            or the Decathlon), or a bundle (a folder or a name, as in mapseg predict); by default the dataset.json
            beside labelsTr, or every value of the truth is a structure. Background is none; voxels of nnU-Net's ignore
            are left out of the comparison. With a bundle, predictions hold class indices and the truth the values. A
            structure may have several values, as in {"hippocampus": [17, 53]}; label maps without any of all values
            hold the numbers of the structures, from 1 in the order given, as mapseg adapt merges them.
        versus: other predictions of the same scans, for a paired comparison (Wilcoxon signed rank test).
        tolerance_mm: surfaces nearer than this agree, for the surface Dice.
        common: evaluate the cases that all folders have; otherwise a file without its partner is an error.
        output: folder for evaluation.csv and evaluation.json; by default nothing is written.
        overwrite: replace an earlier evaluation.
        num_threads: of the CPU.
        quiet: no progress bar, errors only.
        verbose: all that is logged, and tracebacks.

    Returns:
        all figures; its text is the table.

    Raises:
        ConfigError: a path or option is wrong, scipy is missing, or an earlier evaluation exists.
        DataError: files without a partner, unreadable, or on different grids; all of them, one a line. Or the truth has
            no structure.
    """
    with working(num_threads, quiet, verbose):
        require_scipy()
        if labels in (SHIPPED, *shipped_bundles()):
            labels = str(bundle_of(labels))
        if not 0 <= tolerance_mm < math.inf:
            raise ConfigError(f"tolerance_mm is {tolerance_mm}, expected a finite number, 0 or more")
        sets = {"pred": label_maps(pred), "truth": label_maps(truth)}
        if versus is not None:
            sets["versus"] = label_maps(versus)
        sets = without_channels(sets)
        places = {"pred": pred, "truth": truth} | ({} if versus is None else {"versus": versus})
        cases = matched(sets, places, common)
        if output is not None:
            refuse_existing([Path(output) / TABLE, Path(output) / SUMMARY], output, overwrite)
            require_writable(output)
        given = named_beside(Path(truth)) if labels is None else labels
        mapping, named_by_bundle = label_mapping(given)
        structures = {} if given is None else parts_of(mapping, f"labels is {given}", ignore=True)
        ignored = ignored_value(mapping)
        notes: list[Finding] = []
        parts: dict[str, Parts] = {}
        for key, found in sets.items():
            by_index = named_by_bundle and key != "truth"
            parts[key] = read_as(found.values(), structures, by_index)
            if parts[key] != structures and not by_index:
                what = f"no value of {structures} is in its label maps: they are read as {parts[key]}"
                notes.append(
                    Finding("warning", places[key], what, "name their own values by labels if that is not meant")
                )
        unsized, seen = 0, {0}
        rows: dict[str, list[dict[str, Any]]] = {key: [] for key in sets if key != "truth"}
        findings: list[Finding] = []
        for case in progress(cases, "comparing", quiet):
            try:
                true, affine, spacing = whole(sets["truth"][case])
                unsized += is_picture(sets["truth"][case]) and not has_pixel_size(sets["truth"][case])
                outside = outside_of_case(sets["truth"][case], case, true.shape)
                true = true if outside is None else np.where(outside, 0, true)
                named = parts["truth"] or {str(v): [int(v)] for v in np.unique(true) if v > 0}
                known = true if ignored is None else np.where(true == ignored, 0, true)
                if not known.any():
                    notes.append(Finding("warning", str(sets["truth"][case]), "the truth has background alone"))
                notes += unnamed_values(sets["truth"][case], known, named)
                seen |= set(np.unique(known).tolist())
                for key, compared_rows in rows.items():
                    path = sets[key][case]
                    prediction = on_grid(path, true, affine, sets["truth"][case])
                    prediction = prediction if outside is None else np.where(outside, 0, prediction)
                    own = parts[key] or named
                    notes += unnamed_values(path, prediction, own)
                    name = case or stem(path)
                    compared_rows += compared(name, prediction, true, spacing, own, named, tolerance_mm, ignored)
            except DataError as error:
                findings += error.findings or (Finding("error", case, str(error)),)
        raise_findings(findings)
        images = sum(map(is_picture, (sets["truth"][case] for case in cases)))
        if images:
            what = f"{images} of {len(cases)} cases are 2D images, whose distances are in um"
            what += f", in pixels of {unsized} without a pixel size" if unsized else ""
            notes.append(Finding("note", truth, what, "the tolerance likewise"))
        if not any(row["truth_voxels"] for row in rows["pred"]):
            what = f"no label map has a structure, their values are {sorted(seen)}"
            what += f" and those of labels {structures}" if structures else ""
            raise DataError(f"{truth}: {what}: name the folder of the truth, and its values by labels")
        result = Evaluation(rows["pred"], summarised(rows["pred"]), {}, tolerance_mm, len(cases), notes=notes)
        if versus is not None:
            result.versus = compared_sets(rows["pred"], rows["versus"])
        if output is not None:
            write(result, Path(output), places)
        return result


def whole(path: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Voxels (X, Y, Z) of whole numbers, affine and spacing in mm of a label map. Raises `DataError`."""
    scan = read_nifti(path)
    facts = facts_of_scan(scan, with_values=True)
    if facts.not_finite:
        raise fault(path, f"{facts.not_finite} voxels are NaN or infinite", "repair it")
    wrong = value_fault(facts.values or (), exact=scan.voxels.dtype.kind in "iu", more_values=facts.more_values)
    if wrong is not None:
        raise fault(path, wrong[0], f"{wrong[1]}; name the folder of label maps")
    if any(what == LOSSY for _, what, _ in facts.remarks):
        raise fault(path, LOSSY, "save label maps without loss, as PNG or TIFF")
    if facts.more_values:
        different = len(facts.values or ()) + facts.more_values
        raise fault(path, f"{different} different values, expected a label map", "name the folder of label maps")
    return to_whole(scan.voxels).astype(np.int64), scan.affine, np.linalg.norm(scan.affine[:3, :3], axis=0).tolist()


def on_grid(path: Path, truth: np.ndarray, affine: np.ndarray, origin: Path) -> np.ndarray:
    """Voxels of a prediction on the grid of its truth, of a file. Raises `DataError` if it lies on another."""
    prediction, found, _ = whole(path)
    if prediction.shape != truth.shape:
        raise DataError(f"{path}: shape {prediction.shape}, its truth {truth.shape}: resample it to the scan's grid")
    distance = corner_distance(truth.shape, found, affine)
    if is_picture(path) and is_picture(origin):
        return prediction  # pixel for pixel; a pixel size may stand in one of the two files alone
    if distance > GEOMETRY_TOLERANCE_MM:
        raise DataError(
            f"{path}: its affine puts a corner {distance:.3f} mm away from where its truth has it (tolerance "
            f"{GEOMETRY_TOLERANCE_MM} mm): resample it, or repair the header"
        )
    return prediction


def outside_of_case(truth: Path, case: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where a case counts nowhere, by a mask beside its true label map; ``None`` without. Raises `DataError`."""
    names = [case, stem(truth), ENDINGS_OF_RESULTS.sub("", stem(truth))]
    masks = [mask_beside(truth.with_name(f"{name}{truth.suffix}")) for name in names if name]
    mask = next((one for one in masks if one not in (None, truth)), None)
    outside = None if mask is None else np.asarray(read_nifti(mask).voxels == 0)
    if outside is not None and outside.shape != shape:
        raise fault(
            str(mask), f"mask of shape {outside.shape}, its label map {shape}", "draw it on the scan's own grid"
        )
    return outside


def read_as(files: Iterable[Path], structures: Parts, by_index: bool) -> Parts:
    """Structures and the values that they have in a set of label maps.

    Args:
        files: the set.
        structures: their values as they are named.
        by_index: the label maps hold class indices.

    Returns:
        the values as they are named; or the numbers of the structures from 1, by index, or where structures have
        several values and no label map has any of all these, as `mapseg adapt` merges them.
    """
    listed = [value for own in structures.values() for value in own]
    merged = len(listed) > len(structures) and not any(has_one_of(path, listed) for path in files)
    return {name: [n] for n, name in enumerate(structures, start=1)} if by_index or merged else structures


def has_one_of(path: Path, values: Sequence[int]) -> bool:
    """Whether a label map has one of some values; not if it cannot be read, which is told where it is compared."""
    try:
        return bool(np.isin(whole(path)[0], values).any())
    except DataError:
        return False


def unnamed_values(path: Path, label_map: np.ndarray, structures: Parts) -> list[Finding]:
    """A warning about values of a label map that no structure has, and that are compared with nothing."""
    named = [value for own in structures.values() for value in own]
    values, counts = np.unique(label_map, return_counts=True)
    other = [(value, count) for value, count in zip(values.tolist(), counts.tolist()) if value not in {0, *named}]
    if not other:
        return []
    what = f"its values {listed_values(other)} belong to no structure that is compared (background and {named})"
    return [Finding("warning", str(path), what, "name all structures by labels if that is not meant")]


def compared(
    case: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    predicted: Parts,
    structures: Parts,
    tolerance_mm: float,
    ignored: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of one case, by the values of the prediction and of the truth; voxels to ignore are background in both."""
    if not structures:
        return []
    if ignored is not None:
        prediction = np.where(truth == ignored, 0, prediction)
    maps = numbered(prediction, predicted), numbered(truth, structures)
    rows = agreement(*maps, range(1, len(structures) + 1), spacing, tolerance_mm)
    return [
        {"case": case, "structure": one, **row, "missed": bool(row["truth_voxels"] and not row["predicted_voxels"])}
        for one, row in zip(structures, rows)
    ]


def write(result: Evaluation, folder: Path, places: Mapping[str, str]) -> None:
    """CSV of all cases, JSON of the summary. Raises `ResourceError`."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(result.rows[0]) if result.rows else ["case", "structure"])
    writer.writeheader()
    writer.writerows(result.rows)
    write_text(table.getvalue(), folder / TABLE)
    content = {
        **{key: str(place) for key, place in places.items()},
        "cases": result.cases,
        "tolerance_mm": result.tolerance_mm,
        "interval": "percentile bootstrap of the mean over cases, 10000 resamples, seed 0",
        "structures": result.summary,
        "notes": list(map(str, result.notes)),
        "versus_differences": result.versus,
    }
    write_json(content, folder / SUMMARY)


def interval(mean: float | None, bounds: tuple[float, float] | None, form: str = ".3f") -> str:
    """A mean with its interval."""
    if mean is None:
        return cell(None)
    ends = "" if bounds is None else f" [{bounds[0]:{form}}, {bounds[1]:{form}}]"
    return f"{mean:{form}}{ends}"
