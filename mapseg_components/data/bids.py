# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans of a BIDS dataset, and where a BIDS derivative keeps their label maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data.datalist import stem
from mapseg_components.data.layouts import says_label_map
from mapseg_components.errors import ConfigError
from mapseg_components.keys import CASE_ID, IMAGE
from mapseg_components.scans.nifti import is_nifti

__all__ = ["bids_scans", "dataset_description", "is_bids", "result_stem"]

DESCRIPTION = "dataset_description.json"
VERSION = "1.9.0"
# what this package adds to a derivative and BIDS does not know
IGNORED = (
    *("audit.json", "manifest.json", "volumes.csv", "labels_itksnap.txt", "labels_freesurfer.txt", "figures/"),
    "*_uncertainty.nii.gz",
)


def is_bids(folder: str | Path) -> bool:
    """Whether a folder is a BIDS dataset."""
    return (Path(folder) / DESCRIPTION).is_file()


def bids_scans(folder: str | Path, modality: str | None = None) -> list[dict[str, Any]]:
    """Anatomical scans of a dataset as cases: ``sub-*/[ses-*/]anat/*_<modality>.nii[.gz]``.

    Args:
        folder: of the dataset.
        modality: suffix such as ``"T2w"``; may be left out if all scans have the same.

    Raises:
        ConfigError: there is none of that modality, or several modalities and none is named.
    """
    files = sorted(
        path
        for pattern in ("sub-*/anat/sub-*", "sub-*/ses-*/anat/sub-*")
        for path in Path(folder).glob(pattern)
        if is_nifti(path.name) and not says_label_map(stem(path))
    )
    found = sorted({suffix(path) for path in files})
    if modality is None and len(found) > 1:
        raise ConfigError(
            f"{folder} has scans of modalities {', '.join(found)}: choose one by modality, e.g. --modality {found[-1]}"
        )
    files = [path for path in files if modality is None or suffix(path) == modality]
    if not files:
        has = f", it has {', '.join(found)}" if found else ""
        raise ConfigError(f"{folder} has no scan sub-*/[ses-*/]anat/*_{modality or '*'}.nii.gz{has}: correct the path")
    return [{IMAGE: str(path.absolute()), CASE_ID: stem(path)} for path in files]


def result_stem(scan: str | os.PathLike[str], dataset: str | os.PathLike[str]) -> Path:
    """Path of a scan below its dataset, without modality and ending.

    ``sub-1/anat/sub-1_T2w.nii`` becomes ``sub-1/anat/sub-1``.
    """
    path = Path(scan).relative_to(Path(dataset).absolute())
    return path.with_name(stem(path).rpartition("_")[0])


def suffix(path: Path) -> str:
    """Modality of a file, the last part of its name."""
    return stem(path).rpartition("_")[2]


def dataset_description(dataset: str | Path, name: str, version: str, modalities: Sequence[str] = ()) -> dict[str, Any]:
    """Content of a derivative's ``dataset_description.json``.

    Args:
        dataset: folder of the scans.
        name: program that made the label maps.
        version: version of that program.
        modalities: of the scans.
    """
    return {
        "Name": f"Structures segmented by {name}" + "".join(f", {modality}" for modality in modalities),
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": name, "Version": version}],
        "SourceDatasets": [{"URL": Path(dataset).absolute().as_uri()}],
        "DatasetLinks": {"raw": Path(dataset).absolute().as_uri()},
    }
