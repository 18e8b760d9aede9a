# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From a datalist file or a folder to cases. The target's training side has no label key at all.

A datalist is a JSON file in MONAI's decathlon style::

    {
        "labels": {"0": "background", "1": "hippocampus"},
        "source_training": [{"image": "t1/a.nii.gz", "label": "labels/a.nii.gz", "domain": "site 1"}],
        "source_validation": [{"image": "t1/b.nii.gz", "label": "labels/b.nii.gz"}],
        "target_training": [{"image": "t2/c.nii.gz"}],
        "target_test": [{"image": "t2/d.nii.gz", "label": "labels/d.nii.gz"}]
    }

Paths are relative to the file's folder. ``domain`` and ``case_id`` are optional. A folder works as well::

    source/images/*.nii.gz      source/labels/<same name>
    validation/images/...       validation/labels/...
    target/images/...
    test/images/...             test/labels/...

with one more level, ``source/<domain>/images``, for several domains.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import CASE_ID, DOMAIN, IMAGE, LABEL

__all__ = ["SECTIONS", "load_datalist", "load_images", "load_scans"]

logger = logging.getLogger(__name__)

# section of a datalist: folder of the folder convention
SECTIONS = {
    "source_training": "source",
    "source_validation": "validation",
    "target_training": "target",
    "target_test": "test",
}
WITHOUT_LABELS = ("target_training",)
ENDINGS = (".nii.gz", ".nii")


def load_datalist(datalist: str | Path, section: str) -> list[dict[str, Any]]:
    """Cases of one section. No scan is opened, and nothing of another section is looked at.

    Args:
        datalist: a JSON file, or a folder in the convention above.
        section: one of `SECTIONS`.

    Returns:
        one dictionary per case: ``image`` and ``label`` (absolute paths; no label key in ``target_training``),
        ``case_id``, and ``domain`` if there are several.

    Raises:
        ConfigError: the section is unknown, or the file or folder does not have it.
        DataError: the list is empty, an entry lacks its image or label, or a case id is no safe file name.
    """
    if section not in SECTIONS:
        raise ConfigError(f"section {section!r} is unknown, expected one of {sorted(SECTIONS)}")
    if not datalist:
        raise ConfigError("no datalist given: set datalist to a JSON file, or to a folder with source/ and target/")
    path = Path(datalist)
    if path.is_dir():
        entries = entries_of_folder(path / SECTIONS[section], with_labels=section not in WITHOUT_LABELS)
        origin = str(path / SECTIONS[section])
    elif path.is_file():
        content = read_json(path)
        if section not in content:
            raise ConfigError(f"{path} has no {section!r}: add this list (it has {sorted(content)})")
        entries, origin = content[section], f"{path}, {section!r}"
    else:
        raise ConfigError(
            f"no datalist at {path}: set datalist to a JSON file, or to a folder with source/ and target/"
        )
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{origin} is empty: list at least one scan")
    return [case_of_entry(entry, path, section, f"{origin}, entry {number}") for number, entry in enumerate(entries)]


def load_images(datalist: str | Path, sections: Sequence[str]) -> list[dict[str, Any]]:
    """Cases of several sections without their labels, each section a domain of its own (or several)."""
    cases = []
    for section in sections:
        for case in load_datalist(datalist, section):
            case.pop(LABEL, None)
            cases.append({**case, DOMAIN: f"{section} {case.get(DOMAIN, '')}".strip()})
    return cases


def load_scans(folder: str | Path) -> list[dict[str, Any]]:
    """Every NIfTI scan of a folder (or one scan) as a case, for inference; empty if there is none."""
    path = Path(folder)
    scans = [path] if path.is_file() else list_scans(path)
    return [{IMAGE: str(scan.absolute()), CASE_ID: stem(scan)} for scan in scans]


def stem(scan: Path) -> str:
    """File name without its NIfTI ending."""
    return re.sub(r"\.nii(\.gz)?$", "", scan.name)


def list_scans(folder: Path) -> list[Path]:
    """NIfTI files of a folder by name; hidden ones are left out."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid JSON ({error}): correct the datalist") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, expected an object with lists such as source_training"
        )
    return content


def entries_of_folder(folder: Path, with_labels: bool) -> list[dict[str, str]]:
    """Entries of ``folder/images`` and ``folder/labels``, or of each ``folder/<domain>`` that has them."""
    if (folder / "images").is_dir():
        domains = {"": folder}
    elif folder.is_dir():
        domains = {sub.name: sub for sub in sorted(folder.iterdir()) if (sub / "images").is_dir()}
    else:
        raise ConfigError(f"{folder} does not exist: put scans into {folder / 'images'}")
    entries = []
    for domain, place in domains.items():
        for scan in list_scans(place / "images"):
            entry = {IMAGE: str(scan)}
            if with_labels:
                entry[LABEL] = str(place / "labels" / scan.name)
            if domain:
                entry[DOMAIN] = domain
            entries.append(entry)
    return entries


def case_of_entry(entry: Any, datalist: Path, section: str, origin: str) -> dict[str, Any]:
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
    if case.get(LABEL) == case[IMAGE]:
        raise DataError(f"{origin}: {case[IMAGE]} is named as image and as label: name its label map")
    case_id = entry.get(CASE_ID)
    case[CASE_ID] = stem(Path(entry[IMAGE])) if case_id in (None, "") else str(case_id)
    if not re.fullmatch(r"[\w][\w.\- ]*", case[CASE_ID]) or ".." in case[CASE_ID]:
        raise DataError(f"{origin}: case id {case[CASE_ID]!r} cannot name a file: use letters, digits, '.', '_', '-'")
    if entry.get(DOMAIN):
        case[DOMAIN] = str(entry[DOMAIN])
    return case
