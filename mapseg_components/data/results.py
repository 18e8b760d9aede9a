# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The files that inference will write, known before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data.utils import create_file_basename

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import IMAGE, UNCERTAINTY
from mapseg_components.scans.files import result_ending

__all__ = ["check_results", "refuse_existing", "result_path", "uncertainty_path"]

LONGEST_NAME = 255  # bytes, on all common file systems


def result_path(
    scan: str | os.PathLike[str], output_dir: str | os.PathLike[str], postfix: str, fractions: bool = False
) -> Path:
    """Where `mapseg_components.transforms.SaveLabelMapd` puts the result of a scan: ``<scan>_<postfix>.nii.gz``.

    That of a PNG or TIFF image has the image's ending; with ``fractions``, values that are not whole, it is a TIFF.
    """
    base = create_file_basename(postfix, os.fspath(scan), output_dir, separate_folder=False, makedirs=False)
    return Path(f"{base}{result_ending(scan, fractions)}")


def uncertainty_path(scan: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> Path:
    """Where `mapseg_components.transforms.SaveVolumed` puts the map of uncertainty of a scan."""
    return result_path(scan, output_dir, UNCERTAINTY, fractions=True)


def check_results(
    cases: Sequence[Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    postfix: str,
    files: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Refuse, before any inference, results that would overwrite something.

    Args:
        cases: with ``image``, the scan's path.
        output_dir: folder of the results.
        postfix: of the result of each scan, see `result_path`.
        files: what else will be written there, e.g. ``volumes.csv``.
        overwrite: allow earlier results to be replaced. A scan is never replaced, nor one result by another's.

    Raises:
        ConfigError: results exist, or a result would replace a scan.
        DataError: two scans would write one file, or a name is too long.
    """
    scans: dict[Path, str] = {}
    for case in cases:
        path = result_path(case[IMAGE], output_dir, postfix)
        if path in scans:
            raise DataError(f"{scans[path]} and {case[IMAGE]} would both write {path}: rename one, or run them apart")
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise DataError(f"{case[IMAGE]}: its result's name is longer than {LONGEST_NAME} bytes: rename the scan")
        scans[path] = case[IMAGE]
    inputs = {os.path.realpath(case[IMAGE]) for case in cases}
    replaced = [path for path in scans if os.path.realpath(path) in inputs]
    if replaced:
        raise ConfigError(f"{replaced[0]} is a scan of this run: choose another output_dir or output_postfix")
    refuse_existing([*scans, *(Path(output_dir) / name for name in files)], output_dir, overwrite)


def refuse_existing(
    paths: Sequence[Path], output_dir: str | os.PathLike[str], overwrite: bool, remedy: str = "set overwrite to true"
) -> None:
    """Raise `ConfigError` if one of the files exists, unless ``overwrite``."""
    found = [path for path in paths if os.path.lexists(path)]
    if found and not overwrite:
        named = ", ".join(path.name for path in found[:3]) + (" ..." if len(found) > 3 else "")
        raise ConfigError(
            f"{output_dir} has {len(found)} results of an earlier run ({named}): {remedy}, or choose another output_dir"
        )
