# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inputs of transforms: tensors with and without metadata, and NumPy arrays, as in MONAI."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_tensor

from mapseg_components.errors import ConfigError, DataError

__all__ = [
    "MASK_FILE",
    "as_volume",
    "channel_name",
    "outside_tissue",
    "require_spatial",
    "scan_name",
    "tissue_is_raised",
]

MASK_FILE = "mask_file"  # in a scan's metadata: 0 is no tissue, by this file if there is one, see `RaiseTissued`

WIDENED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def as_volume(img: Any) -> torch.Tensor:
    """A tensor as it is, an array as a tensor; MONAI widens types that torch has no arithmetic for, such as uint16.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(img, torch.Tensor):
        return img.to(WIDENED.get(img.dtype, img.dtype))  # the same object where nothing changes
    if not isinstance(img, np.ndarray) or img.dtype.kind not in "biuf":
        found = f"array of {img.dtype}" if isinstance(img, np.ndarray) else type(img).__name__
        raise ConfigError(f"got {found}, expected a tensor or an array of numbers: load scans first (LoadImaged)")
    return convert_to_tensor(img.astype(img.dtype.newbyteorder("="), copy=False))


def require_spatial(img: torch.Tensor, name: str) -> None:
    """Refuse what is not (C, X, Y, Z). Raises `DataError`; ``name`` is for its message."""
    if img.ndim != 4:
        raise DataError(f"{name} has shape {tuple(img.shape)}, expected (C, X, Y, Z): put EnsureChannelFirstd before")


def tissue_is_raised(image: Any) -> bool:
    """Whether all tissue of a scan is above 0, and what is 0 counts nowhere."""
    return isinstance(image, MetaTensor) and MASK_FILE in image.meta


def outside_tissue(image: torch.Tensor) -> torch.Tensor | None:
    """Where (X, Y, Z) a preprocessed scan (C, X, Y, Z) has no tissue; ``None`` if all of it counts."""
    return (image.as_subclass(torch.Tensor) == 0).all(dim=0) if tissue_is_raised(image) else None


def scan_name(image: Any) -> str:
    """File name of a scan for messages, if it is in the tensor's metadata."""
    return str(image.meta.get("filename_or_obj", "a scan in memory")) if isinstance(image, MetaTensor) else "a scan"


def channel_name(image: Any, channel: int) -> str:
    """Name of a scan, and of its channel if it has several, for messages."""
    return f"{scan_name(image)}, channel {channel}" if len(image) > 1 else scan_name(image)
