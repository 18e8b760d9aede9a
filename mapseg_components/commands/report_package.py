# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of ``mapseg report`` for an adaptation without the source: what is compared, and what its package says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapseg_components.reports import sortable_table

__all__ = ["CONSISTENCY", "CONSISTENCY_NOTE", "PACKAGE_NOTE", "by_of", "package_table", "source_scans", "title_of"]

CONSISTENCY = "consistency"
CONSISTENCY_NOTE = (
    "Consistency: how alike a scan's segmentation stays when its intensities change, as mean Dice over structures; a "
    "structure counts as 0 that only the other model has, or whose share of all structures no labelled scan had, by a "
    "factor of 3. It is no estimate of Dice: no labelled scan is here to tell. Confident share: of the voxels that the "
    "adapted model labels, those with a probability above 0.95. Agreement: Dice between the label maps of both models."
)
PACKAGE_NOTE = (
    "Adapted from a hand-over package, without the source's scans. What is said of the source below is the package's."
)


def by_of(assessment: Mapping[str, Any]) -> str:
    """The figure of a case that the verdict compares."""
    return str(assessment.get("by", "estimated_dice"))


def title_of(assessment: Mapping[str, Any]) -> str:
    """The same in words."""
    return "Consistency" if by_of(assessment) == CONSISTENCY else "Estimated Dice"


def source_scans(plan: Mapping[str, Any]) -> str:
    """What a run had of the source."""
    counts = f"{plan['source_training']} + {plan['source_validation']} source scans"
    return "no source scans" if "package" in plan else counts


def package_table(said: Mapping[str, Any], names: Sequence[str]) -> str:
    """Validation Dice of a package's weights as the package says it: nothing here could measure it.

    Args:
        said: ``source_validation`` of the package.
        names: structures.
    """
    if said["mean"] is None:
        return "<p>The package does not say it, and no source scan is here to measure it.</p>"
    rows = [[name, said.get("structures", {}).get(name)] for name in names]
    head = ["structure", f"as the package says, of its own weights ({said['scans']} scans)"]
    return sortable_table(head, [*rows, ["mean", said["mean"]]], compact=True)
