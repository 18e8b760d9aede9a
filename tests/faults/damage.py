# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One function per fault: each damages the one good scan (or label map) at a path, and leaves the file's name alone."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.conftest import make_scan, write_nifti

SHAPE = (20, 24, 28)


def image() -> np.ndarray:
    return make_scan(SHAPE, seed=77)[0]


def label() -> np.ndarray:
    return make_scan(SHAPE, seed=77)[1]


def rewrite(path: Path, content: bytes) -> None:
    """The bytes of a NIfTI file, compressed if the name says so."""
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def plain(path: Path) -> bytearray:
    content = path.read_bytes()
    return bytearray(gzip.decompress(content) if path.name.endswith(".gz") else content)


def header(path: Path, **changes) -> None:
    """Write header fields directly, where nibabel would refuse or repair them."""
    content = plain(path)
    raw = nib.Nifti1Header(bytes(content[:348]), check=False)
    for key, value in changes.items():
        raw[key] = value
    rewrite(path, raw.binaryblock + bytes(content[348:]))


# files


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_its_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def bit_flipped(path, bit=None):
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("patient 5, see the other folder\n" * 20)


def gzipped_text(path):
    path.write_bytes(gzip.compress(b"patient 5, see the other folder\n" * 20))


def plain_named_gz(path):
    path.write_bytes(bytes(plain(path)))


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()
    (path / "IM0001.dcm").write_bytes(b"\0" * 128 + b"DICM")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def more_voxels_promised(path):
    header(path, dim=[3, 20, 24, 29, 1, 1, 1, 1])


def fewer_voxels_promised(path):
    header(path, dim=[3, 20, 24, 20, 1, 1, 1, 1])


def terabytes_promised(path):
    header(path, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])


def dimension_zero(path):
    header(path, dim=[3, 0, 24, 28, 1, 1, 1, 1])


def dimension_negative(path):
    header(path, dim=[3, 20, -24, 28, 1, 1, 1, 1])


def voxels_in_the_header(path):
    header(path, vox_offset=4)


def unknown_type(path):
    header(path, datatype=777)


def infinite_scaling(path):
    header(path, scl_slope=1.0, scl_inter=np.inf)


def nan_voxel(path):
    voxels = image()
    voxels[3, 4, 5] = voxels[9, 9, 9] = np.nan
    write_nifti(path, voxels)


def infinite_voxel(path):
    voxels = image()
    voxels[3, 4, 5] = np.inf
    write_nifti(path, voxels)


def beyond_float32(path):
    voxels = image().astype(np.float64)
    voxels[3, 4, 5] = 1e300
    write_nifti(path, voxels)


def constant(path):
    write_nifti(path, np.full(SHAPE, 7.0, np.float32))


def all_zero(path):
    write_nifti(path, np.zeros(SHAPE, np.float32))


def four_axes(path):
    write_nifti(path, np.stack([image()] * 5, axis=-1))


def two_axes(path):
    write_nifti(path, image()[:, :, 12])


def complex_voxels(path):
    write_nifti(path, image().astype(np.complex64))


def colours(path):
    voxels = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    voxels["R"] = image().clip(0, 255)
    write_nifti(path, voxels)


def dangling_link(path):
    path.unlink()
    path.symlink_to("moved_away.nii.gz")


def link_loop(path):
    path.unlink()
    path.symlink_to(path.name)


# geometry


def affine_of(**changes) -> np.ndarray:
    affine = np.diag([1.0, 1.1, 1.2, 1.0])
    for (row, column), value in changes.get("at", {}).items():
        affine[row, column] = value
    return affine


def singular_affine(path):
    header(path, srow_y=[0, 0, 0, 0])


def nan_in_affine(path):
    header(path, srow_z=[0, 0, np.nan, 0])


def sheared(path, angle_deg=2.0):
    write_nifti(path, image(), affine_of(at={(0, 1): 1.1 * np.tan(np.deg2rad(angle_deg))}))


def unnamed_orientation(path):
    header(path, sform_code=0, qform_code=0)


def unnamed_orientation_flat(path):
    header(path, sform_code=0, qform_code=0, pixdim=[1, 1, 0, 1, 1, 1, 1, 1])


def forms_differ(path, shift_mm=15.0):
    scan = nib.load(path)
    scan = nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine)
    moved = scan.affine.copy()
    moved[0, 3] += shift_mm
    scan.set_sform(scan.affine, 1)
    scan.set_qform(moved, 1)
    nib.save(scan, path)


def other_shape(path):
    write_nifti(path, label()[:, :, :-1])


def flipped(path):
    affine = affine_of()
    affine[0] = [-1.0, 0, 0, 19.0]
    write_nifti(path, label(), affine)


def moved(path):
    write_nifti(path, label(), affine_of(at={(0, 3): 15.0}))


def other_spacing(path):
    write_nifti(path, label(), affine_of(at={(2, 2): 1.3}))


# labels and intensities


def stray_label(path):
    voxels = label()
    voxels[0, 0, :3] = 9
    write_nifti(path, voxels)


def fractional_label(path):
    voxels = label().astype(np.float32)
    voxels[0, 0, :3] = 1.5
    write_nifti(path, voxels)


def negative_label(path):
    voxels = label().astype(np.int16)
    voxels[0, 0, :3] = -1
    write_nifti(path, voxels)


def image_as_label(path):
    write_nifti(path, np.random.default_rng(0).random(SHAPE))


def nan_label(path):
    voxels = label().astype(np.float32)
    voxels[3, 4, 5] = np.nan
    write_nifti(path, voxels)


def blank_label(path):
    write_nifti(path, np.zeros(SHAPE, np.uint8))


def hounsfield(path):
    write_nifti(path, (image() * 10 - 1024).astype(np.int16))


def all_negative(path):
    write_nifti(path, image() - 10000)
