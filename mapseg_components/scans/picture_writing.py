# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Results of PNG and TIFF images in the image's own format, pixel for pixel, with its resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from mapseg_components.errors import ConfigError, MAPSegError, ResourceError
from mapseg_components.scans.files import is_picture, opened
from mapseg_components.scans.pictures import KIND, UM_IN_MM, parse, read_picture
from mapseg_components.scans.pixel_size import RESOLUTION_UNIT, X_RESOLUTION, Y_RESOLUTION, Resolution, resolution_of

__all__ = ["write_picture"]

CENTIMETRE = 3  # of RESOLUTION_UNIT
KINDS = (np.uint8, np.uint16, np.float32)


def write_picture(temporary: Path, voxels: np.ndarray, affine: np.ndarray, like: str | Path, path: Path) -> None:
    """Write voxels as a grey image in the format of the file's name, and verify it.

    Args:
        temporary: where, with an ending of `mapseg_components.scans.files.PICTURES`.
        voxels: (X, Y, 1), uint8, uint16 or, in TIFF, float32.
        affine: (4, 4) in um; its pixel size is written where that of the scan is known.
        like: file of the scan: its resolution is repeated as it is, where its header has one.
        path: the file's later name, for messages.

    Raises:
        ConfigError: several slices, or a type that the format does not hold.
        ResourceError: the disk is full, or does not give back what was written.
    """
    png = temporary.suffix.lower() == ".png"
    if voxels.ndim != 3 or voxels.shape[2] != 1 or voxels.dtype not in (KINDS[:2] if png else KINDS):
        raise ConfigError(
            f"{path}: {voxels.dtype} of shape {voxels.shape}, expected one slice (X, Y, 1) of uint8 or uint16"
            f"{'' if png else ' or float32'}: save it as NIfTI"
        )
    image_module, _ = optional_import("PIL.Image")
    image = image_module.fromarray(np.ascontiguousarray(voxels[..., 0].T))
    resolution = resolution_like(like, affine)
    options: dict[str, Any] = {}
    if png:
        options = {"format": "PNG"}
        if resolution is not None:
            options["dpi"] = (resolution.across * 25.4, resolution.down * 25.4)
    else:
        options = {"format": "TIFF", "compression": "tiff_adobe_deflate"}
        if resolution is not None:
            options["tiffinfo"] = {
                X_RESOLUTION: resolution.across * 10,
                Y_RESOLUTION: resolution.down * 10,
                RESOLUTION_UNIT: CENTIMETRE,
            }
    image.save(temporary, **options)
    try:
        same = np.array_equal(read_picture(temporary).voxels, voxels)
    except MAPSegError as error:
        raise ResourceError(
            f"{path}: cannot be read back ({error}), nothing was kept: free space, check the disk, or choose another "
            "output_dir"
        ) from error
    if not same:
        raise ResourceError(
            f"{path}: pixels read back differ from what was written, nothing was kept: check the disk, or choose "
            "another output_dir"
        )


def resolution_like(like: str | Path, affine: np.ndarray) -> Resolution | None:
    """Resolution of a file's header, whatever it means; without one, that of an affine (4, 4) in um, if the pixel size
    is known: of a file that is gone, unless it is 1."""
    path = Path(like)
    sides = np.linalg.norm(np.asarray(affine, dtype=float)[:3, :2], axis=0)
    sized = not np.allclose(sides, 1.0)
    if is_picture(path) and path.is_file():
        with opened(path, KIND) as stream:
            image, header = parse(path, stream)
            sized = header.sides is not None
            if path.suffix.lower() == ".png":
                dots = image.info.get("dpi")
                found = None if dots is None else Resolution(dots[0] / 25.4, dots[1] / 25.4)
            else:
                found = resolution_of(image.tag_v2, str(image.tag_v2.get(270, "")))
        if found is not None and found.sides is not None:
            return found
    return Resolution(UM_IN_MM / float(sides[0]), UM_IN_MM / float(sides[1])) if sized else None
