# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the slices of a DICOM series make up one volume, and on which grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mapseg_components.errors import DataError
from mapseg_components.scans.dicom_objects import DicomObject
from mapseg_components.scans.findings import fault
from mapseg_components.scans.headers import SHEAR_TOLERANCE_DEG, check_affine

__all__ = ["DCM2NIIX", "Slice", "stack"]

STEP_TOLERANCE = 0.05  # of the distance between slices; positions are rounded in headers
SAME_POSITION_MM = 1e-3
# of a voxel's side: so far a slice may lie from where the volume's regular grid has it. Positions rounded to 0.01 mm
# stay far below, and half a voxel, from where another voxel would be nearer, far above
GRID_TOLERANCE = 0.1
DIRECTION_TOLERANCE = 1e-3  # of direction cosines between slices
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
DCM2NIIX = "convert the series with dcm2niix, which can take it apart"


@dataclass(frozen=True)
class Slice:
    """Geometry of one file, in LPS.

    Args:
        file: where it is.
        shape: columns and rows.
        axes: (3, 2), mm per voxel along a row and along a column.
        position: (3,), mm, of the first voxel.
        header: what it says of its values.
    """

    file: Path
    shape: tuple[int, int]
    axes: np.ndarray
    position: np.ndarray
    header: DicomObject


def stack(series: str, slices: list[Slice]) -> tuple[np.ndarray, list[Slice]]:
    """Affine (4, 4) in RAS+ and the slices in its order.

    Raises:
        DataError: they do not make up one volume; see `read_series`.
    """
    first = slices[0]
    if len(slices) < 2:
        raise fault(series, "one slice, expected a volume", "leave the series out")
    for piece in slices[1:]:
        if piece.shape != first.shape or not np.allclose(
            np.linalg.norm(piece.axes, axis=0), np.linalg.norm(first.axes, axis=0), rtol=1e-3
        ):
            raise fault(series, f"{first.file.name} and {piece.file.name} differ in size or pixel spacing", DCM2NIIX)
        if np.abs(normalised(piece.axes) - normalised(first.axes)).max() > DIRECTION_TOLERANCE:
            what = f"{first.file.name} and {piece.file.name} differ in orientation"
            raise fault(series, what, "move localizers and other planes into folders of their own")
    normal = np.cross(*normalised(first.axes).T)
    order = sorted(slices, key=lambda piece: float(piece.position @ normal))
    heights = np.array([piece.position @ normal for piece in order])
    check_steps(series, heights)
    check_line(series, order, normal)
    step = (order[-1].position - order[0].position) / (len(order) - 1)
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = first.axes, step, order[0].position
    affine = LPS_TO_RAS @ affine
    try:
        check_affine(Path(series), affine, "slice positions")
    except DataError as error:
        angle = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
        if angle <= SHEAR_TOLERANCE_DEG:
            raise
        what = f"its slices lie askew over each other, {angle:.1f} degrees (tilted gantry)"
        raise fault(series, what, "convert the series with dcm2niix, which can straighten it") from error
    return affine, order


def check_steps(series: str, heights: np.ndarray) -> None:
    """Slices stand at equal distances. Raises `DataError`.

    Args:
        series: for messages.
        heights: (slices,), mm along the slices' normal, rising.
    """
    steps = np.diff(heights)
    if steps.min() < SAME_POSITION_MM:
        at = int(steps.argmin())
        copies = int((steps < SAME_POSITION_MM).sum())
        raise fault(
            series,
            f"4D or copied: {copies} of {len(heights)} slices stand where another one stands, the first at "
            f"{heights[at]:.2f} mm",
            "take copies out, or split the volumes into folders of their own (dcm2niix does)",
        )
    usual = float(np.median(steps))
    wrong = np.flatnonzero(np.abs(steps - usual) > STEP_TOLERANCE * usual)
    if len(wrong):
        places = [f"{heights[n]:.2f} and {heights[n + 1]:.2f} mm" for n in wrong[:5]]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise fault(
            series,
            f"slices are {usual:.2f} mm apart, but not between {', '.join(places)}{more}",
            "add the missing slices, or resample the series",
        )


def check_line(series: str, order: Sequence[Slice], normal: np.ndarray) -> None:
    """Each slice lies where a regular grid from the first to the last one has it. Raises `DataError`.

    Args:
        series: for messages.
        order: at least two slices by height.
        normal: (3,), of all of them.
    """
    positions, count = np.array([piece.position for piece in order]), len(order)
    sides = np.array([*np.linalg.norm(order[0].axes, axis=0), 0.0])
    sides[2] = abs((positions[-1] - positions[0]) @ normal) / (count - 1)
    frame = np.column_stack([normalised(order[0].axes), normal])  # across columns, across rows, along the normal
    steps = np.arange(count)[:, None]
    ends = positions[0] + steps / (count - 1) * (positions[-1] - positions[0])
    if (np.abs((positions - ends) @ frame) <= GRID_TOLERANCE * sides).all():
        return
    # which one: by the usual step, so that an end which lies aside does not put all others out of line
    others = steps * np.median(np.diff(positions, axis=0), axis=0)
    aside = (positions - others - np.median(positions - others, axis=0)) @ frame
    worst = int((np.abs(aside) / sides).max(axis=1).argmax())
    distance, height = float(np.linalg.norm(aside[worst])), positions[worst] @ normal
    raise fault(
        series,
        f"slice {worst + 1} of {count} (at {height:.2f} mm) lies {distance:.2f} mm out of line with the others, within "
        f"its plane {float(np.linalg.norm(aside[worst, :2])):.2f} mm",
        "leave that slice out and resample, or split the series where the patient or the table moved (dcm2niix does)",
    )


def normalised(axes: np.ndarray) -> np.ndarray:
    """Columns of length 1."""
    return axes / np.linalg.norm(axes, axis=0)
