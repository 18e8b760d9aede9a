# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""DICOM series of a folder, by ITK: which there are, whether their slices make up one volume, and its voxels.

Only geometry, rescaling, series number, series UID and modality are taken from the headers; nothing about a person.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from mapseg_components.data.findings import fault
from mapseg_components.data.headers import SHEAR_TOLERANCE_DEG, check_affine
from mapseg_components.data.nifti import Scan
from mapseg_components.errors import DataError, MAPSegError
from mapseg_components.memory import require_memory

__all__ = ["Series", "has_dicom", "list_series", "ordered_files", "read_series"]

itk, _ = optional_import("itk")  # MONAI's way: ITK is loaded where it is used, which takes seconds

PREAMBLE, MAGIC = 128, b"DICM"
INDEX_FILE = "DICOMDIR"
STEP_TOLERANCE = 0.05  # of the distance between slices; positions are rounded in headers
SAME_POSITION_MM = 1e-3
DIRECTION_TOLERANCE = 1e-3  # of direction cosines between slices
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# the only tags that are looked at
ROWS, FRAMES, MODALITY, NUMBER = "0028|0010", "0028|0008", "0008|0060", "0020|0011"
GEOMETRY = {"0020|0032": ("position", 3), "0020|0037": ("orientation", 6), "0028|0030": ("pixel spacing", 2)}
SPACING = "0028|0030"
RESCALE = {"0028|1052": "rescale intercept", "0028|1053": "rescale slope"}
TAGS = (ROWS, FRAMES, MODALITY, NUMBER, *GEOMETRY, *RESCALE)
# (0002,0002) at the start of a file says what kind of object follows; these are none with voxels of a volume:
# presentation states, encapsulated documents, waveforms, raw data, reports, radiotherapy structures, plans, records
KIND_OF_OBJECT = re.compile(rb"\x02\x00\x02\x00UI..([\d.]+)", re.DOTALL)
NO_IMAGES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(11|104|9|66|88|481\.[3-9])(\..*)?")
DCM2NIIX = "convert the series with dcm2niix, which can take it apart"


