# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The working frame: one direction of each array axis in all scans, whatever way their slices were laid."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Orientation, Orientationd, Spacingd

from mapseg_components.boxes import is_thick
from mapseg_components.errors import ConfigError
from mapseg_components.transforms.inputs import as_volume

__all__ = ["WorkingFrame", "WorkingFramed", "WorkingSpacingd", "axes_in_frame"]

RAS = np.eye(3)
TILTED = 0.5  # cosine of 60 degrees between a scan's slices and the frame's: beyond, they are other slices


def axes_in_frame(affine: np.ndarray, directions: np.ndarray) -> list[tuple[int, int]]:
    """The axis of a scan, and its sign, that each axis of the frame takes: the nearest of all 48 ways.

    The slices of a stack of thick slices are those of the frame unless they are tilted by more than 60 degrees: the
    nearest way alone would lay oblique stacks of one kind along different axes.

    Args:
        affine: (4, 4), from voxel index to mm in RAS+.
        directions: (3, 3), the direction of each axis of the frame in RAS+, a unit vector each. The third is that of
            the slices.

    Returns:
        for each axis of the frame, the scan's axis and 1 or -1.
    """
    spacing = nib.affines.voxel_sizes(affine)
    cosines = directions @ (affine[:3, :3] / spacing)  # of frame's axis (row) and scan's (column)
    orders = list(itertools.permutations(range(3)))
    slices = int(np.argmax(spacing))
    if is_thick(spacing) and abs(cosines[2, slices]) >= TILTED:
        orders = [order for order in orders if order[2] == slices]
    best = max(orders, key=lambda order: sum(abs(cosines[axis, order[axis]]) for axis in range(3)))
    return [(axis, 1 if cosines[place, axis] >= 0 else -1) for place, axis in enumerate(best)]


class WorkingFrame(Orientation):
    """MONAI's ``Orientation`` to the nearest axes of a frame that need not be those of the body.

    Scans near to isotropic are laid by the body's axes. Stacks of thick slices that lie obliquely, such as short-axis
    views of the heart, are nearest to other axes of the body in each patient; a frame in their own direction lays them
    all alike. Voxels are swapped and flipped, never interpolated.

    Args:
        directions: (3, 3), the direction of each array axis in RAS+, the slices' last; by default right, anterior and
            superior, where it is ``Orientation(axcodes="RAS")`` but for stacks of thick slices.

    Raises:
        ConfigError: the directions are not three unit vectors at right angles.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import WorkingFrame
        >>> scan = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0])))
        >>> WorkingFrame([[0, 1, 0], [0, 0, 1], [1, 0, 0]])(scan).shape  # anterior, superior, right
        torch.Size([1, 5, 6, 4])
    """

    def __init__(self, directions: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__(axcodes="RAS", labels=None)
        self.directions = frame_of(directions)

    def __call__(self, data_array: torch.Tensor, lazy: bool | None = None) -> torch.Tensor:
        """Image (C, X, Y, Z) or (C, ...) with an affine, laid in the frame."""
        data_array = as_volume(data_array)
        affine = data_array.affine.numpy() if isinstance(data_array, MetaTensor) else np.eye(4)
        if not np.array_equal(self.directions, RAS):
            codes = nib.orientations.aff2axcodes(affine)
            opposite = dict(zip("LRPAIS", "RLAPSI"))
            laid = axes_in_frame(np.asarray(affine, dtype=float), self.directions)
            self.axcodes = "".join(codes[axis] if sign > 0 else opposite[codes[axis]] for axis, sign in laid)
        return super().__call__(data_array, lazy=lazy)


class WorkingFramed(Orientationd):
    """Dictionary version of `WorkingFrame`.

    Args:
        keys: scans and label maps (C, X, Y, Z).
        directions: (3, 3), the direction of each array axis in RAS+; by default right, anterior, superior.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import WorkingFramed
        >>> scan = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])))
        >>> WorkingFramed("image")({"image": scan})["image"].affine.diagonal().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        keys: KeysCollection,
        directions: Sequence[Sequence[float]] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, axcodes="RAS", labels=None, allow_missing_keys=allow_missing_keys)
        self.ornt_transform = WorkingFrame(directions)


class WorkingSpacingd(Spacingd):
    """MONAI's ``Spacingd``, beside entries of any kind: that takes every entry named ``image_...`` for metadata of
    ``image``, and fails on the ``image_path`` of MONAI Label.

    Args:
        keys: scans and label maps (C, X, Y, Z).
        pixdim: wanted spacing in mm, one per axis, 0 for an axis that stays as it is.
        options: others of ``Spacingd``.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import WorkingSpacingd
        >>> scan = MetaTensor(torch.zeros(1, 5, 7, 9), meta={"filename_or_obj": "scan.nii.gz"})
        >>> case = WorkingSpacingd("image", pixdim=(2, 2, 2))({"image": scan, "image_path": "scan.nii.gz"})
        >>> case["image"].shape, case["image_path"]
        (torch.Size([1, 3, 4, 5]), 'scan.nii.gz')
    """

    def __init__(self, keys: KeysCollection, pixdim: Sequence[float], **options: Any) -> None:
        super().__init__(keys, pixdim, **options)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Case whose volumes have the spacing; all other entries are as they were."""
        own = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(own, lazy)}


def frame_of(directions: Sequence[Sequence[float]] | None) -> np.ndarray:
    """Directions (3, 3) of a frame. Raises `ConfigError`."""
    if directions is None:
        return RAS
    try:
        found = np.asarray(directions, dtype=float)
    except (TypeError, ValueError):  # letters, or rows of different lengths
        found = np.zeros(0)
    if found.shape != (3, 3) or not np.allclose(found @ found.T, RAS, atol=0.01):
        raise ConfigError(
            f"working_directions is {directions!r}, expected three unit vectors at right angles, the "
            "direction of each array axis in RAS+, or null"
        )
    return found
