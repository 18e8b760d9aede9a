# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Files that stand beside a scan's: other voxels below the same header, or the same bytes under another name."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np

from mapseg_components.errors import DataError, ResourceError
from mapseg_components.files import replacing
from mapseg_components.scans.files import Scan
from mapseg_components.scans.findings import fault
from mapseg_components.scans.nifti import HEADERS, read_geometry, read_nifti

__all__ = ["copy_packed", "copy_scaled", "write_with_header"]

LEVEL, FAST = 6, 1  # of gzip
NO_EXTENSION = bytes(4)


def write_with_header(voxels: np.ndarray, scan: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write voxels as float32 below the header of a scan, so that both lie at the same place for every reader.

    Shape, voxel sides, codes and both forms of the affine are the scan's, bit for bit, as its header has them. The file
    is read back, as a scan is, before it gets its name.

    Args:
        voxels: (X, Y, Z), finite, of the scan's shape.
        scan: a NIfTI file.
        path: of the result, ``.nii.gz``.

    Raises:
        DataError: the scan cannot be read, or has another shape.
        ResourceError: the disk is full, or does not give back what was written.
    """
    scan, path = Path(scan), Path(path)
    geometry = read_geometry(scan)
    with unpacked(scan) as stream:
        header = header_of(stream.read(max(HEADERS)))
    if tuple(voxels.shape) != tuple(geometry.shape):
        raise fault(scan, f"shape {tuple(geometry.shape)}, the result has {tuple(voxels.shape)}", "prepare it anew")
    header.set_data_dtype(np.float32)
    header["scl_slope"], header["scl_inter"], header["cal_max"], header["cal_min"] = 1, 0, 0, 0
    header["vox_offset"] = header.single_vox_offset
    written = np.asarray(voxels, dtype=np.dtype(np.float32).newbyteorder(header.endianness))
    content = header.binaryblock + NO_EXTENSION + written.tobytes(order="F")
    write_checked(
        content,
        path,
        LEVEL,
        lambda found: np.array_equal(found.voxels, written) and np.array_equal(found.affine, geometry.affine),
    )


def copy_packed(scan: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a NIfTI file to a name with ``.nii.gz``: the same bytes, packed if they are not.

    Args:
        scan: ``.nii`` or ``.nii.gz``.
        path: of the copy.

    Raises:
        DataError: the scan cannot be read.
        ResourceError: the disk is full.
    """
    scan = Path(scan)
    read_geometry(scan)  # names what is wrong with the file
    with scan.open("rb") as stream, replacing(path) as temporary:
        if is_packed(scan):
            with temporary.open("wb") as copy:
                shutil.copyfileobj(stream, copy)
        else:
            temporary.write_bytes(gzip.compress(stream.read(), LEVEL, mtime=0))


def copy_scaled(scan: str | os.PathLike[str], path: str | os.PathLike[str], factor: float) -> None:
    """Copy a NIfTI file with all lengths of its header, voxel sides and places, times a factor; voxels stay.

    The file is read back, as a scan is, before it gets its name.

    Args:
        scan: ``.nii`` or ``.nii.gz``.
        path: of the copy, ``.nii.gz``.
        factor: above 0.

    Raises:
        DataError: the scan cannot be read.
        ResourceError: the disk is full, or does not give back what was written.
    """
    scan, path = Path(scan), Path(path)
    original = read_nifti(scan)
    with unpacked(scan) as stream:
        content = stream.read()
    header = header_of(content)
    header["pixdim"][1:4] *= factor
    for name in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[name] = header[name] * factor
    changed = header.binaryblock
    moved = np.diag([factor, factor, factor, 1.0]) @ original.affine
    write_checked(
        changed + content[len(changed) :],
        path,
        FAST,
        lambda found: found.digest == original.digest and np.allclose(found.affine, moved, rtol=1e-5, atol=1e-3),
    )


def write_checked(content: bytes, path: Path, level: int, is_right: Callable[[Scan], bool]) -> None:
    """Pack the bytes of a NIfTI file and write them, if they are right when they are read back as a scan is.

    Raises:
        ResourceError: the disk is full, or does not give back what was written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(content, level, mtime=0))
        try:
            found = read_nifti(temporary)
        except DataError as error:
            raise ResourceError(f"{path}: cannot be read back ({error}), nothing was kept: check the disk") from error
        if not is_right(found):
            raise ResourceError(f"{path}: what was read back differs, nothing was kept: check the disk")


def unpacked(scan: Path) -> BinaryIO:
    """A file that was judged before, open for reading, without its compression."""
    return cast(BinaryIO, gzip.open(scan, "rb") if is_packed(scan) else scan.open("rb"))


def header_of(start: bytes) -> nib.Nifti1Header:
    """Header, as it stands, of a file that was judged before and begins so."""
    order = "<" if int.from_bytes(start[:4], "little") in HEADERS else ">"
    kind = HEADERS[int.from_bytes(start[:4], "little" if order == "<" else "big")][0]
    return kind(start[: kind.template_dtype.itemsize], order, check=False)


def is_packed(scan: Path) -> bool:
    """Whether a file's name ends as one that is compressed."""
    return scan.name.lower().endswith(".gz")
