# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare models on scans without labels: consistency of each, and the Dice that it meant on labelled source scans."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mapseg_components.commands.verdict import CONSISTENCY, ESTIMATE, rounded, verdict_of
from mapseg_components.contrast import contrast_view
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import has_section
from mapseg_components.data.volumes import readable_size, voxel_ml
from mapseg_components.inferers.trial import TRANSLATED, LabelLoader, Trial
from mapseg_components.keys import SOURCE
from mapseg_components.plans.judging import (
    DEGRADATIONS,
    affordable_images,
    count_windows,
    evenly,
    judged_images,
    judged_region,
    versions_of,
)
from mapseg_components.quality import (
    COVERAGE,
    VIEWS,
    Calibration,
    Positions,
    consistency,
    expected_dice,
    label_agreement,
    mean_consistencies,
    positions_of,
    reconciled,
    within_shares,
)
from mapseg_components.sides import axis_across
from mapseg_components.structures import structures_of
from mapseg_components.transforms.inputs import outside_tissue

__all__ = ["assess"]

logger = logging.getLogger(__name__)

CONFIDENT = 0.95
EXPECTED = "expected_dice"
MISPLACED_BELOW = 0.5  # the Dice that a structure's place allows


def assess(
    bundle: str,
    weights: Mapping[str, str],
    symmetric: bool = False,
    quiet: bool = False,
    any_position: bool = False,
    inverts: bool = False,
    samples: int | None = None,
    validation: Mapping[str, str] | None = None,
    package: Mapping[str, Any] | None = None,
    least_gain: float = 0.0,
) -> dict[str, Any]:
    """Figures of each model on the target's scans and on the source's validation scans, and what they say.

    The scans are those of ``target_heldout``, or where there are none those of ``target_training``. For each model a
    calibration from consistency and expected Dice to Dice is fitted to labelled validation scans, as they are and
    degraded. At most 5 of these in 12 versions and 10 target scans are segmented, each once and once per view; fewer,
    down to 4 versions and 2 target scans, where that would cost more than a tenth of the adaptation. Of an image of one
    slice the middle is taken, see `mapseg_components.plans.judging.judged_region`. On each target scan the lower of
    both signs gives an estimate of Dice, and the place of a structure in the scan's foreground an upper bound, by where
    the source's training scans have it; two models' estimates differ by no more than their agreement allows. None of it
    can know errors that all models make alike, and surely, however a scan is shown, and at the right place.

    Without labelled scans no Dice can be estimated: then two models are compared by their consistency itself, in which
    a structure counts as 0 that only the other model has, or whose share of all structures leaves the range of
    the package.

    Args:
        bundle: folder that ``mapseg adapt`` makes: ``configs/inference.json``, ``datalist.json``.
        weights: model name to file; "source_only" and "adapted" for a verdict.
        symmetric: see `mapseg_components.commands.adapt.adapt`.
        any_position: see `mapseg_components.commands.adapt.adapt`.
        quiet: no progress bar.
        inverts: the models were trained on inverted contrasts as well: then the inverted scan is one of the views.
        samples: training samples (patches) of the adaptation, which bound the cost of this comparison.
        validation: model name to the datalist whose section ``source_validation`` shows the scans as the model was
            trained on them, such as translated ones; by default the bundle's. Cases and label maps are the same.
        package: of a bundle whose datalist names no source, ``share_ranges`` and ``ranges_ml`` of its structures, see
            `mapseg_components.plans.package.plan_of_package`.
        least_gain: for the verdict, see `mapseg_components.commands.verdict.least_gain_of`.

    Returns:
        ``held_out``, ``passes`` (number of segmentations of a whole scan), ``coverage`` (nominal, of each case's
        ``interval``), ``models`` (per model: ``validation_dice``, ``calibration``, ``cases``), ``prior_ml``,
        ``between`` (Dice between the two models' label maps per case), ``by`` (what the verdict compares) and
        ``verdict``.
    """
    trial = Trial(bundle)
    parser, preprocessing, probabilities = trial.parser, trial.preprocessing, trial.probabilities
    names = list(structures_of(parser["labels"]))
    across = axis_across("symmetric", names, parser["working_directions"]) if symmetric else None
    datalist = Path(bundle) / "datalist.json"
    load_labels = LabelLoader(parser["labels"], preprocessing)
    judged = "target_heldout" if has_section(datalist, "target_heldout") else "target_training"
    target = load_datalist(datalist, judged)
    own_scans = {name: (validation or {}).get(name, str(datalist)) for name in weights}
    has_source = package is None
    labelled = {name: load_datalist(path, "source_validation") for name, path in own_scans.items() if has_source}
    ranges = [] if package is None else [package["share_ranges"].get(name) for name in names]
    classes = len(names) + 1
    window, window_stride = (parser.get_parsed_content(name) for name in ("window_size", "window_stride"))

    def segment(image: torch.Tensor) -> torch.Tensor:
        return probabilities(image).max(dim=0).indices  # several times as fast as argmax across a volume's first axis

    def signs_of(image: torch.Tensor, found: torch.Tensor, label_map: torch.Tensor, outside: Any) -> dict[str, Any]:
        stable = consistency(image, label_map, segment, classes, across, views, outside)
        return {CONSISTENCY: stable, EXPECTED: expected_dice(found, label_map)}

    def region_of(shape: torch.Size) -> tuple[slice, ...]:
        return judged_region(shape[-3:], window, window_stride)

    prior, places = [], []
    for case in load_datalist(datalist, "source_training") if has_source else ():
        scan = trial.scan(case, SOURCE)
        truth, ml = load_labels(case, scan)
        prior.append(volumes_ml(truth, ml, names))
        places.append(positions_of(scan.as_subclass(torch.Tensor), truth, classes))
    positions = Positions.fit(places, any_position) if places else None
    views = (*VIEWS, contrast_view("inverted")) if inverts else VIEWS
    passes_of_image = 1 + len(views) + symmetric
    affordable = None
    if samples is not None:
        scan = trial.scan(target[0])
        shape = scan[(slice(None), *region_of(scan.shape))].shape[1:]
        windows = len(weights) * passes_of_image * count_windows(shape, window, window_stride)
        affordable = affordable_images(windows, samples)
    number_of_versions, number_of_targets = judged_images(len(target), affordable, has_source)
    versions = versions_of(min(map(len, labelled.values()), default=0), number_of_versions)
    target = evenly(target, number_of_targets)
    models: dict[str, Any] = {}
    calibrations: dict[str, Calibration | None] = {}
    label_maps: dict[str, list[torch.Tensor]] = {}
    images = len(weights) * (len(versions) + len(target))
    with tqdm(total=images, desc="assessment", unit="scan", disable=True if quiet else None) as bar:
        for model, file in weights.items():
            trial.load(file)
            translated = own_scans[model] != str(datalist)  # its validation scans are shown as the target's are
            seen: dict[str, Any] = {CONSISTENCY: [], EXPECTED: []}
            dice = []
            for number, name in versions:
                scan = trial.scan(labelled[model][number], TRANSLATED if translated else SOURCE)
                truth, _ = load_labels(labelled[model][number], scan)
                region = region_of(scan.shape)
                scan, truth = scan[(slice(None), *region)], truth[region]
                image, outside = scan.as_subclass(torch.Tensor), outside_tissue(scan)
                shown = image if name is None else DEGRADATIONS[name](image)
                found = probabilities(shown, outside)
                label_map = found.max(dim=0).indices
                for sign, values in signs_of(shown, found, label_map, outside).items():
                    seen[sign].append(values.tolist())
                dice.append(label_agreement(label_map, truth, classes).tolist())
                bar.update()
            plain = [own for own, (_, name) in zip(dice, versions) if name is None]
            calibration = calibrations[model] = Calibration.fit(seen, dice, [number for number, _ in versions])
            cases = []
            label_maps[model] = []
            for case in target:
                image = trial.scan(case)
                scan = image.as_subclass(torch.Tensor)
                found = probabilities(scan, outside_tissue(image))
                confidence, label_map = found.max(dim=0)
                shown = image[(slice(None), *region_of(scan.shape))]
                part, outside = shown.as_subclass(torch.Tensor), outside_tissue(shown)
                if part.shape == scan.shape:
                    signs = signs_of(part, found, label_map, outside)
                else:  # windows lie elsewhere in a part
                    signs = signs_of(part, inside := probabilities(part, outside), inside.max(dim=0).indices, outside)
                if positions is not None:
                    bound = positions.highest_dice(positions_of(scan, label_map, classes)[0])
                else:
                    bound = within_shares(label_map, ranges)
                figures = case_figures(label_map, confidence, signs, bound, calibration, voxel_ml(image), names)
                cases.append({"case": case["case_id"], **figures})
                label_maps[model].append(label_map.to(torch.int16))
                bar.update()
            models[model] = {
                "validation_dice": summary(plain, names),
                "translated_validation": translated,
                "calibration": None if calibration is None else calibration.as_json(),
                "cases": cases,
            }
    result: dict[str, Any] = {
        "models": models,
        "held_out": judged == "target_heldout",
        "passes": images * passes_of_image,
        "coverage": COVERAGE,
        "prior_ml": {name: sorted(one[name] for one in prior) for name in names},
        "by": ESTIMATE if has_source else CONSISTENCY,
    }
    if package is not None:
        result["prior_ml"] = {name: package["ranges_ml"].get(name, []) for name in names}
    if {"source_only", "adapted"} <= set(models):
        result["between"] = {}
        pairs = zip(*(zip(models[name]["cases"], label_maps[name]) for name in ("source_only", "adapted")))
        for (first, one), (second, other) in pairs:
            agreement = label_agreement(one.long(), other.long(), classes)
            result["between"][first["case"]] = rounded(float(agreement.nanmean()))
            if has_source:
                reconcile(first, second, agreement.numpy())
            else:
                compare(first, second)
    for name, figures in models.items():
        for case in figures["cases"]:
            case["interval"] = interval_of(calibrations[name], case["estimated_dice"])
    if "between" in result:
        both = models["source_only"], models["adapted"]
        result["verdict"] = verdict_of(*both, result["held_out"], result["by"], least_gain)
    return result


