# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How large the source's bodies are beside the target's, by the scans' foreground; source scans at their size."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.keys import IMAGE, LABEL, MASK, SOURCE, TARGET
from mapseg_components.scans.extents import median_extent
from mapseg_components.scans.files import is_picture, stem
from mapseg_components.scans.rewriting import copy_scaled

__all__ = ["SIZED", "describe_size", "find_size", "sized_cases", "sized_source"]

SIZED = "sized"  # folder of the scaled source scans
FILES = (IMAGE, LABEL, MASK)  # entries of a case that lie on its grid
ALIKE = 1.15  # sizes within this factor are left to the random scales of training
ONE_FORM = 1.25  # largest ratio among the axes over the smallest: beyond, one factor does not fit
FARTHEST = 3.0  # beyond, it is another body part or a wrong unit

Cases = list[dict[str, Any]]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set


def find_size(source_mm: Sequence[float] | None, target_mm: Sequence[float] | None) -> dict[str, Any] | None:
    """Factor by which the target's bodies are larger than the source's, or ``None`` where they are alike or not known.

    Args:
        source_mm: median extent of what the source's scans show, see `mapseg_components.scans.extents.median_extent`.
        target_mm: of the target's.

    Returns:
        ``factor``, if it is about the same along all three axes, ``source_mm`` and ``target_mm``.
    """
    factor = factor_between(source_mm, target_mm)
    if source_mm is None or target_mm is None or factor is None or factor == 1:
        return None
    return {"factor": factor, "source_mm": [*source_mm], "target_mm": [*target_mm]}


def factor_between(source_mm: Sequence[float] | None, target_mm: Sequence[float] | None) -> float | None:
    """Factor by which the target's bodies are larger: 1 where they are alike, ``None`` where one does not fit.

    Args: see `find_size`.

    Examples:
        >>> from mapseg_components.plans.extents import factor_between
        >>> factor_between([137, 176, 134], [92, 118, 94]), factor_between([137, 176, 134], [140, 170, 139])
        (0.681, 1.0)
        >>> factor_between([137, 176, 134], [150, 200, 230]) is None  # a head with its neck
        True
    """
    if source_mm is None or target_mm is None:
        return None
    ratios = np.divide(target_mm, source_mm)
    factor = float(np.exp(np.log(ratios).mean()))
    if ratios.max() > ONE_FORM * ratios.min() or max(factor, 1 / factor) >= FARTHEST:
        return None
    return round(factor, 3) if max(factor, 1 / factor) > ALIKE else 1.0


def sized_source(
    training: Cases,
    validation: Cases,
    target: Cases,
    folder: Path,
    match: bool,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Cases, Cases, dict[str, Any]]:
    """Cases of the source at the target's size, if it is another one.

    Args:
        training: of the source.
        validation: of the source.
        target: all cases.
        folder: for copies.
        match: whether the source is to be at the target's size.
        settings: of the user, who may say what negative values are.

    Returns:
        training, validation, and what the plan has of it: ``foreground_mm``, the median extent of what the model learns
        from, and ``target_mm``, that of the target's scans, ``None`` where it is not known; ``size``, see `find_size`,
        unless scans are taken as they are.

    Raises:
        DataError: a file cannot be read.
        ResourceError: the disk is full.
    """
    source_mm, target_mm = (
        median_extent([case[IMAGE] for case in cases], (settings or {}).get(f"{side}_negative_values"))
        for side, cases in ((SOURCE, [*training, *validation]), (TARGET, target))
    )
    size = find_size(source_mm, target_mm) if match else None
    unknown = [side for side, extent in ((SOURCE, source_mm), (TARGET, target_mm)) if extent is None]
    if match and unknown and not any(is_picture(case[IMAGE]) for case in target):
        logger.info(
            f"Sizes of {SOURCE} and {TARGET} are not compared: the {' and the '.join(unknown)}'s scans do not show a "
            "whole body in front of an empty background (match_size)."
        )
    if size is None:
        return training, validation, {"foreground_mm": source_mm, "target_mm": target_mm}
    logger.info(describe_size(size))
    training, validation = (
        sized_cases(cases, size["factor"], folder / name)
        for name, cases in (("training", training), ("validation", validation))
    )
    return training, validation, {"foreground_mm": target_mm, "target_mm": target_mm, "size": size}


def sized_cases(cases: Iterable[Mapping[str, Any]], factor: float, folder: Path) -> Cases:
    """The cases with copies of their files whose voxels are larger or smaller by a factor; values are the same.

    Args:
        cases: of the source.
        factor: of the voxels' sides.
        folder: for the copies; those that are there are written again.

    Raises:
        DataError: a file cannot be read.
        ResourceError: the disk is full.
    """
    result = []
    for number, case in enumerate(cases):
        copies = {}
        for key in FILES:
            if case.get(key):
                copies[key] = str(folder / f"{key}s" / f"{number:04d}_{stem(Path(case[key]))}.nii.gz")
                Path(copies[key]).parent.mkdir(parents=True, exist_ok=True)
                copy_scaled(case[key], copies[key], factor)
        result.append({**case, **copies})
    return result


def describe_size(size: Mapping[str, Any]) -> str:
    """The factor in words, for the terminal and the report."""
    sides = (" x ".join(f"{side:.0f}" for side in size[f"{name}_mm"]) for name in ("target", "source"))
    shown = "The package's model works" if size.get("package") else "Source scans are shown"
    return (
        "{} at {:.2f} of {} size: what target scans show measures {} mm, what source scans show {} mm (medians; "
        "another choice: match_size)."
    ).format(shown, size["factor"], "its" if size.get("package") else "their", *sides)
