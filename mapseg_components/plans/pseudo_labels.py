# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pseudo labels as files: which segmented target scans a student learns from, and how much they change by the round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mapseg_components.data.datalist import load_datalist, read_json
from mapseg_components.errors import DataError
from mapseg_components.files import replacing, write_json
from mapseg_components.quality import label_agreement
from mapseg_components.scans.nifti import read_geometry, read_nifti
from mapseg_components.structures import to_whole
from mapseg_components.transforms.saving import write_verified

__all__ = ["agreement_of", "keep_pseudo_labels", "missing_structures"]

DATALIST, RECORD = "datalist.json", "left_out.json"
MOST_NAMED = 8  # cases in the text of an error


def missing_structures(classes: np.ndarray, labels: Mapping[str, int], required: Sequence[str]) -> list[str]:
    """Required structures of which a label map has no voxel.

    Args:
        classes: (X, Y, Z), class indices: 0 background, then the structures from 1.
        labels: structures and their values, in the order of the class indices.
        required: names.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.plans.pseudo_labels import missing_structures
        >>> classes = np.zeros((2, 3, 4), int)
        >>> classes[0] = 1
        >>> missing_structures(classes, {"tumour": 7, "cochlea": 9}, ["tumour", "cochlea"])
        ['cochlea']
    """
    found = {*np.unique(classes).tolist()}
    return [name for number, name in enumerate(labels, start=1) if name in required and number not in found]


def keep_pseudo_labels(
    datalist: Path, label_maps: Mapping[str, Path], labels: Mapping[str, int], required: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the pseudo labels that a student learns from, and a datalist with them.

    A case in which a required structure is missing is left out. The others' label maps are written with the values of
    ``labels`` in the place of class indices, each on its scan's grid; then ``datalist.json``: the given one with the
    section ``target_labelled``. ``left_out.json`` says what was left out, and why.

    Args:
        datalist: of the labelled source, and of the scans in ``target_training``.
        label_maps: case id to a label map of class indices.
        labels: structures and their values.
        required: names of structures.
        folder: to write.

    Returns:
        ``scans`` (number), ``required``, ``kept`` (case ids), ``left_out`` (``case`` and ``missing`` each).

    Raises:
        DataError: no case is left; ``left_out.json`` is written, and an earlier datalist stays.
        ResourceError: a file cannot be written.
    """
    values = np.array([0, *labels.values()])
    kind = next(kind for kind in (np.uint8, np.int16, np.int32) if values.max() <= np.iinfo(kind).max)
    kept, left_out = [], []
    cases = load_datalist(datalist, "target_training")
    for case in cases:
        classes = to_whole(read_nifti(label_maps[case["case_id"]]).voxels).astype(np.int64)
        missing = missing_structures(classes, labels, required)
        if missing:
            left_out.append({"case": case["case_id"], "missing": missing})
            continue
        path = folder / "labels" / f"{case['case_id']}.nii.gz"
        with replacing(path) as temporary:
            write_verified(temporary, values[classes].astype(kind), read_geometry(case["image"]).affine, path)
        kept.append({**case, "label": str(path.absolute())})
    found = {
        "scans": len(cases),
        "required": [*required],
        "kept": [case["case_id"] for case in kept],
        "left_out": left_out,
    }
    write_json(found, folder / RECORD)
    if not kept:
        raise nothing_left(left_out, folder)
    write_json({**read_json(datalist), "target_labelled": kept}, folder / DATALIST)
    return found


def nothing_left(left_out: Sequence[Mapping[str, Any]], folder: Path) -> DataError:
    """The error of a filter that leaves no scan."""
    counts: dict[str, int] = {}
    for one in left_out:
        for name in one["missing"]:
            counts[name] = counts.get(name, 0) + 1
    structures = ", ".join(f"{name} in {'all' if n == len(left_out) else n}" for name, n in counts.items())
    cases = ", ".join(str(one["case"]) for one in left_out[:MOST_NAMED])
    more = f" and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
    return DataError(
        f"{folder}: no pseudo label is left of {len(left_out)} target scans ({cases}{more}): each lacks a structure of "
        f"those that every label map of the source has (missing: {structures}). Look at the label maps in "
        f"{folder.parent}: where the target's scans do not show these structures, repeat the command with the setting "
        "required_structures, a list of those that they show; where they do, the model has not learnt to find them: "
        "train longer (max_epochs) in a new folder"
    )


def agreement_of(
    first: Mapping[str, Path], second: Mapping[str, Path], names: Sequence[str]
) -> dict[str, float | None]:
    """Mean Dice of each structure between the label maps of two rounds; ``None`` where neither has it in any case.

    Args:
        first: case id to a label map of class indices.
        second: likewise, of the same cases.
        names: structures in the order of the class indices.
    """
    rows = []
    for case, path in first.items():
        maps = [torch.from_numpy(to_whole(read_nifti(one).voxels).astype(np.int64)) for one in (path, second[case])]
        rows.append(label_agreement(*maps, len(names) + 1).tolist())
    columns = np.array(rows, dtype=float).reshape(len(rows), len(names)).T
    means = [float(np.nanmean(column)) if np.isfinite(column).any() else None for column in columns]
    return {name: None if mean is None else round(mean, 4) for name, mean in zip(names, means)}
