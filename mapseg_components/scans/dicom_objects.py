# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What one file is in DICOM's terms, by pydicom: an image, an object that holds none, damaged, or no DICOM at all.

A folder that a scanner or an archive exported holds more than images: reports, presentation states, spectroscopy, raw
data, private classes of vendors. ITK cannot read those, and cannot tell them from an image that is damaged.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.filereader import read_partial
from pydicom.uid import UID

__all__ = ["DicomObject", "begins_like_dicom", "describe"]

PREAMBLE, MAGIC = 128, b"DICM"
FIRST_GROUPS = (0x0002, 0x0008)  # of a file without preamble: meta information, or at once the data set
VALUE_REPRESENTATION = re.compile(rb"[A-Z]{2}")
LONGEST_FIRST_VALUE = 4096  # bytes of a plausible first element without value representation
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and integer pixel data
UNDEFINED = 0xFFFFFFFF
ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
DEFLATED = "1.2.840.10008.1.2.1.99"
# objects with pixels that are no scan, and standard classes without any: index, waveforms, presentation states,
# spectroscopy, raw data, segmentations and surfaces, encapsulated documents, reports, radiotherapy but its images
NO_SCAN = re.compile(
    r"1\.2\.840\.10008\.(1\.3\.10|5\.1\.4\.1\.1\.(11|9|4\.2|66|67|68|88|104|481\.([2-9]|1\d))(\.\d+)*)"
)
STANDARD = "1.2.840.10008."
WANTED = {
    "sop_class": 0x00080016,
    "modality": 0x00080060,
    "series_uid": 0x0020000E,
    "number": 0x00200011,
    "rows": 0x00280010,
    "photometric": 0x00280004,
    "signed": 0x00280103,
    "allocated": 0x00280100,
    "stored": 0x00280101,
    "padding": 0x00280120,
    "padding_limit": 0x00280121,
    "intercept": 0x00281052,
    "slope": 0x00281053,
    "rescale_type": 0x00281054,
    "units": 0x00541001,
    "modality_lut": 0x00283000,
}


@dataclass(frozen=True)
class DicomObject:
    """One file.

    Args:
        file: where it is.
        kind: ``"image"``, ``"no image"`` or ``"damaged"``.
        reason: why it is no image; of a damaged one, what is missing.
        tags: name as in `WANTED` to text, empty for what its header does not have.
    """

    file: Path
    kind: str
    reason: str
    tags: dict[str, str]

    def number(self, name: str, otherwise: float | None = None) -> float | None:
        """A tag's number, or ``otherwise`` if it has none."""
        try:
            return float(self.tags[name])
        except ValueError:
            return otherwise


def begins_like_dicom(start: bytes) -> bool:
    """Whether a file with these first 132 bytes is DICOM: with its preamble, or beginning with the data set."""
    if start[PREAMBLE : PREAMBLE + len(MAGIC)] == MAGIC:
        return True
    for order in ("little", "big"):
        if len(start) >= 12 and int.from_bytes(start[:2], order) in FIRST_GROUPS:  # type: ignore[arg-type]
            length = int.from_bytes(start[4:8], order)  # type: ignore[arg-type]
            return bool(VALUE_REPRESENTATION.fullmatch(start[4:6])) or length <= LONGEST_FIRST_VALUE
    return False


def describe(file: Path) -> DicomObject | None:
    """What a file is; ``None`` if it is no DICOM. Voxels are not read, names and dates of persons neither.

    Raises:
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait forever
        return None
    with file.open("rb") as stream:
        start = stream.read(PREAMBLE + len(MAGIC))
        if not begins_like_dicom(start):
            return None
        stream.seek(0)
        return judged(file, stream, start[PREAMBLE:] == MAGIC)


def judged(file: Path, stream: BinaryIO, with_preamble: bool) -> DicomObject | None:
    """What an open file is, whose start looks like DICOM."""
    pixels: list[tuple[int, int]] = []  # where they begin, and their length

    def at_pixels(tag: int, representation: str | None, length: int) -> bool:
        if tag in PIXELS:
            pixels.append((stream.tell(), length))
        return tag in PIXELS

    before = logging.getLogger("pydicom").level
    try:
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings may quote a header
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = read_partial(stream, at_pixels, force=True, specific_tags=list(WANTED.values()))
            tags = {name: text_of(content, tag) for name, tag in WANTED.items()}
            sop_class = tags["sop_class"] or text_of(content.file_meta, 0x00020002)
            deflated = text_of(content.file_meta, 0x00020010) == DEFLATED
    except Exception:  # of a damaged file anything
        content, tags, sop_class, deflated = None, dict.fromkeys(WANTED, ""), "", False
    finally:
        logging.getLogger("pydicom").setLevel(before)
    tags["sop_class"] = sop_class
    if NO_SCAN.fullmatch(sop_class):
        return DicomObject(file, "no image", f"DICOM object without a scan ({class_name(sop_class)})", tags)
    of_no_image_class = sop_class != "" and "Image Storage" not in UID(sop_class).name
    if pixels or (tags["rows"] and not of_no_image_class):
        complete = pixels and (deflated or ends(stream, *pixels[0]))
        return DicomObject(file, "image" if complete else "damaged", "" if complete else "its voxels are cut off", tags)
    if of_no_image_class and stream.tell() <= size_of(stream):  # where a tag that is cut off would end
        return DicomObject(file, "no image", f"DICOM object without a scan ({class_name(sop_class)})", tags)
    if not (with_preamble or sop_class or content is None):
        return None
    return DicomObject(file, "damaged", "its header is cut off", tags)


def class_name(sop_class: str) -> str:
    """What a class of objects is called: by the standard, or by its number."""
    return UID(sop_class).name if sop_class.startswith(STANDARD) else f"private class {sop_class}"


def ends(stream: BinaryIO, start: int, length: int) -> bool:
    """Whether pixel data that begin at ``start`` are there to their end; compressed ones are a list of items."""
    size = size_of(stream)
    if length != UNDEFINED:
        return start + length <= size
    while start < size:
        stream.seek(start)
        tag, piece = stream.read(4), int.from_bytes(stream.read(4), "little")
        if tag == DELIMITER:
            return True
        if tag != ITEM:
            return False
        start += 8 + piece
    return start == size  # some writers leave out the delimiter


def size_of(stream: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(stream.fileno()).st_size


def text_of(content: Any, tag: int) -> str:
    """A tag's value as text without padding; empty for none, and for one that pydicom cannot decode."""
    try:
        value = content[tag].value if tag in content else None
    except Exception:  # a value of another kind than its header says
        return ""
    if isinstance(value, bytes):  # a number whose sign the header leaves open
        return str(int.from_bytes(value, "little"))
    return "" if value is None else str(value).strip(" \0")
