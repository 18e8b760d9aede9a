# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Saving volumes with verification: a file is read back and compared before it gets its name.

MONAI's ``SaveImage`` writes in place, accepts incomplete files of some writers on a full disk, and reports every
failure of the others as a missing library. Its ``NibabelWriter`` writes no unit of length, and a qform also where that
cannot represent the affine.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImage, SaveImaged
from monai.utils import MetaKeys
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from mapseg_components.boxes import corner_distance
from mapseg_components.errors import ConfigError, NonFiniteError, ResourceError
from mapseg_components.files import replacing
from mapseg_components.scans.files import is_picture, result_ending
from mapseg_components.scans.picture_writing import write_picture

__all__ = ["SaveLabelMap", "SaveLabelMapd", "SaveVolume", "SaveVolumed", "nifti_image", "write_verified"]

# the largest class that each type holds
LABEL_TYPES = (np.uint8, np.int16)
QFORM_TOLERANCE_MM = 1e-3  # of a corner; readers that compare the forms may refuse more


class SaveVolume(SaveImage):
    """Save a volume as float32 NIfTI and verify the file; after an error there is no new file.

    The result of a PNG or TIFF image is an image of the same pixels: TIFF, or for label maps the scan's own format.

    The file is written under a temporary name in the same folder, read back, compared (shape, type, affine and every
    voxel, all without tolerance; NIfTI keeps the affine as float32) and then renamed. If a step fails, an earlier file
    of that name is unchanged.

    Args:
        output_dir: folder; made if missing.
        output_postfix: ``scan.nii.gz`` becomes ``scan_<postfix>.nii.gz``.
        output_ext: ``".nii.gz"`` or ``".nii"``.
        separate_folder: put each file into a folder named as its scan.
        overwrite: replace an existing file; otherwise it is an error. A symbolic link is replaced, never followed.
        savepath_in_metadict: note the path in the metadata as ``saved_to``.

    Raises:
        ConfigError: the ending is another one.

    Examples:
        >>> import os, tempfile
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import SaveVolume
        >>> volume = MetaTensor(torch.rand(1, 5, 6, 7), meta={"filename_or_obj": "scans/a.nii.gz"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     volume = SaveVolume(folder, output_postfix="map")(volume)
        ...     os.listdir(folder)
        ['a_map.nii.gz']
    """

    fractions = True  # values need not be whole

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = "./",
        output_postfix: str = "trans",
        output_ext: str = ".nii.gz",
        separate_folder: bool = False,
        overwrite: bool = False,
        savepath_in_metadict: bool = False,
    ) -> None:
        super().__init__(
            output_dir=output_dir,
            output_postfix=output_postfix,
            output_ext=output_ext,
            separate_folder=separate_folder,
            print_log=False,
            writer=NibabelWriter,
            savepath_in_metadict=savepath_in_metadict,
        )
        if output_ext not in (".nii.gz", ".nii"):
            raise ConfigError(f"output_ext is {output_ext!r}, expected '.nii.gz' or '.nii'")
        self.folder_layout.makedirs = False  # `replacing` makes folders, with a plain error if it cannot
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def __call__(
        self,
        img: torch.Tensor | np.ndarray,
        meta_data: dict[str, Any] | None = None,
        filename: str | os.PathLike[str] | None = None,
    ) -> torch.Tensor | np.ndarray:
        """Save and return the volume.

        Args:
            img: (1, X, Y, Z).
            meta_data: its ``affine`` and ``filename_or_obj``, where ``img`` is no ``MetaTensor``.
            filename: path without its ending, instead of what the settings above give.

        Raises:
            ConfigError: the volume has another shape, its values do not fit, or the file exists.
            NonFiniteError: it holds NaN or infinite values.
            ResourceError: the disk is full, cannot be written, or does not give back what was written.
        """
        meta_data = img.meta if isinstance(img, MetaTensor) else meta_data or {}
        scan = str(meta_data.get("filename_or_obj") or "")
        if filename is None:
            path = Path(self.folder_layout.filename(**self.fname_formatter(meta_data, self)))
            if is_picture(scan):
                ending = result_ending(scan, self.fractions)
                path = path.with_name(f"{path.name.removesuffix(self.output_ext)}{ending}")
            if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(self.output_dir)):
                raise ConfigError(f"{path} would lie outside of {self.output_dir}: rename the scan")
        else:
            path = Path(f"{filename}{self.output_ext}")
        if img.ndim != 4 or img.shape[0] != 1:
            raise ConfigError(f"{path}: shape {tuple(img.shape)}, expected (1, X, Y, Z): save one channel")
        if not self.overwrite and os.path.lexists(path):
            raise ConfigError(f"{path} exists: set overwrite to true, or choose another output_dir")
        voxels = self.typed(np.asarray(img.detach().cpu() if isinstance(img, torch.Tensor) else img)[0], path)
        affine = NibabelWriter.get_meta_info(meta_data)[1]
        affine = np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
        with replacing(path) as temporary:
            if is_picture(path):
                write_picture(temporary, unsigned(voxels), affine, scan, path)
            else:
                write_verified(temporary, voxels, affine, path)
        self._data_index += 1
        if self.savepath_in_metadict:
            meta_data[MetaKeys.SAVED_TO] = str(path)
        return img

    def typed(self, voxels: np.ndarray, path: Path) -> np.ndarray:
        """Voxels (X, Y, Z) in the type of the file; ``path`` is for messages."""
        bad = voxels.size - int(np.isfinite(voxels).sum())
        if bad:
            raise NonFiniteError(f"{path}: {bad} voxels are NaN or infinite, not written: check the weights and amp")
        return voxels.astype(np.float32)


