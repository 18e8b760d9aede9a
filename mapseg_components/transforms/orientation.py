# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Orientation of scans whose header has none: set explicitly, never guessed."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Transform

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms.dictionary import EachKey
from mapseg_components.transforms.inputs import as_volume, scan_name

__all__ = ["AssumeOrientation", "AssumeOrientationd"]


def check_axcodes(axcodes: str | None) -> None:
    """Refuse a text that is not an orientation; ``None`` passes. Raises `ConfigError`."""
    pairs = [next((n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair), -1) for code in axcodes or ""]
    if axcodes is not None and sorted(pairs) != [0, 1, 2]:
        raise ConfigError(
            f"assume_orientation is {axcodes!r}, expected one letter each of L or R, P or A, I or S, or null"
        )


def assumed_affine(axcodes: str, spacing: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Affine (4, 4) of a grid with spacing (3,) in mm whose axes point to ``axcodes``, its centre at 0 mm."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(axcodes))):
        affine[int(world), axis] = sign * spacing[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


class AssumeOrientation(Transform):
    """Give a scan whose NIfTI header names no orientation (sform and qform codes 0) the affine of a known one.

    Its voxel sides are the header's pixdim, its centre is at 0 mm. Scans that name an orientation are left alone, and
    so is a tensor without a NIfTI header.

    Args:
        axcodes: where the three axes point to, e.g. ``"RAS"``; ``None`` refuses such scans.

    Raises:
        ConfigError: the letters are no orientation.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import AssumeOrientation
        >>> header = {"sform_code": 0, "qform_code": 0, "pixdim": [1.0, 2.0, 2.0, 3.0]}
        >>> scan = MetaTensor(torch.zeros(1, 5, 6, 7), meta=header)
        >>> AssumeOrientation("LPS")(scan).affine.diagonal().tolist()  # in mm; RAS+ is positive
        [-2.0, -2.0, 3.0, 1.0]
    """

    def __init__(self, axcodes: str | None = None) -> None:
        check_axcodes(axcodes)
        self.axcodes = axcodes

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Image (C, X, Y, Z), the same voxels.

        Raises:
            DataError: the header names no orientation and none is assumed.
        """
        img = as_volume(img)
        if not isinstance(img, MetaTensor) or not {"sform_code", "qform_code"} <= set(img.meta):
            return img
        if int(img.meta["sform_code"]) > 0 or int(img.meta["qform_code"]) > 0:
            return img
        if self.axcodes is None:
            raise DataError(
                f"{scan_name(img)}: its header names no orientation (sform and qform codes are 0): "
                "repair the header, or set assume_orientation, such as 'RAS', if you know it"
            )
        spacing = np.asarray(img.meta["pixdim"], dtype=float)[1:4]
        affine = assumed_affine(self.axcodes, spacing, img.shape[1:4])
        result = img.clone()
        result.affine = torch.from_numpy(affine)
        result.meta["original_affine"] = affine
        return result


class AssumeOrientationd(EachKey):
    """Dictionary version of `AssumeOrientation`.

    Args:
        keys: scans (C, X, Y, Z).
        axcodes: where the three axes point to, e.g. ``"RAS"``; ``None`` refuses scans without an orientation.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: the letters are no orientation.
        DataError: in a call, the header names no orientation and none is assumed.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import AssumeOrientationd
        >>> header = {"sform_code": 0, "qform_code": 0, "pixdim": [1.0, 2.0, 2.0, 3.0]}
        >>> case = {"image": MetaTensor(torch.zeros(1, 5, 6, 7), meta=header)}
        >>> AssumeOrientationd(keys="image", axcodes="RAS")(case)["image"].affine.diagonal().tolist()
        [2.0, 2.0, 3.0, 1.0]
    """

    def __init__(self, keys: KeysCollection, axcodes: str | None = None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = AssumeOrientation(axcodes)
