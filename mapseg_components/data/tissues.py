# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Entries of a datalist whose source is label maps alone, from which images are synthesised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapseg_components.errors import DataError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, TISSUES
from mapseg_components.scans.files import stem

__all__ = ["LABEL_MAPS", "is_alone", "with_tissues"]

LABEL_MAPS = "source_label_maps"  # of a datalist whose source has no images


def is_alone(entry: Any, section: str, origin: str) -> bool:
    """Whether an entry of a source of label maps has no image, as it must outside of validation."""
    if not isinstance(entry, dict) or not isinstance(entry.get(LABEL), str):
        raise DataError(f"{origin}: expected an object with {LABEL!r}, found {entry!r}")
    if IMAGE not in entry or entry[IMAGE] == entry.get(TISSUES):  # the latter as `load_datalist` gives it
        return True
    if section != "source_validation":
        raise DataError(
            f"{origin}: {entry[IMAGE]} is an image, and {LABEL_MAPS} says that the source has none: take it out, or "
            f"name a label map of all tissues as {TISSUES!r}"
        )
    return False


def with_tissues(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry whose map of tissues stands for its image; it is named after its label map."""
    return {CASE_ID: stem(Path(entry[LABEL])), **entry, IMAGE: entry.get(TISSUES, entry[LABEL])}
