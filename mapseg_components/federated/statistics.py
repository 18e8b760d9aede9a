# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a site may tell about its scans as a whole: intensities, volumes and voxel sides, rounded, from enough scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapseg_components.data.portraits import Portrait, PortraitRecord
from mapseg_components.errors import ConfigError, DataError

__all__ = ["FEATURES", "LEAST_SCANS", "Range", "summary_of"]

LEAST_SCANS = 3  # nobody may ask for less: the mean of two tells each of two owners the other's value
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


# the bins are fixed: with narrow ones of their own choice a server could ask for single scans
FEATURES = {
    "intensity": Range(0.0, 1.0, 20),
    "log10_field_of_view_mm3": Range(4.0, 8.0, 16),
    "log10_foreground_mm3": Range(4.0, 8.0, 16),
    "least_voxel_side_mm": Range(0.0, 3.0, 12),
    "greatest_voxel_side_mm": Range(0.0, 6.0, 12),
}


def summary_of(images: Sequence[str], least: int) -> dict[str, Any]:
    """Everything that a site ever answers; there is no other way to its scans.

    Foreground are the voxels above the lowest value; intensities are scaled so that 0 is the lowest value of a scan
    and 1 its 99.5th percentile. The histogram of ``intensity`` holds whole per cents of the foreground of an average
    scan; those of the other features hold numbers of scans where there are ``least`` or more (see `told`). Means and
    standard deviations are over scans, to a fifth of a bin.

    Args:
        images: files of the scans. least: number of scans below which nothing is told.

    Returns:
        ``scans``, and by feature of `FEATURES` ``mean``, ``stddev`` and ``histogram``.

    Raises:
        ConfigError: ``least`` is less than 3. DataError: there are fewer scans, or one cannot be read.
    """
    if least < LEAST_SCANS:
        raise ConfigError(
            f"statistics_min_scans is {least}, expected {LEAST_SCANS} or more: fewer would show single scans"
        )
    if len(images) < least:
        raise DataError(
            f"has {len(images)} scans, statistics_min_scans is {least}: nothing is told about so few; "
            "leave this site out of the picture"
        )
    portraits = [portrait(image) for image in images]
    values = {
        "intensity": [float(each.quantiles.mean()) for each in portraits],
        "log10_field_of_view_mm3": [math.log10(volume(each)) for each in portraits],
        "log10_foreground_mm3": [math.log10(volume(each) * (1 - each.background_share)) for each in portraits],
        "least_voxel_side_mm": [min(each.spacing_mm) for each in portraits],
        "greatest_voxel_side_mm": [max(each.spacing_mm) for each in portraits],
    }
    features = {name: told(values[name], bounds, least) for name, bounds in FEATURES.items()}
    features["intensity"]["histogram"] = percents(portraits, FEATURES["intensity"])
    return {"scans": len(images), "features": features}


def portrait(image: str) -> Portrait:
    """Portrait of a scan that has one."""
    record = PortraitRecord()
    record.facts(image, False)
    if image not in record.portraits:
        raise DataError(f"{image} has no contrast, or voxels that are not finite: repair it, or leave it out")
    return record.portraits[image]


def volume(portrait: Portrait) -> float:
    """Field of view in mm3."""
    return math.prod(portrait.extent_mm)


def told(values: Sequence[float], bounds: Range, least: int) -> dict[str, Any]:
    """Rounded mean and standard deviation, and the scans in each bin, 0 for fewer than ``least``.

    Nor may fewer than ``least`` be missing from the bins: with the mean, they would tell where a single scan lies.
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


def percents(portraits: Sequence[Portrait], bounds: Range) -> list[int]:
    """Share of the foreground in each bin, the mean over scans in whole per cents; from 101 quantiles of each."""
    levels = np.linspace(0, 1, len(portraits[0].quantiles))
    below = np.mean([np.interp(bounds.edges, each.quantiles, levels, left=0, right=1) for each in portraits], axis=0)
    below[[0, -1]] = 0, 1
    return [round(100 * float(share)) for share in np.diff(below)]
