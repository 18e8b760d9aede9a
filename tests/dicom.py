# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""DICOM series written by pydicom, which shares no code with the reader under test. The patient is made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

PATIENT = {"PatientName": "Quxley^Zeb", "PatientID": "PID-778899", "PatientBirthDate": "19470813"}
STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}
AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def write_series(
    folder: Path,
    voxels: np.ndarray,
    positions=None,
    axes=AXES,
    spacing=(0.7, 0.9),
    step=2.5,
    number=3,
    modality="CT",
    slope=1.0,
    intercept=0.0,
    uid=None,
    first_file=0,
    **tags,
) -> str:
    """One file per slice of stored integers (X, Y, Z), named against the order of positions; returns the UID.

    Args:
        positions: (Z, 3) of the slices' first voxels, in mm.
        axes: directions of a row and of a column.
        slope: one, or one per slice.
        tags: replace what stands in each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid(entropy_srcs=[str(folder), str(number)])
    normal = np.cross(*axes)
    count = voxels.shape[2]
    positions = (
        [np.array([10.0, 20.0, -30.0]) + n * step * normal for n in range(count)] if positions is None else positions
    )
    slopes = np.broadcast_to(slope, count)
    for n in range(count):
        name = folder / f"IM{first_file + count - n:04d}.dcm"
        geometry = {
            "ImagePositionPatient": [f"{v:.8g}" for v in positions[n]],
            "ImageOrientationPatient": [f"{v:.10g}" for v in (*axes[0], *axes[1])],
            "PixelSpacing": [spacing[1], spacing[0]],
            "RescaleSlope": f"{slopes[n]:g}",
            "RescaleIntercept": f"{intercept:g}",
        }
        series = {"SeriesInstanceUID": uid, "SeriesNumber": number}
        write_file(name, voxels[..., n].T, modality=modality, **{**series, **geometry, **tags})
    return uid


def write_file(path: Path, pixels: np.ndarray, modality="CT", **tags) -> None:
    """One object: ``pixels`` are (rows, columns), or (frames, rows, columns); a tag of ``None`` is left out."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = EnhancedMRImageStorage if pixels.ndim == 3 else STORAGE[modality]
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.StudyInstanceUID = modality, generate_uid(entropy_srcs=["study"])
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    if pixels.ndim == 3:
        data.NumberOfFrames = pixels.shape[0]
    for name, value in {**PATIENT, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    data.PixelData = np.ascontiguousarray(pixels.astype("<i2")).tobytes()
    data.save_as(path, enforce_file_format=True)
