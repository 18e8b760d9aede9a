# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A source of label maps alone, and structures of several values: what `mapseg adapt` makes of them before it plans."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from mapseg_components.data import Audit, load_datalist
from mapseg_components.data.datalist import (
    has_label_maps,
    has_section,
    labels_file,
    list_scans,
    open_datalist,
    read_json,
    scans_below,
    stem,
)
from mapseg_components.data.layouts import child
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_json
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, TISSUES
from mapseg_components.plans.cases import held_apart, source_cases, structure_names
from mapseg_components.plans.recipes import LABEL_MAPS
from mapseg_components.scans.findings import Finding, raise_findings
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.structures import numbered, parts_of, to_whole
from mapseg_components.transforms import SaveLabelMap

__all__ = ["FOLDER", "add_synthetic_validation", "label_map_cases", "labelled_cases", "merged", "several_values"]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set

VALIDATION_SHARE = 0.2  # unless a user says otherwise
FOLDER = "label_maps"  # in the output folder: merged label maps, and synthetic scans
Cases = list[dict[str, Any]]


def labelled_cases(
    request: Mapping[str, Any], source: str, folder: Path
) -> tuple[Cases, Cases, dict[str, int], dict[str, list[int]], dict[str, Any]]:
    """Cases of the source, and the structures and their values in these.

    Where a structure has several values, its label maps are written anew, with the numbers of the structures.

    Args:
        request: arguments of ``mapseg adapt``.
        source: where the source is read.
        folder: output of the run.

    Returns:
        cases for training, those for validation, structures, their values in the label maps as they were given, and
        settings that follow.

    Raises:
        ConfigError: there is no such source, or the labels are wrong.
        DataError: a label map cannot be used.
    """
    from_maps, labels = bool(request.get("source_label_maps")), request["labels"]
    share = VALIDATION_SHARE if request["validation_share"] is None else request["validation_share"]
    seed = request["seed"]
    training, validation = (label_map_cases if from_maps else source_cases)(source, share, seed)
    cases = [*training, *validation]
    parts = several_values(labels, request["source"])
    if from_maps:
        found = values_of(cases)
    if parts is None:
        structures = structure_names(labels, request["source"], cases)
        parts = {name: [value] for name, value in structures.items()}
    else:
        structures = {name: number for number, name in enumerate(parts, start=1)}
        dropped = "others" if from_maps else (request["settings"] or {}).get("dropped_labels", [])
        logger.info(f"Label maps are written with one number for each structure: {structures}.")
        cases = merged(cases, parts, dropped, folder / FOLDER / "merged")
        training, validation = cases[: len(training)], cases[len(training) :]
    if not from_maps:
        return training, validation, structures, parts, {}
    absent = [f"{name} ({', '.join(map(str, values))})" for name, values in parts.items() if not {*values} & found]
    if absent:
        raise ConfigError(
            f"labels: no label map of {source} has {', '.join(absent)}: correct the values, or leave the structure out "
            f"(found are {sorted(found)})"
        )
    others = sorted(found - {value for values in parts.values() for value in values} - {0})
    logger.info(
        f"{len(cases)} label maps without images: {len(training)} to learn from synthetic images, {len(validation)} "
        f"for validation. Structures: {parts}. Other values, which images are made of as well: {others or 'none'}."
    )
    alike = [values for values in parts.values() if len(values) > 1]
    return training, validation, structures, parts, {"synthesis_alike": alike}


def several_values(labels: Mapping[str, Any] | None, source: str) -> dict[str, list[int]] | None:
    """Structures and their values as asked, or as the datalist says; ``None`` where none has several values."""
    named = labels_file(source) if not labels else None
    if not labels and named is None:
        return None
    given = labels if labels else read_json(named)["labels"]  # type: ignore[arg-type]
    given = given.get("labels", given) if isinstance(given.get("labels", given), Mapping) else given
    texts = [value for value in given.values() if isinstance(value, str)]
    several = any(isinstance(value, (list, tuple)) for value in given.values())
    if not several and (len(texts) < len(given) or len(set(texts)) == len(texts)):
        return None
    return parts_of(given, "labels" if labels else f"{named}, labels")


