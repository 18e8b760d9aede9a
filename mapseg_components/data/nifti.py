# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One NIfTI file from a stranger: the header is judged before anything large is read, then each byte is read once."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling

from mapseg_components.data.findings import fault
from mapseg_components.errors import DataError, ResourceError
from mapseg_components.memory import require_memory

__all__ = ["ENDINGS", "Scan", "corner_distance", "is_nifti", "median_spacing", "read_nifti"]

ENDINGS = (".nii.gz", ".nii")
PIECE = 1 << 20  # bytes read or decompressed at a time
DEFLATE_MOST = 1032  # a deflate stream cannot expand more than this
PADDING = 4096  # bytes after the last voxel that some writers add
HEADERS = {348: (nib.Nifti1Header, 344, b"n+1\0", 352), 540: (nib.Nifti2Header, 4, b"n+2\0", 544)}
# columns of an affine may be this far from orthogonal (resampling by float32 headers leaves far less)
SHEAR_TOLERANCE_DEG = 0.5
FARTHEST_MM = 1e9  # finite in a header, but nothing in an affine is as large
COPY_AGAIN = "copy it again from its origin"
CONVERT = "convert it to .nii.gz (dcm2niix for DICOM)"


@dataclass(frozen=True)
class Scan:
    """A 3D scan as read.

    Args:
        voxels: (X, Y, Z), scaled as the header says.
        affine: (4, 4), voxel to mm, as nibabel and MONAI take it: sform, else qform, else a guess from the spacing.
        sform, qform: (4, 4), or ``None`` if the header says that there is none.
        digest: sha256 of shape, type, scaling and decoded voxels; names and headers do not enter.
    """

    voxels: np.ndarray
    affine: np.ndarray
    sform: np.ndarray | None
    qform: np.ndarray | None
    digest: str


def is_nifti(name: str) -> bool:
    """Whether a file's name ends as one that is read, ``.nii`` or ``.nii.gz``, in capitals or not."""
    return name.lower().endswith(ENDINGS)


