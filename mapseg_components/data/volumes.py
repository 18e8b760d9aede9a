# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes of the structures in a label map."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from mapseg_components.errors import DataError
from mapseg_components.files import write_text
from mapseg_components.keys import IMAGE, LABEL, MASK
from mapseg_components.scans.files import Scan, is_picture
from mapseg_components.scans.masks import outside_of
from mapseg_components.scans.nifti import affine_beside, read_nifti
from mapseg_components.structures import structures_of, to_whole

__all__ = [
    "class_weights",
    "faces_of",
    "read_volumes_csv",
    "readable_size",
    "share_ranges",
    "structure_sizes",
    "structure_volumes",
    "voxel_ml",
    "write_volumes_csv",
]

PIECE = 1 << 22  # voxels at a time: counting takes 64-bit numbers
COLUMNS = ("case", "structure", "voxels", "volume_mm3", "touches_edge")
OPTIONAL = {"confidence": float, "adaptation": str, "gain": float}  # column to its type


def class_weights(cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int], power: float) -> list[float] | None:
    """Cross-entropy weights that grow with the rarity of a class: ``(1 / share of voxels) ** power``, background 1.

    Args:
        cases: labelled (source) cases; every label map is read once.
        labels: structure name to value; all other values count as background.
        power: 0 for equal weights (then nothing is read), 0.5 for a strong, 1 for a full balance.

    Returns:
        one weight per class, background first, or ``None`` for equal weights. A class without a voxel weighs 1.
    """
    if power == 0:
        return None
    labels = structures_of(labels)
    counts = np.zeros(len(labels) + 1)
    for case in cases:
        voxels = counted(case, read_nifti(case[LABEL]))
        found = [int((voxels == value).sum()) for value in labels.values()]
        counts += [voxels.size - sum(found), *found]
    weights = np.where(counts > 0, (counts[0] / np.maximum(counts, 1)) ** power, 1.0)
    return [float(weight) for weight in weights]


def counted(case: Mapping[str, Any], label: Scan) -> np.ndarray:
    """Values of a case's label map, of any shape, without what its mask or transparent pixels leave out."""
    voxels = to_whole(label.voxels)
    known = IMAGE in case and (MASK in case or is_picture(case[IMAGE]))
    outside = outside_of(case[IMAGE], case.get(MASK)) if known else None
    return voxels if outside is None or outside.shape != voxels.shape else voxels[~outside]


def structure_sizes(
    cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int]
) -> list[dict[str, tuple[int, float]]]:
    """Voxels and mm3 of each structure in each labelled case; every label map is read once.

    Args:
        cases: with ``label``, a file.
        labels: structure name to value.
    """
    labels, sizes = structures_of(labels), []
    for case in cases:
        scan = read_nifti(case[LABEL])
        affine = affine_beside(case[LABEL], scan.affine, case.get(IMAGE, case[LABEL]))
        voxels, voxel_mm3 = counted(case, scan), abs(float(np.linalg.det(affine[:3, :3])))
        counts = {name: int((voxels == value).sum()) for name, value in labels.items()}
        sizes.append({name: (count, count * voxel_mm3) for name, count in counts.items()})
    return sizes


