# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The labelled scans of a datalist as nnU-Net reads them: files, ``dataset.json`` and a division."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mapseg_components.data.datalist import has_section, load_datalist
from mapseg_components.errors import DataError
from mapseg_components.files import replacing, write_json
from mapseg_components.keys import CASE_ID, IMAGE, LABEL
from mapseg_components.structures import IGNORED, structures_of
from mapseg_components.transforms.saving import write_verified

__all__ = ["balanced", "write_dataset"]

ENDING = ".nii.gz"
SECTIONS = ("source_training", "target_labelled", "source_validation")


def balanced(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Names repeated so that each sequence has half of the result, whatever their lengths; the first if the second is
    empty.

    nnU-Net draws scans evenly from the names of a division: half of them are then of either domain, as the sum of two
    means of COSMOS (Eq. 8) says.

    Examples:
        >>> from mapseg_components.engines.nnunet_dataset import balanced
        >>> balanced(["a", "b"], ["c"])
        ['a', 'b', 'c', 'c']
    """
    if not second:
        return [*first]
    shared = math.gcd(len(first), len(second))
    return [*first] * (len(second) // shared) + [*second] * (len(first) // shared)


def write_dataset(
    datalist: str | Path,
    reading: Callable[[dict[str, Any]], Mapping[str, Any]],
    labels: Mapping[str, int],
    folder: Path,
) -> dict[str, list[str]]:
    """Write the labelled scans of a datalist as a dataset of nnU-Net.

    Args:
        datalist: with ``source_training``, ``source_validation`` and, of a student, ``target_labelled``.
        reading: from a case to ``image`` (C, X, Y, Z) with its affine and ``label`` (1, X, Y, Z) of class indices from
            0; `mapseg_components.structures.IGNORED` where nothing counts.
        labels: structures and their values, in the order of the class indices.
        folder: receives ``imagesTr``, ``labelsTr``, ``dataset.json``, and ``cases.json``: which case has which name.

    Returns:
        ``train`` and ``val``, a division as nnU-Net has it; both domains have half of ``train``.

    Raises:
        DataError: a scan or label map cannot be read, or there are too many structures.
        ResourceError: the disk is full.
    """
    names = [*structures_of(labels)]
    ignored = len(names) + 1
    if ignored >= IGNORED:
        raise DataError(f"{len(names)} structures, and nnU-Net's label maps here have {IGNORED - 2} at most")
    written: dict[str, list[str]] = {section: [] for section in SECTIONS}
    cases, channels, leaves_out = {}, 0, False
    for section in SECTIONS:
        for case in load_datalist(datalist, section) if has_section(datalist, section) else []:
            name = f"case_{len(cases):04d}"
            sample = reading(dict(case))
            image, label = (np.asarray(sample[key].as_subclass(torch.Tensor)) for key in (IMAGE, LABEL))
            affine = np.asarray(sample[IMAGE].affine, dtype=float)
            if image.shape[1:] != label.shape[1:]:
                raise DataError(
                    f"{case[LABEL]} has shape {label.shape[1:]}, its scan {image.shape[1:]}: draw the label map on the "
                    "scan's own grid"
                )
            leaves_out |= bool((label == IGNORED).any())
            channels = len(image)
            for number, channel in enumerate(image.astype(np.float32)):
                save(channel, affine, folder / "imagesTr" / f"{name}_{number:04d}{ENDING}")
            classes = np.where(label[0] == IGNORED, ignored, label[0]).astype(np.uint8)
            save(classes, affine, folder / "labelsTr" / f"{name}{ENDING}")
            cases[name] = {"section": section, CASE_ID: case[CASE_ID], IMAGE: case[IMAGE]}
            written[section].append(name)
    values = {"background": 0, **{name: value for value, name in enumerate(names, start=1)}}
    content = {
        "channel_names": {str(number): f"channel {number}" for number in range(channels)},  # z-scores, as of MR
        "labels": values | ({"ignore": ignored} if leaves_out else {}),
        "numTraining": len(cases),
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NibabelIO",  # SimpleITK refuses some affines
    }
    write_json(cases, folder / "cases.json")
    write_json(content, folder / "dataset.json")
    train = balanced(written["source_training"], written["target_labelled"])
    return {"train": train, "val": written["source_validation"] or written["source_training"]}


def save(voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels (X, Y, Z), whole or not at all."""
    with replacing(path) as temporary:
        write_verified(temporary, voxels, affine, path)
