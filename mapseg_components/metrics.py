# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Agreement of a label map with the truth, per structure, and the uncertainty of a mean over few cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice
from monai.metrics.utils import get_edge_surface_distance
from monai.utils import optional_import

from mapseg_components.errors import ConfigError

__all__ = [
    "METRICS",
    "agreement",
    "bootstrap_interval",
    "compared_sets",
    "paired_comparison",
    "require_scipy",
    "summarised",
]

# column: its title in tables, and whether higher is better
METRICS = {
    "dice": ("Dice", True),
    "surface_dice": ("surface Dice", True),
    "hd95_mm": ("HD95 mm", False),
    "assd_mm": ("ASSD mm", False),
}
MEAN = "mean of structures"
RESAMPLES = 10_000
FEWEST_CASES = 6  # five pairs cannot reach p < 0.05 in a two-sided signed rank test


def require_scipy() -> None:
    """Raise `ConfigError` without scipy, which MONAI's surface metrics and the rank test need.

    Examples:
        >>> from mapseg_components.metrics import require_scipy
        >>> require_scipy()  # does nothing where scipy is installed
    """
    if not optional_import("scipy.ndimage")[1]:
        raise ConfigError("surface distances need scipy, which is not installed: pip install scipy")


def agreement(
    prediction: np.ndarray, truth: np.ndarray, values: Sequence[int], spacing_mm: Sequence[float], tolerance_mm: float
) -> list[dict[str, float | None]]:
    """Dice, surface Dice, 95th percentile Hausdorff and average symmetric surface distance of each structure, by MONAI.

    Args:
        prediction: label map (X, Y, Z).
        truth: label map (X, Y, Z) on the same grid; one of a single slice is an image, and its surfaces are outlines.
        values: label values of the structures.
        spacing_mm: sides of a voxel, (3,), in mm.
        tolerance_mm: surfaces nearer than this agree, for the surface Dice, in mm.

    Returns:
        one row per structure: each of `METRICS`, and ``truth_voxels``, ``predicted_voxels``. All metrics are ``None``
        where the truth has no such structure; the distances where the prediction has none (both Dice are 0 then).

    Raises:
        ConfigError: scipy is missing.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.metrics import agreement
        >>> truth = np.zeros((10, 11, 12), np.uint8)
        >>> truth[2:6, 2:6, 2:6] = 1
        >>> moved = np.roll(truth, 1, axis=0)  # by one voxel of 2 mm
        >>> row, = agreement(moved, truth, values=[1], spacing_mm=(2.0, 1.0, 1.0), tolerance_mm=2.0)
        >>> row["dice"], row["surface_dice"], row["hd95_mm"], row["truth_voxels"]
        (0.75, 1.0, 2.0, 64)
    """
    require_scipy()
    rows: list[dict[str, float | None]] = []
    for value in values:
        masks = [label_map == value for label_map in (prediction, truth)]
        row: dict[str, float | None] = dict.fromkeys(METRICS)
        row |= {"truth_voxels": int(masks[1].sum()), "predicted_voxels": int(masks[0].sum())}
        if row["truth_voxels"] and not row["predicted_voxels"]:
            row |= {"dice": 0.0, "surface_dice": 0.0}
        elif row["truth_voxels"]:
            flat = truth.shape.index(1) if 1 in truth.shape else None  # an image, whose surface is its outline
            spacing = [float(side) for axis, side in enumerate(spacing_mm) if axis != flat]
            masks = masks if flat is None else [mask.squeeze(flat) for mask in masks]
            pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in cropped(*masks)]
            row |= {"dice": float(compute_dice(*pair)), **between_surfaces(*pair, spacing, tolerance_mm)}
        rows.append(row)
    return rows


