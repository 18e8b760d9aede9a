# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A reader of NIfTI, PNG and TIFF for MONAI's ``LoadImage`` that reads as the data audit does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import NibabelReader
from monai.utils import ensure_tuple

from mapseg_components.errors import DataError
from mapseg_components.scans.files import ENDINGS, PICTURES, Scan, is_picture, is_scan
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.scans.pictures import check_rule, read_picture

__all__ = ["NiftiReader"]


class NiftiReader(NibabelReader):
    """MONAI's ``NibabelReader`` by `read_nifti`: the affine is the one that the audit checks, in mm.

    MONAI's reader compares sform and qform with ``pixdim`` and takes the one that fits, so that an outdated ``pixdim``
    mirrors or moves a scan. It fails on header extensions that other programs skip, and takes all lengths as mm.

    Name it as ``reader`` of ``LoadImage`` or ``LoadImaged``. PNG and TIFF images are scans of one slice, see
    `mapseg_components.scans.pictures.read_picture`. Files with other endings go to MONAI's readers.

    Args:
        rgb: how colours of PNG and TIFF images become one channel, see `mapseg_components.scans.pictures.RGB_RULES`.

    The metadata has ``affine``, ``original_affine``, ``spatial_shape``, ``space``, ``pixdim`` (8,) in mm as the affine
    has it, and ``sform_code`` and ``qform_code``: 1 for a form that can be used, else 0.

    Examples:
        >>> import tempfile
        >>> import nibabel as nib
        >>> import numpy as np
        >>> from monai.transforms import LoadImage
        >>> from mapseg_components.data import NiftiReader
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nib.save(nib.Nifti1Image(np.ones((5, 6, 7)), np.diag([2.0, 2.0, 3.0, 1.0])), f"{folder}/scan.nii.gz")
        ...     scan = LoadImage(reader=NiftiReader, ensure_channel_first=True)(f"{folder}/scan.nii.gz")
        >>> tuple(scan.shape), scan.pixdim.tolist()
        ((1, 5, 6, 7), [2.0, 2.0, 3.0])
    """

    def __init__(self, rgb: str = "luminance") -> None:
        super().__init__()
        check_rule(rgb)
        self.rgb = rgb

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[str]:
        """Names of the files. They are opened by `get_data`: after an error here ``LoadImage`` tries MONAI's readers.

        Raises:
            DataError: a name that is none of NIfTI, PNG or TIFF.
        """
        files = [str(name) for name in ensure_tuple(data)]
        if not all(map(is_scan, files)):
            expected = " or ".join((*ENDINGS, *PICTURES))
            raise DataError(f"{', '.join(files)}: not named {expected}: name another reader")
        return files

    def get_data(self, img: Sequence[str] | str) -> tuple[np.ndarray, dict[str, Any]]:
        """Voxels (X, Y, Z), of several files (files, X, Y, Z), and metadata of the first. Errors as `read_nifti`."""
        self.filenames = files = list(ensure_tuple(img))
        scans = [read_picture(name, self.rgb) if is_picture(name) else read_nifti(name) for name in files]
        return super().get_data(scans)

    def _get_meta_dict(self, img: Scan) -> dict[str, Any]:
        sides = np.linalg.norm(img.affine[:3, :3], axis=0)
        return {
            "pixdim": np.array([1, *sides, 1, 1, 1, 1]),
            "sform_code": int(img.sform is not None),
            "qform_code": int(img.qform is not None),
        }

    def _get_affine(self, img: Scan) -> np.ndarray:
        return img.affine.copy()

    def _get_spatial_shape(self, img: Scan) -> np.ndarray:
        return np.array(img.voxels.shape)

    def _get_array_data(self, img: Scan, filename: str) -> np.ndarray:
        return np.asarray(img.voxels, dtype=img.voxels.dtype.newbyteorder("="))
