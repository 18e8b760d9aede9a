# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What lies in an input and is not used, with the reason: nothing is left out without a word.

It is what is there less what is taken, so that a file of a kind nobody thought of is listed as well.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.data.datalist import stem
from mapseg_components.data.layouts import listing_of, named_as_label, scans_of_label, stems_of
from mapseg_components.files import readable
from mapseg_components.scans.dicom import has_dicom
from mapseg_components.scans.files import is_nifti, is_picture, is_scan
from mapseg_components.scans.findings import Finding

__all__ = ["LeftOut", "in_one_line", "left_out", "notes_of", "records_of", "scans_and_label_maps", "summary"]

CONVERT = "convert it to NIfTI (.nii.gz)"
SIDECAR, SYSTEM, PICTURE, HIDDEN = "sidecar or text", "of the operating system", "picture, no volume", "hidden"
BESIDE = "a picture beside scans: if it is a 2D image to work on, keep images in a separate folder"
JPEG = "a JPEG image, which is not read: save a scan as PNG or TIFF; a label map loses its values in JPEG"
MASK_OF_SCAN = "the mask of its scan, used with it"
# endings, in small letters, to what such a file is
ENDINGS = {
    **dict.fromkeys((".json", ".bval", ".bvec", ".tsv", ".csv", ".txt", ".md", ".rst", ".log"), SIDECAR),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".html", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".bib"), SIDECAR),
    **dict.fromkeys((".py", ".sh", ".m", ".ipynb", ".ini", ".cfg", ".toml", ".cff", ".mat", ".lta", ".tfm"), SIDECAR),
    **dict.fromkeys((".gif", ".bmp", ".svg"), PICTURE),
    **dict.fromkeys((".jpg", ".jpeg", ".webp"), JPEG),
    **dict.fromkeys((".hdr", ".img"), f"half of an Analyze or NIfTI pair (.hdr and .img): {CONVERT}"),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc", ".gipl"), f"another format: {CONVERT}"),
    **dict.fromkeys((".par", ".rec", ".brik", ".head", ".v", ".ima", ".dcm"), f"another format: {CONVERT}"),
    **dict.fromkeys((".h5", ".hdf5", ".npy", ".npz", ".raw", ".vtk"), f"another format: {CONVERT}"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".z"), "packed: unpack it"),
    **dict.fromkeys((".ima", ".dcm", ".dicom"), "named as DICOM, but it is none: copy it again from its origin"),
}
TEXTS = ("readme", "changes", "license", "citation", "authors", "notice")
OF_SYSTEM = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r")
# last part of the name of what is no scan: of BIDS, of results of this package, and what others call them
LABEL_MAP = re.compile(
    r"(^|[_.\- ])(dseg|probseg|seg|segmentation|labels?|labelmap|mask|brainmask|roi|pred|probabilities|aseg|gt)$",
    re.IGNORECASE,
)
IS_LABEL_MAP = "a label map by its name: if it is a scan, rename it, or name the file itself as the input"
DEEPER = "a scan in a sub-folder: name that folder as the input"
QUIET = (SIDECAR, SYSTEM, PICTURE, BESIDE, JPEG, MASK_OF_SCAN)  # kinds that stand beside most scans
MOST_QUIET, MOST_NAMED = 10, 50  # names that are printed of a reason


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not used.

    Args:
        path: where it is.
        reason: why, and what to do if it should be used.
    """

    path: Path
    reason: str


def scans_and_label_maps(cases: Sequence[dict[str, Any]], key: str) -> tuple[list[dict[str, Any]], list[Path]]:
    """Cases of a folder that are scans by their names, and files that are label maps; ``key`` names the file."""
    maps = [case for case in cases if is_label_map(Path(case[key]))]
    return [case for case in cases if case not in maps], [Path(case[key]) for case in maps]


def is_label_map(path: Path) -> bool:
    """Whether a file is a label map by its name alone, or by its name beside its scan."""
    name = stem(path)
    if LABEL_MAP.search(name):
        return True
    return named_as_label(name) and scans_of_label(name, list(stems_of(path.parent))) is not None


def left_out(
    top: str | os.PathLike[str],
    taken: Iterable[str | os.PathLike[str]],
    known: Mapping[Path, str] | None = None,
    results: str | os.PathLike[str] | None = None,
    nifti: str = DEEPER,
    dicom: str = "",
) -> list[LeftOut]:
    """All of a folder that is not taken, by path; of a file nothing.

    Args:
        top: the input.
        taken: files that are used, or that were named as an error.
        known: file to reason, where it is known already.
        results: a folder for results, which is not looked into.
        nifti: reason for a NIfTI file that is not taken.
        dicom: for a DICOM file that ``known`` does not have; empty where such are not looked for.
    """
    place = Path(os.path.abspath(top))
    if not place.is_dir():
        return []
    used = {os.path.abspath(path) for path in taken}
    holding = used | {str(folder) for path in used for folder in Path(path).parents}
    reasons = {os.path.abspath(path): reason for path, reason in (known or {}).items()}
    closed = None if results is None else os.path.realpath(results)
    found: list[LeftOut] = []
    for folder, folders, files in os.walk(place, onerror=None):
        here = Path(folder)
        entries = [(name, reason_of_folder(here / name, closed)) for name in folders]
        folders[:] = sorted(name for name, reason in entries if not reason)
        found += [LeftOut(here / n, why) for n, why in entries if why and os.path.join(folder, n) not in holding]
        for name in files:
            path = os.path.join(folder, name)
            if path not in used:
                found.append(LeftOut(Path(path), reasons.get(path) or reason_of(Path(path), nifti, dicom)))
    return sorted(found, key=lambda one: one.path)


def reason_of_folder(path: Path, closed: str | None) -> str:
    """Why a folder is not looked into; empty if it is."""
    if os.path.realpath(path) == closed:
        return "the folder of results"
    if path.is_symlink():
        return "a link to a folder, which is not followed: name that folder as the input"
    if path.name.startswith("."):
        return HIDDEN
    try:
        return "" if os.listdir(path) else "an empty folder"
    except OSError as error:
        return f"a folder that cannot be listed ({error.strerror}): allow reading it"


def reason_of(path: Path, nifti: str, dicom: str) -> str:
    """Why a file is not used, by its name, and by its first bytes where that says nothing."""
    name, lowered = path.name, path.name.lower()
    if path.is_symlink() and not path.exists():
        return f"a link to {readable(os.readlink(path))}, which does not exist: copy the file there"
    if lowered in OF_SYSTEM or name in (".DS_Store",) or name.startswith("._"):
        return SYSTEM
    if name.startswith("."):
        return f"{HIDDEN}: rename it if it is a scan" if is_scan(name) else HIDDEN
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "no regular file"
        if is_nifti(name):
            return IS_LABEL_MAP if is_label_map(path) else nifti
        if is_picture(name):
            return reason_of_picture(path, nifti)
        if lowered == "dicomdir":
            return "an index of DICOM files"
        if dicom and has_dicom(path):
            return dicom
        if lowered.split(".")[0] in TEXTS:
            return SIDECAR
        with path.open("rb") as stream:
            start = stream.read(4096)
    except OSError as error:
        return f"cannot be read ({error.strerror}): allow reading it, or copy it again"
    ending = os.path.splitext(lowered)[1]
    if not start and ENDINGS.get(ending) not in QUIET:
        return "an empty file"
    if ending not in ENDINGS or ending == ".gz":
        compressed = begins_as_nifti(start)
        if compressed is not None:
            right = ".nii.gz" if compressed else ".nii"
            return f"a NIfTI file by its content: rename it, so that its name ends with {right}"
    return ENDINGS.get(ending) or f"neither NIfTI nor DICOM by its content: {CONVERT} if it is a scan"


def reason_of_picture(path: Path, reason: str) -> str:
    """Why a PNG or TIFF image is not used; ``reason`` is that of a scan elsewhere."""
    found = listing_of(path.parent)
    if path.name not in found.scans:
        return BESIDE
    if path.name in found.masks:
        return MASK_OF_SCAN
    return IS_LABEL_MAP if is_label_map(path) else reason


def begins_as_nifti(start: bytes) -> bool | None:
    """Whether a file that begins so is compressed NIfTI, or plain; ``None`` if it is no NIfTI."""
    compressed = start[:2] == b"\x1f\x8b"
    if compressed:
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, 352)
        except (zlib.error, gzip.BadGzipFile):
            return None
    return compressed if start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0" else None


def grouped(left: Iterable[LeftOut]) -> dict[str, list[Path]]:
    """Reason to paths; what stands beside most scans comes last."""
    groups: dict[str, list[Path]] = {}
    for one in left:
        groups.setdefault(one.reason, []).append(one.path)
    return dict(sorted(groups.items(), key=lambda item: item[0] in QUIET))


def summary(left: Collection[LeftOut], top: str | os.PathLike[str]) -> str:
    """Lines for the screen: how many were left out, and the names below ``top`` for each reason; empty for none."""
    if not left:
        return ""
    place = os.path.abspath(top)
    lines = [f"Left out, {len(left)}:"]
    for reason, paths in grouped(left).items():
        most = MOST_QUIET if reason in QUIET else MOST_NAMED
        names = ", ".join(readable(os.path.relpath(path, place)) for path in paths[:most])
        more = f" and {len(paths) - most} more" if len(paths) > most else ""
        lines.append(f"  {reason} ({len(paths)}): {names}{more}")
    return "\n".join(lines)


def in_one_line(left: Collection[LeftOut], top: str | os.PathLike[str]) -> str:
    """As `summary`, for the end of an error; empty for none."""
    lines = [line.strip() for line in summary(left, top).splitlines()]
    return f". {lines[0]} {'; '.join(lines[1:])}" if lines else ""


def records_of(left: Iterable[LeftOut], top: str | os.PathLike[str], named: bool) -> list[dict[str, Any]]:
    """As plain values, one for each reason: how many, and which, unless names may be a person's, as those of DICOM."""
    place = os.path.abspath(top)
    records: list[dict[str, Any]] = []
    for reason, paths in grouped(left).items():
        records.append({"reason": reason, "count": len(paths)})
        if named and not reason.startswith("DICOM"):
            records[-1]["paths"] = [os.path.relpath(path, place) for path in paths]
    return records


def notes_of(left: Iterable[LeftOut], top: str | os.PathLike[str]) -> list[Finding]:
    """As findings, one for each path, but one for all of a kind that stands beside most scans, and of more than 50.

    A label map among scans is a warning, for a training on that folder refuses it; all else is a note.
    """
    notes = []
    for reason, paths in grouped(left).items():
        severity = "warning" if reason == IS_LABEL_MAP else "note"
        if reason in QUIET or len(paths) > MOST_NAMED:
            names = ", ".join(readable(path.name) for path in paths[:MOST_QUIET])
            more = f" and {len(paths) - MOST_QUIET} more" if len(paths) > MOST_QUIET else ""
            notes.append(Finding(severity, str(top), f"left out, {reason}: {names}{more}"))
        else:
            notes += [Finding(severity, str(path), f"left out, {reason}") for path in paths]
    return notes
