# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The working frame of an adaptation: directions of the array axes and voxel sides, from all scans and label maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.ndimage import distance_transform_edt

from mapseg_components.boxes import is_thick
from mapseg_components.errors import ConfigError
from mapseg_components.plans.sizes import plan_sizes
from mapseg_components.scans.nifti import affine_beside, read_geometry, read_nifti
from mapseg_components.transforms.frame import axes_in_frame, frame_of
from mapseg_components.transforms.resampling import spacing_of
from mapseg_components.transforms.shapes import SPECK

__all__ = ["Frame", "Grid", "Sizes", "find_frame", "plan_frame", "sizes_of"]

LOOKED_AT = 10  # label maps whose structures are measured
STACKS = 40  # that are compared with each other for the frame
ALIKE = 1.1  # spacings within this factor are not worth a resampling
COARSER = 1.3  # nor is a grid that is hardly coarser
ACROSS = 4.0  # working voxels across the thinnest structure, at least
FINE = 5.0  # working voxels across the thinnest structure, below which a network keeps the full resolution
WHOLE = 0.5  # of each side of a scan in a patch: beyond, a global view adds little to the patch
FEW_MM = 0.1
AROUND = 1.3  # a patch is this many times wider than all structures together


@dataclass(frozen=True)
class Grid:
    """A scan's grid in the working frame.

    Args:
        shape: (3,), voxels.
        spacing: (3,), mm.
    """

    shape: np.ndarray
    spacing: np.ndarray


@dataclass(frozen=True)
class Sizes:
    """What the label maps say of the structures, along the axes of the working frame.

    Args:
        extent: (3,), mm of the box around all structures, of the larger scans (90th percentile); in 2D images around
            the larger components of the most extended structure.
        widths: mm across each structure at its broadest, in the plane of thick slices; the median over scans.
    """

    extent: np.ndarray
    widths: Mapping[str, float]


@dataclass(frozen=True)
class Frame:
    """The working frame of all scans of an adaptation.

    Args:
        directions: (3, 3) in RAS+, or ``None`` for the body's axes.
        spacing: mm per axis, 0 for an axis that stays as it is, or ``None`` where nothing is resampled.
        grids: of all scans in the frame, before they are resampled.
        thinnest: mm across the thinnest structure, or ``None`` if there is none.
    """

    directions: list[list[float]] | None
    spacing: list[float] | None
    grids: Sequence[Grid]
    thinnest: float | None = None

    @property
    def fine(self) -> bool:
        """Whether a structure is so thin that features of half the resolution would lose it."""
        return self.thinnest is None or self.thinnest < FINE * float(np.median(self.spacings, axis=0).min())

    def needs_view(self, patch: Sequence[int]) -> bool:
        """Whether a patch shows so little of the median scan that a view of the whole says more."""
        return bool((np.asarray(patch) < WHOLE * np.median(self.shapes, axis=0)).any())

    @property
    def settings(self) -> dict[str, Any]:
        """What the bundles' configs have of it."""
        return {"working_directions": self.directions, "working_spacing": self.spacing}

    @property
    def spacings(self) -> list[np.ndarray]:
        """mm per axis of each scan as it is worked on."""
        wanted = np.zeros(3) if self.spacing is None else np.asarray(self.spacing)
        return [np.where(wanted > 0, wanted, grid.spacing) for grid in self.grids]

    @property
    def shapes(self) -> list[np.ndarray]:
        """Voxels per axis of each scan as it is worked on."""
        return [
            np.maximum(np.round(grid.shape * grid.spacing / spacing), 1).astype(int)
            for grid, spacing in zip(self.grids, self.spacings)
        ]

    @property
    def figures(self) -> dict[str, Any]:
        """Medians, for the record and the terminal."""
        return {
            "median_shape": np.median([grid.shape for grid in self.grids], axis=0).tolist(),
            "median_spacing_mm": [rounded(side) for side in np.median([grid.spacing for grid in self.grids], axis=0)],
            "working_shape": np.median(self.shapes, axis=0).tolist(),
            "working_spacing_mm": [rounded(side) for side in np.median(self.spacings, axis=0)],
        }


def rounded(side: float) -> float:
    """A length in mm for reading: to three decimals, of pixels of a microscope to four digits."""
    return round(float(side), 3) if side >= FEW_MM else float(f"{side:.4g}")


