# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A label map as DICOM Segmentation (DICOM-SEG) of the series that it was made from, by highdicom.

Unlike all other results it holds what the series says about the patient and the study: DICOM demands it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import structure_colours
from mapseg_components.errors import ConfigError, MAPSegError, ResourceError
from mapseg_components.files import replacing
from mapseg_components.scans.dicom import Series, ordered_files
from mapseg_components.scans.findings import fault
from mapseg_components.scans.lookup import printable

__all__ = ["Algorithm", "reference_headers", "require_highdicom", "write_segmentation"]

LONGEST = 64  # bytes of a label or meaning in DICOM
# what a segmentation must repeat, though it may be empty; anonymised files often have it taken out
MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")
MAY_BE_EMPTY += ("StudyDate", "StudyTime")
NEEDED = {"StudyInstanceUID": "Study Instance UID", "FrameOfReferenceUID": "Frame of Reference UID"}
# No standard code fits structures of any name: the category claims no more than a place in space, the type is a
# private code made of the structure's name.
CATEGORY = ("309825002", "SCT", "Spatial and Relational Concept")
PRIVATE_SCHEME = "99MAPSEG"
FAMILY = ("123109", "DCM", "Artificial Intelligence")
MAKER, PROGRAM = "MAPSeg for MONAI contributors", "mapseg predict"
NUMBER_OFFSET = 1000  # series 3 is segmented in series 1003
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError)  # of pydicom and highdicom


@dataclass(frozen=True)
class Algorithm:
    """What made a label map.

    Args:
        name: of the bundle.
        version: of the bundle.
        program: version of this package.
        weights: the start of the weights' sha256, several joined by ``+``.
    """

    name: str
    version: str
    program: str
    weights: str


def require_highdicom() -> None:
    """Raise `ConfigError` if highdicom or pydicom is missing."""
    for name in ("pydicom", "highdicom"):
        if not optional_import(name)[1]:
            raise ConfigError(f"dicom_seg needs {name}, which is not installed: pip install 'mapseg-monai[dicom]'")


def reference_headers(series: Series) -> list[Any]:
    """Headers of a series in the order of its slices, as pydicom has them.

    Raises:
        DataError: one cannot be read, or lacks what a segmentation refers to.
    """
    dcmread, _ = optional_import("pydicom", name="dcmread")
    headers = []
    for file in ordered_files(series):
        try:
            content = dcmread(file, stop_before_pixels=True)
        except (OSError, *DAMAGED) as error:
            raise fault(file, "its header cannot be read", "export the series again, or leave out dicom_seg") from error
        for key, name in NEEDED.items():
            if not content.get(key):
                what = f"its header has no {name}, which a DICOM-SEG refers to"
                raise fault(file, what, "leave out dicom_seg, or repair the header")
        for key in MAY_BE_EMPTY:
            if key not in content:
                setattr(content, key, None)
        headers.append(content)
    try:
        ends = [np.array(header.ImagePositionPatient, dtype=float) for header in (headers[0], headers[-1])]
        for header in headers:  # of one volume, as `ordered_files` has checked; said alike, and where it may be missing
            header.ImageOrientationPatient = headers[0].ImageOrientationPatient
            header.SpacingBetweenSlices = float(np.linalg.norm(ends[1] - ends[0]) / (len(headers) - 1))
            header.SliceThickness = header.get("SliceThickness") or header.SpacingBetweenSlices
    except DAMAGED as error:
        raise unusable(series, error) from error
    return headers


