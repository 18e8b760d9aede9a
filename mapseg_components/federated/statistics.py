# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Summary statistics that a site may send: intensities, volumes and voxel sizes, rounded, over at least three scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapseg_components.data.scan_statistics import ScanStatistics, StatisticsRecord
from mapseg_components.errors import ConfigError, DataError

__all__ = ["FEATURES", "LEAST_SCANS", "Range", "summary_of"]

LEAST_SCANS = 3  # the mean of two values reveals to the owner of one the value of the other
STEPS = 5  # of means and standard deviations in the width of a bin


@dataclass(frozen=True)
class Range:
    """Histogram of a feature: ``bins`` of equal width from ``low`` to ``high``; what lies outside is moved there."""

    low: float
    high: float
    bins: int

    @property
    def edges(self) -> np.ndarray:
        """(bins + 1,)"""
        return np.linspace(self.low, self.high, self.bins + 1)

    def rounded(self, value: float) -> float:
        """To a fifth of a bin."""
        step = (self.high - self.low) / self.bins / STEPS
        return round(round(value / step) * step, 6)


# the bins are fixed: a server that could choose narrow ones could single out scans
FEATURES = {
    "intensity": Range(0.0, 1.0, 20),
    "log10_field_of_view_mm3": Range(4.0, 8.0, 16),
    "log10_foreground_mm3": Range(4.0, 8.0, 16),
    "least_voxel_side_mm": Range(0.0, 3.0, 12),
    "greatest_voxel_side_mm": Range(0.0, 6.0, 12),
}


def summary_of(images: Sequence[str], least: int) -> dict[str, Any]:
    """Summary statistics of the scans of a site: all that it ever sends about them.

    Foreground are the voxels above the lowest value; intensities are scaled so that 0 is the lowest value of a scan
    and 1 its 99.5th percentile. The histogram of ``intensity`` holds whole per cents of the foreground of an average
    scan; those of the other features hold numbers of scans where there are ``least`` or more (see `feature_summary`).
    Means and standard deviations are over scans, to a fifth of a bin.

    Args:
        images: files of the scans.
        least: number of scans below which nothing is sent.

    Returns:
        ``scans``, and by feature of `FEATURES` ``mean``, ``stddev`` and ``histogram``.

    Raises:
        ConfigError: ``least`` is less than 3.
        DataError: there are fewer scans, or one cannot be read.
    """
    if least < LEAST_SCANS:
        raise ConfigError(
            f"statistics_min_scans is {least}, expected {LEAST_SCANS} or more: fewer would show single scans"
        )
    if len(images) < least:
        raise DataError(
            f"has {len(images)} scans, statistics_min_scans is {least}: no statistics are sent for so few; "
            "leave this site out"
        )
    statistics = [statistics_of(image) for image in images]
    values = {
        "intensity": [float(each.quantiles.mean()) for each in statistics],
        "log10_field_of_view_mm3": [math.log10(volume(each)) for each in statistics],
        "log10_foreground_mm3": [math.log10(volume(each) * (1 - each.background_share)) for each in statistics],
        "least_voxel_side_mm": [min(each.spacing_mm) for each in statistics],
        "greatest_voxel_side_mm": [max(each.spacing_mm) for each in statistics],
    }
    features = {name: feature_summary(values[name], bounds, least) for name, bounds in FEATURES.items()}
    features["intensity"]["histogram"] = percents(statistics, FEATURES["intensity"])
    return {"scans": len(images), "features": features}


def statistics_of(image: str) -> ScanStatistics:
    """Statistics of a scan.

    Raises:
        DataError: it has no contrast, or voxels that are not finite.
    """
    record = StatisticsRecord()
    record.facts(image, False)
    if image not in record.statistics:
        raise DataError(f"{image} has no contrast, or voxels that are not finite: repair it, or leave it out")
    return record.statistics[image]


def volume(statistics: ScanStatistics) -> float:
    """Field of view in mm3."""
    return math.prod(statistics.extent_mm)


def feature_summary(values: Sequence[float], bounds: Range, least: int) -> dict[str, Any]:
    """Rounded mean and standard deviation, and the scans in each bin, 0 for fewer than ``least``.

    Nor may fewer than ``least`` be missing from the bins: with the mean, they would reveal where a single scan lies.
    """
    inside = np.clip(values, bounds.low, bounds.high)
    found, _ = np.histogram(inside, bounds.edges)
    found[found < least] = 0
    if 0 < len(values) - found.sum() < least:
        found[:] = 0
    return {
        "mean": bounds.rounded(float(inside.mean())),
        "stddev": bounds.rounded(float(inside.std(ddof=1))),
        "histogram": found.tolist(),
    }


def percents(statistics: Sequence[ScanStatistics], bounds: Range) -> list[int]:
    """Share of the foreground in each bin, the mean over scans in whole per cents; from 101 quantiles of each."""
    levels = np.linspace(0, 1, len(statistics[0].quantiles))
    below = np.mean([np.interp(bounds.edges, each.quantiles, levels, left=0, right=1) for each in statistics], axis=0)
    below[[0, -1]] = 0, 1
    return [round(100 * float(share)) for share in np.diff(below)]