def find_frame(
    labelled: Sequence[Mapping[str, Any]],
    target: Sequence[Mapping[str, Any]],
    labels: Mapping[str, int],
    preset: str,
    settings: Mapping[str, Any],
) -> Frame:
    """The frame of an adaptation.

    Args:
        labelled: cases of the source.
        target: cases of the target.
        labels: structures and their values.
        preset: one of `PRESETS`; the side of its patch says how much a step can see.
        settings: of the user; ``working_directions`` and ``working_spacing`` are taken as they are.

    Raises:
        ConfigError: a setting is no frame, or a preset is unknown.
        DataError: a scan or label map cannot be read.
    """
    headers = [read_geometry(case["image"]) for case in (*labelled, *target)]
    if "working_directions" in settings:
        directions = settings["working_directions"]
        frame_of(directions)
    else:
        directions = directions_of([header.affine for header in headers])
    grids = [laid(header.shape, header.affine, directions) for header in headers]
    maps, images = [[case[key] for case in labelled] for key in ("label", "image")]
    sizes = sizes_of(maps, labels, directions, images)
    if "working_spacing" in settings:
        spacing = checked_spacing(settings["working_spacing"])
    else:
        unworked = Frame(directions, None, grids)
        patch = plan_sizes(unworked.shapes, unworked.spacings, preset)["patch_size"]
        spacing = plan_frame(grids[: len(labelled)], grids[len(labelled) :], sizes, patch)
    return Frame(directions, spacing, grids, min(sizes.widths.values()) if sizes and sizes.widths else None)


def checked_spacing(spacing: Any) -> list[float] | None:
    """A working spacing as the user set it. Raises `ConfigError`."""
    if spacing is None:
        return None
    try:
        found = [float(side) for side in spacing]
    except (TypeError, ValueError):
        found = []
    if len(found) != 3 or not all(np.isfinite(side) and side >= 0 for side in found):
        raise ConfigError(
            f"working_spacing is {spacing!r}, expected mm for each of three axes (0 leaves an axis as it is), or null"
        )
    return found


def directions_of(affines: Sequence[np.ndarray]) -> list[list[float]] | None:
    """Directions of the working frame's axes for scans of these affines (4, 4) each; ``None`` for the body's own.

    For stacks of thick slices it is the stack that lies best among the others, its slices on the last axis and its
    axes turned to the right, the front and upwards as far as they go; for anything else the body's axes.
    """
    turns = [(affine, affine[:3, :3] / spacing_of(affine)) for affine in affines]
    thick = [one for one in turns if is_thick(spacing_of(one[0]))]
    if 2 * len(thick) <= len(turns):
        return None
    thick = thick[:: math.ceil(len(thick) / STACKS)]
    candidates = []
    for affine, turn in thick:
        slices = int(np.argmax(spacing_of(affine)))
        plane = [axis for axis in range(3) if axis != slices]
        plane.sort(key=lambda axis: np.argmax(np.abs(turn[:, axis])))
        left, _, right = np.linalg.svd(turn[:, [*plane, slices]].T)
        rows = left @ right  # at right angles, where the header's are nearly
        candidates.append(np.array([row if row[np.argmax(np.abs(row))] > 0 else -row for row in rows]))

    def alike(frame: np.ndarray) -> float:
        return sum(
            abs(float(frame[place] @ turn[:, axis]))
            for affine, turn in thick
            for place, (axis, _) in enumerate(axes_in_frame(affine, frame))
        )

    best = max(candidates, key=alike)
    return np.round(best, 4).tolist()


def laid(shape: Sequence[int], affine: np.ndarray, directions: Sequence[Sequence[float]] | None) -> Grid:
    """Grid of a shape and an affine (4, 4) in the working frame. Raises `ConfigError`."""
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all() or np.any(spacing == 0):
        raise ConfigError(f"the affine {np.asarray(affine).tolist()} names no axes: check the scan's header")
    order = [axis for axis, _ in axes_in_frame(affine, frame_of(directions))]
    return Grid(np.asarray(shape)[order], spacing[order])