def write_segmentation(
    series: Series, label_map: np.ndarray, names: Sequence[str], algorithm: Algorithm, path: str | Path
) -> None:
    """Write a label map as binary segments, one per structure; read it back, or leave what was there.

    Args:
        series: the label map's.
        label_map: (X, Y, Z) on the grid of `read_series`, integers, 0 background.
        names: structures in the order of their value.
        algorithm: what made it.
        path: the file.

    Raises:
        DataError: the series has no header that a segmentation could refer to.
        ResourceError: the disk is full, cannot be written, or does not give back what was written.
    """
    require_highdicom()
    headers = reference_headers(series)
    slices = np.ascontiguousarray(np.asarray(label_map).T).astype(np.uint16 if len(names) > 255 else np.uint8)
    segmentation, _ = optional_import("highdicom.seg")
    new_uid, _ = optional_import("highdicom", name="UID")
    try:
        content = segmentation.Segmentation(
            source_images=headers,
            pixel_array=slices,
            segmentation_type="BINARY",
            segment_descriptions=descriptions(names, algorithm),
            series_instance_uid=new_uid(),
            series_number=NUMBER_OFFSET + max(series.number, 0),
            sop_instance_uid=new_uid(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=PROGRAM,
            software_versions=algorithm.program,
            device_serial_number=algorithm.weights[:LONGEST],
            content_label="SEGMENTATION",
            content_description=text(f"{algorithm.name} {algorithm.version}"),
            series_description=text(f"Segmentation by {algorithm.name}"),
            specific_character_set="ISO_IR 192",  # UTF-8, for any structure's name
        )
    except DAMAGED as error:
        raise unusable(series, error) from error
    with replacing(path) as temporary:
        content.save_as(temporary)
        verify(temporary, headers, slices, Path(path))


def unusable(series: Series, error: BaseException) -> MAPSegError:
    """Error of headers that pydicom or highdicom refuse; their own words might quote a header, so they are left out."""
    what = f"its headers make no DICOM-SEG ({type(error).__name__})"
    return fault(str(series), what, "leave out dicom_seg, or repair the headers")


def descriptions(names: Sequence[str], algorithm: Algorithm) -> list[Any]:
    """Segment descriptions: name, colour, what made it."""
    segmentation, _ = optional_import("highdicom.seg")
    identification, _ = optional_import("highdicom", name="AlgorithmIdentificationSequence")
    concept, _ = optional_import("highdicom.sr", name="CodedConcept")
    colour_of, _ = optional_import("highdicom.color", name="CIELabColor")
    made_by = identification(
        name=text(algorithm.name), family=concept(*FAMILY), version=text(algorithm.version), source=MAKER
    )
    return [
        segmentation.SegmentDescription(
            segment_number=number,
            segment_label=text(name),
            segmented_property_category=concept(*CATEGORY),
            segmented_property_type=concept(hashlib.sha256(name.encode()).hexdigest()[:16], PRIVATE_SCHEME, text(name)),
            algorithm_type="AUTOMATIC",
            algorithm_identification=made_by,
            display_color=colour_of.from_string(colour),
        )
        for number, (name, colour) in enumerate(zip(names, structure_colours(len(names))), start=1)
    ]


def text(words: str) -> str:
    """Words as DICOM keeps them: one line, no backslash (it parts values), not too long, not empty."""
    line = printable(words).replace("\\", "/").encode()[:LONGEST]
    return line.decode(errors="ignore").strip() or "unnamed"


def verify(temporary: Path, headers: Sequence[Any], slices: np.ndarray, path: Path) -> None:
    """Read a segmentation to its end and compare it, slice by slice of its series, with what was to be written.

    Raises:
        ResourceError: it differs; the message has ``path``, the file's later name.
    """
    segread, _ = optional_import("highdicom.seg", name="segread")
    try:
        found = segread(temporary).get_pixels_by_source_instance(
            [header.SOPInstanceUID for header in headers],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
    except (OSError, RuntimeError, *DAMAGED) as error:
        raise unequal(path, f"cannot be read back ({type(error).__name__})") from error
    if not np.array_equal(found, slices):
        raise unequal(path, "voxels read back differ from what was written")


def unequal(path: Path, what: str) -> MAPSegError:
    """Error of a file that does not give back what was written."""
    return ResourceError(f"{path}: {what}, nothing was kept: check the disk, or leave out dicom_seg")
