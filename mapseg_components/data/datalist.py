# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Cases of a datalist file or a folder. The training cases of the target have no label key at all.

A datalist is a JSON file in MONAI's decathlon style::

    {
        "labels": {"0": "background", "1": "hippocampus"},
        "source_training": [{"image": "t1/a.nii.gz", "label": "labels/a.nii.gz", "domain": "site 1"}],
        "source_validation": [{"image": "t1/b.nii.gz", "label": "labels/b.nii.gz"}],
        "target_training": [{"image": "t2/c.nii.gz"}],
        "target_test": [{"image": "t2/d.nii.gz", "label": "labels/d.nii.gz"}]
    }

A source of label maps alone, from which images are synthesised, has ``"source_label_maps": true``, and its cases name a
``label`` without an image; ``tissues`` may name a label map of more values, from which images are made instead. A case
of ``source_validation`` may have an ``image``, which is read as it is.

Paths are relative to the file's folder. ``domain``, ``case_id`` and ``mask`` are optional; a mask is a file on the
scan's grid, 0 where nothing counts. Scans are NIfTI files, or 2D images as PNG or TIFF, where ``a_mask`` beside ``a``
is its mask. ``target_labelled`` names target scans with the pseudo labels that self-training learns from. A folder
works as well::

    source/images/*.nii.gz      source/labels/<same name>
    validation/images/...       validation/labels/...
    target/images/...
    test/images/...             test/labels/...

with one more level, ``source/<domain>/images``, for several domains; a case id is then ``<domain>_<name>``. Folders and
``dataset.json`` of nnU-Net and of the Medical Segmentation Decathlon are understood as a source, see `layouts`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data.layouts import DATASET, dataset_content, decathlon_content, labels_of_scans, masks_among
from mapseg_components.data.tissues import LABEL_MAPS, is_alone, with_tissues
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import CASE_ID, DOMAIN, IMAGE, LABEL, MASK, TISSUES
from mapseg_components.scans.files import is_picture, scans_among, stem
from mapseg_components.scans.findings import Finding, findings_of, raise_findings
from mapseg_components.scans.masks import mask_beside

__all__ = ["SECTIONS", "load_datalist", "load_images", "load_scans", "tissue_is_known"]

logger = logging.getLogger(__name__)

# section of a datalist: folder of the folder convention
SECTIONS = {
    "source_training": "source",
    "source_validation": "validation",
    "target_training": "target",
    "target_heldout": "heldout",
    "target_labelled": "pseudo",
    "target_test": "test",
}
MOST_FOLDERS = 200  # searched for the text of an error
WITHOUT_LABELS = ("target_training", "target_heldout")
# what is added to a case id when its results are written, and what a file system allows for a name
LONGEST_NAME_BYTES = 255 - len(".._reconstruction.nii.gz.12345678.tmp")


def load_datalist(datalist: str | Path, section: str) -> list[dict[str, Any]]:
    """Cases of one section. No scan is opened, and other sections are not checked.

    Args:
        datalist: a JSON file, or a folder in the convention above.
        section: one of `SECTIONS`.

    Returns:
        one dictionary per case: ``image`` and ``label`` (absolute paths; no label key in ``target_training``),
        ``case_id``, and ``domain`` if there are several.

    Raises:
        ConfigError: the section is unknown, empty, or the file or folder does not have it.
        DataError: an entry lacks its image or label, or a case id is no safe file name; all of them, one per line.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from mapseg_components.data import load_datalist
        >>> content = {"target_training": [{"image": "t2/c.nii.gz"}, {"image": "t2/d.nii.gz", "case_id": "d-2"}]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "datalist.json").write_text(json.dumps(content))
        ...     cases = load_datalist(f"{folder}/datalist.json", "target_training")
        >>> [case["case_id"] for case in cases], sorted(cases[0])
        (['c', 'd-2'], ['case_id', 'image'])
    """
    cases, findings = read_section(datalist, section)
    raise_findings(findings)
    return cases


def read_section(datalist: str | Path, section: str) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Valid cases of one section, and findings on the others. Raises `ConfigError` as `load_datalist`."""
    if section not in SECTIONS:
        raise ConfigError(f"section {section!r} is unknown, expected one of {sorted(SECTIONS)}")
    content, path = open_datalist(datalist), Path(datalist)
    findings: list[Finding] = []
    if content is None:
        origin = str(path / SECTIONS[section])
        try:
            entries = entries_of_folder(path / SECTIONS[section], section not in WITHOUT_LABELS, findings)
        except OSError as error:
            raise ConfigError(f"{origin} cannot be listed ({error}): allow reading it") from error
    else:
        origin = f"{path}, {section!r}"
        if section not in content:
            raise ConfigError(f"{path} has no {section!r}: add this list (it has {sorted(content)})")
        entries = content[section]
    if not isinstance(entries, list) or not (entries or findings):
        raise ConfigError(f"{origin} is empty: list at least one scan")
    cases = []
    without_images = bool(content and content.get(LABEL_MAPS)) and section.startswith("source_")
    for number, entry in enumerate(entries):
        try:
            place = f"{origin}, entry {number}"
            alone = without_images and is_alone(entry, section, place)
            case = case_of_entry(with_tissues(entry) if alone else entry, path, section, place, alone)
            cases.append({**case, TISSUES: case[IMAGE]} if alone else case)
        except DataError as error:
            findings += findings_of(error)
    return cases, findings


def has_label_maps(datalist: str | Path) -> bool:
    """Whether a datalist says that its source is label maps alone. Raises `ConfigError` if there is no datalist."""
    return bool((open_datalist(datalist) or {}).get(LABEL_MAPS))


def has_section(datalist: str | Path, section: str) -> bool:
    """Whether a datalist names a section at all. Raises `ConfigError` if there is no datalist."""
    content = open_datalist(datalist)
    return (Path(datalist) / SECTIONS[section]).is_dir() if content is None else section in content


def all_targets(datalist: str | Path) -> list[dict[str, Any]]:
    """Target cases of a run's datalist, adapted on and held out."""
    held = load_datalist(datalist, "target_heldout") if has_section(datalist, "target_heldout") else []
    return [*load_datalist(datalist, "target_training"), *held]


def tissue_is_known(datalist: str | Path, given: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> bool:
    """Whether 0 is no tissue in all target scans of a training: each is a PNG or TIFF image, or has a mask.

    Args:
        datalist: see `load_datalist`.
        given: cases that a client gave in its place, see `given_cases`.

    Examples:
        >>> from mapseg_components.data import tissue_is_known
        >>> target = [{"image": "a.png"}, {"image": "b.nii.gz", "mask": "b_mask.nii.gz"}]
        >>> tissue_is_known("", {"target_training": target})
        True
    """
    if given is None:
        known = has_section(datalist, "target_training")
        cases: Sequence[Mapping[str, Any]] = load_datalist(datalist, "target_training") if known else ()
    else:
        cases = given.get("target_training", ())
    return bool(cases) and all(is_picture(case[IMAGE]) or MASK in case for case in cases)


def open_datalist(datalist: str | Path) -> dict[str, Any] | None:
    """Content of a datalist file, or of a folder of nnU-Net or the Decathlon; ``None`` for a folder of another layout.

    Raises `ConfigError`.
    """
    if not datalist:
        raise ConfigError("no datalist given: set datalist to a JSON file, or to a folder with source/ and target/")
    path = Path(datalist)
    try:
        if path.is_dir():
            own = any((path / folder).is_dir() for folder in SECTIONS.values())
            return None if own else dataset_content(path)
        if path.is_file():
            content = read_json(path)
            if any(section in content for section in SECTIONS) or (path.name != DATASET and "training" not in content):
                return content
            return decathlon_content(content, path.parent) or content
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be opened ({error}): correct datalist, or allow reading it") from error
    raise ConfigError(f"no datalist at {path}: set datalist to a JSON file, or to a folder with source/ and target/")


def labels_file(datalist: str | Path) -> Path | None:
    """The file that names structures: the datalist, or ``datalist.json`` or ``dataset.json`` of a folder; or none."""
    path = Path(datalist)
    candidates = [path / "datalist.json", path / DATASET] if path.is_dir() else [path]
    return next((one for one in candidates if one.is_file() and isinstance(read_json(one).get("labels"), dict)), None)


def load_images(datalist: str | Path, sections: Sequence[str]) -> list[dict[str, Any]]:
    """Cases of several sections without their labels, each section a separate domain (or several), for pretraining.

    Args:
        datalist: see `load_datalist`.
        sections: of `SECTIONS`.

    Raises:
        ConfigError: as `load_datalist`.
        DataError: as `load_datalist`.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from mapseg_components.data import load_images
        >>> content = {"source_training": [{"image": "a.nii.gz", "label": "labels/a.nii.gz", "domain": "site 1"}]}
        >>> content["target_training"] = [{"image": "c.nii.gz"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = Path(folder, "datalist.json").write_text(json.dumps(content))
        ...     cases = load_images(f"{folder}/datalist.json", ["source_training", "target_training"])
        >>> [case["domain"] for case in cases], "label" in cases[0]
        (['source_training site 1', 'target_training'], False)
    """
    cases = []
    for section in sections:
        for case in load_datalist(datalist, section):
            case.pop(LABEL, None)
            cases.append({**case, DOMAIN: f"{section} {case.get(DOMAIN, '')}".strip()})
    return cases


def load_scans(folder: str | Path) -> list[dict[str, Any]]:
    """Every scan of a folder (or one scan) as a case, for inference; empty if there is none.

    Args:
        folder: a folder, whose hidden files are left out, or a file.

    Returns:
        one dictionary per scan, in order of their names: ``image`` (absolute path), ``case_id``, and ``mask`` if one
        lies beside a PNG or TIFF image.

    Raises:
        ConfigError: the folder cannot be listed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from mapseg_components.data import load_scans
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.nii.gz", "a.nii", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [case["case_id"] for case in load_scans(folder)]
        ['a', 'b']
    """
    path = Path(folder)
    try:
        scans = [path] if path.is_file() else list_scans(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be listed ({error}): correct dataset_dir, or allow reading it") from error
    return [with_mask({IMAGE: str(scan.absolute()), CASE_ID: stem(scan)}) for scan in scans]


def with_mask(case: dict[str, Any]) -> dict[str, Any]:
    """The case, with the ``mask`` that lies beside its image, if it names none."""
    found = None if MASK in case else mask_beside(case[IMAGE])
    return case if found is None or str(found) == case.get(LABEL) else {**case, MASK: str(found)}


def scans_below(folder: str | Path) -> str:
    """For the error of a folder without scans: a sub-folder that has some, if it is found quickly; else empty."""
    for place, folders, files in itertools.islice(os.walk(folder), MOST_FOLDERS):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count = len(scans_among(files))
        if count and place != str(folder):
            return f" itself, but its sub-folder {os.path.relpath(place, folder)} has {count}"
    return ""


def list_scans(folder: Path, without: tuple[str, ...] = ()) -> list[Path]:
    """NIfTI files of a folder by name, or its PNG and TIFF images; hidden files and masks of images are left out.

    Images beside NIfTI files are no scans, see `mapseg_components.scans.files.scans_among`.
    ``without`` are ends of names, without ending, of files to leave out.
    """
    if not folder.is_dir():
        return []
    names = sorted(p.name for p in folder.iterdir() if not stem(p).endswith(without))
    names = scans_among(names)
    masks = masks_among(names)
    return [folder / name for name in names if name not in masks]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid JSON ({error}): correct the datalist") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, expected an object with lists such as source_training"
        )
    return content


def entries_of_folder(folder: Path, with_labels: bool, findings: list[Finding]) -> list[dict[str, str]]:
    """Entries of ``folder/images`` and ``folder/labels``, or of each ``folder/<domain>`` that has them.

    With several domains a case id is ``<domain>_<name>``, since sites may use the same names. A scan without a label
    map, or the reverse, is added to ``findings``.
    """
    if (folder / "images").is_dir():
        domains = {"": folder}
    elif folder.is_dir():
        domains = {sub.name: sub for sub in sorted(folder.iterdir()) if (sub / "images").is_dir()}
    else:
        raise ConfigError(f"{folder} does not exist: put scans into {folder / 'images'}")
    entries = []
    for domain, place in domains.items():
        scans, labels = list_scans(place / "images"), list_scans(place / "labels") if with_labels else []
        maps = labels_of_scans(scans, labels)
        if with_labels:
            findings += unpaired(place, set(scans) - set(maps), set(labels) - set(maps.values()))
        for scan in scans:
            entry = {IMAGE: str(scan)}
            if with_labels:
                if scan not in maps:
                    continue
                entry[LABEL] = str(maps[scan])
            if domain:
                entry |= {DOMAIN: domain, CASE_ID: f"{domain}_{stem(scan)}"}
            entries.append(entry)
    return entries


def unpaired(place: Path, scans: set[Path], labels: set[Path]) -> list[Finding]:
    """One finding for scans of ``place/images`` without a label map in ``place/labels``, one for the reverse."""
    what = [
        (place / "images", scans, f"scans without a label map of the same name in {place / 'labels'}"),
        (place / "labels", labels, f"label maps without a scan of the same name in {place / 'images'}"),
    ]
    return [
        Finding(
            "error",
            str(folder),
            f"{text}: {', '.join(sorted(one.name for one in files))}",
            "add what is missing, or move them away",
        )
        for folder, files, text in what
        if files
    ]


def case_of_entry(entry: Any, datalist: Path, section: str, origin: str, label_map: bool = False) -> dict[str, Any]:
    """One checked case with absolute paths."""
    if not isinstance(entry, dict) or not isinstance(entry.get(IMAGE), str):
        raise DataError(f"{origin}: expected an object with {IMAGE!r}, found {entry!r}")
    base = datalist if datalist.is_dir() else datalist.parent
    keys = [IMAGE]
    if section in WITHOUT_LABELS:
        if LABEL in entry:
            logger.warning(f"{origin} names a label; target labels are never read in training, it is left out.")
    else:
        keys.append(LABEL)
    case: dict[str, Any] = {}
    for key in keys:
        if not isinstance(entry.get(key), str):
            raise DataError(f"{origin}: {key!r} is missing for {entry[IMAGE]}: name it, or leave the case out")
        # absolute paths stay; relative ones are below the datalist (or, from a folder, already begin with it)
        case[key] = str((Path(entry[key]) if datalist.is_dir() else base / entry[key]).absolute())
    if isinstance(entry.get(MASK), str):
        case[MASK] = str((Path(entry[MASK]) if datalist.is_dir() else base / entry[MASK]).absolute())
    elif MASK in entry:
        raise DataError(f"{origin}: {MASK!r} is {entry[MASK]!r}: name the file of a mask, 0 where nothing counts")
    if case.get(LABEL) == case[IMAGE] and not label_map:
        raise DataError(f"{origin}: {case[IMAGE]} is named as image and as label: name its label map")
    case_id = entry.get(CASE_ID)
    case[CASE_ID] = stem(Path(entry[IMAGE])) if case_id in (None, "") else str(case_id)
    composed = unicodedata.normalize("NFC", case[CASE_ID])  # a letter and its accent may come as two characters
    if not re.fullmatch(r"[\w][\w.\- ]*", composed) or ".." in composed:
        raise DataError(
            f"{origin}: case id {case[CASE_ID]!r} cannot name a file: use letters, digits, '.', '_', '-' "
            "(rename the file, or set case_id)"
        )
    if len(os.fsencode(case[CASE_ID])) > LONGEST_NAME_BYTES:
        raise DataError(
            f"{origin}: case id {case[CASE_ID]!r} has {len(os.fsencode(case[CASE_ID]))} bytes, "
            f"results can be named by {LONGEST_NAME_BYTES}: set a shorter case_id"
        )
    if entry.get(DOMAIN):
        case[DOMAIN] = str(entry[DOMAIN])
    return with_mask(case)
