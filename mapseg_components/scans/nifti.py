# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Read one untrusted NIfTI file: the header is checked before anything large is read, then each byte is read once."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling

from mapseg_components.errors import DataError
from mapseg_components.memory import require_memory
from mapseg_components.scans.files import CONVERT, COPY_AGAIN, ENDINGS, Scan, is_nifti, is_picture, opened, stem
from mapseg_components.scans.findings import fault
from mapseg_components.scans.headers import Geometry, geometry_of, volume_shape
from mapseg_components.scans.pictures import picture_geometry, read_picture

__all__ = [
    "ENDINGS",
    "Scan",
    "affine_beside",
    "along_ras",
    "is_nifti",
    "median_spacing",
    "read_geometry",
    "read_nifti",
    "stem",
]

PIECE = 1 << 20  # bytes read or decompressed at a time
DEFLATE_MOST = 1032  # a deflate stream cannot expand more than this
PADDING = 4096  # bytes after the last voxel that some writers add
HEADERS = {348: (nib.Nifti1Header, 344, b"n+1\0", 352), 540: (nib.Nifti2Header, 4, b"n+2\0", 544)}


def read_nifti(path: str | Path) -> Scan:
    """Read a 3D NIfTI file (``.nii`` or ``.nii.gz``) to its end, so that a gzip's checksum and length are tested.

    A PNG or TIFF image is read by `read_picture`, as a scan of one slice.

    Where its voxels lie is decided by `geometry_of`. Axes of length 1 after the third are left out, extensions of the
    header are not looked at. Links are followed. Before voxels are read, the header's promise is compared with the
    file's size (for a gzip: with what deflate can reach at most) and with the machine's memory.

    Raises:
        DataError: no such file, no permission, another format, damaged, not 3D, no plain numbers, or an affine that is
            not finite, not invertible or sheared.
        ResourceError: the scan does not fit into memory.
    """
    path = Path(path)
    if is_picture(path):
        return read_picture(path)
    with opened(path, "NIfTI") as stream:
        return decode(path, stream, os.fstat(stream.fileno()).st_size)


def read_geometry(path: str | Path) -> Geometry:
    """Shape and affine of a file, by its header alone. Errors as `read_nifti`, of the header."""
    path = Path(path)
    if is_picture(path):
        return picture_geometry(path)
    with opened(path, "NIfTI") as stream:
        return parse_header(path, begin(pieces_of(path, stream)))[1]


def affine_beside(label_map: str | Path, affine: np.ndarray, scan: str | Path) -> np.ndarray:
    """Affine (4, 4) of a label map: of PNG and TIFF images that of its scan, which may alone name a pixel size.

    Args:
        label_map: its file.
        affine: by its own header.
        scan: file of its scan.
    """
    same = str(label_map) == str(scan) or not (is_picture(label_map) and is_picture(scan))
    return affine if same else read_geometry(scan).affine