def between_surfaces(
    prediction: torch.Tensor, truth: torch.Tensor, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """What MONAI's three surface metrics give for two masks (1, 1, X, Y[, Z]), from one search of the distances."""
    _, ways, _ = get_edge_surface_distance(prediction[0, 0], truth[0, 0], spacing=spacing, symmetric=True)
    both = torch.cat(ways)
    return {
        "surface_dice": float((both <= tolerance_mm).sum() / len(both)),
        "hd95_mm": float(max(torch.quantile(way, 0.95) for way in ways)),
        "assd_mm": float(both.mean()),
    }


def cropped(one: np.ndarray, two: np.ndarray) -> list[np.ndarray]:
    """Two masks cut to the box that holds both, a voxel of background around it."""
    either = one | two
    box = []
    for axis in range(either.ndim):
        found = np.flatnonzero(either.any(axis=tuple(a for a in range(either.ndim) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return [np.pad(mask[tuple(box)], 1) for mask in (one, two)]


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean by resampling the cases (percentiles of 10,000 means); ``None`` below two cases.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        values: one per case.
        seed: of the resampling.

    Returns:
        lower and upper end, in the unit of the values.

    Examples:
        >>> from mapseg_components.metrics import bootstrap_interval
        >>> low, high = bootstrap_interval([0.7, 0.8, 0.8, 0.9])
        >>> 0.7 < low < 0.8 < high < 0.9
        True
        >>> bootstrap_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    sample = np.asarray(values, dtype=float)
    if sample.size < 2:
        return None
    draws = np.random.default_rng(seed).integers(sample.size, size=(RESAMPLES, sample.size))
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summary_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Number of cases with a value, their mean, standard deviation, median and the mean's interval."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return {"n": 0, "mean": None, "sd": None, "median": None, "ci95": None}
    return {
        "n": len(known),
        "mean": float(np.mean(known)),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "median": float(np.median(known)),
        "ci95": bootstrap_interval(known),
    }


def paired_comparison(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> dict[str, Any]:
    """Difference of two methods on the same cases: mean, its interval, and a two-sided Wilcoxon signed rank test.

    Args:
        first: case to value of one method.
        second: case to value of the other. Cases that lack one of the two are left out.

    Returns:
        ``n``, ``mean_difference`` (first minus second), ``ci95``, ``p``, and ``note``: why there is no ``p``.

    Raises:
        ConfigError: scipy is missing.

    Examples:
        >>> from mapseg_components.metrics import paired_comparison
        >>> before = {case: 0.5 for case in "abcdef"}
        >>> after = {case: 0.75 for case in "abcdef"}
        >>> result = paired_comparison(after, before)
        >>> result["n"], result["mean_difference"], round(result["p"], 5)  # 2 of the 2 ** 6 patterns of signs
        (6, 0.25, 0.03125)
    """
    require_scipy()
    pairs = [(first[case], second[case]) for case in first if case in second]
    difference = [float(a) - float(b) for a, b in pairs if a is not None and b is not None]
    result = {"n": len(difference), "mean_difference": None, "ci95": None, "p": None, "note": ""}
    if difference:
        result |= {"mean_difference": float(np.mean(difference)), "ci95": bootstrap_interval(difference)}
    if len(difference) < FEWEST_CASES:
        result["note"] = f"too few cases for a test ({len(difference)}, at least {FEWEST_CASES})"
    elif not any(difference):
        result["note"] = "no case differs"
    else:
        wilcoxon, _ = optional_import("scipy.stats", name="wilcoxon")
        result["p"] = float(wilcoxon(difference).pvalue)
    return result


def case_means(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """Case to the mean of its structures."""
    by_case: dict[str, list[float]] = {}
    for row in rows:
        values = by_case.setdefault(row["case"], [])
        if row[metric] is not None:
            values.append(row[metric])
    return {case: float(np.mean(values)) if values else None for case, values in by_case.items()}


def by_structure(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, float | None]]:
    """Structure to case to value, and the mean of structures last."""
    found: dict[str, dict[str, float | None]] = {}
    for row in rows:
        found.setdefault(row["structure"], {})[row["case"]] = row[metric]
    return {**found, MEAN: case_means(rows, metric)}


def summarised(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures over cases of each metric.

    Args:
        rows: one per case and structure, with ``case``, ``structure`` and the metrics of `METRICS`.

    Returns:
        structure to metric to ``n``, ``mean``, ``sd``, ``median`` and ``ci95``; the mean of structures last.

    Examples:
        >>> from mapseg_components.metrics import METRICS, summarised
        >>> rows = [{"case": case, "structure": "cortex", **dict.fromkeys(METRICS, dice)}
        ...         for case, dice in (("a", 0.5), ("b", 0.75))]
        >>> found = summarised(rows)
        >>> list(found), found["cortex"]["dice"]["mean"]
        (['cortex', 'mean of structures'], 0.625)
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        for name, values in by_structure(rows, metric).items():
            result.setdefault(name, {})[metric] = summary_of(list(values.values()))
    return result


def compared_sets(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Comparison of two sets of predictions of the same cases.

    Args:
        first: rows as in `summarised`.
        second: rows of the other set.

    Returns:
        structure to metric to the `paired_comparison` of both; the mean of structures last.

    Examples:
        >>> from mapseg_components.metrics import METRICS, compared_sets
        >>> first = [{"case": case, "structure": "cortex", **dict.fromkeys(METRICS, 0.75)} for case in "ab"]
        >>> second = [{**row, "dice": 0.5} for row in first]
        >>> found = compared_sets(first, second)["cortex"]["dice"]
        >>> found["mean_difference"], found["note"]
        (0.25, 'too few cases for a test (2, at least 6)')
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        one, two = by_structure(first, metric), by_structure(second, metric)
        for name in one:
            result.setdefault(name, {})[metric] = paired_comparison(one[name], two.get(name, {}))
    return result
