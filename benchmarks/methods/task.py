# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A task: labelled source scans, unlabelled target scans, and labelled test scans that nobody trains on."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mapseg_components.commands.adapt import adapt
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import labels_file, list_scans, with_mask
from mapseg_components.data.layouts import labels_of_scans
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.keys import MASK
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.masks import MASK as MASK_OF
from mapseg_components.scans.pixel_size import pixel_size_of
from mapseg_components.structures import structures_of

__all__ = ["ENDINGS", "Inputs", "Task", "read_task", "stem_of", "write_inputs"]

Case = dict[str, str]
KEYS = {
    "name", "title", "data", "datalist", "labels", "source", "validation", "target", "test", "oracle",
    "oracle_validation", "arguments", "settings", "tolerance_mm",
}  # fmt: skip
# part of a task: section of a datalist that it is, if the task names one
SECTIONS = {
    "source": "source_training",
    "validation": "source_validation",
    "target": "target_training",
    "test": "target_test",
}
ENDINGS = (".nii.gz", ".nii", ".png", ".tif", ".tiff")
FILES = ("image", "label", MASK)
LABELLED = ("source", "validation", "test", "oracle", "oracle_validation")
NEEDED = ("source", "target", "test")
# what the benchmark says itself, and what would change the scans
OWN = {
    "source", "target", "output", "labels", "method", "settings", "length", "seed", "num_threads", "quiet", "verbose",
    "prepare",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a task file says, with absolute paths.

    Args:
        name: of its folder of results.
        title: one line for tables.
        labels: structure to value.
        parts: source, validation, target, test, oracle, oracle_validation: cases with ``image``, ``case_id``, but for
            the target ``label``, and ``mask`` where there is one.
        arguments: of ``mapseg adapt``, the same for all methods.
        settings: of its ``--settings``, the same for all methods.
        tolerance_mm: of the surface Dice.
    """

    name: str
    title: str
    labels: dict[str, int]
    parts: dict[str, list[Case]]
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance_mm: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """Files that a task gives to commands.

    Args:
        datalist: source and target of every method; no label of the target is in it.
        oracle: labelled target scans as its source, and the source's scans as those that are not learnt from, so that
            the same scans are planned for; or ``None``.
        images: folder of the test scans, named by case.
        truth: their label maps.
        target_truth: label maps of target scans, as far as the oracle has them; a folder, or ``None``.
    """

    datalist: Path
    oracle: Path | None
    images: Path
    truth: Path
    target_truth: Path | None


def read_task(path: Path, data: Path | None = None) -> Task:
    """Read and check a task file (YAML or JSON).

    Args:
        path: the file. Its paths are relative to ``data``.
        data: by default what the file says, relative to the file; without, the file's folder.

    Raises:
        ConfigError: the file is no task, or an entry is of another form than expected.
        DataError: files are missing, or a test scan is among those that are trained on; all of them, one a line.
    """
    content = read_mapping_file(path)
    unknown = sorted(set(content) - KEYS)
    if unknown:
        near = difflib.get_close_matches(unknown[0], KEYS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{path} has {unknown}{hint}, expected keys among {sorted(KEYS)}")
    base = (path.parent / str(content.get("data", "."))).resolve() if data is None else data.resolve()
    if not base.is_dir():
        raise ConfigError(f"{path}: the folder of the scans, {base}, does not exist: name it by data (make: DATA=)")
    datalist = content.get("datalist")
    for name, section in SECTIONS.items():
        if datalist is not None and name not in content and section in read_mapping_file(base / str(datalist)):
            content[name] = {"datalist": datalist, "section": section}
    missing = [name for name in NEEDED if not content.get(name)]
    if missing:
        raise ConfigError(f"{path} has no {' and no '.join(missing)}: name these scans")
    parts = {
        name: cases_of(content[name], base, f"{path}, {name}", name in LABELLED)
        for name in (*SECTIONS, "oracle", "oracle_validation")
        if content.get(name)
    }
    name = str(content.get("name", path.stem))
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{path}: name is {name!r}, expected letters, digits, '_' and '-' alone, for a folder")
    task = Task(
        name=name,
        title=str(content.get("title", name.replace("_", " "))),
        labels=labels_of(content, base, path),
        parts=parts,
        arguments=checked_arguments(content.get("arguments") or {}, path),
        settings=mapping_of(content.get("settings") or {}, f"{path}, settings"),
        tolerance_mm=checked_tolerance(content.get("tolerance_mm", 1.0), path),
    )
    check_files(task, path)
    return task


def read_mapping_file(path: Path) -> dict[str, Any]:
    """Content of a YAML or JSON file that is a mapping. Raises `ConfigError`."""
    try:
        return mapping_of(yaml.safe_load(path.read_text(encoding="utf-8-sig")), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name a task file, YAML or JSON") from error


def stem_of(file: str | Path) -> str:
    """Name of a file without the ending of an image."""
    name = Path(file).name
    return name[: len(name) - len(next((one for one in ENDINGS if name.lower().endswith(one)), ""))]


def mapping_of(content: Any, origin: str) -> dict[str, Any]:
    """The content, if it is a mapping. Raises `ConfigError`."""
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} is a {type(content).__name__}, expected names with values")
    return content


def cases_of(content: Any, base: Path, origin: str, labelled: bool) -> list[Case]:
    """Cases of one part of a task, in one of the forms of docs/reference/benchmark.md. Raises `ConfigError`."""
    if isinstance(content, dict) and "datalist" in content:
        cases = load_datalist(base / str(content["datalist"]), str(content.get("section", "source_training")))
        entries: list[Any] = [dict(case) for case in cases]
    elif isinstance(content, dict):
        entries = entries_of_folders(content, base, origin, labelled)
    elif isinstance(content, list):
        entries = content
    else:
        raise ConfigError(f"{origin} is a {type(content).__name__}, expected a list of cases, folders or a datalist")
    found = []
    for number, entry in enumerate(entries):
        given = {"image": entry} if isinstance(entry, str) else entry
        keys = ("image", "label") if labelled else ("image",)
        lacking = [key for key in keys if not isinstance(given, dict) or not isinstance(given.get(key), str)]
        if lacking:
            raise ConfigError(f"{origin}, entry {number} is {entry!r}, expected {' and '.join(keys)}, each a path")
        case = {key: str((base / given[key]).absolute()) for key in keys}
        named = {MASK: str((base / given[MASK]).absolute())} if given.get(MASK) else {}
        case = with_mask(case | named)
        found.append(case | {"case_id": str(given.get("case_id") or stem_of(given["image"]))})
    unsafe = [case["case_id"] for case in found if not re.fullmatch(r"\w[\w.\- ]*", case["case_id"])]
    if unsafe:
        raise ConfigError(f"{origin}: case id {unsafe[0]!r} cannot name a file: use letters, digits, '.', '_' and '-'")
    twice = [name for name, count in Counter(case["case_id"] for case in found).items() if count > 1]
    if twice:
        raise ConfigError(f"{origin} has several cases {twice[0]!r}: set case_id")
    return found


def entries_of_folders(content: Mapping[str, Any], base: Path, origin: str, labelled: bool) -> list[Case]:
    """Cases of a folder of images and one of label maps, those that ``cases`` names or all. Raises `ConfigError`."""
    unknown = sorted(set(content) - {"images", "labels", "cases"})
    needed = {"images", "labels"} if labelled else {"images"}
    if unknown or not needed <= set(content):
        raise ConfigError(f"{origin} has {sorted(content)}, expected {sorted(needed)} and perhaps cases")
    scans = list_scans(base / str(content["images"]))
    maps = labels_of_scans(scans, list_scans(base / str(content["labels"]))) if labelled else {}
    chosen = None if content.get("cases") is None else [str(name) for name in content["cases"]]
    by_name = {stem_of(scan): scan for scan in scans}
    absent = sorted(set(chosen or []) - set(by_name))
    if absent or not scans:
        raise ConfigError(f"{base / str(content['images'])} has no scan {absent or 'at all'}: correct {origin}")
    kept = scans if chosen is None else [by_name[name] for name in chosen]
    without = [str(scan) for scan in kept if labelled and scan not in maps]
    if without:
        raise ConfigError(f"{origin}: no label map of {without[0]} in {content['labels']}: add it, or leave it out")
    return [{"image": str(scan), **({"label": str(maps[scan])} if labelled else {})} for scan in kept]


def labels_of(content: Mapping[str, Any], base: Path, path: Path) -> dict[str, int]:
    """Structures and values: a mapping, a JSON file with ``labels``, or those of the datalist. Raises `ConfigError`."""
    given = content.get("labels", content.get("datalist"))
    if isinstance(given, str):
        named = labels_file(str(base / given))
        if named is None:
            raise ConfigError(f"{path}: {base / given} names no labels: add labels to the task")
        given = read_mapping_file(named)["labels"]
    return structures_of(mapping_of(given, f"{path}, labels"), f"{path}, labels")


def checked_arguments(given: Any, path: Path) -> dict[str, Any]:
    """Arguments of ``mapseg adapt`` that a task may set. Raises `ConfigError`."""
    known = set(inspect.signature(adapt).parameters) - OWN
    wrong = sorted(set(mapping_of(given, f"{path}, arguments")) - known)
    if wrong:
        raise ConfigError(f"{path}, arguments has {wrong}, expected those of mapseg adapt among {sorted(known)}")
    return given


def checked_tolerance(value: Any, path: Path) -> float:
    """Tolerance in mm. Raises `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"{path}: tolerance_mm is {value!r}, expected a number from 0, in mm")
    return float(value)


def check_files(task: Task, path: Path) -> None:
    """Refuse files that are missing, and test scans or label maps that training would see.

    A scan is known again by its path, and by its content.

    Raises `DataError`.
    """
    files = [case[key] for cases in task.parts.values() for case in cases for key in FILES if key in case]
    missing = sorted({file for file in files if not Path(file).is_file()})
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"{path}: missing {', '.join(missing[:5])}{more}: correct the paths, or data (make: DATA=)")
    names = Counter(stem_of(case["image"]) for case in task.parts["target"])
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise DataError(
            f"{path}: several target scans are files named {twice[0]!r}: rename them, for label maps of them"
        )
    sizes: dict[int, list[tuple[str, Case]]] = {}
    for name, cases in task.parts.items():
        for case in cases if name != "test" else ():
            sizes.setdefault(Path(case["image"]).stat().st_size, []).append((name, case))
    seen = []
    for case in task.parts["test"]:
        size = Path(case["image"]).stat().st_size
        for name, other in sizes.get(size, []):
            if os.path.samefile(case["image"], other["image"]) or sha256_of(case["image"]) == sha256_of(other["image"]):
                seen.append(f"{case['image']} is {other['image']} of {name}")
    if seen:
        raise DataError(f"{path}: test scans that are trained on: {'; '.join(seen)}: take them out of one of the two")


def write_inputs(task: Task, folder: Path) -> Inputs:
    """Write what the commands of a task read: datalists, and folders of links to the test scans and label maps.

    Args:
        task: see `read_task`.
        folder: to write; what was there is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    labels = {"0": "background", **{str(value): name for name, value in task.labels.items()}}
    source, target, oracle = (task.parts.get(name) for name in ("source", "target", "oracle"))

    def datalist(name: str, training: Sequence[Case], validation: Sequence[Case] | None, other: Sequence[Case]) -> Path:
        sections = {"source_training": training, **({"source_validation": validation} if validation else {})}
        unlabelled = [{key: value for key, value in case.items() if key != "label"} for case in other]
        write_json({"labels": labels, **sections, "target_training": unlabelled}, folder / name)
        return folder / name

    for case in task.parts["test"]:
        for key, place in (("image", "images"), ("label", "labels")):
            link(case[key], folder / "test" / place, case["case_id"])
            if is_picture(case["image"]):  # what is known of an image stands beside it
                describe(case, folder / "test" / place)
    labelled = [*(oracle or []), *task.parts.get("oracle_validation", [])]
    known = {os.path.realpath(case["image"]): case["label"] for case in labelled}
    found = [(known.get(os.path.realpath(case["image"])), case) for case in target or []]
    truth = [(label, case) for label, case in found if label is not None]
    for label, case in truth:
        link(label, folder / "target_labels", stem_of(case["image"]))
    return Inputs(
        datalist=datalist("datalist.json", source or [], task.parts.get("validation"), target or []),
        oracle=datalist("oracle.json", oracle, task.parts.get("oracle_validation"), source or []) if oracle else None,
        images=folder / "test" / "images",
        truth=folder / "test" / "labels",
        target_truth=folder / "target_labels" if truth else None,
    )


def describe(case: Case, folder: Path) -> None:
    """Put the mask and the pixel size of an image beside its link."""
    if MASK in case:
        link(case[MASK], folder, f"{case['case_id']}{MASK_OF}")
    sides, _ = pixel_size_of(Path(case["image"]), stem_of(case["image"]), None)  # that of its header it keeps
    if sides is not None:
        write_json({"PixelSize": [*sides], "PixelSizeUnits": "mm"}, folder / f"{case['case_id']}.json")


def link(file: str, folder: Path, name: str) -> None:
    """Put a file into a folder under another name: a link, or a copy where links cannot be made.

    Raises `DataError` if another file has that name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}{Path(file).name[len(stem_of(file)) :]}"
    if place.is_symlink() or place.exists():  # a copy would go into the file that a link names
        raise DataError(f"{file} and another file are both {name!r} of a task: rename one of them")
    try:
        place.symlink_to(Path(file).absolute())
    except OSError:
        shutil.copyfile(file, place)


def as_json(task: Task) -> dict[str, Any]:
    """What results depend on, for a file."""
    return json.loads(json.dumps(vars(task)))
