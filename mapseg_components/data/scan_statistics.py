# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Statistics of a scan, a few hundred numbers: enough to see that one scan of a set differs from the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mapseg_components.data.volumes import faces_of
from mapseg_components.scans.facts import AuditRecord, Facts, facts_of_scan
from mapseg_components.scans.nifti import Scan, read_nifti
from mapseg_components.scans.pictures import Picture
from mapseg_components.structures import are_whole

__all__ = ["ScanStatistics", "StatisticsRecord", "scan_statistics"]

GRID = 16  # cells per axis of the coarse view
QUANTILES = 101
BRIGHTEST = 99.5  # percentile that the networks' scaling clips at
MOST_VOXELS = 1 << 21  # drawn regularly for quantiles


@dataclass(frozen=True)
class ScanStatistics:
    """Geometry and intensities of an image in numbers.

    Args:
        spacing_mm: voxel sizes along x, y, z of RAS.
        extent_mm: field of view along x, y, z of RAS.
        axcodes: orientation by the header, such as ``"RAS"``.
        background_share: share of voxels that have exactly the lowest value.
        border_share: the same on the six faces of the volume.
        whole_numbers: all values are whole numbers.
        soft_tissue_hu: share of the voxels above the lowest value that lie in -150 to 250.
        soft_tissue_shifted: the same in 874 to 1274.
        quantiles: (101,) of the voxels above the lowest value, scaled so that 0 is the lowest value and 1 the 99.5th
            percentile.
        view: (16, 16, 16), the box of what is above the lowest value, in RAS by the header, on a coarse grid: mean
            intensity of each cell, scaled as the quantiles; float16, since those of all scans are kept.
        sized: lengths are known; of an image without a pixel size they are in pixels.
    """

    spacing_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    axcodes: str
    background_share: float
    border_share: float
    whole_numbers: bool
    soft_tissue_hu: float
    soft_tissue_shifted: float
    quantiles: np.ndarray
    view: np.ndarray
    sized: bool


def scan_statistics(scan: Scan) -> ScanStatistics | None:
    """Statistics of a scan; ``None`` if it has voxels that are not finite, or no contrast."""
    turn = nib.io_orientation(scan.affine)
    voxels = np.asarray(nib.apply_orientation(scan.voxels, turn), dtype=np.float32)
    lowest, highest = float(voxels.min()), float(voxels.max())
    if not np.isfinite(highest - lowest) or lowest == highest:
        return None
    sides = np.linalg.norm(scan.affine[:3, :3], axis=0)[np.argsort(turn[:, 0])]
    above = voxels > lowest
    drawn = voxels[above][:: max(int(above.sum()) // MOST_VOXELS, 1)]
    top = max(
        float(np.percentile(voxels.ravel()[:: max(voxels.size // MOST_VOXELS, 1)], BRIGHTEST)),
        np.nextafter(lowest, highest),
    )
    faces = np.concatenate([face.ravel() for face in faces_of(above)])
    scaled = np.clip((drawn - lowest) / (top - lowest), 0, 1)
    box = tuple(slice(*limits) for limits in box_of(above))
    return ScanStatistics(
        spacing_mm=tuple(float(s) for s in sides),
        extent_mm=tuple(float(s * n) for s, n in zip(sides, voxels.shape)),
        axcodes="".join(nib.aff2axcodes(scan.affine)),
        background_share=float(1 - above.mean()),
        border_share=float(1 - faces.mean()),
        whole_numbers=bool(are_whole(drawn).all()),
        soft_tissue_hu=float(((drawn > -150) & (drawn < 250)).mean()),
        soft_tissue_shifted=float(((drawn > 874) & (drawn < 1274)).mean()),
        quantiles=np.quantile(scaled, np.linspace(0, 1, QUANTILES)),
        view=coarse(np.clip((voxels[box] - lowest) / (top - lowest), 0, 1)).astype(np.float16),
        sized=not isinstance(scan, Picture) or scan.sized,
    )


def box_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open box of what is true."""
    limits = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        limits.append((int(found[0]), int(found[-1]) + 1))
    return limits


def coarse(volume: np.ndarray) -> np.ndarray:
    """Means over (about) equal parts of each axis; axes shorter than the grid repeat their voxels."""
    for axis in range(3):
        edges = np.linspace(0, volume.shape[axis], GRID + 1)
        sums = np.concatenate(
            [
                np.zeros_like(np.take(volume, [0], axis), dtype=np.float64),
                np.cumsum(volume, axis=axis, dtype=np.float64),
            ],
            axis,
        )
        low = np.floor(edges).astype(int)
        part = edges - low
        shape = [1, 1, 1]
        shape[axis] = -1
        at = np.take(sums, low, axis) * (1 - part.reshape(shape))
        at += np.take(sums, np.minimum(low + 1, volume.shape[axis]), axis) * part.reshape(shape)
        volume = np.diff(at, axis=axis) / np.diff(edges).reshape(shape)
    return volume


class StatisticsRecord(AuditRecord):
    """Facts of files, each read once, with the statistics of each image. Nothing is kept between runs."""

    def __init__(self) -> None:
        super().__init__(None)
        self.statistics: dict[str, ScanStatistics] = {}
        self.read: Any = lambda path: None  # called with each file that was read, for a progress bar
        self.known: dict[tuple[str, bool], Facts] = {}

    def facts(self, path: str | Path, with_values: bool) -> Facts:
        """Facts of a file. Errors as `read_nifti`."""
        key = str(path), with_values
        if key not in self.known:
            try:
                scan = read_nifti(path)
            finally:
                self.read(path)
            self.known[key] = facts_of_scan(scan, with_values)
            statistics = None if with_values else scan_statistics(scan)
            if statistics is not None:
                self.statistics[str(path)] = statistics
        return self.known[key]