class SaveLabelMap(SaveVolume):
    """Save a label map as integers (uint8, or int16 for classes above 255) and verify the file, see `SaveVolume`.

    Args:
        output_dir: folder; made if missing.
        output_postfix: ``scan.nii.gz`` becomes ``scan_<postfix>.nii.gz``.
        output_ext: ``".nii.gz"`` or ``".nii"``.
        separate_folder: put each file into a folder named as its scan.
        overwrite: replace an existing file; otherwise it is an error. A symbolic link is replaced, never followed.
        savepath_in_metadict: note the path in the metadata as ``saved_to``.
        num_classes: with background; fixes the type of all files and refuses higher values. By default the
            largest value of each map decides.

    Raises:
        ConfigError: the ending is another one, or ``num_classes`` is out of bounds; or, in a call, values are not
            whole numbers from 0 to the largest class, or as `SaveVolume`.

    Examples:
        >>> import tempfile
        >>> import nibabel as nib
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import SaveLabelMap
        >>> label_map = MetaTensor(torch.ones(1, 5, 6, 7), meta={"filename_or_obj": "scans/a.nii.gz"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     label_map = SaveLabelMap(folder, num_classes=3)(label_map)
        ...     nib.load(f"{folder}/a_seg.nii.gz").get_data_dtype()
        dtype('uint8')
    """

    fractions = False

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = "./",
        output_postfix: str = "seg",
        output_ext: str = ".nii.gz",
        separate_folder: bool = False,
        overwrite: bool = False,
        savepath_in_metadict: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(output_dir, output_postfix, output_ext, separate_folder, overwrite, savepath_in_metadict)
        self.num_classes = num_classes
        if num_classes is not None and not 1 <= num_classes <= np.iinfo(LABEL_TYPES[-1]).max + 1:
            raise ConfigError(f"num_classes is {num_classes}, expected 1 to {np.iinfo(LABEL_TYPES[-1]).max + 1}")

    def typed(self, voxels: np.ndarray, path: Path) -> np.ndarray:
        """Whole numbers from 0 in the smallest type that holds the largest class."""
        largest = np.iinfo(LABEL_TYPES[-1]).max if self.num_classes is None else self.num_classes - 1
        low, high = float(voxels.min()), float(voxels.max())  # NaN if there is one
        if not (0 <= low and high <= largest) or bool((voxels != np.rint(voxels)).any()):
            raise ConfigError(
                f"{path}: values {low:g} to {high:g}, expected whole numbers from 0 to {largest}: take the argmax of "
                "logits (AsDiscreted) and invert with nearest_interp before saving a label map"
            )
        decisive = high if self.num_classes is None else largest
        return voxels.astype(next(kind for kind in LABEL_TYPES if decisive <= np.iinfo(kind).max))


