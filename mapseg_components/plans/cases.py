# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Cases and structures of an adaptation: from folders and datalists to what a bundle is trained with."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data import load_datalist, load_scans
from mapseg_components.data.audit import names_of
from mapseg_components.data.datalist import (
    has_section,
    labels_file,
    list_scans,
    open_datalist,
    read_json,
    scans_below,
    stem,
    with_mask,
)
from mapseg_components.data.layouts import image_folders, labels_among, labels_of_scans, misplaced
from mapseg_components.data.left_out import scans_and_label_maps
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.scans.facts import facts_of
from mapseg_components.scans.files import FORMATS, is_picture
from mapseg_components.scans.findings import Finding, fault, raise_findings
from mapseg_components.sides import unnamed
from mapseg_components.structures import IGNORED, structures_of, value_fault

__all__ = ["hold_out", "source_cases", "structure_names", "target_cases"]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set

MOST_LABELS = IGNORED - 1
FEWEST_TO_HOLD_OUT = 5  # target scans; below it, all are adapted on
FEWEST_HELD_OUT = 2


def source_cases(source: str, validation_share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Cases for training and validation. Raises `ConfigError`, `DataError`."""
    path = Path(source)
    if path.is_dir() and (path / "images").is_dir():
        if not (path / "labels").is_dir():
            raise ConfigError(f"{path / 'labels'} does not exist: put the label maps there, named as their images")
        cases = labelled_folder(path)
    elif path.is_dir() and not (path / "source").is_dir() and (maps := labels_among(list_scans(path))):
        cases = labelled_among(path, maps)
    elif path.is_dir() and not (path / "source").is_dir() and open_datalist(path) is None:
        expected = (
            "images/ and labels/, imagesTr/ and labelsTr/ (nnU-Net, Decathlon), label maps named after their scans "
        )
        expected += "(a_label beside a), or source/"
        raise ConfigError(f"{path} has none of {expected}{scans_below(path)}: see docs/how-to/data.md for the folders")
    else:
        cases = load_datalist(path, "source_training")
        refuse_misplaced(cases)
        if has_section(path, "source_validation"):
            return cases, load_datalist(path, "source_validation")
    return held_apart(cases, path, validation_share, seed)


def held_apart(cases: list[dict], path: Path, validation_share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Cases for training, and those held out for validation. Raises `DataError` for a single case."""
    if len(cases) < 2:
        raise DataError(
            f"{path} has {len(cases)} labelled case(s): two at least are needed, one of them for validation"
        )
    held_out = min(max(round(len(cases) * validation_share), 1), len(cases) - 1)
    chosen = set(random.Random(seed).sample(range(len(cases)), held_out))
    logger.info(f"Held out for validation: {sorted(cases[i]['case_id'] for i in chosen)}.")
    return [c for i, c in enumerate(cases) if i not in chosen], [c for i, c in enumerate(cases) if i in chosen]


def labelled_among(path: Path, maps: Mapping[Path, Path]) -> list[dict[str, Any]]:
    """Cases of a folder whose label maps lie beside their scans. Raises `DataError` if one has no partner."""
    odd = sorted(one.name for one in set(list_scans(path)) - {*maps, *maps.values()})
    if odd:
        raise DataError(
            f"{path}: no label map, or no scan, of one name with {', '.join(odd[:5])}: add it, or move it away"
        )
    cases = [{"image": str(s.absolute()), "label": str(m.absolute()), "case_id": stem(s)} for s, m in maps.items()]
    return [with_mask(case) for case in sorted(cases, key=lambda case: case["case_id"])]


def labelled_folder(path: Path) -> list[dict[str, Any]]:
    """Cases of ``path/images`` and ``path/labels``."""
    images, labels = list_scans(path / "images"), list_scans(path / "labels")
    maps = labels_of_scans(images, labels)
    odd = sorted(
        {stem(scan) for scan in images if scan not in maps} | {stem(m) for m in set(labels) - {*maps.values()}}
    )
    if odd or not images:
        found = odd[:5] or "there are none"
        raise DataError(f"{path}: images and labels do not pair ({found}): give both the same names")
    cases = [{"image": str(s.absolute()), "label": str(m.absolute()), "case_id": stem(m)} for s, m in maps.items()]
    refuse_misplaced(cases)
    return [with_mask(case) for case in cases]


def target_cases(target: str) -> list[dict[str, Any]]:
    """Unlabelled cases; label maps are named by their files. Raises `ConfigError`, and `DataError` for equal names."""
    cases = cases_of_target(target)
    raise_findings(names_of(cases))
    return cases


def cases_of_target(target: str) -> list[dict[str, Any]]:
    """Unlabelled cases. Raises `ConfigError`."""
    path = Path(target)
    if (path.is_file() and path.suffix == ".json") or (path / "target").is_dir():
        return load_datalist(path, "target_training")
    folders = image_folders(path)
    if len(folders) > 1:
        named = " and ".join(one.name for one in folders)
        raise ConfigError(f"{path} has {named}: name the folder of the target's scans, such as {folders[-1]}")
    folder = folders[0] if folders else path
    cases = load_scans(folder)
    if any(is_picture(case["image"]) for case in cases):  # usually in one folder with their label maps
        cases, maps = scans_and_label_maps(cases, "image")
        if maps:
            logger.info(f"{len(maps)} label maps in {folder} are not looked at, such as {maps[0].name}.")
    if not cases:
        raise ConfigError(
            f"{folder} has no NIfTI file or image ({FORMATS}){scans_below(folder)}: name the folder of the "
            "target's scans"
        )
    refuse_misplaced(cases)
    return cases


def hold_out(cases: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Target cases to adapt on, and those that only the verdict looks at, in their order; chosen by the seed.

    Args:
        cases: of the target.
        share: of the cases that is held out, two at least; 0 for none. Below five cases none is.
        seed: of the choice.
    """
    if not share or len(cases) < FEWEST_TO_HOLD_OUT:
        logger.info("No target scan is held out: gains are judged on the scans adapted on.")
        return [*cases], []
    number = min(max(round(len(cases) * share), FEWEST_HELD_OUT), len(cases) - 1)
    chosen = set(random.Random(seed).sample(range(len(cases)), number))
    held = [case for index, case in enumerate(cases) if index in chosen]
    logger.info(f"Held out of adaptation, to judge it: {[case['case_id'] for case in held]}.")
    return [case for index, case in enumerate(cases) if index not in chosen], held


def refuse_misplaced(cases: Sequence[Mapping[str, Any]]) -> None:
    """Refuse label maps and several channels in the place of scans. Raises `DataError` with all of them."""
    reasons = ((case["image"], misplaced(case["image"])) for case in cases)
    raise_findings(Finding("error", str(path), *reason) for path, reason in reasons if reason is not None)


def structure_names(
    labels: Mapping[str, int] | None, source: str, cases: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Structures to train for: as asked, as the datalist or ``dataset.json`` says, or as found in the label maps."""
    if labels:
        found = labels.get("labels")
        return trainable(structures_of(found if isinstance(found, dict) else labels, "labels"), "labels")
    named = labels_file(source)
    if named is not None:
        return trainable(structures_of(read_json(named)["labels"], f"{named}, labels"), f"{named}: labels")
    values: dict[float, int] = {}
    for case in cases:
        facts = facts_of(case["label"], with_values=True)
        wrong = value_fault(facts.values or (), more_values=facts.more_values)
        if wrong is not None:
            raise fault(case["label"], *wrong)
        values |= {value: 0 for value, _ in facts.values or ()}
    values.pop(0.0, None)
    if not values or len(values) > MOST_LABELS:
        raise DataError(f"the label maps of {source} have {len(values)} values above 0: name the structures by labels")
    return {unnamed(value): int(value) for value in sorted(values)}


def trainable(structures: dict[str, int], origin: str) -> dict[str, int]:
    """The structures. Raises `ConfigError` if they are too many for class indices in a byte."""
    if len(structures) > MOST_LABELS:
        raise ConfigError(f"{origin} name {len(structures)} structures, expected {MOST_LABELS} at most: merge some")
    return structures
