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

from mapseg_components.errors import MAPSegError
from mapseg_components.memory import require_memory
from mapseg_components.scans.dicom_geometry import DCM2NIIX, Slice, stack
from mapseg_components.scans.dicom_objects import MAGIC, PREAMBLE, WANTED, DicomObject, begins_like_dicom, describe
from mapseg_components.scans.dicom_values import require_grey, values_of_tissue
from mapseg_components.scans.findings import Finding, fault, findings_of
from mapseg_components.scans.nifti import Scan, is_nifti

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
# the only tags that are taken from ITK
FRAMES = "0028|0008"
GEOMETRY = {"0020|0032": ("position", 3), "0020|0037": ("orientation", 6), "0028|0030": ("pixel spacing", 2)}
SPACING = "0028|0030"
RESCALE = {"0028|1052": "rescale intercept", "0028|1053": "rescale slope"}
TAGS = (FRAMES, *GEOMETRY, *RESCALE)


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
    """Finite numbers of a header; empty if one of them is none, where ITK would take another number of its own."""
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
        affine, slices = stack(str(series), [read_slice(file, names[file]) for file in series.files])
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
        return [piece.file for piece in stack(str(series), [read_slice(file, names[file]) for file in series.files])[1]]


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
