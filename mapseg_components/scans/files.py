# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of scans: what their names say, a scan as read, and opening one that nobody vouches for."""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mapseg_components.errors import ResourceError
from mapseg_components.scans.findings import fault
from mapseg_components.scans.headers import Remark

__all__ = [
    "COPY_AGAIN",
    "ENDINGS",
    "FORMATS",
    "PICTURES",
    "Scan",
    "is_nifti",
    "is_picture",
    "is_scan",
    "opened",
    "result_ending",
    "scans_among",
    "stem",
]

ENDINGS = (".nii.gz", ".nii")
PICTURES = (".png", ".tiff", ".tif")  # 2D images: scans of one slice
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
FORMATS = "*.nii, *.nii.gz, *.png, *.tif"
COPY_AGAIN = "copy it again from its origin"
CONVERT = "convert it to .nii.gz (dcm2niix for DICOM)"
OF_LOSSY = "save the image as PNG or TIFF, and a label map anew as it was annotated: JPEG changes values"


@dataclass(frozen=True)
class Scan:
    """A 3D scan as read.

    Args:
        voxels: (X, Y, Z), scaled as the header says.
        affine: see `Geometry`.
        sform: see `Geometry`.
        qform: see `Geometry`.
        remarks: see `Geometry`.
        digest: sha256 of shape, type, scaling and decoded voxels; names and headers do not enter.
    """

    voxels: np.ndarray
    affine: np.ndarray
    sform: np.ndarray | None
    qform: np.ndarray | None
    digest: str
    remarks: tuple[Remark, ...] = ()


def is_nifti(name: str) -> bool:
    """Whether a file's name ends with ``.nii`` or ``.nii.gz``, in capitals or not."""
    return name.lower().endswith(ENDINGS)


def is_picture(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name ends as that of a PNG or TIFF image, in capitals or not."""
    return os.fspath(name).lower().endswith(PICTURES)


def is_scan(name: str) -> bool:
    """Whether a file's name ends as one that is read: NIfTI, PNG or TIFF, in capitals or not."""
    return name.lower().endswith((*ENDINGS, *PICTURES))


def scans_among(names: Iterable[str]) -> list[str]:
    """Of the names of a folder's files those of scans, in their order; hidden ones are left out.

    PNG and TIFF images beside NIfTI files are pictures of those, such as previews, and no scans.
    """
    shown = [name for name in names if is_scan(name) and not name.startswith(".")]
    return [name for name in shown if is_nifti(name)] or shown


def stem(scan: Path) -> str:
    """File name of a scan without its ending, in capitals or not."""
    return re.sub(r"\.(nii(\.gz)?|png|tiff?)\Z", "", scan.name, flags=re.IGNORECASE)


def result_ending(scan: str | os.PathLike[str], fractions: bool = False) -> str:
    """Ending of a result's name: of a PNG or TIFF image its own, else ``.nii.gz``.

    Args:
        scan: file of the scan.
        fractions: the result has values that are not whole, which PNG does not hold: TIFF.
    """
    if not is_picture(scan):
        return ENDINGS[0]
    ending = Path(os.fspath(scan)).suffix.lower()
    return ".tif" if fractions and ending == ".png" else ending


@contextmanager
def opened(path: Path, kind: str) -> Iterator[BinaryIO]:
    """A file of a scan, open for reading; what goes wrong meanwhile is named.

    Args:
        path: the file.
        kind: of the file, such as ``"NIfTI"``, for messages.

    Raises:
        DataError: no such file, no permission, no name of a scan, or damaged.
        ResourceError: the scan does not fit into memory.
    """
    check_kind(path)
    try:
        with path.open("rb") as stream:
            yield stream
    except PermissionError as error:
        raise fault(path, "no permission to read it", "allow it (chmod u+r), or leave the scan out") from error
    except (EOFError, zlib.error) as error:
        raise fault(path, f"cannot be read as {kind} (damaged gzip: {error})", COPY_AGAIN) from error
    except ResourceError:
        raise
    except OSError as error:
        raise fault(path, f"cannot be read as {kind} ({error.strerror or error})", COPY_AGAIN) from error
    except MemoryError as error:
        raise fault(path, "does not fit into memory", "free some, or crop the scan", ResourceError) from error


def check_kind(path: Path) -> None:
    """Refuse what is no regular file with the name of a scan. Raises `DataError`."""
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
    if path.name.lower().endswith(LOSSY):
        raise fault(path, "a JPEG image, expected a file named .nii, .nii.gz, .png or .tif", OF_LOSSY)
    if not is_scan(path.name):
        raise fault(path, "expected a file named .nii or .nii.gz (or .png or .tif, for 2D images)", CONVERT)
