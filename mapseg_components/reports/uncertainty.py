# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a network that learnt its uncertainty says of each structure, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from mapseg_components.reports.page import sortable_table

__all__ = ["uncertainty_section"]

NOTE = (
    "Mean of abs(V), the standard deviation of the logits that the adapted model trained with, over the voxels of all "
    "target scans that it labels as the structure: all of them, those that the source-only model labels alike, and the "
    "others. It began as 1 everywhere. An uncertainty that knows something is larger where both differ. The maps lie "
    "beside the label maps."
)


def uncertainty_section(cases: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], names: Sequence[str]) -> str:
    """HTML of the mean uncertainty per structure; empty without a case.

    Args:
        cases: of each scan its map of uncertainty, the label map that belongs to it, and another model's, all on one
            grid, labels as class indices.
        names: structures, in the order of the classes from 1.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.reports import uncertainty_section
        >>> labels, other = np.array([0, 1, 1]), np.array([0, 1, 0])
        >>> html = uncertainty_section([(np.array([0.5, 1.0, 3.0]), labels, other)], ["tumour"])
        >>> [value in html for value in ("2.000", "1.000", "3.000")]
        [True, True, True]
    """
    classes = len(names) + 1
    sums, counts = np.zeros((2, classes)), np.zeros((2, classes))  # where both agree, where they differ
    for size, label_map, other in cases:
        for row, where in enumerate((label_map == other, label_map != other)):
            found = label_map[where].astype(np.int64)
            sums[row] += np.bincount(found, weights=size[where], minlength=classes)[:classes]
            counts[row] += np.bincount(found, minlength=classes)[:classes]
    if not counts.any():
        return ""
    rows = [
        [name, mean(sums[:, number].sum(), counts[:, number].sum()), *map(mean, sums[:, number], counts[:, number])]
        for number, name in enumerate(names, start=1)
    ]
    head = ["structure", "mean", "where both models agree", "where they differ"]
    return f'<h2>Uncertainty</h2><p class="quiet">{escape(NOTE)}</p>{sortable_table(head, rows, compact=True)}'


def mean(total: float, count: float) -> float | None:
    """A mean, or ``None`` of nothing."""
    return float(total / count) if count else None
