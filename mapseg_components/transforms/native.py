# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From class scores on the working grid to a label map on the scan's own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from mapseg_components.memory import naming_memory_errors, require_memory
from mapseg_components.transforms.inputs import MASK_FILE
from mapseg_components.transforms.probabilities import beside, plain
from mapseg_components.transforms.resampling import linear_resampling

__all__ = ["ArgmaxOnScand"]

BYTES_PER_VOXEL = 40  # of the scan: best score and class so far, one class with its coordinates


class ArgmaxOnScand(MapTransform):
    """The likeliest class of each voxel of the scan, from logits on a grid of another spacing.

    Probabilities are interpolated linearly, one class after the other, and the largest so far is kept: a border lies
    between voxels of the working grid, where a label map that is interpolated has steps, and the memory is that of one
    class. In the place of ``AsDiscreted`` and ``Invertd`` where scans are resampled. Of a scan that knows no file's
    grid, such as an array, the likeliest classes stay on the grid of the logits.

    Args:
        keys: logits (classes, X, Y, Z) with the affine of their grid.
        image_key: the scan after its preprocessing; its metadata know the grid of its file.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ResourceError: in a call, the memory does not suffice.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from monai.transforms import Spacing
        >>> from mapseg_components.transforms import ArgmaxOnScand
        >>> scan = Spacing((2, 2, 2))(MetaTensor(torch.rand(1, 6, 8, 10)))
        >>> scan.meta["original_affine"], scan.meta["spatial_shape"] = torch.eye(4), (6, 8, 10)  # of LoadImaged
        >>> logits = MetaTensor(torch.rand(3, *scan.shape[1:]), affine=scan.affine)
        >>> label_map = ArgmaxOnScand("pred")({"pred": logits, "image": scan})["pred"]
        >>> tuple(label_map.shape), label_map.dtype
        ((1, 6, 8, 10), torch.uint8)
    """

    def __init__(
        self, keys: KeysCollection = "pred", image_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with label maps (1, X, Y, Z), uint8, on the grid of the scan's file."""
        case = dict(data)
        scan = case[self.image_key]
        for key in self.key_iterator(case):
            logits = case[key]
            known = isinstance(scan, MetaTensor) and {"original_affine", "spatial_shape"} <= set(scan.meta)
            if isinstance(logits, MetaTensor) and known:
                case[key] = label_map_of(logits, scan.meta)
            else:
                classes = plain(logits).max(dim=0, keepdim=True).indices
                case[key] = beside(classes.to(kept_type(len(logits))), logits)
        return case


def kept_type(classes: int) -> torch.dtype:
    """Type of a label map of so many classes."""
    return torch.uint8 if classes <= 256 else torch.int32


def label_map_of(logits: MetaTensor, meta: Mapping[str, Any]) -> MetaTensor:
    """See `ArgmaxOnScand`; the grid is that of ``meta``, as ``LoadImaged`` leaves it."""
    affine = torch.as_tensor(meta["original_affine"], dtype=torch.float64)
    shape = tuple(int(side) for side in meta["spatial_shape"])
    voxels = shape[0] * shape[1] * shape[2]
    what = f"the label map of {shape} voxels"
    require_memory(voxels * BYTES_PER_VOXEL, "cpu", what, "use a larger machine")
    with naming_memory_errors(what, "processes"):
        scores = torch.softmax(plain(logits).float().cpu(), dim=0)
        move = linear_resampling(logits.affine, scores.shape[1:], affine, shape)
        best = torch.full(shape, -1.0)
        found = torch.zeros(shape, dtype=kept_type(len(scores)))
        for number, score in enumerate(scores):
            one = move(score)
            higher = one > best
            found[higher] = number
            best = torch.maximum(best, one)
    kept = {key: meta[key] for key in ("filename_or_obj", "original_affine", "spatial_shape", MASK_FILE) if key in meta}
    return MetaTensor(found[None], affine=affine, meta={**kept, "affine": affine})
