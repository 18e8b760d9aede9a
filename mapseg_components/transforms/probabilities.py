# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How sure a network was: the largest probability of each voxel, and the probabilities of all classes as a file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from mapseg_components.errors import ResourceError
from mapseg_components.files import replacing
from mapseg_components.keys import CONFIDENCE, PROBABILITIES
from mapseg_components.transforms.inputs import as_volume
from mapseg_components.transforms.saving import nifti_image

__all__ = ["Confidenced", "Probabilitiesd", "largest_probability", "save_probabilities"]

PIECE = 1 << 22  # voxels at a time, to keep memory low
STEPS = 255  # of a stored probability


def largest_probability(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely class.

    Args:
        logits: (classes, X, Y, Z).

    Returns:
        (1, X, Y, Z), float32.
    """
    flat = logits.flatten(1)
    found = torch.empty(flat.shape[1], device=logits.device)
    for piece, place in zip(flat.split(PIECE, dim=1), found.split(PIECE)):
        place.copy_((piece.amax(dim=0) - torch.logsumexp(piece.float(), dim=0)).exp())
    return found.reshape(1, *logits.shape[1:])


class Confidenced(MapTransform):
    """Add ``confidence`` (1, X, Y, Z) to a case: `largest_probability` of the logits under the key."""

    def __init__(self, keys: KeysCollection = "pred", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with ``confidence``."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[CONFIDENCE] = beside(largest_probability(plain(case[key])), case[key])
        return case


class Probabilitiesd(MapTransform):
    """Add ``probabilities`` (classes, X, Y, Z), uint8 from 0 to 255, to a case: softmax of the logits under the key."""

    def __init__(self, keys: KeysCollection = "pred", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with ``probabilities``."""
        case = dict(data)
        for key in self.key_iterator(case):
            logits = plain(case[key])
            pieces = [
                (torch.softmax(piece.float(), dim=0) * STEPS).round().to(torch.uint8)
                for piece in logits.flatten(1).split(PIECE, dim=1)
            ]
            case[PROBABILITIES] = beside(torch.cat(pieces, dim=1).reshape(logits.shape), case[key])
        return case


def plain(logits: Any) -> torch.Tensor:
    """Tensor without metadata."""
    return as_volume(logits).as_subclass(torch.Tensor)


def beside(values: torch.Tensor, logits: Any) -> MetaTensor:
    """Values with what logits on the same grid know of their scan; MONAI inverts no plain tensor."""
    return MetaTensor(values).copy_meta_from(logits) if isinstance(logits, MetaTensor) else MetaTensor(values)


def save_probabilities(steps: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write probabilities as 4D NIfTI, read it back, or leave what was there.

    Stored as uint8 with the slope 1/255, which every reader applies: a quarter of float32's size at a resolution of
    0.4 %. NIfTI has no 16-bit floating point type.

    Args:
        steps: (classes, X, Y, Z), uint8, background first. affine: (4, 4). path: the file.

    Raises:
        ResourceError: the disk is full, cannot be written, or does not give back what was written.
    """
    volume = nifti_image(np.moveaxis(np.asarray(steps, dtype=np.uint8), 0, -1), np.asarray(affine, dtype=float))
    volume.header.set_slope_inter(1 / STEPS, 0)
    with replacing(path) as temporary:
        nib.save(volume, temporary)
        found = nib.load(temporary)
        if not np.array_equal(found.dataobj.get_unscaled(), volume.dataobj):
            raise ResourceError(
                f"{path}: voxels read back differ from what was written, nothing was kept: check the disk"
            )
