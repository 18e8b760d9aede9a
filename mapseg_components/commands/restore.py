# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg restore``: a label map of a prepared scan, back on the grid of the original scan."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.errors import ConfigError
from mapseg_components.files import require_writable
from mapseg_components.scans.findings import fault
from mapseg_components.scans.nifti import ENDINGS, read_nifti
from mapseg_components.scans.sidecars import read_sidecar
from mapseg_components.transforms.resampling import resample
from mapseg_components.transforms.saving import SaveLabelMap

__all__ = ["restore"]

GRID_TOLERANCE_MM = 1e-3  # affines of files are float32


def restore(
    label_map: str | os.PathLike[str],
    sidecar: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Resample a label map from the grid of the prepared scan to the native one, by the nearest voxel.

    Shape and affine of the result are those of the source scan (the affine as NIfTI keeps it, in float32); it is
    read back and compared before it takes its place.

    Args:
        label_map: NIfTI file on the prepared grid: what a model made of the prepared scan, or its prepared label map.
        sidecar: the ``.json`` file beside the prepared scan.
        output: ``.nii.gz`` or ``.nii`` file to write.
        overwrite: replace it if it exists.

    Returns:
        ``output``.

    Raises:
        ConfigError: the sidecar is none, ``output`` has another ending or exists, or values are no whole numbers.
        DataError: the label map cannot be read, or is not on the prepared grid.
        ResourceError: memory or disk do not suffice.
    """
    path, grids = Path(output), read_sidecar(sidecar)
    ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
    if ending is None:
        raise ConfigError(f"output is {path}, expected a name that ends with .nii.gz or .nii: rename it")
    if grids.native is None or grids.prepared is None:
        raise fault(sidecar, "a sidecar without grids", "prepare the scan again", ConfigError)
    label = read_nifti(label_map)
    prepared, native = np.array(grids.prepared.affine), np.array(grids.native.affine)
    if label.voxels.shape != grids.prepared.shape:
        what = f"shape {label.voxels.shape}, its prepared scan has {grids.prepared.shape} by {sidecar}"
        raise fault(label_map, what, "name the sidecar of its scan")
    distance = corner_distance(grids.prepared.shape, label.affine, prepared)
    if distance > GRID_TOLERANCE_MM:
        what = f"its affine puts a corner {distance:.3f} mm away from where {sidecar} has it"
        raise fault(label_map, what, "name the sidecar of its scan")
    require_writable(path.parent)
    voxels = resample(label.voxels, prepared, grids.native.shape, native, "nearest")
    save = SaveLabelMap(output_dir=path.parent, output_ext=ending, overwrite=overwrite)
    save(voxels[None], {"affine": native}, str(path).removesuffix(ending))
    return path
