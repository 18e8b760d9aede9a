# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans that are synthesised from label maps once, with fixed seeds: what a source of label maps is validated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from mapseg_components.keys import CASE_ID, IMAGE, TISSUES
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.structures import to_whole

__all__ = ["synthetic_scans"]

FEWEST = 4  # scans: one of each label map, or several contrasts where there are fewer


def synthetic_scans(
    cases: Sequence[Mapping[str, Any]],
    synthesis: Any,
    save: Callable[..., Any],
    folder: str | Path,
    seed: int = 0,
    fewest: int = FEWEST,
) -> list[dict[str, Any]]:
    """Cases with a synthetic scan in the place of a label map's; scans are made anew in each call, and alike.

    Contrasts follow from the seed and the number of the scan alone: a resumed run has the scans that it had.

    Args:
        cases: of `load_datalist`; those with an image of their own stay as they are.
        synthesis: from ``{"image": label map (1, X, Y, Z)}`` to an image in its place, with ``set_random_state``.
        save: from an image (1, X, Y, Z) with metadata and ``filename`` (without ending) to ``<filename>.nii.gz``, such
            as `SaveVolume`.
        folder: of the scans.
        seed: of all draws.
        fewest: scans that are made at least; label maps are taken several times if need be.

    Returns:
        cases whose ``image`` is a scan on the label map's grid, ``<folder>/<case id>_<number>.nii.gz``, and without
        ``tissues``.

    Raises:
        DataError: a label map cannot be read.
        ResourceError: a scan cannot be written.
    """
    alone = [case for case in cases if TISSUES in case]
    found = [dict(case) for case in cases if TISSUES not in case]
    rounds = max(-(-fewest // len(alone)), 1) if alone else 0
    for number in range(rounds * len(alone)):
        case = {key: value for key, value in alone[number % len(alone)].items() if key != TISSUES}
        case[CASE_ID] = f"{case[CASE_ID]}_{number // len(alone) + 1}"
        path = Path(folder) / f"{case[CASE_ID]}.nii.gz"
        scan = read_nifti(case[IMAGE])
        voxels = torch.from_numpy(np.ascontiguousarray(to_whole(scan.voxels), dtype=np.float32))[None]
        label_map = MetaTensor(voxels, affine=torch.from_numpy(scan.affine), meta={"filename_or_obj": case[IMAGE]})
        synthesis.set_random_state(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        save(synthesis({IMAGE: label_map})[IMAGE], filename=path.with_name(case[CASE_ID]))
        found.append({**case, IMAGE: str(path)})
    return found
