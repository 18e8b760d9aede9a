# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Cases that a client such as MONAI Label gives a training in place of its datalist's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data.datalist import load_scans, scans_below, stem, with_mask
from mapseg_components.errors import ConfigError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL

__all__ = ["given_cases"]


def given_cases(
    lists: Mapping[str, Sequence[Mapping[str, Any]]], target_dir: str | None
) -> dict[str, list[dict[str, Any]]] | None:
    """The cases of a training whose labelled ones a client gave; ``None`` if it gave none.

    Args:
        lists: ``source_training`` and, unless the bundle's datalist has it, ``source_validation``: mappings with
            ``image`` and ``label``, as the client names them; see `mapseg_components.configs.given_lists`.
        target_dir: folder of unlabelled scans to adapt to; ``None`` trains on the labelled ones alone. Scans that stand
            in ``lists`` are left out of it.

    Returns:
        the sections with a ``case_id`` for each case, and ``target_training`` with a ``target_dir``.

    Raises:
        ConfigError: ``target_dir`` is set although no case was given, or has no scan; or no labelled case was given.
    """
    if not lists:
        if target_dir is not None:
            raise ConfigError(
                f"target_dir is {target_dir}, but the labelled scans come from a datalist: name the unlabelled ones "
                "there, as target_training"
            )
        return None
    if not lists.get("source_training"):
        raise ConfigError(
            "no labelled scan is left for training: label two scans or more, of which one is kept for validation "
            "(or all are trained on, with a validation share of 0)"
        )
    found = {section: [with_case_id(case) for case in cases] for section, cases in lists.items()}
    if target_dir is not None:
        labelled = {Path(case[IMAGE]).resolve() for cases in found.values() for case in cases}
        scans = [case for case in load_scans(target_dir) if Path(case[IMAGE]).resolve() not in labelled]
        if not scans:
            raise ConfigError(
                f"target_dir {target_dir} has no NIfTI file that is not labelled, nor such an image (PNG, TIFF)"
                f"{scans_below(Path(target_dir))}: name the folder of the unlabelled scans, or set target_dir to null"
            )
        found["target_training"] = scans
    return found


def with_case_id(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case by absolute paths, named by its image's file."""
    absolute = {key: str(Path(case[key]).absolute()) for key in (IMAGE, LABEL) if key in case}
    return with_mask({**case, **absolute, CASE_ID: case.get(CASE_ID, stem(Path(case[IMAGE])))})
