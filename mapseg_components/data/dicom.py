# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""DICOM series of a folder, by ITK: which there are, whether their slices make up one volume, and its voxels.

Only geometry, rescaling and what the stored values mean, class, series number, series UID and modality are taken from
the headers; nothing about a person.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from mapseg_components.data.dicom_objects import MAGIC, PREAMBLE, WANTED, DicomObject, begins_like_dicom, describe
from mapseg_components.data.dicom_values import require_grey, values_of_tissue
from mapseg_components.data.findings import Finding, fault, findings_of
from mapseg_components.data.headers import SHEAR_TOLERANCE_DEG, check_affine
from mapseg_components.data.nifti import Scan, is_nifti
from mapseg_components.errors import DataError, MAPSegError
from mapseg_components.memory import require_memory

__all__ = [
    "Contents",
    "Series",
    "SeriesScan",
    "has_dicom",
    "list_series",
    "look_into",
    "ordered_files",
    "read_series",
]

itk, _ = optional_import("itk")  # MONAI's way: ITK is loaded where it is used, which takes seconds

INDEX_FILE = "DICOMDIR"
STEP_TOLERANCE = 0.05  # of the distance between slices; positions are rounded in headers
SAME_POSITION_MM = 1e-3
# of a voxel's side: so far a slice may lie from where the volume's regular grid has it. Positions rounded to 0.01 mm
# stay far below, and half a voxel, from where another voxel would be nearer, far above
GRID_TOLERANCE = 0.1
DIRECTION_TOLERANCE = 1e-3  # of direction cosines between slices
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# the only tags that are taken from ITK
FRAMES = "0028|0008"
GEOMETRY = {"0020|0032": ("position", 3), "0020|0037": ("orientation", 6), "0028|0030": ("pixel spacing", 2)}
SPACING = "0028|0030"
RESCALE = {"0028|1052": "rescale intercept", "0028|1053": "rescale slope"}
TAGS = (FRAMES, *GEOMETRY, *RESCALE)
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
        header: what it says of its values.
    """

    file: Path
    shape: tuple[int, int]
    axes: np.ndarray
    position: np.ndarray
    header: DicomObject


def has_dicom(file: Path) -> bool:
    """Whether a file is a DICOM object that is no index, with its usual preamble or without."""
    try:
        with file.open("rb") as stream:
            start = stream.read(PREAMBLE + len(MAGIC))
    except OSError:
        return False
    return file.name.upper() != INDEX_FILE and begins_like_dicom(start)


@dataclass(frozen=True)
class Contents:
    """What a folder has of DICOM.

    Args:
        series: its image series, by number and UID.
        left_out: object without a scan to what it is.
        findings: what cannot be used, and belongs to none of the series.
    """

    series: list[Series]
    left_out: dict[Path, str]
    findings: list[Finding]


def list_series(folder: Path) -> list[Series]:
    """Image series of a folder, without its sub-folders, by number and UID; reports and the like are left out."""
    return look_into(folder).series


def look_into(folder: Path, names: Sequence[str] | None = None) -> Contents:
    """Image series of a folder, without its sub-folders, and what else it has of DICOM; voxels are not read.

    A slice must not be lost without a word: a damaged file stands among the files of its series, so that reading the
    series names it. Where its header does not tell the series any more, it stands in each one that it may belong to.

    Args:
        folder: where to look.
        names: of the files to look at; by default all that are not hidden, nor NIfTI.
    """
    place = Path(folder)
    names = [path.name for path in place.iterdir()] if names is None else names
    images: dict[Path, DicomObject] = {}
    lost: dict[Path, DicomObject] = {}
    left_out: dict[Path, str] = {}
    empty = []
    for file in sorted(place / name for name in names if not name.startswith(".") and not is_nifti(name)):
        try:
            found = describe(file)
            empty += [file] if found is None and not file.stat().st_size and file.is_file() else []
        except FileNotFoundError:  # a link to nowhere
            continue
        except OSError as error:
            found = DicomObject(file, "damaged", error.strerror or type(error).__name__, dict.fromkeys(WANTED, ""))
        if found is None:
            continue
        if found.kind == "no image":
            left_out[file] = found.reason
        elif found.kind == "damaged" and not found.tags["series_uid"]:
            lost[file] = found
        else:
            images[file] = found
    if images:  # what is a slice of nothing lies among slices
        lost |= {file: DicomObject(file, "damaged", "the file is empty", dict.fromkeys(WANTED, "")) for file in empty}
    members: dict[str, list[Path]] = {}
    for file, found in images.items():
        members.setdefault(found.tags["series_uid"], []).append(file)
    orphans = []
    for file, found in lost.items():
        owners = possible_owners(found, images)
        for uid in owners:
            members[uid].append(file)
        if not owners:
            orphans.append(file)
            left_out[file] = f"cannot be read as DICOM (damaged: {found.reason}): export the series again"
    findings = list(findings_of(damaged(orphans[0], lost[orphans[0]].reason, len(orphans)))) if orphans else []
    series = []
    for uid, files in members.items():
        tags = images[files[0]].tags
        series.append(Series(place, uid, whole(tags["number"]), tags["modality"], tuple(files)))
    return Contents(sorted(series, key=lambda one: (one.number, one.uid)), left_out, findings)


def possible_owners(lost: DicomObject, images: Mapping[Path, DicomObject]) -> list[str]:
    """UIDs of the series that a file may be a slice of, whose header does not tell its series.

    Of one kind of object, and, where the names of each series follow each other, beside it by name.
    """
    ordered = [images[file] for file in sorted(images)]
    uids = [one.tags["series_uid"] for one in ordered]
    kind = lost.tags["sop_class"]
    possible = {one.tags["series_uid"] for one in ordered if kind in ("", one.tags["sop_class"])}
    runs = sum(one != other for one, other in zip(uids, uids[1:])) + 1
    if runs == len(set(uids)):
        at = sum(one.file < lost.file for one in ordered)
        possible &= set(uids[max(at - 1, 0) : at + 1])
    return sorted(possible)


def whole(text: str) -> int:
    """A whole number of a header; 0 if it is none."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else 0


