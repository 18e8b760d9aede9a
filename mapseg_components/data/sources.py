# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""All scans below a folder, as people keep them: NIfTI files, ``images`` with ``labels``, and DICOM series."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mapseg_components.data.datalist import LONGEST_NAME_BYTES, list_scans, stem
from mapseg_components.data.layouts import (
    images_beside,
    label_of,
    labels_among,
    labels_beside,
    labels_of_scans,
    misplaced,
)
from mapseg_components.data.left_out import LeftOut, in_one_line, left_out
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.scans.dicom import Contents, Series, look_into
from mapseg_components.scans.files import is_nifti, is_picture
from mapseg_components.scans.findings import Finding

__all__ = ["Source", "find_series", "find_sources"]

IMAGES, LABELS = "images", "labels"
FLAT = "a 2D image: none is prepared, use images as they are (mapseg check, adapt, predict)"
NOT_CHOSEN = "not the series that was chosen"


@dataclass(frozen=True)
class Source:
    """A scan that was found.

    Args:
        name: where its result goes: a path without ending, relative to the folder of results.
        image: the file, or a DICOM series.
        label: its label map.
        label_name: as ``name``, of the label map's result.
    """

    name: str
    image: Path | Series
    label: Path | None = None
    label_name: str | None = None


def find_sources(
    folder: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    series: str | None = None,
    leave_out: str | os.PathLike[str] | None = None,
) -> tuple[list[Source], list[Finding], list[LeftOut]]:
    """Scans of a folder and all folders below it, or of one file; voxels are not read.

    Label maps are the files of equal name in ``labels`` beside ``images``, those of nnU-Net's and the Decathlon's
    ``labelsTr``, and what is named as one beside its scan (``a_dseg``); all other NIfTI files are scans. The findings
    name a label map without its scan, or of one of several scans, and a scan of several channels. A DICOM series is
    named ``<its folder>_<series number>``; what the header says about a person is not looked at. Hidden files and
    folders are left out.

    Args:
        folder: folder or NIfTI file.
        labels: folder of label maps named as their scans, if they lie elsewhere.
        series: take the DICOM series with this UID only.
        leave_out: a folder that is not looked into.

    Returns:
        the scans by name, what was found and cannot be used, and what was left out.

    Raises:
        ConfigError: nothing to prepare, no such folder, or no series of this UID.
        DataError: two scans would have results of one name.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    known: dict[Path, str] = {}
    try:
        sources = list(walk(folder, findings, known, leave_out)) if folder.is_dir() else [one_file(folder)]
        if labels is not None:
            sources = with_labels(sources, Path(labels), findings)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed ({error}): allow reading it") from error
    if series is not None:
        every, sources = sources, chosen(sources, series)
        known |= {file: NOT_CHOSEN for one in every if one not in sources for file in files_of(one)}
    whole = in_one_folder([one.image for one in sources if isinstance(one.image, Series)], findings, known)
    sources = [one for one in sources if not isinstance(one.image, Series) or one.image in whole]
    taken = [file for one in sources for file in files_of(one)] + [finding.file for finding in findings]
    left = left_out(folder, taken, known, leave_out)
    if not sources and not findings:
        raise ConfigError(
            f"{folder}: no NIfTI scan (*.nii, *.nii.gz) and no DICOM series found: correct the input"
            f"{in_one_line(left, folder)}"
        )
    sources = sorted(sources, key=lambda source: source.name)
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            images = [str(source.image) for source in sources if source.name == name]
            raise DataError(f"{' and '.join(images)} would have results of one name, {name}: rename one")
    for source in sources:
        if len(os.fsencode(Path(source.name).name)) > LONGEST_NAME_BYTES:
            what = f"its result's name is longer than {LONGEST_NAME_BYTES} bytes"
            findings.append(Finding("error", str(source.image), what, "rename it"))
    named = {finding.file for finding in findings}
    return [source for source in sources if str(source.image) not in named], findings, left


def find_series(
    folder: str | os.PathLike[str], leave_out: str | os.PathLike[str] | None = None
) -> tuple[list[Series], list[Finding], dict[Path, str]]:
    """DICOM series of a folder and all folders below it, by name; voxels are not read. Arguments as `find_sources`.

    Returns:
        the series, what was found and cannot be used (a series whose files lie in two folders as well), and files
        that hold no scan, with the reason.
    """
    findings: list[Finding] = []
    known: dict[Path, str] = {}
    places = walk_folders(Path(folder), findings, leave_out)
    found = [one for place, files in places for one in series_of(place, files, findings, known).series]
    return sorted(in_one_folder(found, findings, known), key=lambda one: one.name), findings, known


def in_one_folder(found: Iterable[Series], findings: list[Finding], known: dict[Path, str]) -> list[Series]:
    """Series whose files all lie in one folder; of others there would be volumes with slices less, so that they are
    added to the arguments."""
    series: dict[str, list[Series]] = {}
    for one in found:
        series.setdefault(one.name, []).append(one)
    for parts in series.values():
        if len(parts) > 1:
            what = f"files of one series, number {parts[0].number}, lie in {len(parts)} folders"  # names are a person's
            remedy = "move the slices into one folder, or take copies out"
            findings.append(Finding("error", str(parts[0].folder), what, remedy))
            known |= {file: f"{what}: {remedy}" for one in parts for file in one.files}
    return [parts[0] for parts in series.values() if len(parts) == 1]


def one_file(path: Path) -> Source:
    """A single NIfTI file; that it can be read is seen later."""
    if path.exists() and is_picture(path):
        raise ConfigError(f"{path} is {FLAT}")
    if path.exists() and not is_nifti(path.name):
        raise ConfigError(f"{path}: expected a .nii or .nii.gz file, or a folder: for DICOM name the series' folder")
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: no such file or folder: correct the input")
    return Source(stem(path), path)


def walk_folders(
    top: Path, findings: list[Finding], leave_out: str | os.PathLike[str] | None
) -> Iterator[tuple[Path, list[str]]]:
    """Folders from ``top`` down, with the names of their files; links to folders and hidden folders are left out."""
    closed = None if leave_out is None else os.path.realpath(leave_out)

    def refuse(error: OSError) -> None:
        findings.append(Finding("error", str(error.filename), "a folder that cannot be listed", "allow reading it"))

    for place, folders, files in os.walk(top, onerror=refuse):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and os.path.realpath(here / f) != closed)
        yield here, files


def walk(
    top: Path, findings: list[Finding], known: dict[Path, str], leave_out: str | os.PathLike[str] | None
) -> Iterator[Source]:
    """Scans below a folder; what cannot be used, and files that hold no scan, are added to the arguments."""
    for here, files in walk_folders(top, findings, leave_out):
        relative = here.relative_to(top)
        images = images_beside(here) if here != top else None
        if images is not None:
            used = set(labels_of_scans(list_scans(images), list_scans(here)).values())
            findings += [orphan(path) for path in list_scans(here) if path not in used]
            continue
        scans = [scan for scan in list_scans(here) if not is_picture(scan)]
        known |= {here / name: FLAT for name in files if is_picture(name)}
        others = labels_beside(here) if here != top else None
        maps = labels_among(scans) if others is None else labels_of_scans(scans, list_scans(others))
        place = relative if others is None else relative.parent / others.name
        for scan in scans:
            if scan in maps.values():
                continue
            reason = misplaced(scan)
            if reason is not None:
                findings.append(Finding("error", str(scan), *reason))
            elif scan in maps:
                yield Source(posix(relative, stem(scan)), scan, maps[scan], posix(place, stem(maps[scan])))
            else:
                yield Source(posix(relative, stem(scan)), scan)
        yield from dicom_sources(here, relative, series_of(here, files, findings, known).series)


def series_of(folder: Path, files: list[str], findings: list[Finding], known: dict[Path, str]) -> Contents:
    """DICOM of a folder with these files; what is wrong with it, and what holds no scan, is added to the arguments."""
    found = look_into(folder, files)
    findings += found.findings
    known |= found.left_out
    return found


def files_of(source: Source) -> list[Path]:
    """All files of a scan."""
    files = list(source.image.files) if isinstance(source.image, Series) else [source.image]
    return files if source.label is None else [*files, source.label]


def dicom_sources(folder: Path, relative: Path, found: list[Series]) -> Iterator[Source]:
    """One scan for each series of a folder."""
    base = re.sub(r"[^\w.\-]+", "_", folder.resolve().name).lstrip(".") or "series"
    used: Counter[int] = Counter()
    for series in found:
        used[series.number] += 1
        again = f"_{used[series.number]}" if used[series.number] > 1 else ""
        yield Source(posix(relative.parent, f"{base}_{series.number}{again}"), series)


def with_labels(sources: list[Source], labels: Path, findings: list[Finding]) -> list[Source]:
    """Scans with label maps of a folder; results are laid out in ``images`` and ``labels``."""
    if not labels.is_dir():
        raise ConfigError(f"{labels}: no such folder: correct labels")
    known = {path.resolve() for path in list_scans(labels)}
    maps = {stem(path): path for path in list_scans(labels)}
    findings[:] = [finding for finding in findings if Path(finding.file).resolve() not in known]
    result: list[Source] = []
    used: dict[Path, Path] = {}  # label map to the folder of its scans
    for source in sources:
        if isinstance(source.image, Path) and source.image.resolve() in known:
            continue  # labels lie below the input
        label = label_of(Path(source.name).name, maps)
        if label is None:
            result.append(Source(f"{IMAGES}/{source.name}", source.image))
        else:
            place = Path(source.name).parent
            if used.setdefault(label, place) != place:  # in one folder they are contrasts of one scan
                what = f"label map of scans in two folders, {source.name} among them"
                findings.append(Finding("error", str(label), what, "name scans and label maps apart, one for each"))
            name = (place / stem(label)).as_posix()
            result.append(Source(f"{IMAGES}/{source.name}", source.image, label, f"{LABELS}/{name}"))
    findings += [orphan(path) for path in maps.values() if path not in used]
    return result


def orphan(path: Path) -> Finding:
    """A label map without a scan."""
    return Finding("error", str(path), "label map without a scan of the same name", "add the scan, or move it away")


def chosen(sources: list[Source], uid: str) -> list[Source]:
    """The scan of one series. Raises `ConfigError`, which lists the series that there are."""
    listed = [source for source in sources if isinstance(source.image, Series)]
    found = [source for source in listed if isinstance(source.image, Series) and source.image.uid == uid]
    if not found:
        there = "; ".join(
            f"{s.image.uid} ({s.name}, {s.image.modality}, {len(s.image.files)} files)"
            for s in listed
            if isinstance(s.image, Series)
        )
        raise ConfigError(f"no DICOM series with UID {uid!r}, found {there or 'none at all'}: correct series")
    return found


def posix(folder: Path, name: str) -> str:
    """Name below a folder, with ``/``."""
    return (folder / name).as_posix()
