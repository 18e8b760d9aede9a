# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the values of a DICOM slice mean: grey or colour, padding, and which end is dark (DICOM PS3.3 C.7.6.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapseg_components.scans.dicom_objects import DicomObject
from mapseg_components.scans.findings import fault

__all__ = ["require_grey", "values_of_tissue"]

DARK_IS_HIGH, DARK_IS_LOW = "MONOCHROME1", "MONOCHROME2"
QUANTITIES = ("CT", "PT")  # modalities whose rescaled values have a unit, however they are to be displayed
HOUNSFIELD = "HU"
AIR_HU = -1000.0


def require_grey(header: DicomObject) -> None:
    """Refuse colours, and values that a rescale slope does not describe. Raises `DataError`."""
    photometric = header.tags["photometric"].upper()
    if photometric not in (DARK_IS_HIGH, DARK_IS_LOW, ""):
        what = f"its photometric interpretation is {photometric}: colours, expected grey values ({DARK_IS_LOW})"
        raise fault(header.file, what, "leave the series out")
    if header.tags["modality_lut"]:
        what = "its values go through a table (Modality LUT Sequence), expected rescale slope and intercept"
        raise fault(header.file, what, "export the series with rescaled values")


def values_of_tissue(voxels: np.ndarray, headers: Sequence[DicomObject], modality: str) -> tuple[str, ...]:
    """Put the values of a volume right, in place, as the standard says.

    - MONOCHROME1: the lowest value is the brightest. Values with a unit (Hounsfield units, PET) mean what they say and
      stay; all others are turned over, so that the darkest becomes 0.
    - Pixel Padding Value, and the range up to Pixel Padding Range Limit: no tissue. It becomes air in Hounsfield
      units, else 0, or the lowest value of tissue if that is lower.

    Args:
        voxels: (X, Y, Z) as ITK reads them, which takes MONOCHROME1 over the whole range of the stored bits.
        headers: of the Z slices.
        modality: of the series.

    Returns:
        what was done, one sentence each; empty for most series.
    """
    notes = []
    inverted = [n for n, header in enumerate(headers) if header.tags["photometric"].upper() == DARK_IS_HIGH]
    for n in inverted:
        slope, intercept = scaling(headers[n])
        bits = int(headers[n].number("stored") or headers[n].number("allocated") or 16)
        whole_range = -1 if headers[n].tags["signed"] == "1" else 2**bits - 1  # what ITK takes the stored values from
        voxels[..., n] = slope * whole_range + 2 * intercept - voxels[..., n]
    padded = np.zeros(voxels.shape, bool) if any(header.tags["padding"] for header in headers) else None
    if padded is not None:
        for n, header in enumerate(headers):
            bounds = padding_bounds(header)
            if bounds is not None:
                padded[..., n] = (voxels[..., n] >= bounds[0]) & (voxels[..., n] <= bounds[1])
        if padded.all() or not padded.any():
            padded = None
    hounsfield = modality == "CT" or any(header.tags["rescale_type"].upper() == HOUNSFIELD for header in headers)
    if inverted and (hounsfield or modality in QUANTITIES):
        notes.append(f"{DARK_IS_HIGH} says how it is displayed; its values have a unit and stay as they are")
    elif inverted:
        darkest = voxels[..., inverted].max(initial=-np.inf, where=True if padded is None else ~padded[..., inverted])
        voxels[..., inverted] = darkest - voxels[..., inverted]
        notes.append(f"{DARK_IS_HIGH}, low values are bright: its values were taken from {darkest:g}")
    if padded is not None:
        lowest = float(voxels.min(initial=np.inf, where=~padded))
        background = min(lowest, AIR_HU if hounsfield and lowest < 0 else 0.0)
        changed = int((padded & (voxels != background)).sum())
        voxels[padded] = background
        if changed:
            notes.append(f"{changed} voxels are pixel padding, no tissue: they were set to {background:g}")
    return tuple(notes)


def scaling(header: DicomObject) -> tuple[float, float]:
    """Rescale slope and intercept of a slice."""
    return header.number("slope", 1.0), header.number("intercept", 0.0)  # type: ignore[return-value]


def padding_bounds(header: DicomObject) -> tuple[float, float] | None:
    """Lowest and highest rescaled value that is padding, with half a step of the stored values around; or ``None``."""
    value = header.number("padding")
    if value is None:
        return None
    limit = header.number("padding_limit", value)
    slope, intercept = scaling(header)
    ends = [slope * as_stored(header, end) + intercept for end in (value, limit) if end is not None]
    return min(ends) - abs(slope) / 2, max(ends) + abs(slope) / 2


def as_stored(header: DicomObject, value: float) -> float:
    """A padding value as the voxels have it: its sign is theirs, whatever sign its own tag was written with."""
    bits = int(header.number("allocated") or 16)
    if header.tags["signed"] == "1":
        return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    return value % 2**bits
