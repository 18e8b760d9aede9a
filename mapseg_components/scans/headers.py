# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a NIfTI header puts its voxels, in mm. This is decided here alone; whatever reads a scan asks this module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.scans.findings import fault

__all__ = ["Geometry", "Remark", "geometry_of", "volume_shape"]

# columns of an affine may be this far from orthogonal (resampling by float32 headers leaves far less)
SHEAR_TOLERANCE_DEG = 0.5
SHORTEST_MM, FARTHEST_MM = 1e-6, 1e9  # above 0 and finite in a header, but nothing in an affine is beyond
SMALLEST_MM, LARGEST_MM = 1.0, 3000.0  # longest side of a field of view; beyond, a unit other than mm is an error
SAME_SPACING = 1e-3  # relative; some writers round pixdim to three digits
LONGER, SHORTER = 0.01, 1e-4  # a quaternion may be this much longer or shorter than 1 by rounding (to 16 bits)
UNITS = {0: ("unknown", 1.0), 1: ("metre", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}  # of xyzt_units, in mm
REPAIR = "repair the header"
Remark = tuple[str, str, str]  # severity, what, remedy, as in `Finding`


@dataclass(frozen=True)
class Geometry:
    """Where a header puts its voxels.

    Args:
        shape: (3,), voxels per axis; further axes of length 1 are left out.
        affine: (4, 4), voxel to mm: the sform, else the qform, else a guess from the spacing.
        sform: (4, 4) in mm, or ``None`` if the header has none that can be used.
        qform: likewise.
        remarks: what was found beside that.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    sform: np.ndarray | None
    qform: np.ndarray | None
    remarks: tuple[Remark, ...] = ()


def volume_shape(path: Path, dims: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape of the one volume that a file holds: axes of length 1 after the third are left out.

    Raises:
        DataError: fewer than three axes, several volumes, or several values for each voxel.
    """
    extra = [side for side in dims[3:] if side != 1]
    if len(dims) >= 3 and not extra:
        return dims[0], dims[1], dims[2]
    what = f"shape {dims}, expected 3D"
    if len(dims) < 3:
        raise fault(path, what, "stack the slices of a scan into one file per volume")
    if any(side != 1 for side in dims[4:]):
        values = " x ".join(map(str, extra))
        what = f"{what}, it is a vector image with {values} values for each voxel (colours, displacements)"
        raise fault(path, what, "name the scan of grey values that it was made from, or save one component by itself")
    remedy = f"split a series of {dims[3]} volumes into one file per volume, and name those that are to be used"
    raise fault(path, what, remedy)


def geometry_of(path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> Geometry:
    """Decide where the voxels of a file lie.

    The sform is taken, else the qform, each if its code is above 0. A qform that cannot be decoded beside a sound
    sform, and a sform of zeros beside a sound qform, are left aside with a warning. ``pixdim`` counts for the qform
    only, or without both. Lengths are scaled to mm by ``xyzt_units``.

    Args:
        path: for messages.
        header: as it stands in the file, unrepaired.
        shape: (3,).

    Raises:
        DataError: the affine is not finite, not invertible or sheared, or by its unit the scan has an impossible size.
    """
    remarks: list[Remark] = []
    unit, scale = unit_of(header, remarks)
    sides = np.array(header["pixdim"][1:4], dtype=float) * scale
    sform = sform_of(header, scale)
    qforms, broken = qforms_of(header, scale)
    if sform is not None and not sform[:3, :3].any() and qforms:
        remarks.append(("warning", "its sform is all zero", "the qform is used; set sform_code to 0"))
        sform = None
    if sform is None and broken:
        raise fault(path, broken, REPAIR)
    if sform is not None:
        check_affine(path, sform, "sform")
        own = np.linalg.norm(sform[:3, :3], axis=0)
        if not np.allclose(sides, own, rtol=SAME_SPACING, atol=0):
            what = f"pixdim gives voxel sides of {numbers(sides)} mm, the sform {numbers(own)} mm"
            remarks.append(("warning", what, "the sform is used; correct pixdim, or the sform if pixdim is right"))
        if broken:
            remarks.append(("warning", broken, "the sform is used; set qform_code to 0"))
    qform = closest(qforms, sform, shape)
    if qform is not None:
        check_affine(path, qform, "qform")
        remarks += quaternion_remarks(header)
    affine = sform if sform is not None else qform
    if affine is None:
        affine = guess(path, header, scale, remarks)
    extent = np.linalg.norm(affine[:3, :3], axis=0) * shape
    if scale != 1 and not SMALLEST_MM <= extent.max() <= LARGEST_MM:
        what = f"by its unit, {unit} (xyzt_units), its field of view is {numbers(extent)} mm"
        raise fault(path, what, "set xyzt_units to 2 if its lengths are mm, or to 0 to take them as they stand")
    return Geometry(shape, affine, sform, qform, tuple(remarks))


def unit_of(header: nib.Nifti1Header, remarks: list[Remark]) -> tuple[str, float]:
    """Name and mm of the spatial unit; the bits of the temporal unit are not looked at."""
    code = int(header["xyzt_units"]) & 7
    if code not in UNITS:
        remarks.append(("warning", f"its spatial unit has the unknown code {code} (xyzt_units)", "it is taken as mm"))
    unit, scale = UNITS.get(code, UNITS[0])
    if scale != 1:
        remarks.append(("note", f"its lengths are in {unit} (xyzt_units {code})", "they are converted to mm"))
    return unit, scale


def sform_of(header: nib.Nifti1Header, scale: float) -> np.ndarray | None:
    """The sform (4, 4) in mm, as it stands; ``None`` if its code is 0."""
    if header["sform_code"] <= 0:
        return None
    rows = np.array([header[f"srow_{axis}"] for axis in "xyz"], dtype=float)
    return np.vstack([rows * scale, [0, 0, 0, 1]])


def qforms_of(header: nib.Nifti1Header, scale: float) -> tuple[list[np.ndarray], str]:
    """What the qform may mean, the standard's reading first, each (4, 4) in mm; none, and why, if it has no meaning.

    Where ``b, c, d`` are rounded near length 1, the fourth component is lost: it may be 0, a half turn. Where
    ``pixdim[0]`` is neither 1 nor -1, the standard reads its sign, and a writer may have left it out.
    """
    if header["qform_code"] <= 0:
        return [], ""
    vector = np.array([header[f"quatern_{part}"] for part in "bcd"], dtype=float)
    offset = np.array([header[f"qoffset_{axis}"] for axis in "xyz"], dtype=float) * scale
    sides = np.array(header["pixdim"][1:4], dtype=float) * scale
    length, qfac = float(np.linalg.norm(vector)), float(header["pixdim"][0])
    if not are_lengths(sides):
        return [], f"its qform has voxel sides of {numbers(sides)} mm (pixdim)"
    if not np.abs([*vector, *offset]).max() < FARTHEST_MM:  # true for NaN as well
        return [], "its affine (qform) is not finite"
    if length > 1 + LONGER:
        return [], f"its affine (qform) has a quaternion of length {length:.6g}, expected 1"
    rest = 1 - length**2
    threshold = 3 * float(np.finfo(header["quatern_b"].dtype).eps)  # nibabel's
    fourth = [float(np.sqrt(rest))] if rest > threshold else [0.0]
    fourth += [0.0] if 1 - SHORTER < length and rest > threshold else []
    third = [-1.0 if qfac < 0 else 1.0]
    third += [] if qfac in (-1, 1) else [-third[0]]
    found = []
    for w in fourth:
        for sign in third:
            form = np.eye(4)
            form[:3, :3] = nib.quaternions.quat2mat([w, *vector]) @ np.diag(sides * [1, 1, sign])
            form[:3, 3] = offset
            found.append(form)
    return found, ""


def closest(qforms: list[np.ndarray], sform: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Of what the qform may mean, what agrees best with the sform; without one, the standard's reading."""
    if sform is None or not qforms:
        return qforms[0] if qforms else None
    return min(qforms, key=lambda form: corner_distance(shape, form, sform))


def quaternion_remarks(header: nib.Nifti1Header) -> Iterator[Remark]:
    """What is odd about a qform that can be decoded."""
    length = float(np.linalg.norm([float(header[f"quatern_{part}"]) for part in "bcd"]))
    if 1 - length**2 < -3 * float(np.finfo(header["quatern_b"].dtype).eps):
        yield "warning", f"the quaternion of its qform has length {length:.8g}, expected 1", "it is taken as 1 long"
    qfac = float(header["pixdim"][0])
    if qfac not in (-1, 0, 1):
        yield "warning", f"pixdim[0] (qfac) is {qfac:g}, expected 1 or -1", "its sign is used"


def guess(path: Path, header: nib.Nifti1Header, scale: float, remarks: list[Remark]) -> np.ndarray:
    """Affine (4, 4) of a header that names none, by its voxel sides, as nibabel has it. Raises `DataError`."""
    sides = np.array(header["pixdim"][1:4], dtype=float) * scale
    if not are_lengths(sides):
        raise fault(path, f"its header gives voxel sides of {numbers(sides)} mm (pixdim)", REPAIR)
    if any(np.any(header[f"srow_{axis}"]) for axis in "xyz"):
        what = "its sform is filled, but not in use (sform_code is 0)"
        remarks.append(("warning", what, "set sform_code to 1 if the sform is right"))
    affine = np.array(header.get_base_affine(), dtype=float)
    affine[:3] *= scale
    check_affine(path, affine, "voxel spacing")
    return affine


def are_lengths(sides: np.ndarray) -> bool:
    """Whether voxel sides in mm are finite and above 0."""
    return bool(np.all(sides > SHORTEST_MM) and np.all(sides < FARTHEST_MM))


def check_affine(path: Path, affine: np.ndarray, name: str) -> None:
    """Refuse an affine (4, 4) that is not finite, not invertible, or sheared by more than `SHEAR_TOLERANCE_DEG`."""
    if not np.abs(affine).max() < FARTHEST_MM:  # true for NaN as well
        raise fault(path, f"its affine ({name}) is not finite", REPAIR)
    axes = affine[:3, :3]
    sides = np.linalg.norm(axes, axis=0)
    if sides.min() < SHORTEST_MM or abs(np.linalg.det(axes / sides)) < 1e-6:
        raise fault(path, f"its affine ({name}) is not invertible, voxel sides {sides.round(6)} mm", REPAIR)
    cosines = (axes / sides).T @ (axes / sides) - np.eye(3)
    angle = float(np.degrees(np.arcsin(min(np.abs(cosines).max(), 1.0))))
    if angle > SHEAR_TOLERANCE_DEG:
        raise fault(
            path,
            f"its affine ({name}) is sheared by {angle:.2f} degrees (tolerance {SHEAR_TOLERANCE_DEG})",
            "resample it to an orthogonal grid",
        )


def numbers(values: np.ndarray) -> str:
    """``1 x 1 x 2.5``"""
    return " x ".join(f"{value:.4g}" for value in values)