def read_nifti(path: str | Path) -> Scan:
    """Read a 3D NIfTI file (``.nii`` or ``.nii.gz``) to its end, so that a gzip's checksum and length are tested.

    A fourth axis of length 1 is squeezed. Links are followed. Before voxels are read, the header's promise is compared
    with the file's size (for a gzip: with what deflate can reach at most) and with the machine's memory.

    Raises:
        DataError: no such file, no permission, another format, damaged, not 3D, no plain numbers, or an affine that is
            not finite, not invertible or sheared.
        ResourceError: the scan does not fit into memory.
    """
    path = Path(path)
    check_kind(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return decode(path, stream, size)
    except PermissionError as error:
        raise fault(path, "no permission to read it", "allow it (chmod u+r), or leave the scan out") from error
    except (EOFError, zlib.error) as error:
        raise fault(path, f"cannot be read as NIfTI (damaged gzip: {error})", COPY_AGAIN) from error
    except ResourceError:
        raise
    except OSError as error:
        raise fault(path, f"cannot be read as NIfTI ({error.strerror or error})", COPY_AGAIN) from error
    except MemoryError as error:
        raise fault(path, "does not fit into memory", "free some, or crop the scan", ResourceError) from error


def check_kind(path: Path) -> None:
    """Refuse what is no regular file named ``.nii`` or ``.nii.gz``. Raises `DataError`."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise fault(path, "no permission to look at it", "allow it (chmod u+rx on its folder)") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise fault(path, f"a link to {os.readlink(path)}, which does not exist", "copy the scan there") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise fault(path, "no such file", "correct the datalist, or copy the scan there") from error
        reason = getattr(error, "strerror", None) or error
        raise fault(path, f"cannot be opened ({reason})", "correct the path or the link") from error
    if stat.S_ISDIR(mode):
        raise fault(path, "a folder, expected a .nii or .nii.gz file", CONVERT)
    if not stat.S_ISREG(mode):
        raise fault(path, "no regular file", "copy the scan there")
    if not is_nifti(path.name):
        raise fault(path, "expected a file named .nii or .nii.gz", CONVERT)


def decode(path: Path, stream: BinaryIO, size: int) -> Scan:
    """Header, then voxels, from an open file of ``size`` bytes."""
    if not size:
        raise fault(path, "cannot be read as NIfTI (the file is empty)", COPY_AGAIN)
    packed = path.name.lower().endswith(".gz")
    start = stream.read(4)
    stream.seek(0)
    if (start[:2] == b"\x1f\x8b") != packed:
        found = "not compressed" if packed else "compressed with gzip"
        other = ".nii" if packed else ".nii.gz"
        raise fault(path, f"cannot be read as NIfTI (it is {found})", f"rename it to {other}, or {COPY_AGAIN}")
    pieces = inflate(stream) if packed else iter(lambda: stream.read(PIECE), b"")
    start = b""
    while len(start) < max(HEADERS) and (piece := next(pieces, None)) is not None:
        start += piece
    header, shape = parse_header(path, start)
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    promised = offset + math.prod(shape) * dtype.itemsize
    most = size * DEFLATE_MOST if packed else size
    if promised > most:
        raise fault(
            path,
            f"its header promises shape {shape}, {promised:,} bytes, the file of {size:,} bytes holds at most {most:,}",
            COPY_AGAIN,
        )
    needed = promised + 4 * math.prod(shape)
    require_memory(needed, "cpu", f"{path}: shape {shape}", "crop the scan, or use a larger machine")
    content, read = bytearray(promised), 0
    for piece in (start, *([] if len(start) > promised else pieces)):
        part = piece[: max(promised - read, 0)]
        content[read : read + len(part)] = part
        read += len(piece)
        if read > promised + PADDING:
            raise fault(path, f"goes on after the {promised:,} bytes that its header promises", COPY_AGAIN)
    if read < promised:
        raise fault(path, f"ends after {read:,} of the {promised:,} bytes that its header promises", COPY_AGAIN)
    return build(path, header, shape, content)


def inflate(stream: BinaryIO) -> Iterator[bytes]:
    """Decompressed pieces of a gzip stream, of bounded size; zlib tests checksum and length of each member.

    Raises:
        zlib.error: damaged. EOFError: it ends too early.
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


def parse_header(path: Path, start: bytes) -> tuple[nib.Nifti1Header, tuple[int, ...]]:
    """Header and its shape, as it stands (1 or more axes); only what nibabel would read without a guess."""
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
            if not 1 <= dims[0] <= 7 or any(side < 1 for side in dims[1 : dims[0] + 1]):
                raise fault(path, f"its header has dimensions {dims}, expected positive ones", "repair the header")
            if not least <= offset <= 2**31:
                raise fault(path, f"its header puts the voxels at byte {offset:g}", COPY_AGAIN)
            shape = tuple(dims[1 : dims[0] + 1])
            if len(shape) != 3 and (len(shape) != 4 or shape[3] != 1):
                raise fault(path, f"shape {shape}, expected 3D", "split a series into one file per volume")
            try:
                dtype = raw.get_data_dtype()
            except (nib.spatialimages.HeaderDataError, KeyError):
                dtype = None
            if dtype is None or dtype.fields is not None or dtype.kind not in "iuf":
                name = f"code {int(raw['datatype'])}" if dtype is None else dtype
                raise fault(path, f"voxels of type {name}, expected plain numbers", "convert to grey values")
            sides = [float(side) for side in raw["pixdim"][1:4]]
            if raw["sform_code"] <= 0 and not all(
                0 < side < FARTHEST_MM for side in sides
            ):  # nibabel would take 1 for 0
                raise fault(path, f"its header gives voxel sides of {sides} mm", "repair the header")
            header = kind(raw.binaryblock, raw.endianness, check=True)
            header.get_slope_inter()
    except Exception as error:  # nibabel fails in many ways on a damaged header, and none may escape without a name
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise fault(path, f"cannot be read as NIfTI (damaged header: {reason})", COPY_AGAIN) from error
    return header, shape


def build(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...], content: bytearray) -> Scan:
    """Scan from a judged header and all bytes of the file."""
    offset, dtype = int(header["vox_offset"]), header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    raw = np.ndarray(shape[:3], dtype, buffer=content, offset=offset, order="F")
    digest = hashlib.sha256(f"{shape[:3]} {dtype.str} {slope} {inter}".encode())
    digest.update(memoryview(content)[offset:])
    try:
        with np.errstate(all="ignore"):
            sform = header.get_sform(coded=True)[0]
            qform = header.get_qform(coded=True)[0]
            affine = header.get_best_affine()
            voxels = raw if slope is None else apply_read_scaling(raw, slope, inter)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise fault(path, f"its header's orientation cannot be decoded ({error})", "repair the header") from error
    for name, matrix in (("sform", sform), ("qform", qform), ("voxel spacing", affine)):
        if matrix is not None:
            check_affine(path, matrix, name)
    return Scan(voxels, affine, sform, qform, digest.hexdigest())


def check_affine(path: Path, affine: np.ndarray, name: str) -> None:
    """Refuse an affine (4, 4) that is not finite, not invertible, or sheared by more than `SHEAR_TOLERANCE_DEG`."""
    if not np.abs(affine).max() < FARTHEST_MM:  # true for NaN as well
        raise fault(path, f"its affine ({name}) is not finite", "repair the header")
    axes = affine[:3, :3]
    sides = np.linalg.norm(axes, axis=0)
    if sides.min() < 1e-6 or abs(np.linalg.det(axes / sides)) < 1e-6:
        raise fault(
            path, f"its affine ({name}) is not invertible, voxel sides {sides.round(6)} mm", "repair the header"
        )
    cosines = (axes / sides).T @ (axes / sides) - np.eye(3)
    angle = float(np.degrees(np.arcsin(min(np.abs(cosines).max(), 1.0))))
    if angle > SHEAR_TOLERANCE_DEG:
        raise fault(
            path,
            f"its affine ({name}) is sheared by {angle:.2f} degrees (tolerance {SHEAR_TOLERANCE_DEG})",
            "resample it to an orthogonal grid",
        )


def median_spacing(paths: Sequence[str | Path]) -> list[float]:
    """Median voxel size in mm along the RAS axes over several scans, two decimals; only headers are read."""
    spacings = []
    for path in paths:
        affine = nib.load(path).affine
        axes = nib.orientations.io_orientation(affine)[:, 0].astype(int)  # RAS axis of each voxel axis
        spacings.append(nib.affines.voxel_sizes(affine)[np.argsort(axes)])
    return [round(float(value), 2) for value in np.median(spacings, axis=0)]


def corner_distance(shape: tuple[int, ...], one: np.ndarray, two: np.ndarray) -> float:
    """Largest distance in mm between where two affines (4, 4) put a corner of a grid."""
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape], [1])).reshape(4, -1)
    return float(np.linalg.norm(((one - two) @ corners)[:3], axis=0).max())
