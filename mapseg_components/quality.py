# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How much a segmentation of an unlabelled scan can be trusted, as far as the scan itself tells.

A model that knows a scan gives the same label map when the scan is shown a little differently; one that guesses does
not. `consistency` measures that, `Calibration` turns it into a Dice by what was seen on labelled scans of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Calibration", "consistency", "label_agreement"]

# monotone curves of the intensities in [0, 1], as between scanners and protocols
GAMMAS = (0.7, 1.4)


def label_agreement(first: torch.Tensor, second: torch.Tensor, classes: int) -> torch.Tensor:
    """Dice between two label maps.

    Args:
        first, second: (X, Y, Z), class indices.
        classes: number of classes, background included.

    Returns:
        (classes - 1,), one per structure; NaN where neither map has it.
    """
    sizes = [torch.bincount(one.flatten().long(), minlength=classes)[1:] for one in (first, second)]
    common = torch.bincount(first[first == second].flatten().long(), minlength=classes)[1:]
    return (2 * common.double() / (sizes[0] + sizes[1])).float()


def consistency(
    image: torch.Tensor,
    label_map: torch.Tensor,
    segment: Callable[[torch.Tensor], torch.Tensor],
    classes: int,
    flip_axis: int | None = None,
) -> torch.Tensor:
    """Dice between the label map of a scan and those of the same scan shown differently.

    Shown differently means: intensities raised to 0.7 and to 1.4, and, if an axis is named, mirrored along it (the
    label map is mirrored back). A structure that only some of the label maps have counts as 0 in these.

    Args:
        image: (C, X, Y, Z) in [0, 1]. label_map: (X, Y, Z), its segmentation.
        segment: function from such an image to its label map.
        classes: number of classes, background included.
        flip_axis: 0, 1 or 2; only for structures that are alike on both sides and not named by side.

    Returns:
        (classes - 1,) between 0 and 1, mean over the ways; NaN where no label map has the structure.
    """
    others = [segment(image**gamma) for gamma in GAMMAS]
    if flip_axis is not None:
        others.append(segment(image.flip(1 + flip_axis)).flip(flip_axis))
    return torch.stack([label_agreement(label_map, other, classes) for other in others]).nanmean(dim=0)


@dataclass(frozen=True)
class Calibration:
    """A straight line from `consistency` to Dice, fitted to labelled scans of the source.

    Args:
        slope, intercept: of the line; the slope is never negative.
        points: number of structures times scans it was fitted to.
        error: root mean square error on points of scans that were left out, one at a time; on the fitted points if
            there is only one scan.
        lowest, highest: range of the consistencies seen. An estimate outside of it is a guess.
    """

    slope: float
    intercept: float
    points: int
    error: float
    lowest: float
    highest: float

    @classmethod
    def fit(cls, consistencies: Sequence[Sequence[float]], dice: Sequence[Sequence[float]]) -> Calibration | None:
        """Fit to scans, each a list of structures; pairs with a NaN are left out. ``None`` below three points."""
        pairs = [
            np.array([(c, d) for c, d in zip(*one) if np.isfinite(c) and np.isfinite(d)]).reshape(-1, 2)
            for one in zip(consistencies, dice)
        ]
        points = np.concatenate(pairs) if pairs else np.zeros((0, 2))
        if len(points) < 3:
            return None
        slope, intercept = line(points)
        residuals = points[:, 1] - (slope * points[:, 0] + intercept)
        if len(pairs) > 1:
            left_out = []
            for number, own in enumerate(pairs):
                a, b = line(np.concatenate([one for other, one in enumerate(pairs) if other != number]))
                left_out.append(own[:, 1] - (a * own[:, 0] + b))
            residuals = np.concatenate(left_out)
        error = float(np.sqrt(np.mean(residuals**2)))
        return cls(slope, intercept, len(points), error, float(points[:, 0].min()), float(points[:, 0].max()))

    def dice(self, consistency: float) -> float:
        """Expected Dice, between 0 and 1; NaN for NaN."""
        return float(np.clip(self.slope * consistency + self.intercept, 0.0, 1.0))

    def covers(self, consistency: float) -> bool:
        """Whether such a consistency was seen on the labelled scans."""
        return self.lowest <= consistency <= self.highest


def line(points: np.ndarray) -> tuple[float, float]:
    """Slope (0 or more) and intercept of the least-squares line through points (N, 2)."""
    x, y = points.T
    spread = float(np.var(x)) if len(x) else 0.0
    slope = max(float(np.mean((x - x.mean()) * (y - y.mean()))) / spread, 0.0) if spread > 1e-12 else 0.0
    return slope, float(y.mean() - slope * x.mean()) if len(y) else 0.0
