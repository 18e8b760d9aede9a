# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Agreement of a label map with the truth, per structure, with intervals and tests over cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from monai.utils import optional_import

from mapseg_components.errors import ConfigError

__all__ = ["METRICS", "agreement", "bootstrap_interval", "paired_comparison", "require_scipy"]

# column: what it is called in tables, and whether more is better
METRICS = {
    "dice": ("Dice", True),
    "surface_dice": ("surface Dice", True),
    "hd95_mm": ("HD95 mm", False),
    "assd_mm": ("ASSD mm", False),
}
RESAMPLES = 10_000
FEWEST_CASES = 6  # five pairs cannot reach p < 0.05 in a two-sided signed rank test


def require_scipy() -> None:
    """Raise `ConfigError` without scipy, which MONAI's surface metrics and the rank test need."""
    if not optional_import("scipy.ndimage")[1]:
        raise ConfigError("surface distances need scipy, which is not installed: pip install scipy")


def agreement(
    prediction: np.ndarray, truth: np.ndarray, values: Sequence[int], spacing_mm: Sequence[float], tolerance_mm: float
) -> list[dict[str, float | None]]:
    """Dice, surface Dice, 95th percentile Hausdorff and average symmetric surface distance of each structure, by MONAI.

    Args:
        prediction: label map (X, Y, Z).
        truth: label map (X, Y, Z) on the same grid.
        values: of the structures.
        spacing_mm: voxel sides.
        tolerance_mm: surfaces nearer than this agree, for the surface Dice.

    Returns:
        one row per structure: each of `METRICS`, and ``truth_voxels``, ``predicted_voxels``. All metrics are ``None``
        where the truth has no such structure; the distances where the prediction has none (both Dice are 0 then).

    Raises:
        ConfigError: scipy is missing.
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
            pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in cropped(*masks)]
            spacing = [float(side) for side in spacing_mm]
            row |= {
                "dice": float(compute_dice(*pair)),
                "surface_dice": float(compute_surface_dice(*pair, [tolerance_mm], True, spacing=spacing)),
                "hd95_mm": float(compute_hausdorff_distance(*pair, True, percentile=95, spacing=spacing)),
                "assd_mm": float(compute_average_surface_distance(*pair, True, symmetric=True, spacing=spacing)),
            }
        rows.append(row)
    return rows


def cropped(one: np.ndarray, two: np.ndarray) -> list[np.ndarray]:
    """Two masks cropped to the box that holds both, with a margin of one voxel."""
    either = one | two
    box = []
    for axis in range(either.ndim):
        found = np.flatnonzero(either.any(axis=tuple(a for a in range(either.ndim) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return [np.pad(mask[tuple(box)], 1) for mask in (one, two)]


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean by resampling the cases (percentiles of 10,000 means); ``None`` below two cases."""
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
        first: case to value.
        second: case to value. Cases that lack one of the two are left out.

    Returns:
        ``n``, ``mean_difference`` (first minus second), ``ci95``, ``p``, and ``note``: why there is no ``p``.

    Raises:
        ConfigError: scipy is missing.
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
