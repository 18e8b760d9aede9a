# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Task files from a file of splits: a JSON object of task to labels, source and target, as in

    {"t1_to_t2": {"labels": {"1": "hippocampus"},
                  "source": {"image": "T1", "label": "label", "train": ["01", "02"], "validation": ["15"]},
                  "target": {"image": "T2", "train": "patients 03-09 (labels never used)", "test": ["20"]}}}

python -m benchmarks.methods.splits SPLITS --data DIR --output TASKS [--hold_out 2]

``image`` and ``label`` are folders below DIR, or patterns such as ``scans/*_T1`` whose star is the name of a case;
without ``label``, the label map of ``a.png`` is ``a_label.png`` beside it. Cases are listed by name, or are "all", or a
range of numbers behind a word of the file names. ``labels`` may be "as above". A remark in brackets is left out.

The test cases of a task are ``target``'s ``test``; else its ``validation``; else the target's scans of the people of
the source's validation, by their names; else the last --hold_out of its training cases, which are taken out of
training. Label maps of target training cases are for the oracle and the check of estimates alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.task import ENDINGS, read_mapping_file, stem_of
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import write_json
from mapseg_components.structures import structures_of

__all__ = ["task_of", "tasks_of"]

LABEL_MAP = re.compile(r"_(label|labels|seg|mask|dseg)$")
RANGE = re.compile(r"([A-Za-z]+?)s? 0*(\d+) ?- ?0*(\d+)")


def tasks_of(splits: Mapping[str, Any], data: Path, hold_out: int) -> dict[str, dict[str, Any]]:
    """Name to content of a task file, for each task.

    Args:
        splits: see above.
        data: folder of the scans.
        hold_out: training cases of the target that become the test where nothing else is.

    Raises:
        ConfigError: a task is of another form, or a case has no file.
    """
    found: dict[str, dict[str, Any]] = {}
    labels: Any = None
    for name, split in splits.items():
        if not isinstance(split, dict) or not {"source", "target"} <= set(split):
            raise ConfigError(f"{name}: expected an object with labels, source and target")
        given = split.get("labels", "as above")
        labels = labels if given == "as above" else given
        if not isinstance(labels, dict):
            raise ConfigError(f"{name}: labels is {given!r}, expected structures with values")
        found[name] = task_of(name, {**split, "labels": labels}, data, hold_out)
    return found


def task_of(name: str, split: Mapping[str, Any], data: Path, hold_out: int) -> dict[str, Any]:
    """Content of one task file. Args and raises: see `tasks_of`."""
    source, target = split["source"], split["target"]
    training = files_of(source, "train", data, name)
    validation = files_of(source, "validation", data, name) if source.get("validation") else []
    adapted_on, remark = files_of(target, "train", data, name), ""
    if target.get("test"):
        test = files_of(target, "test", data, name)
    elif target.get("validation"):
        test = files_of(target, "validation", data, name)
    else:
        everyone = files_of({**target, "train": "all"}, "train", data, name)
        names = {key for key, _ in validation}
        test = [(key, file) for key, file in everyone if key in names and (key, file) not in adapted_on]
        remark = " (test: people whose source scans choose weights)" if test else f" (test: {hold_out} held out)"
        if not test:
            adapted_on, test = adapted_on[:-hold_out], adapted_on[-hold_out:]
    if not adapted_on or not test:
        raise ConfigError(f"{name}: no target scan is left to adapt on, or none to test: lower hold_out")
    truths = (target.get("test_label"), target.get("label"), source.get("label"))

    def cases(files: Sequence[tuple[str, Path]], patterns: Sequence[str | None], needed: bool) -> list[dict[str, str]]:
        entries = []
        for key, file in files:
            label = label_of(key, file, patterns, data)
            if label is None and needed:
                raise ConfigError(f"{name}: no label map of {file}: add it, or leave the case out")
            entry = {"image": str(file.relative_to(data)), "case_id": f"{file.parent.name}_{stem_of(file)}"}
            entries.append(entry if label is None else {**entry, "label": str(label.relative_to(data))})
        return entries

    labelled = [case for case in cases(adapted_on, truths, False) if "label" in case]
    return {
        "name": name,
        "title": name.replace("_", " ") + remark,
        "labels": structures_of(split["labels"], f"{name}, labels"),
        "source": cases(training, (source.get("label"),), True),
        **({"validation": cases(validation, (source.get("label"),), True)} if validation else {}),
        "target": [{k: v for k, v in case.items() if k != "label"} for case in cases(adapted_on, truths, False)],
        "test": cases(test, truths, True),
        **({"oracle": labelled} if labelled else {}),
    }


def files_of(side: Mapping[str, Any], part: str, data: Path, name: str) -> list[tuple[str, Path]]:
    """Name and file of the cases of a part. Raises `ConfigError`."""
    origin = f"{name}, {part} of {side.get('image')}"
    if "image" not in side or part not in side:
        raise ConfigError(f"{name}: expected image and {part}, found {sorted(side)}")
    known = matching(str(side["image"]), data)
    given = side[part]
    if isinstance(given, str):
        text = re.sub(r"\(.*?\)", "", given).strip()
        known = {key: file for key, file in known.items() if not LABEL_MAP.search(stem_of(file))}
        bounds = RANGE.fullmatch(text)
        if text == "all":
            chosen = sorted(known)
        elif bounds:
            number = re.compile(rf"{bounds[1]}[-_]?0*(\d+)(?!\d)", re.IGNORECASE)
            numbers = {key: number.search(file.name) for key, file in known.items()}
            low, high = int(bounds[2]), int(bounds[3])
            chosen = sorted(key for key, match in numbers.items() if match and low <= int(match[1]) <= high)
        else:
            raise ConfigError(f"{origin} is {given!r}, expected a list of names, 'all', or such as 'patients 01-05'")
    else:
        chosen = [str(one) for one in given]
    absent = [key for key in chosen if key not in known]
    if absent or not chosen:
        raise ConfigError(f"{origin}: no file of {absent or given!r} below {data}: correct data or the splits")
    return [(key, known[key]) for key in chosen]


def matching(pattern: str, data: Path) -> dict[str, Path]:
    """Name of a case to its file, of a folder or a pattern."""
    folder, _, last = pattern.rpartition("/") if "*" in pattern else (pattern, "", "*")
    before, _, after = last.partition("*")
    found: dict[str, Path] = {}
    for file in sorted((data / folder).glob("*")):
        stem = stem_of(file)
        fits = stem.startswith(before) and stem.endswith(after) and len(stem) > len(before) + len(after)
        if file.name.lower().endswith(ENDINGS) and fits and not file.name.startswith("."):
            found[stem[len(before) : len(stem) - len(after)]] = file
    return found


def label_of(key: str, file: Path, patterns: Sequence[str | None], data: Path) -> Path | None:
    """Label map of a case: by the patterns, beside the image, or in a folder ``label`` beside the image's folder."""
    for pattern in patterns:
        found = matching(pattern, data).get(key) if pattern else None
        if found is not None:
            return found
    stem = stem_of(file)
    ending = file.name[len(stem) :]
    candidates = [file.with_name(f"{stem}_label{ending}"), file.parent.parent / "label" / f"{stem}{ending}"]
    return next((one for one in candidates if one.is_file()), None)


def main(line: Sequence[str] | None = None) -> int:
    """Write a task file for each task, or for those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the scans")
    parser.add_argument("--output", type=Path, required=True, help="folder of the task files")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="these tasks; all by default")
    parser.add_argument("--hold_out", type=int, default=2, help="target scans for a test where the splits name none")
    arguments = parser.parse_args(line)
    data = arguments.data.resolve()
    try:
        splits = read_mapping_file(arguments.splits)
        tasks = tasks_of(splits, data, arguments.hold_out)
        unknown = sorted(set(arguments.only or []) - set(tasks))
        if unknown:
            raise ConfigError(f"{arguments.splits} has no task {unknown}, expected some of {sorted(tasks)}")
        for name in arguments.only or tasks:
            path = arguments.output / f"{name}.json"
            write_json({**tasks[name], "data": str(data)}, path)
            print(f"{path}: {json.dumps({key: len(v) for key, v in tasks[name].items() if isinstance(v, list)})}")
    except MAPSegError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
