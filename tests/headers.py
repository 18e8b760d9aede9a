# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan under many headers: each says the same place in another way, as programs write it."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

UNIT_MM = {"metre": (1, 1000.0), "micron": (3, 0.001)}  # xyzt_units, and mm


def orientation_affine(axcodes: str, spacing=(1.1, 1.6, 2.3), origin=(-31.0, 17.5, 8.25)) -> np.ndarray:
    """Affine (4, 4) whose axes point to ``axcodes``."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(axcodes))):
        affine[int(world), axis] = sign * spacing[axis]
    affine[:3, 3] = origin
    return affine


def write_raw(path: Path, image: nib.Nifti1Image, extension: bytes | None = None, **fields) -> Path:
    """Write an image with header fields set as they are, past nibabel's repairs."""
    content = image.to_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    if extension is not None:
        fields["vox_offset"] = 352 + len(extension)
    for key, value in fields.items():
        header[key] = value
    rest = content[348:352] if extension is None else b"\1\0\0\0" + extension
    raw = header.binaryblock + rest + content[352:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if path.name.endswith(".gz") else raw)
    return path


def scan_with(path: Path, voxels: np.ndarray, affine: np.ndarray, variant: str) -> Path:
    """Write voxels (X, Y, Z) that lie where ``affine`` says; ``variant`` is one of `VARIANTS`."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    header, fields = image.header, {}
    sides = np.array(header["pixdim"])
    quaternion = np.array([float(header[f"quatern_{part}"]) for part in "bcd"])
    if variant.startswith("sform only"):
        fields |= {"qform_code": 0, "quatern_b": 0, "quatern_c": 0, "quatern_d": 0}
    if variant.startswith("qform only"):
        fields |= {"sform_code": 0, "srow_x": 0, "srow_y": 0, "srow_z": 0}
    if "0.4 mm apart" in variant:
        fields |= {"qoffset_x": float(header["qoffset_x"]) + 0.4}
    if "pixdim 1" in variant:
        fields |= {"pixdim": [1] * 8}
    if "pixdim 0" in variant:
        fields |= {"pixdim": [0] * 8}
    if "pixdim negative" in variant:
        fields |= {"pixdim": [*sides[:1], *-sides[1:4], *sides[4:]]}
    if "sixth digit" in variant:
        fields |= {"pixdim": sides * [1, *[1 + 2e-5] * 3, 1, 1, 1, 1]}
    if "quaternion longer" in variant:
        fields |= {f"quatern_{part}": value * 1.000002 for part, value in zip("bcd", quaternion)}
    if "quaternion in 16 bits" in variant:
        fields |= {f"quatern_{part}": np.trunc(value * 32767) / 32767 for part, value in zip("bcd", quaternion)}
    if "quaternion far" in variant:
        fields |= {"quatern_b": 2.0, "quatern_c": np.nan if "NaN" in variant else 1.0}
    if "sform of zeros" in variant:
        fields |= {"srow_x": 0, "srow_y": 0, "srow_z": 0}
    if "qfac 0" in variant:
        fields |= {"pixdim": [0, *sides[1:]]}
    if "codes that nobody knows" in variant:
        fields |= {"sform_code": 9, "qform_code": 11}
    for unit, (code, mm) in UNIT_MM.items():
        if unit in variant:
            fields |= {f"srow_{axis}": header[f"srow_{axis}"] / mm for axis in "xyz"}
            fields |= {f"qoffset_{axis}": header[f"qoffset_{axis}"] / mm for axis in "xyz"}
            fields |= {"pixdim": [sides[0], *sides[1:4] / mm, *sides[4:]], "xyzt_units": code + 8}
    return write_raw(path, image, **fields)


# what is written in another way, and whether the audit has a word on it
VARIANTS = {
    "both": False,
    "sform only": False,
    "qform only": False,
    "both, 0.4 mm apart": True,
    "both, 0.4 mm apart, spacing differs in the sixth digit": True,
    "both, spacing differs in the sixth digit": False,
    "sform only, pixdim 1": True,
    "sform only, pixdim 0": True,
    "sform only, pixdim negative": True,
    "both, pixdim 0": True,
    "both, quaternion in 16 bits": False,
    "both, quaternion far from 1": True,
    "both, quaternion far from 1, NaN": True,
    "both, sform of zeros": True,
    "both, qfac 0": False,
    "both, codes that nobody knows": False,
    "both, metre": True,
    "both, micron": True,
    "qform only, metre": True,
    "sform only, micron": True,
}
LONGER = ("both, quaternion longer than 1", "qform only, quaternion longer than 1")  # where the quaternion is not 0