def numbers(text: str) -> list[float]:
    """Finite numbers of a header; empty if one of them is none, where ITK would assume another number."""
    try:
        found = [float(part) for part in text.split("\\")]
    except ValueError:
        return []
    return found if np.isfinite(found).all() else []


@dataclass(frozen=True)
class SeriesScan(Scan):
    """A series as read.

    Args:
        notes: what was done to its values beyond rescaling.
    """

    notes: tuple[str, ...] = ()


def read_series(series: Series) -> SeriesScan:
    """Voxels of a series, scaled by the rescale slope and intercept of each slice, on an affine in RAS+.

    Padding and grey values that are stored inverted are treated as `values_of_tissue` says.

    Returns:
        voxels float32 (X, Y, Z): X along a row, Y along a column, Z over the slices, right-handed in LPS.

    Raises:
        DataError: a file is damaged, has several frames or colours, or no position; the slices differ in size,
            spacing or orientation, stand at one position, have a gap, or lie askew over each other.
        ResourceError: the volume does not fit into memory.
    """
    with names_for_itk(series.files) as names:
        affine, slices = stack(series, [read_slice(file, names[file]) for file in series.files])
        columns, rows = slices[0].shape
        shape = (columns, rows, len(slices))
        require_memory(13 * columns * rows * len(slices), "cpu", f"{series}: shape {shape}", "use a larger machine")
        reader = itk.ImageSeriesReader[itk.Image[itk.F, 3]].New(FileNames=[names[piece.file] for piece in slices])
        reader.SetImageIO(itk.GDCMImageIO.New())
        try:
            reader.Update()
        except RuntimeError as error:
            raise damaged(series) from error
        voxels = np.array(itk.array_view_from_image(reader.GetOutput())).T
    if voxels.shape != shape:
        raise fault(str(series), f"ITK read shape {voxels.shape}, its headers say {shape}", DCM2NIIX)
    notes = values_of_tissue(voxels, [piece.header for piece in slices], series.modality)
    digest = hashlib.sha256(f"{shape}".encode())
    digest.update(np.ascontiguousarray(voxels))
    return SeriesScan(voxels, affine, affine, None, digest.hexdigest(), notes=notes)


def ordered_files(series: Series) -> list[Path]:
    """Files of a series in the order of the third axis of `read_series`. Raises as it does, of headers."""
    with names_for_itk(series.files) as names:
        return [piece.file for piece in stack(series, [read_slice(file, names[file]) for file in series.files])[1]]


@contextlib.contextmanager
def names_for_itk(files: Sequence[Path]) -> Iterator[dict[Path, str]]:
    """Context that yields each file's name for ITK, which takes UTF-8, whatever bytes or locale the files' names have:
    links in a temporary folder where they are not plain ASCII."""
    if all(str(file).isascii() for file in files):
        yield {file: str(file) for file in files}
        return
    with tempfile.TemporaryDirectory() as folder:
        links = {file: Path(folder) / f"{number}.dcm" for number, file in enumerate(files)}
        for file, link in links.items():
            link.symlink_to(file.absolute())
        yield {file: str(link) for file, link in links.items()}