def sizes_of(
    label_maps: Sequence[str],
    labels: Mapping[str, int],
    directions: Sequence[Sequence[float]] | None,
    scans: Sequence[str] = (),
) -> Sizes | None:
    """Sizes of the structures in some of the label maps; ``None`` where none has a structure.

    Args:
        label_maps: files.
        labels: structures and their values.
        directions: of the frame.
        scans: their files, which may name a pixel size where PNG and TIFF label maps do not.

    Raises:
        DataError: a file cannot be read.
    """
    step = max(len(label_maps) // LOOKED_AT, 1)
    extents: list[np.ndarray] = []
    widths: dict[str, list[float]] = {name: [] for name in labels}
    chosen = list(zip(label_maps, scans or label_maps))[::step]
    for path, origin in chosen[:LOOKED_AT]:
        scan = read_nifti(path)
        affine = affine_beside(path, scan.affine, origin)
        spacing = spacing_of(affine)
        order = [axis for axis, _ in axes_in_frame(affine, frame_of(directions))]
        voxels = np.transpose(np.asarray(scan.voxels), order)
        sides = spacing[order]
        known = np.isin(np.round(voxels), list(labels.values()))
        if not known.any():
            continue
        where = np.argwhere(known)
        low, high = where.min(axis=0), where.max(axis=0) + 1
        flat = tuple(np.flatnonzero(np.equal(voxels.shape, 1)))
        spans = [high - low] if not flat else component_spans(voxels, labels.values())
        extents.append(np.max(spans, axis=0) * sides)
        # a 2D image has no end along its third axis
        part = np.squeeze(np.round(voxels[tuple(map(slice, low, high))]), axis=flat)
        across = sides * np.where(is_thick(sides) & (sides == sides.max()), 1e6, 1.0)  # slices have no say
        across = np.delete(across, flat)
        for name, value in labels.items():
            for box in ndimage.find_objects((part == value).astype(np.uint8)):  # one, or none
                inside = np.pad(part[box] == value, 1)
                widths[name].append(2 * float(np.percentile(distance_transform_edt(inside, across)[inside], 95)))
    if not extents:
        return None
    return Sizes(np.percentile(extents, 90, axis=0), {name: float(np.median(w)) for name, w in widths.items() if w})


def component_spans(voxels: np.ndarray, values: Iterable[int]) -> list[np.ndarray]:
    """Voxels per axis of the larger connected components (90th percentile, without specks), of each structure.

    An image of tissue may be full of cells: what a patch must hold is one of them.
    """
    spans = []
    for value in values:
        numbered, count = ndimage.label(np.round(voxels) == value)
        if count:
            sizes = np.bincount(numbered.ravel())[1:]
            boxes = ndimage.find_objects(numbered)
            sides = [
                [part.stop - part.start for part in box]
                for box, size in zip(boxes, sizes)
                if size >= SPECK * sizes.max()
            ]
            spans.append(np.percentile(sides, 90, axis=0))
    return spans


def plan_frame(source: Sequence[Grid], target: Sequence[Grid], sizes: Sizes | None, patch: Sequence[int]) -> Any:
    """Voxel sides to work with, in mm per axis of the working frame.

    As fine as the coarser of both sides' median scans. Coarser where the structures together do not fit a patch with
    what is around them, as long as the thinnest is `ACROSS` voxels wide. Slices are kept as they are, unless those of
    source and target differ by more than twice.

    Args:
        source: grids of the labelled scans.
        target: grids of the others.
        sizes: of the structures.
        patch: voxels per axis that a step can afford.

    Returns:
        mm per axis, 0 for an axis that stays as it is in each scan; ``None`` where no scan is resampled.
    """
    medians = [np.median([grid.spacing for grid in side], axis=0) for side in (source, target) if side]
    base = np.max(medians, axis=0)
    every = np.array([grid.spacing for grid in (*source, *target)])
    shapes = np.array([grid.shape for grid in (*source, *target)])
    flat = (shapes == 1).all(axis=0)
    slices = np.array([is_thick(base)] * 3) & (base == base.max())
    plane = ~slices & ~flat
    wanted = base.copy()
    if sizes is not None and sizes.widths:
        finest = min(sizes.widths.values()) / ACROSS
        fits = max(sizes.extent[axis] * AROUND / patch[axis] for axis in np.flatnonzero(plane))
        coarse = min(finest, fits)
        if coarse > COARSER * base[plane].max():
            wanted[plane] = coarse
    differs = np.maximum(every / wanted, wanted / every).max(axis=0) > ALIKE
    keep = flat | (slices & (np.max(medians, axis=0) < 2.0 * np.min(medians, axis=0)))
    if not (differs & ~keep).any():
        return None
    return [0.0 if keep[axis] else rounded(float(wanted[axis])) for axis in range(3)]