def share_ranges(cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """Lowest and highest share of each structure, of the voxels of all structures of a labelled case.

    Args:
        cases: with ``label``, a file; every label map is read once. Cases without any structure are left out.
        labels: structure name to value.
    """
    counts = np.array([[voxels for voxels, _ in sizes.values()] for sizes in structure_sizes(cases, labels)], float)
    counts = counts[counts.sum(axis=1) > 0] if len(counts) else counts
    if not len(counts):
        return {}
    shares = counts / counts.sum(axis=1, keepdims=True)
    names = structures_of(labels)
    return {name: (float(low), float(high)) for name, low, high in zip(names, shares.min(axis=0), shares.max(axis=0))}


def voxel_ml(image: torch.Tensor) -> float:
    """Volume of a voxel in ml, from the affine in mm that a scan travels with; 0 without one."""
    return abs(float(np.linalg.det(np.asarray(image.affine)[:3, :3]))) / 1000 if isinstance(image, MetaTensor) else 0.0


def structure_volumes(
    label_map: np.ndarray, affine: np.ndarray, names: Sequence[str], confidence: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Voxels and mm3 of each structure, and whether it touches the edge of the field of view (and may go on there).

    Args:
        label_map: integers (X, Y, Z), 0 background, then the structures in order.
        affine: (4, 4), voxel to mm.
        names: structures, background left out.
        confidence: (X, Y, Z), the largest probability of each voxel.

    Returns:
        one row per structure: ``structure``, ``voxels``, ``volume_mm3``, ``touches_edge``; with ``confidence`` its mean
        over the structure as well, ``None`` where that has no voxel.
    """
    voxel_mm3 = abs(float(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3])))
    label_map = np.asarray(label_map)
    counts = sums_by_label(label_map, len(names) + 1)
    at_edge = {int(value) for face in faces_of(label_map) for value in np.unique(face)}
    rows: list[dict[str, Any]] = [
        {
            "structure": name,
            "voxels": int(counts[index]),
            "volume_mm3": readable_size(int(counts[index]) * voxel_mm3, 3),
            "touches_edge": index in at_edge,
        }
        for index, name in enumerate(names, start=1)
    ]
    if confidence is not None:
        sums = sums_by_label(label_map, len(names) + 1, confidence)
        for index, row in enumerate(rows, start=1):
            row["confidence"] = round(float(sums[index] / counts[index]), 4) if counts[index] else None
    return rows


def faces_of(volume: np.ndarray) -> list[np.ndarray]:
    """The outer slices of a volume (X, Y, Z), two along each axis; none along that of a single slice, which is all of
    it.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.data.volumes import faces_of
        >>> [face.shape for face in faces_of(np.zeros((3, 4, 1)))]
        [(4, 1), (4, 1), (3, 1), (3, 1)]
    """
    axes = [axis for axis in range(3) if volume.shape[axis] > 1]
    return [np.take(volume, end, axis) for axis in axes for end in (0, -1)]


def readable_size(size: float, decimals: int) -> float:
    """A size for a table: so many decimals, or four digits of what they would leave less of, as of cells in mm3.

    Examples:
        >>> from mapseg_components.data.volumes import readable_size
        >>> readable_size(12.34567, 3), readable_size(0.00000123456, 3)
        (12.346, 1.235e-06)
    """
    return round(size, decimals) if abs(size) >= 10 ** (4 - decimals) else float(f"{size:.4g}")


def sums_by_label(label_map: np.ndarray, count: int, values: np.ndarray | None = None) -> np.ndarray:
    """Voxels of each label below a count, or the sum of ``values`` (of the same shape) over them; (count,), float64."""
    labels, weights = label_map.ravel(), None if values is None else values.ravel()
    sums = np.zeros(count)
    for start in range(0, labels.size, PIECE):
        part = slice(start, start + PIECE)
        piece = labels[part].astype(np.int64)
        sums += np.bincount(piece, None if weights is None else weights[part], count)[:count]
    return sums


def write_volumes_csv(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write rows of `structure_volumes`, each with its ``case``, as CSV; all of it or nothing.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    table = io.StringIO(newline="")
    columns = [*COLUMNS, *(name for name in OPTIONAL if any(name in row for row in rows))]
    writer = csv.DictWriter(table, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(table.getvalue(), path)


def read_volumes_csv(path: str | Path) -> list[dict[str, Any]]:
    """Rows as `write_volumes_csv` took them.

    Raises:
        DataError: there is no such file, or it is none of ``write_volumes_csv``.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
        for row in rows:
            row["voxels"], row["volume_mm3"] = int(row["voxels"]), float(row["volume_mm3"])
            row["touches_edge"] = {"True": True, "False": False}[row["touches_edge"]]
            for name in OPTIONAL.keys() & set(row):
                row[name] = OPTIONAL[name](row[name]) if row[name] else None
            if set(row) - set(OPTIONAL) != set(COLUMNS):
                raise ValueError(f"columns {sorted(map(str, row))}")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is no table of volumes ({error!r}): expected columns {', '.join(COLUMNS)}") from error
    return rows
