# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What comes with the package: the bundles with their small weights, and the sample of real scans."""

from __future__ import annotations

from pathlib import Path

from mapseg_components.errors import ConfigError

__all__ = ["SEGMENTS", "SHIPPED", "bundle_of", "bundles_folder", "sample_folder"]

SHIPPED = "shipped"  # the word for the adaptation bundle that comes with the package
SEGMENTS = "T2w MRI of the fetal brain at 1.6 mm"  # and nothing else
PACKAGE = Path(__file__).parent
PLACES = (PACKAGE / "shipped", PACKAGE.parent)  # of an installation (setup.py puts it there), of a clone


def bundles_folder() -> Path:
    """Folder of the bundles ``mapseg_adaptation`` and ``mapseg_pretraining``. Raises `ConfigError`."""
    return find("bundles", "mapseg_adaptation/configs/train.json")


def sample_folder() -> Path:
    """Folder of the sample, with its ``datalist.json``. Raises `ConfigError`."""
    return find("sample/fetal_age", "datalist.json")


def find(folder: str, content: str) -> Path:
    """The first place that has a folder with a file. Raises `ConfigError`."""
    candidates = [place / folder for place in PLACES]
    for candidate in candidates:
        if (candidate / content).is_file():
            return candidate
    raise ConfigError(f"{content} is in neither of {[str(c) for c in candidates]}: install mapseg-monai again")


def bundle_of(name: str) -> Path:
    """Folder of a bundle: as given, or for the word ``shipped`` the one of the package (``./shipped`` is a folder).

    Raises:
        ConfigError: the package is installed without its bundles.
    """
    return bundles_folder() / "mapseg_adaptation" if name == SHIPPED else Path(name)