def header(file: Path, name: str) -> tuple[Any, dict[str, str]]:
    """ITK's reader after reading a header, and its tags as text without padding; ``name`` is ITK's name of the file.

    Raises:
        DataError: ITK cannot read it.
    """
    reader = itk.GDCMImageIO.New()
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise damaged(file) from error
    content = reader.GetMetaDataDictionary()
    return reader, {key: str(content[key]).strip(" \0") for key in content.GetKeys() if key in TAGS}


def damaged(what: Series | Path, reason: str = "", count: int = 1) -> MAPSegError:
    """Error of images that ITK cannot read; its own words, which might quote a header, are left to the cause.

    Args:
        what: the series, or one file.
        reason: what is known of it.
        count: of files that this is true of.
    """
    more = f" like {count - 1} more files" if count > 1 else ""
    said = f"damaged: {reason}" if reason else "damaged, or of an unknown kind"
    return fault(str(what), f"cannot be read as DICOM images ({said}){more}", "export the series again")


def read_slice(file: Path, name: str) -> Slice:
    """Geometry of one file; ``name`` is ITK's name of it. Raises `DataError`."""
    try:
        found = describe(file)
    except OSError as error:
        raise damaged(file, error.strerror or type(error).__name__) from error
    if found is None or found.kind != "image":
        reason = "the file is empty, or no DICOM" if found is None else found.reason
        unknown = "" if found is not None and found.tags["series_uid"] else ", and may be a slice of this series"
        raise fault(
            file,
            f"cannot be read as DICOM images (damaged: {reason}){unknown}",
            f"export the series again{', or move the file away' if unknown else ''}",
        )
    require_grey(found)
    reader, tags = header(file, name)
    deep = int(reader.GetDimensions(2)) if reader.GetNumberOfDimensions() > 2 else 1
    frames = max(whole(tags.get(FRAMES, "")), deep)
    if frames > 1:
        raise fault(file, f"{frames} frames in one file, expected one slice", DCM2NIIX)
    if reader.GetNumberOfComponents() != 1:
        raise fault(file, "colours, expected grey values", "leave the series out")
    numbers_of = {tag: numbers(tags.get(tag, "")) for tag in GEOMETRY}
    missing = [name for tag, (name, count) in GEOMETRY.items() if len(numbers_of[tag]) != count]
    if missing:
        raise fault(file, f"its header has no {' and no '.join(missing)}", "leave out what is no slice of a volume")
    if min(numbers_of[SPACING]) <= 0:
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
        header=found,
    )


def stack(series: Series, slices: list[Slice]) -> tuple[np.ndarray, list[Slice]]:
    """Affine (4, 4) in RAS+ and the slices in its order.

    Raises:
        DataError: they do not make up one volume; see `read_series`.
    """
    first = slices[0]
    if len(slices) < 2:
        raise fault(str(series), "one slice, expected a volume", "leave the series out")
    for piece in slices[1:]:
        if piece.shape != first.shape or not np.allclose(
            np.linalg.norm(piece.axes, axis=0), np.linalg.norm(first.axes, axis=0), rtol=1e-3
        ):
            raise fault(
                str(series), f"{first.file.name} and {piece.file.name} differ in size or pixel spacing", DCM2NIIX
            )
        if np.abs(normalised(piece.axes) - normalised(first.axes)).max() > DIRECTION_TOLERANCE:
            what = f"{first.file.name} and {piece.file.name} differ in orientation"
            raise fault(str(series), what, "move localizers and other planes into separate folders")
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
            "take copies out, or split the volumes into separate folders (dcm2niix does)",
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


def check_line(series: Series, order: Sequence[Slice], normal: np.ndarray) -> None:
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
        str(series),
        f"slice {worst + 1} of {count} (at {height:.2f} mm) lies {distance:.2f} mm out of line with the others, within "
        f"its plane {float(np.linalg.norm(aside[worst, :2])):.2f} mm",
        "leave that slice out and resample, or split the series where the patient or the table moved (dcm2niix does)",
    )


def normalised(axes: np.ndarray) -> np.ndarray:
    """Columns of length 1."""
    return axes / np.linalg.norm(axes, axis=0)