def label_map_cases(source: str, validation_share: float, seed: int) -> tuple[Cases, Cases]:
    """Label maps for training and for validation, each standing for its image as well.

    Args:
        source: a datalist, whose images are not read, a dataset of nnU-Net or the Decathlon, a folder with
            ``source/labels`` (and ``validation/labels``), ``labels`` or ``labelsTr``, or a folder of label maps.
        validation_share: of the cases that is held out where the source names none.
        seed: of that choice.

    Raises:
        ConfigError: there is no label map.
        DataError: there is only one.
    """
    path = Path(source)
    if (path.is_file() and path.suffix == ".json") or (path.is_dir() and has_sections(path)):
        sections = [name for name in ("source_training", "source_validation") if has_section(path, name)]
        training, *rest = [[alone(case) for case in load_datalist(path, name)] for name in sections]
        if has_label_maps(path) is False:
            logger.info(f"The images of {path} are not read: source_label_maps makes images from its label maps.")
        return (training, rest[0]) if rest else held_apart(training, path, validation_share, seed)
    if (path / "source" / "labels").is_dir():
        training = cases_of(path / "source" / "labels")
        if (path / "validation" / "labels").is_dir():
            return training, cases_of(path / "validation" / "labels")
        return held_apart(training, path, validation_share, seed)
    folders = [child(path, f"labels{ending}") for ending in ("", "tr")] if path.is_dir() else []
    place = next((one for one in folders if one is not None and one.is_dir()), path)
    return held_apart(cases_of(place), path, validation_share, seed)


def has_sections(folder: Path) -> bool:
    """Whether a folder has images with label maps in a layout of datalists."""
    own = (folder / "source" / "images").is_dir() and (folder / "source" / "labels").is_dir()
    return own or (not (folder / "source").is_dir() and open_datalist(folder) is not None)


def cases_of(folder: Path) -> Cases:
    """A case for each label map of a folder, or of a single file. Raises `ConfigError` if there is none."""
    files = [folder] if folder.is_file() else list_scans(folder)
    if not files:
        raise ConfigError(
            f"{folder} has no label map (.nii, .nii.gz){scans_below(folder)}: name the folder of the label maps"
        )
    return [alone({LABEL: str(file.absolute()), CASE_ID: stem(file)}) for file in files]


def alone(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case whose label map stands for its image as well."""
    tissues = case.get(TISSUES, case[LABEL])
    return {**case, IMAGE: tissues, TISSUES: tissues}


def values_of(cases: Sequence[Mapping[str, Any]]) -> set[int]:
    """All values of the label maps that images are made from. Raises `DataError` with all that cannot be used."""
    audit, found = Audit(), set()
    for case in cases:
        facts = audit.tissues(case[TISSUES])
        found |= {value for value, _ in (facts.values or () if facts is not None else ())}
    raise_findings(finding for finding in audit.findings if finding.severity == "error")
    return {int(value) for value in found}


def merged(cases: Sequence[Mapping[str, Any]], parts: Mapping[str, Sequence[int]], dropped: Any, folder: Path) -> Cases:
    """Cases with label maps of one number for each structure, which are written.

    Args:
        cases: with ``label``.
        parts: structures and their values, numbered in this order from 1.
        dropped: values that become background; ``"others"`` for all.
        folder: of the new label maps, ``<number of the case>_<case id>.nii.gz``: two folders may use the same names.

    Raises:
        DataError: a label map cannot be read, or has values that are neither named nor dropped.
        ResourceError: a file cannot be written.
    """
    save = SaveLabelMap(str(folder), num_classes=len(parts) + 1, overwrite=True)
    audit, result = Audit(), []
    known = None if dropped == "others" else [value for part in (*parts.values(), dropped) for value in part]
    for number, case in enumerate(cases):
        path = folder / f"{number:04d}_{case[CASE_ID]}"
        if audit.label(case[LABEL], known, case[LABEL], None) is not None and not errors_of(audit):
            scan = read_nifti(case[LABEL])
            numbers = numbered(to_whole(scan.voxels), parts)[None]
            save(torch.from_numpy(numbers), {"affine": torch.from_numpy(scan.affine)}, path)
        result.append({**case, LABEL: f"{path}.nii.gz"})
    raise_findings(errors_of(audit))
    return result


def errors_of(audit: Audit) -> list[Finding]:
    """The errors among the findings; the warnings come with the check of all scans."""
    return [finding for finding in audit.findings if finding.severity == "error"]


def add_synthetic_validation(folder: Path) -> None:
    """Make the scans of a bundle's ``source_validation``, and name them in its datalist.

    They are synthesised as the bundle's training does it, so that everything after it reads scans.

    Args:
        folder: the bundle that ``mapseg adapt`` makes.

    Raises:
        DataError: a label map cannot be read.
        ResourceError: a scan cannot be written.
    """
    configs = [folder / "configs" / name for name in ("train.json", LABEL_MAPS, "settings.json")]
    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in configs]))
    parser["bundle_root"], parser["output_dir"] = str(folder), str(folder / FOLDER)
    cases = parser.get_parsed_content("validate#dataset#data")
    path = folder / "datalist.json"
    write_json(json.loads(path.read_text(encoding="utf-8")) | {"source_validation": cases}, path)