def unsigned(voxels: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 in a type that images have."""
    return voxels.astype(np.uint16) if voxels.dtype == np.int16 else voxels


def write_verified(temporary: Path, voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels (X, Y, Z) in their type with an affine (4, 4), and verify the file.

    Args:
        temporary: path that `replacing` gave.
        voxels: (X, Y, Z).
        affine: (4, 4), from voxel index to mm.
        path: the file's later name, for messages.

    Raises:
        ResourceError: it differs; see `verify`.
    """
    nib.save(nifti_image(voxels, affine), temporary)
    verify(temporary, voxels, affine, path)


def nifti_image(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """NIfTI image of voxels (X, Y, Z) or (X, Y, Z, channels) in their type, with an unambiguous header.

    The sform is the affine (4, 4), from voxel to mm. So is the qform, or it is not in use (code 0) where a quaternion
    cannot hold the affine: if that is sheared, or by rounding near a half turn. ``pixdim`` and the unit (mm) agree.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_xyzt_units("mm")
    image = nib.Nifti1Image(voxels, affine, header)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if corner_distance(voxels.shape[:3], image.get_qform(), affine) > QFORM_TOLERANCE_MM:
        image.set_qform(None, code=0)
    return image


def verify(temporary: Path, voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Read a file to its end, checksum included, and compare it with what was to be written.

    Raises:
        ResourceError: it differs; the message has ``path``, the file's later name.
    """
    try:
        content = temporary.read_bytes()
        found = nib.Nifti1Image.from_bytes(gzip.decompress(content) if temporary.name.endswith(".gz") else content)
        differing = [
            name
            for name, equal in (
                ("shape", found.shape == voxels.shape),
                ("type", found.get_data_dtype() == voxels.dtype),
                ("affine", np.array_equal(found.affine, affine.astype(np.float32))),
            )
            if not equal
        ] or ([] if np.array_equal(np.asanyarray(found.dataobj), voxels) else ["voxels"])
    except (ImageFileError, HeaderDataError, WrapStructError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ResourceError(
            f"{path}: cannot be read back ({error}), nothing was kept: free space, check the disk, or choose "
            "another output_dir"
        ) from error
    if differing:
        raise ResourceError(
            f"{path}: {' and '.join(differing)} read back differ from what was written, nothing was kept: "
            "check the disk, or choose another output_dir"
        )


class SaveVolumed(SaveImaged):
    """Dictionary version of `SaveVolume`.

    Args:
        keys: volumes (1, X, Y, Z).
        output_dir: folder; made if missing.
        output_postfix: ``scan.nii.gz`` becomes ``scan_<postfix>.nii.gz``.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.
        settings: the other arguments of `SaveVolume`.

    Raises:
        ConfigError: as `SaveVolume`.

    Examples:
        >>> import os, tempfile
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import SaveVolumed
        >>> case = {"image": MetaTensor(torch.rand(1, 5, 6, 7), meta={"filename_or_obj": "scans/a.nii.gz"})}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     case = SaveVolumed(keys="image", output_dir=folder, output_ext=".nii")(case)
        ...     os.listdir(folder)
        ['a_trans.nii']
    """

    saver_type: type[SaveVolume] = SaveVolume

    def __init__(
        self,
        keys: Hashable | Iterable[Hashable],
        output_dir: str | os.PathLike[str] = "./",
        output_postfix: str = "trans",
        allow_missing_keys: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, allow_missing_keys=allow_missing_keys)
        self.saver = self.saver_type(output_dir=output_dir, output_postfix=output_postfix, **settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save the volumes under the keys; returns the dictionary."""
        return super().__call__(data)


class SaveLabelMapd(SaveVolumed):
    """Dictionary version of `SaveLabelMap`.

    A subclass of MONAI's ``SaveImaged``, which MONAI Label drops from a bundle's postprocessing by its type.

    Args:
        keys: label maps (1, X, Y, Z).
        output_dir: folder; made if missing.
        output_postfix: ``scan.nii.gz`` becomes ``scan_<postfix>.nii.gz``.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.
        settings: the other arguments of `SaveLabelMap`.

    Raises:
        ConfigError: as `SaveLabelMap`.

    Examples:
        >>> import os, tempfile
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import SaveLabelMapd
        >>> case = {"pred": MetaTensor(torch.ones(1, 5, 6, 7), meta={"filename_or_obj": "scans/a.nii.gz"})}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     case = SaveLabelMapd(keys="pred", output_dir=folder)(case)
        ...     os.listdir(folder)
        ['a_seg.nii.gz']
    """

    saver_type = SaveLabelMap

    def __init__(
        self,
        keys: Hashable | Iterable[Hashable],
        output_dir: str | os.PathLike[str] = "./",
        output_postfix: str = "seg",
        allow_missing_keys: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(keys, output_dir, output_postfix, allow_missing_keys, **settings)