def interval_of(calibration: Calibration | None, dice: float | None) -> list[float | None] | None:
    """Interval of an estimate, where there is one."""
    found = None if calibration is None or dice is None else calibration.interval(dice)
    return None if found is None else [rounded(end) for end in found]


def reconcile(first: dict[str, Any], second: dict[str, Any], agreement: np.ndarray) -> None:
    """Put estimates of two models on one scan no further apart than their label maps, see `reconciled`."""
    estimates = (
        np.array([np.nan if value is None else value for value in case["estimated_by_structure"].values()])
        for case in (first, second)
    )
    for case, found in zip((first, second), reconciled(*estimates, agreement)):
        known = np.isfinite(found)
        if known.any():
            values = dict(zip(case["estimated_by_structure"], found))
            case["estimated_by_structure"] |= {name: rounded(v) for name, v in values.items() if np.isfinite(v)}
        kept = [value for value in case["estimated_by_structure"].values() if value is not None]
        case["estimated_dice"] = rounded(float(np.mean(kept))) if kept else None


def compare(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Make the consistencies of two models on one scan comparable, see `mean_consistencies`."""
    stable = []
    for case in (first, second):
        found = case["consistency_by_structure"].items()
        values = [np.nan if value is None else 0.0 if name in case["misplaced"] else value for name, value in found]
        stable.append(torch.tensor(values))
    for case, value in zip((first, second), mean_consistencies(*stable)):
        case[CONSISTENCY] = rounded(value)


def volumes_ml(label_map: torch.Tensor, ml: float, names: Sequence[str]) -> dict[str, float]:
    """Volume of each structure."""
    counts = torch.bincount(label_map.flatten().long(), minlength=len(names) + 1)[1:].tolist()
    return {name: readable_size(count * ml, 4) for name, count in zip(names, counts)}


def case_figures(
    label_map: torch.Tensor,
    confidence: torch.Tensor,
    signs: Mapping[str, torch.Tensor],
    bound: torch.Tensor,
    calibration: Calibration | None,
    ml: float,
    names: Sequence[str],
) -> dict[str, Any]:
    """Figures of the segmentation of one scan."""
    structure = confidence[label_map > 0]
    stable = signs[CONSISTENCY]
    mean = float(stable.nanmean()) if not stable.isnan().all() else 0.0
    estimates = np.full(len(names), np.nan)
    if calibration is not None:
        of_structures = zip(*(values.tolist() for values in signs.values()))
        lines = [calibration.dice(**dict(zip(signs, values))) for values in of_structures]
        estimates = np.fmin(lines, bound.numpy())
    estimate = float(np.nanmean(estimates)) if np.isfinite(estimates).any() else np.nan
    return {
        "consistency": rounded(mean),
        "consistency_by_structure": {name: rounded(value) for name, value in zip(names, stable.tolist())},
        "estimated_dice": rounded(estimate),
        "estimated_by_structure": {name: rounded(value) for name, value in zip(names, estimates.tolist())},
        "misplaced": [name for name, value in zip(names, bound.tolist()) if value < MISPLACED_BELOW],
        "within_calibration": calibration is not None and calibration.covers(mean),
        EXPECTED: rounded(float(signs[EXPECTED].nanmean())),
        "confidence": rounded(float(structure.mean())) if len(structure) else 0.0,
        "confident_share": rounded(float((structure > CONFIDENT).float().mean())) if len(structure) else 0.0,
        "volumes_ml": volumes_ml(label_map, ml, names),
    }


def summary(dice: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    """Mean Dice over cases, per structure and over structures, and how many cases they are."""
    means = [rounded(float(np.nanmean(column))) if np.isfinite(column).any() else None for column in np.array(dice).T]
    known = [value for value in means if value is not None]
    mean = rounded(float(np.mean(known))) if known else None
    return {"scans": len(dice), "structures": dict(zip(names, means)), "mean": mean}
