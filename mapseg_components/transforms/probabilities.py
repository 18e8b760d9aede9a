# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Confidence of a network: the largest probability of each voxel, and the probabilities of all classes as a file."""

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
    """Add ``confidence`` (1, X, Y, Z), float32, to a case: the largest of the logits' probabilities.

    Args:
        keys: logits (classes, X, Y, Z).
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import Confidenced
        >>> logits = torch.zeros(4, 2, 3, 5)  # four classes, all as likely
        >>> confidence = Confidenced(keys="pred")({"pred": logits})["confidence"]
        >>> tuple(confidence.shape), confidence.unique().tolist()
        ((1, 2, 3, 5), [0.25])
    """

    def __init__(self, keys: KeysCollection = "pred", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with ``confidence``."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[CONFIDENCE] = beside(largest_probability(plain(case[key])), case[key])
        return case


class Probabilitiesd(MapTransform):
    """Add ``probabilities`` (classes, X, Y, Z), uint8 from 0 to 255, to a case: softmax of the logits under the key.

    Args:
        keys: logits (classes, X, Y, Z).
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import Probabilitiesd
        >>> logits = torch.tensor([0.6, 0.4]).log().reshape(2, 1, 1, 1)
        >>> Probabilitiesd(keys="pred")({"pred": logits})["probabilities"].flatten().tolist()  # 255 is 1
        [153, 102]
    """

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
    """Values with the metadata of logits on the same grid, which MONAI's ``Invertd`` needs."""
    return MetaTensor(values).copy_meta_from(logits) if isinstance(logits, MetaTensor) else MetaTensor(values)


def save_probabilities(steps: np.ndarray, affine: np.ndarray, path: str | Path) -> None:
    """Write probabilities as 4D NIfTI and verify the file; after an error an earlier file is unchanged.

    Stored as uint8 with the slope 1/255, which every reader applies: a quarter of float32's size at a resolution of
    0.4 %. NIfTI has no 16-bit floating point type.

    Args:
        steps: (classes, X, Y, Z), uint8, background first, 255 for 1.
        affine: (4, 4), from voxel index to mm.
        path: the file, ``.nii`` or ``.nii.gz``.

    Raises:
        ResourceError: the disk is full, cannot be written, or does not give back what was written.

    Examples:
        >>> import tempfile
        >>> import nibabel as nib
        >>> import numpy as np
        >>> from mapseg_components.transforms import save_probabilities
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_probabilities(np.full((2, 3, 4, 5), 51), np.eye(4), f"{folder}/scan.nii.gz")
        ...     volume = nib.load(f"{folder}/scan.nii.gz").get_fdata()
        >>> volume.shape, round(float(volume[0, 0, 0, 0]), 3)
        ((3, 4, 5, 2), 0.2)
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