@dataclass(frozen=True)
class Series:
    """Files of one series.

    Args:
        folder: where they are.
        uid: Series Instance UID.
        number: Series Number, 0 without one.
        modality: such as ``"CT"`` or ``"MR"``.
        files: in no order that means anything.
    """

    folder: Path
    uid: str
    number: int
    modality: str
    files: tuple[Path, ...]

    @property
    def uid_sha256(self) -> str:
        """Checksum of the UID, which tells series apart and says nothing about a person."""
        return hashlib.sha256(self.uid.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of its results, such as ``MR_3_1f2e3d4c``: modality, number and the start of `uid_sha256`."""
        return f"{re.sub(r'[^A-Za-z0-9]', '', self.modality) or 'series'}_{self.number}_{self.uid_sha256[:8]}"

    def __str__(self) -> str:
        return f"{self.folder}, series {self.number}"


@dataclass(frozen=True)
class Slice:
    """Geometry of one file, in LPS.

    Args:
        file: where it is.
        shape: columns and rows.
        axes: (3, 2), mm per voxel along a row and along a column.
        position: (3,), mm, of the first voxel.
    """

    file: Path
    shape: tuple[int, int]
    axes: np.ndarray
    position: np.ndarray


def has_dicom(file: Path) -> bool:
    """Whether a file is a DICOM object with its usual preamble (the index DICOMDIR is none)."""
    if file.name == INDEX_FILE:
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(PREAMBLE + len(MAGIC))[PREAMBLE:] == MAGIC
    except OSError:
        return False


def list_series(folder: Path) -> list[Series]:
    """Image series of a folder, without its sub-folders, by number and UID; reports and the like are left out.

    Raises:
        DataError: a file of the folder is an image, but cannot be read: a slice must not be lost without a word.
    """
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)  # one series is one UID; what does not fit together within it is refused by name
    names.SetDirectory(str(folder))
    found, listed = [], set()
    for uid in names.GetSeriesUIDs():
        files = tuple(Path(name) for name in sorted(names.GetFileNames(uid)))
        tags = header(files[0])[1]
        listed |= set(files)
        if ROWS in tags and is_image(files[0]):
            found.append(Series(Path(folder), uid, whole(tags.get(NUMBER, "")), tags.get(MODALITY, ""), files))
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and file not in listed and has_dicom(file) and is_image(file):
            raise damaged(file)
    return sorted(found, key=lambda series: (series.number, series.uid))


def whole(text: str) -> int:
    """A whole number of a header; 0 if it is none."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else 0


def numbers(text: str) -> list[float]:
    """Finite numbers of a header; empty if one of them is none, where ITK would take another number of its own."""
    try:
        found = [float(part) for part in text.split("\\")]
    except ValueError:
        return []
    return found if np.isfinite(found).all() else []


def is_image(file: Path) -> bool:
    """Whether a DICOM file is an image, by what its first bytes say; yes, if they say nothing."""
    with file.open("rb") as stream:
        kind = KIND_OF_OBJECT.search(stream.read(1024))
    return kind is None or NO_IMAGES.fullmatch(kind[1].decode("ascii")) is None


def read_series(series: Series) -> Scan:
    """Voxels of a series, scaled by rescale slope and intercept, on an affine in RAS+.

    Returns:
        voxels float32 (X, Y, Z): X along a row, Y along a column, Z over the slices, right-handed in LPS.

    Raises:
        DataError: a file is damaged, has several frames or colours, or no position; the slices differ in size,
            spacing or orientation, stand at one position, have a gap, or lie askew over each other.
        ResourceError: the volume does not fit into memory.
    """
    slices = [read_slice(file) for file in series.files]
    affine, slices = stack(series, slices)
    columns, rows = slices[0].shape
    shape = (columns, rows, len(slices))
    require_memory(12 * columns * rows * len(slices), "cpu", f"{series}: shape {shape}", "use a larger machine")
    reader = itk.ImageSeriesReader[itk.Image[itk.F, 3]].New(FileNames=[str(piece.file) for piece in slices])
    reader.SetImageIO(itk.GDCMImageIO.New())
    try:
        reader.Update()
    except RuntimeError as error:
        raise damaged(series) from error
    voxels = np.array(itk.array_view_from_image(reader.GetOutput())).T
    if voxels.shape != shape:
        raise fault(str(series), f"ITK read shape {voxels.shape}, its headers say {shape}", DCM2NIIX)
    digest = hashlib.sha256(f"{shape}".encode())
    digest.update(np.ascontiguousarray(voxels))
    return Scan(voxels, affine, affine, None, digest.hexdigest())


def ordered_files(series: Series) -> list[Path]:
    """Files of a series in the order of the third axis of `read_series`. Raises as it does, of headers."""
    return [piece.file for piece in stack(series, [read_slice(file) for file in series.files])[1]]


def header(file: Path) -> tuple[Any, dict[str, str]]:
    """ITK's reader after reading a header, and its tags as text without padding. Raises `DataError`."""
    reader = itk.GDCMImageIO.New()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged(file) from error
    content = reader.GetMetaDataDictionary()
    return reader, {key: str(content[key]).strip(" \0") for key in content.GetKeys() if key in TAGS}


def damaged(what: Series | Path) -> MAPSegError:
    """Error of images that ITK cannot read; its own words, which might quote a header, are left to the cause."""
    return fault(
        str(what), "cannot be read as DICOM images (damaged, or of an unknown kind)", "export the series again"
    )


def read_slice(file: Path) -> Slice:
    """Geometry of one file. Raises `DataError`."""
    reader, tags = header(file)
    deep = int(reader.GetDimensions(2)) if reader.GetNumberOfDimensions() > 2 else 1
    frames = max(whole(tags.get(FRAMES, "")), deep)
    if frames > 1:
        raise fault(file, f"{frames} frames in one file, expected one slice", DCM2NIIX)
    if reader.GetNumberOfComponents() != 1:
        raise fault(file, "colours, expected grey values", "leave the series out")
    found = {tag: numbers(tags.get(tag, "")) for tag in GEOMETRY}
    missing = [name for tag, (name, count) in GEOMETRY.items() if len(found[tag]) != count]
    if missing:
        raise fault(file, f"its header has no {' and no '.join(missing)}", "leave out what is no slice of a volume")
    if min(found[SPACING]) <= 0:
        raise fault(file, "its pixel spacing is not above 0", "export the series again")
    wrong = [name for tag, name in RESCALE.items() if tags.get(tag) and len(numbers(tags[tag])) != 1]
    if wrong:
        raise fault(file, f"its {' and its '.join(wrong)} is no number", "export the series again")
    directions = np.array([reader.GetDirection(axis) for axis in range(2)], dtype=float).T
    spacing = np.array([reader.GetSpacing(axis) for axis in range(2)], dtype=float)
    return Slice(
        file=file,
        shape=(int(reader.GetDimensions(0)), int(reader.GetDimensions(1))),
        axes=directions * spacing,
        position=np.array([reader.GetOrigin(axis) for axis in range(3)], dtype=float),
    )


def stack(series: Series, slices: list[Slice]) -> tuple[np.ndarray, list[Slice]]:
    """Affine (4, 4) in RAS+ and the slices in its order.

    Raises:
        DataError: they do not make up one volume; see `read_series`.
    """
    first = slices[0]
    for piece in slices[1:]:
        if piece.shape != first.shape or not np.allclose(
            np.linalg.norm(piece.axes, axis=0), np.linalg.norm(first.axes, axis=0), rtol=1e-3
        ):
            raise fault(
                str(series), f"{first.file.name} and {piece.file.name} differ in size or pixel spacing", DCM2NIIX
            )
        if np.abs(normalised(piece.axes) - normalised(first.axes)).max() > DIRECTION_TOLERANCE:
            what = f"{first.file.name} and {piece.file.name} differ in orientation"
            raise fault(str(series), what, "move localizers and other planes into folders of their own")
    if len(slices) < 2:
        raise fault(str(series), "one slice, expected a volume", "leave the series out")
    normal = np.cross(*normalised(first.axes).T)
    order = sorted(slices, key=lambda piece: float(piece.position @ normal))
    heights = np.array([piece.position @ normal for piece in order])
    check_steps(series, heights)
    step = (order[-1].position - order[0].position) / (len(order) - 1)
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = first.axes, step, order[0].position
    affine = LPS_TO_RAS @ affine
    try:
        check_affine(Path(str(series)), affine, "slice positions")
    except DataError as error:
        angle = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
        if angle <= SHEAR_TOLERANCE_DEG:
            raise
        what = f"its slices lie askew over each other, {angle:.1f} degrees (tilted gantry)"
        raise fault(str(series), what, "convert the series with dcm2niix, which can straighten it") from error
    return affine, order


def check_steps(series: Series, heights: np.ndarray) -> None:
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
            str(series),
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
            str(series),
            f"slices are {usual:.2f} mm apart, but not between {', '.join(places)}{more}",
            "add the missing slices, or resample the series",
        )


def normalised(axes: np.ndarray) -> np.ndarray:
    """Columns of length 1."""
    return axes / np.linalg.norm(axes, axis=0)
