# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""All scans below a folder, as people keep them: NIfTI files, ``images`` with ``labels``, and DICOM series."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mapseg_components.data.datalist import LONGEST_NAME_BYTES, list_scans, stem
from mapseg_components.data.dicom import Series, has_dicom, list_series
from mapseg_components.data.findings import Finding, findings_of
from mapseg_components.data.layouts import (
    images_beside,
    label_of,
    labels_among,
    labels_beside,
    labels_of_scans,
    misplaced,
)
from mapseg_components.data.nifti import ENDINGS
from mapseg_components.errors import ConfigError, DataError, MAPSegError

__all__ = ["Source", "find_series", "find_sources"]

IMAGES, LABELS = "images", "labels"


@dataclass(frozen=True)
class Source:
    """A scan that was found.

    Args:
        name: where its result goes: a path without ending, relative to the folder of results.
        image: the file, or a DICOM series.
        label: its label map. label_name: as ``name``, of the label map's result.
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
) -> tuple[list[Source], list[Finding]]:
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
        the scans by name, and what was found and cannot be used.

    Raises:
        ConfigError: nothing to prepare, no such folder, or no series of this UID.
        DataError: two scans would have results of one name.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    try:
        sources = list(walk(folder, findings, leave_out)) if folder.is_dir() else [one_file(folder)]
        if labels is not None:
            sources = with_labels(sources, Path(labels), findings)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed ({error}): allow reading it") from error
    if series is not None:
        sources = chosen(sources, series)
    if not sources and not findings:
        raise ConfigError(f"{folder}: no NIfTI scan (*.nii, *.nii.gz) and no DICOM series found: correct the input")
    sources = sorted(sources, key=lambda source: source.name)
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            images = [str(source.image) for source in sources if source.name == name]
            raise DataError(f"{' and '.join(images)} would have results of one name, {name}: rename one")
    for source in sources:
        if len(os.fsencode(Path(source.name).name)) > LONGEST_NAME_BYTES:
            raise DataError(f"{source.image}: its result's name is longer than {LONGEST_NAME_BYTES} bytes: rename it")
    return sources, findings


def find_series(
    folder: str | os.PathLike[str], leave_out: str | os.PathLike[str] | None = None
) -> tuple[list[Series], list[Finding]]:
    """DICOM series of a folder and all folders below it, by name; voxels are not read. Arguments as `find_sources`.

    Returns:
        the series, and what was found and cannot be used.

    Raises:
        DataError: files of one series lie in two folders.
    """
    findings: list[Finding] = []
    series: dict[str, Series] = {}
    for place, files in walk_folders(Path(folder), findings, leave_out):
        for one in series_of(place, files, findings):
            other = series.setdefault(one.name, one)
            if other is not one:
                what = f"{other.folder} and {one.folder} hold files of one series, number {one.number}"
                raise DataError(f"{what}: move the slices into one folder, or take copies out")
    return [series[name] for name in sorted(series)], findings


def one_file(path: Path) -> Source:
    """A single NIfTI file; that it can be read is seen later."""
    if path.exists() and not path.name.endswith(ENDINGS):
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


def walk(top: Path, findings: list[Finding], leave_out: str | os.PathLike[str] | None) -> Iterator[Source]:
    """Scans below a folder."""
    for here, files in walk_folders(top, findings, leave_out):
        relative = here.relative_to(top)
        images = images_beside(here) if here != top else None
        if images is not None:
            used = set(labels_of_scans(list_scans(images), list_scans(here)).values())
            findings += [orphan(path) for path in list_scans(here) if path not in used]
            continue
        scans, others = list_scans(here), labels_beside(here) if here != top else None
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
        yield from dicom_sources(here, relative, series_of(here, files, findings))


def series_of(folder: Path, files: list[str], findings: list[Finding]) -> list[Series]:
    """DICOM series of a folder with these files; what is wrong with it is added to the findings."""
    if not any(has_dicom(folder / file) for file in files if not file.startswith(".") and not file.endswith(ENDINGS)):
        return []
    try:
        return list_series(folder)
    except MAPSegError as error:
        findings += findings_of(error)
        return []


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
    result, used = [], set()
    for source in sources:
        if isinstance(source.image, Path) and source.image.resolve() in known:
            continue  # labels lie below the input
        label = label_of(Path(source.name).name, maps)
        if label is None:
            result.append(Source(f"{IMAGES}/{source.name}", source.image))
        else:
            used.add(label)
            name = (Path(source.name).parent / stem(label)).as_posix()
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
