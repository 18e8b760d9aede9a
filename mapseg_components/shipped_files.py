# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What comes with the package: the bundles with their small weights, and the samples of real scans."""

from __future__ import annotations

from pathlib import Path

from mapseg_components.errors import ConfigError

__all__ = ["SAMPLES", "SEGMENTS", "SHIPPED", "bundle_of", "bundles_folder", "sample_folder", "shipped_bundles"]

SHIPPED = "shipped"  # the word for the adaptation bundle that comes with the package
SAMPLES = ("adult_t1_to_t2", "fetal_age")
SEGMENTS = "T2w MRI of the fetal brain at 1.6 mm"  # and nothing else
METADATA = "configs/metadata.json"
PACKAGE = Path(__file__).parent
PLACES = (PACKAGE / "shipped", PACKAGE.parent)  # of an installation (setup.py puts it there), of a clone


def bundles_folder() -> Path:
    """Folder of the bundles ``mapseg_adaptation`` and ``mapseg_pretraining``. Raises `ConfigError`."""
    return find("bundles", "mapseg_adaptation/configs/train.json")


def sample_folder(name: str = "fetal_age") -> Path:
    """Folder of a sample, with its ``datalist.json``: fetal_age or adult_t1_to_t2. Raises `ConfigError`."""
    if name not in SAMPLES:
        raise ConfigError(f"sample {name!r} is unknown, expected one of {list(SAMPLES)}")
    return find(f"sample/{name}", "datalist.json")


def find(folder: str, content: str) -> Path:
    """The first place that has a folder with a file. Raises `ConfigError`."""
    candidates = [place / folder for place in PLACES]
    for candidate in candidates:
        if (candidate / content).is_file():
            return candidate
    raise ConfigError(f"{content} is in neither of {[str(c) for c in candidates]}: install mapseg-monai again")


def shipped_bundles() -> list[str]:
    """Names of the bundles that come with the package. Raises `ConfigError` if it is installed without them."""
    return sorted(path.parents[1].name for path in bundles_folder().glob(f"*/{METADATA}"))


def bundle_of(name: str) -> Path:
    """Folder of a bundle: as given, or that of the package which has this name; ``shipped`` is its adaptation bundle.

    A folder of that name goes first; ``./shipped`` is always a folder.

    Raises:
        ConfigError: the package is installed without its bundles.

    Examples:
        >>> from mapseg_components.shipped_files import bundle_of
        >>> bundle_of("buda_seg").parts[-2:]
        ('bundles', 'buda_seg')
    """
    path = Path(name)
    if name == SHIPPED:
        return bundles_folder() / "mapseg_adaptation"
    if path.name == name and name in shipped_bundles() and not path.exists():
        return bundles_folder() / name
    return path