def pieces_of(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Content of a file that was just opened, unpacked, in pieces. Raises `DataError` if its name says another kind."""
    start = stream.read(4)
    stream.seek(0)
    if not start:
        raise fault(path, "cannot be read as NIfTI (the file is empty)", COPY_AGAIN)
    packed = path.name.lower().endswith(".gz")
    if (start[:2] == b"\x1f\x8b") != packed:
        found = "not compressed" if packed else "compressed with gzip"
        other = ".nii" if packed else ".nii.gz"
        raise fault(path, f"cannot be read as NIfTI (it is {found})", f"rename it to {other}, or {COPY_AGAIN}")
    return inflate(stream) if packed else iter(lambda: stream.read(PIECE), b"")


def begin(pieces: Iterator[bytes]) -> bytes:
    """The first pieces, so many that a header is whole, if there is one."""
    start = b""
    while len(start) < max(HEADERS) and (piece := next(pieces, None)) is not None:
        start += piece
    return start


def decode(path: Path, stream: BinaryIO, size: int) -> Scan:
    """Header, then voxels, from an open file of ``size`` bytes."""
    pieces = pieces_of(path, stream)
    start = begin(pieces)
    header, geometry = parse_header(path, start)
    shape, dtype, offset = geometry.shape, header.get_data_dtype(), int(header["vox_offset"])
    promised = offset + math.prod(shape) * dtype.itemsize
    most = size * DEFLATE_MOST if path.name.lower().endswith(".gz") else size
    if promised > most:
        raise fault(
            path,
            f"its header promises shape {shape}, {promised:,} bytes, the file of {size:,} bytes holds at most {most:,}",
            COPY_AGAIN,
        )
    needed = promised + 4 * math.prod(shape)
    require_memory(needed, "cpu", f"{path}: shape {shape}", "crop the scan, or use a larger machine")
    content, read = bytearray(promised), 0
    for piece in itertools.chain([start], [] if len(start) > promised else pieces):
        part = piece[: max(promised - read, 0)]
        content[read : read + len(part)] = part
        read += len(piece)
        if read > promised + PADDING:
            raise fault(path, f"goes on after the {promised:,} bytes that its header promises", COPY_AGAIN)
    if read < promised:
        raise fault(path, f"ends after {read:,} of the {promised:,} bytes that its header promises", COPY_AGAIN)
    return build(path, header, geometry, content)


def inflate(stream: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces of a gzip stream, of bounded size; zlib tests checksum and length of each member.

    Raises:
        zlib.error: damaged.
        EOFError: it ends too early.
    """
    pending = stream.read(PIECE)
    while pending:
        inflater = zlib.decompressobj(wbits=31)
        while not inflater.eof:
            pending = pending or stream.read(PIECE)
            piece = inflater.decompress(pending, PIECE)
            if not pending and not piece and not inflater.eof:
                raise EOFError(f"it ends after {stream.tell():,} bytes, within a block")
            pending = inflater.unconsumed_tail
            yield piece
        pending = inflater.unused_data or stream.read(PIECE)
        while pending and not pending.strip(b"\0"):  # zeros may follow the last member
            pending = stream.read(PIECE)


def parse_header(path: Path, start: bytes) -> tuple[nib.Nifti1Header, Geometry]:
    """Header, and where it puts its voxels; only what nibabel would read without a guess. Raises `DataError`."""
    order = next((o for o in ("little", "big") if int.from_bytes(start[:4], o) in HEADERS), None)
    if order is None:
        raise fault(path, "cannot be read as NIfTI (it does not begin with a NIfTI header)", CONVERT)
    kind, at, magic, least = HEADERS[int.from_bytes(start[:4], order)]
    if len(start) < least or start[at : at + 4] != magic:
        raise fault(path, "cannot be read as NIfTI (no single-file NIfTI header)", CONVERT)
    try:
        with np.errstate(all="ignore"):
            raw = kind(start[: kind.template_dtype.itemsize], "<" if order == "little" else ">", check=False)
            dims, offset = [int(side) for side in raw["dim"]], float(raw["vox_offset"])
            sides = dims[1 : dims[0] + 1]
            sides[3:] = [side or 1 for side in sides[3:]]  # some writers leave 0 where an axis is not in use
            if not 1 <= dims[0] <= 7 or any(side < 1 for side in sides):
                raise fault(path, f"its header has dimensions {dims}, expected positive ones", "repair the header")
            if not least <= offset <= 2**31:
                raise fault(path, f"its header puts the voxels at byte {offset:g}", COPY_AGAIN)
            shape = volume_shape(path, tuple(sides))
            try:
                dtype = raw.get_data_dtype()
            except (nib.spatialimages.HeaderDataError, KeyError):
                dtype = None
            if dtype is None or dtype.fields is not None or dtype.kind not in "iuf":
                name = f"code {int(raw['datatype'])}" if dtype is None else dtype
                raise fault(path, f"voxels of type {name}, expected plain numbers", "convert to grey values")
            geometry = geometry_of(path, raw, shape)
            header = kind(raw.binaryblock, raw.endianness, check=False)
            header["pixdim"], header["qform_code"], header["sform_code"] = 1, 0, 0  # judged, and not looked at again
            header.check_fix()
            header.get_slope_inter()
    except Exception as error:  # nibabel fails in many ways on a damaged header, and none may escape without a name
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise fault(path, f"cannot be read as NIfTI (damaged header: {reason})", COPY_AGAIN) from error
    return header, geometry


def build(path: Path, header: nib.Nifti1Header, geometry: Geometry, content: bytearray) -> Scan:
    """Scan from a judged header and all bytes of the file."""
    shape, offset, dtype = geometry.shape, int(header["vox_offset"]), header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    raw = np.ndarray(shape, dtype, buffer=content, offset=offset, order="F")
    digest = hashlib.sha256(f"{shape} {dtype.str} {slope} {inter}".encode())
    digest.update(memoryview(content)[offset:])
    try:
        with np.errstate(all="ignore"):
            voxels = raw if slope is None else apply_read_scaling(raw, slope, inter)
    except (ValueError, ArithmeticError) as error:
        raise fault(path, f"its voxels cannot be scaled ({error})", "repair the header") from error
    return Scan(voxels, geometry.affine, geometry.sform, geometry.qform, digest.hexdigest(), geometry.remarks)


def along_ras(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Values (3,) of a scan's array axes along the axes nearest to right, anterior and superior."""
    axes = nib.orientations.io_orientation(affine)[:, 0].astype(int)  # RAS axis of each voxel axis
    return values[np.argsort(axes)]


def median_spacing(paths: Sequence[str | Path]) -> list[float]:
    """Median voxel size in mm along the RAS axes over several scans, four digits; only headers are read."""
    spacings = []
    for path in paths:
        affine = read_geometry(path).affine
        spacings.append(along_ras(nib.affines.voxel_sizes(affine), affine))
    return [float(f"{value:.4g}") for value in np.median(spacings, axis=0)]
