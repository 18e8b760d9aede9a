# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Labelled scans as the target shows them: whole translated volumes, their label maps, and a datalist of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from mapseg_components.data.datalist import SECTIONS, has_section, labels_file, load_datalist, read_json
from mapseg_components.errors import MAPSegError, NonFiniteError
from mapseg_components.files import replacing, write_json
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, PRED
from mapseg_components.scans import read_nifti
from mapseg_components.scans.nifti import affine_beside, is_nifti
from mapseg_components.scans.rewriting import copy_packed, write_with_header
from mapseg_components.transforms.saving import write_verified

__all__ = ["write_translated"]

logger = logging.getLogger(__name__)

TRANSLATED = ("source_training", "source_validation")
UNCHANGED = ("target_training", "target_heldout")


def write_translated(
    datalist: str | Path,
    folder: str | Path,
    network: nn.Module,
    inferer: Inferer,
    preprocessing: Callable[[Any], Any],
    postprocessing: Callable[[Any], Any],
    labels: Mapping[str, int],
    device: torch.device | str = "cpu",
    sections: Sequence[str] = TRANSLATED,
) -> Path:
    """Translate the labelled scans of a datalist as volumes.

    ``images/CASE.nii.gz`` has the grid and the header of the scan and its translation as float32,
    ``labels/CASE.nii.gz`` is the scan's label map, bit for bit. Each file is written whole or not at all, and
    ``datalist.json`` last: it names the translated scans with their domains in place of the source's, the target's as
    they are, by absolute paths, and the structures.

    Args:
        datalist: see `load_datalist`. The target's sections are passed on, no scan of theirs is opened.
        folder: receives the files; earlier ones of the same names are replaced.
        network: from slices of a source scan to slices as the target shows them.
        inferer: runs it on a volume (1, 1, X, Y, Z).
        preprocessing: from a case with ``image`` to the scan as the network takes it, (1, X, Y, Z).
        postprocessing: from the case with ``pred`` to the translation on the scan's own grid, (1, X, Y, Z).
        labels: structure name to label value, for a datalist that names no structures.
        device: where the network runs.
        sections: what is translated, those that the datalist has.

    Returns:
        path of ``datalist.json``.

    Raises:
        ConfigError: the datalist cannot be used.
        DataError: a scan or label map cannot be read.
        NonFiniteError: a translation has NaN or infinite voxels.
        ResourceError: the disk is full.
    """
    folder = Path(folder).absolute()
    named = labels_file(datalist)
    content: dict[str, Any] = {
        "labels": read_json(named)["labels"]
        if named is not None
        else {"0": "background", **{str(value): name for name, value in labels.items()}}
    }
    training = network.training
    network.eval()
    try:
        for section in sections:
            if not has_section(datalist, section):
                continue
            content[section] = []
            for case in load_datalist(datalist, section):
                image, label = (folder / kind / f"{case[CASE_ID]}.nii.gz" for kind in ("images", "labels"))
                try:
                    voxels = translated(case, network, inferer, preprocessing, postprocessing, device)
                    save_volume(voxels, case[IMAGE], image)
                except MAPSegError as error:
                    raise type(error)(f"case {case[CASE_ID]}: {error}") from error
                save_label(case[LABEL], case[IMAGE], label)
                content[section].append({**case, IMAGE: str(image), LABEL: str(label)})
            logger.info(f"{section}: {len(content[section])} translated scans in {folder / 'images'}.")
    finally:
        network.train(training)
    for section in UNCHANGED:
        if has_section(datalist, section):
            content[section] = load_datalist(datalist, section)
    order = {"labels": content["labels"], **{name: content[name] for name in SECTIONS if name in content}}
    write_json(order, folder / "datalist.json")
    return folder / "datalist.json"


@torch.no_grad()
def translated(
    case: Mapping[str, Any],
    network: nn.Module,
    inferer: Inferer,
    preprocessing: Callable[[Any], Any],
    postprocessing: Callable[[Any], Any],
    device: torch.device | str,
) -> np.ndarray:
    """Voxels (X, Y, Z), float32, of a case on its own grid. Its label is not read. See `write_translated`."""
    sample = preprocessing({key: value for key, value in case.items() if key != LABEL})
    output = inferer(sample[IMAGE][None].to(device), network)
    assert isinstance(output, torch.Tensor)
    sample[PRED] = output[0].float().cpu()
    voxels = np.asarray(postprocessing(sample)[PRED].as_subclass(torch.Tensor), dtype=np.float32)[0]
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        raise NonFiniteError(f"{bad} translated voxels are NaN or infinite, nothing was written: check weights and amp")
    return voxels


def save_volume(voxels: np.ndarray, scan: str, path: Path) -> None:
    """Write voxels (X, Y, Z) below the header of a scan."""
    if is_nifti(scan):
        write_with_header(voxels, scan, path)
        return
    with replacing(path) as temporary:
        write_verified(temporary, voxels, np.asarray(read_nifti(scan).affine), path)


def save_label(label: str, image: str, path: Path) -> None:
    """Copy a label map: the same bytes, or the same voxels on the scan's grid where it is no NIfTI file."""
    if is_nifti(label):
        copy_packed(label, path)
        return
    scan = read_nifti(label)
    with replacing(path) as temporary:
        write_verified(temporary, scan.voxels, np.asarray(affine_beside(label, scan.affine, image)), path)
