# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The size of a pixel of a PNG or TIFF image, in mm: by a file beside it, or by its header if that means one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError
from mapseg_components.scans.findings import fault
from mapseg_components.scans.headers import FARTHEST_MM, Remark

__all__ = ["Resolution", "pixel_size_of", "resolution_of"]

FOLDERS_FILE = "pixel_size.json"  # for all images of a folder
KEY, UNITS_KEY = "PixelSize", "PixelSizeUnits"  # of BIDS microscopy
MM = {"mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3, "micron": 1e-3, "nm": 1e-6, "cm": 10.0, "m": 1e3}
MM |= {"inch": 25.4, "millimeter": 1.0, "micrometer": 1e-3, "nanometer": 1e-6, "centimeter": 10.0}
SMALLEST_MM = 1e-9
# dots per inch that programs write who know no pixel size: of screens, printers and scanners of paper
NO_SIZE = (1, 25.4, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 220, 240, 300, 350, 360, 400, 600, 720, 1200)
SAME = 0.005  # relative; PNG rounds to whole pixels a metre
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
UNIT_MM = {2: 25.4, 3: 10.0}  # of RESOLUTION_UNIT; 1 is none
OME = re.compile(r'PhysicalSize([XY])(Unit)?\s*=\s*"([^"]*)"')
IMAGEJ_UNIT = re.compile(r"^unit=(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Resolution:
    """Pixels per mm, along a row and along a column.

    Args:
        across: along a row.
        down: along a column.
        meant: it is a pixel size, by a program for microscopy, whatever its number.
    """

    across: float
    down: float
    meant: bool = False

    @property
    def sides(self) -> tuple[float, float] | None:
        """Sides of a pixel in mm; ``None`` if the numbers are none."""
        found = tuple(1 / each if each > 0 and math.isfinite(each) else 0.0 for each in (self.across, self.down))
        return (found[0], found[1]) if all(SMALLEST_MM <= side <= FARTHEST_MM for side in found) else None

    @property
    def says_nothing(self) -> bool:
        """Whether it is the resolution of a screen or printer."""
        dots = self.across * 25.4
        return not self.meant and any(abs(dots - one) <= SAME * one for one in NO_SIZE)


def resolution_of(tags: Mapping[int, Any], description: str) -> Resolution | None:
    """Resolution by the tags of a TIFF image, by OME's or ImageJ's words if they are there; ``None`` without."""
    ome = {(axis, bool(unit)): text for axis, unit, text in OME.findall(description)}
    if ("X", False) in ome and ("Y", False) in ome:
        sides = [number(ome[axis, False]) * MM.get(unit_text(ome.get((axis, True), "um")), 0.0) for axis in "XY"]
        return Resolution(1 / sides[0], 1 / sides[1], meant=True) if min(sides) > 0 else None
    across, down = number(tags.get(X_RESOLUTION)), number(tags.get(Y_RESOLUTION))
    if min(across, down) <= 0:
        return None
    named = IMAGEJ_UNIT.search(description) if description.startswith("ImageJ=") else None
    if named is not None:
        mm = MM.get(unit_text(named[1]), 0.0)
        return Resolution(across / mm, down / mm, meant=True) if mm else None
    mm = UNIT_MM.get(int(tags.get(RESOLUTION_UNIT, 2)), 0.0)
    return Resolution(across / mm, down / mm) if mm else None


def unit_text(text: str) -> str:
    """A unit as in `MM`; ``µm`` may come as UTF-8 read as Latin-1, or escaped."""
    plain = text.strip().replace("\\u00B5", "\u00b5").replace("\u00c2\u00b5", "\u00b5")
    return plain if plain in MM else plain.lower()


def number(value: Any) -> float:
    """A number above 0 of a tag or attribute; 0 if it is none."""
    try:
        found = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return found if math.isfinite(found) and found > 0 else 0.0


def pixel_size_of(
    path: Path, stem: str, resolution: Resolution | None
) -> tuple[tuple[float, float] | None, tuple[Remark, ...]]:
    """Sides of a pixel in mm, along a row and along a column, or ``None``; and what is odd about them.

    ``CASE.json`` beside the image counts, as BIDS has it for microscopy (``PixelSize``, ``PixelSizeUnits``), else
    ``pixel_size.json`` of its folder with the same keys, else the image's own header.

    Args:
        path: of the image.
        stem: its name without ending.
        resolution: by its header.

    Raises:
        ConfigError: ``pixel_size.json`` is no such file.
    """
    for name in (f"{stem}.json", FOLDERS_FILE):
        sides = sides_of_file(path.with_name(name))
        if sides is not None:
            return sides, ()
    if resolution is None or resolution.sides is None:
        return None, ()
    if resolution.says_nothing:
        what = f"its resolution of {resolution.across * 25.4:.4g} dpi is that of a screen or printer"
        return None, (("note", what, f"lengths are in pixels; {FOLDERS_FILE} beside the images names a size"),)
    return resolution.sides, ()


def sides_of_file(file: Path) -> tuple[float, float] | None:
    """Sides of a pixel in mm by a file; ``None`` without one, or without a size in a sidecar. Raises `ConfigError`."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        given = content.get(KEY) if isinstance(content, dict) else None
        if given is None and file.name != FOLDERS_FILE:
            return None
        sizes = [float(one) for one in (given if isinstance(given, list) else [given, given])][:2]
        sides = [size * MM[unit_text(str(content[UNITS_KEY]))] for size in sizes]
        if len(sides) == 2 and all(SMALLEST_MM <= side <= FARTHEST_MM for side in sides):
            return sides[0], sides[1]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if file.name != FOLDERS_FILE:
            return None
        raise unusable(file) from error
    raise unusable(file)


def unusable(file: Path) -> Exception:
    """Error of a file of a pixel size."""
    remedy = f'write such as {{"{KEY}": [0.1, 0.1], "{UNITS_KEY}": "um"}} (mm, um or nm), or remove it'
    return fault(file, "names no pixel size", remedy, ConfigError)
