# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Quality of a segmentation, estimated without labels of the scan.

`consistency` is the agreement of the label maps of one scan under changed intensities, `expected_dice` that of a label
map with its own probabilities. `Calibration` maps them to a Dice, by lines fitted on labelled source scans. A model can
be consistent and wrong, so `Positions` bounds the Dice of a structure that lies where no labelled scan has it, and
`reconciled` the difference of two models that agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "Calibration",
    "Positions",
    "consistency",
    "expected_dice",
    "label_agreement",
    "mean_consistencies",
    "positions_of",
    "reconciled",
    "within_shares",
]

# monotone curves of the intensities in [0, 1], as between scanners and protocols
VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (lambda image: image**0.7, lambda image: image**1.5)
COVERAGE = 0.8  # nominal, of intervals
# of the foreground's voxels along an axis; what lies beyond is taken as noise
BOX_SHARES = (0.01, 0.99)
SPREAD = 1.5  # times the largest distance between a labelled scan and the others, that counts as normal
LEAST_SPREAD = 0.05  # of the box
FACTOR = 3.0  # by which a structure's share may leave the range of labelled scans, as in share_limits.yaml


def label_agreement(first: torch.Tensor, second: torch.Tensor, classes: int) -> torch.Tensor:
    """Dice between two label maps.

    Args:
        first: (X, Y, Z), class indices.
        second: (X, Y, Z), class indices.
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
    views: Sequence[Callable[[torch.Tensor], torch.Tensor]] = VIEWS,
    outside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dice between the label map of a scan and those of the same scan changed; one call of `segment` for each change.

    The changes: the views, and, if an axis is named, a mirror image along it (the label map is mirrored back).
    A structure that only some of the label maps have counts as 0 in these.

    Args:
        image: (C, X, Y, Z) in [0, 1].
        label_map: (X, Y, Z), its segmentation.
        segment: function from such an image to its label map.
        classes: number of classes, background included.
        flip_axis: 0, 1 or 2; only for structures that are alike on both sides and not named by side.
        views: changes of an image that move no voxel, to contrasts that the model was trained for.
        outside: (X, Y, Z), where the scan has no tissue: background in all label maps.

    Returns:
        (classes - 1,) between 0 and 1, mean over the ways; NaN where no label map has the structure.
    """
    others = [segment(view(image)) for view in views]
    if flip_axis is not None:
        others.append(segment(image.flip(1 + flip_axis)).flip(flip_axis))
    if outside is not None:
        others = [other.masked_fill(outside, 0) for other in others]
    return torch.stack([label_agreement(label_map, other, classes) for other in others]).nanmean(dim=0)


def expected_dice(probabilities: torch.Tensor, label_map: torch.Tensor) -> torch.Tensor:
    """Dice between a label map and the probabilities that it is made of: what these expect of it.

    Args:
        probabilities: (classes, X, Y, Z).
        label_map: (X, Y, Z), their largest.

    Returns:
        (classes - 1,) between 0 and 1; NaN for a structure that the label map lacks.

    Examples:
        >>> import torch
        >>> from mapseg_components.quality import expected_dice
        >>> probabilities = torch.tensor([[0.2, 0.4, 1.0], [0.8, 0.6, 0.0]])[..., None, None]
        >>> expected_dice(probabilities, probabilities.argmax(dim=0))
        tensor([0.8235])
    """
    found = []
    for number in range(1, len(probabilities)):
        inside, own = label_map == number, probabilities[number]
        size = inside.sum()
        found.append(2 * own[inside].sum() / (size + own.sum()) if size else torch.tensor(torch.nan))
    return torch.stack(found)


def mean_consistencies(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Mean `consistency` of two models on one scan, comparable where there is no labelled scan to estimate Dice by.

    A structure counts for both models if one of them has it: for the other one as 0. So a model gains nothing by a
    structure that vanishes.

    Args:
        first: (structures,), of one model by `consistency`; NaN for a structure that it has nowhere.
        second: likewise, of the other.

    Returns:
        both means over structures; 0 where no model has any.

    Examples:
        >>> import torch
        >>> from mapseg_components.quality import mean_consistencies
        >>> nan = torch.nan
        >>> mean_consistencies(torch.tensor([0.5, 0.75, nan]), torch.tensor([1.0, nan, nan]))
        (0.625, 0.5)
    """
    known = ~(first.isnan() & second.isnan())
    one, other = (stable[known].nan_to_num(nan=0.0).double() for stable in (first, second))
    return (float(one.mean()), float(other.mean())) if known.any() else (0.0, 0.0)


def within_shares(label_map: torch.Tensor, ranges: Sequence[Sequence[float] | None]) -> torch.Tensor:
    """Which structures of a label map have such a share of all structures as labelled scans have, by a factor of 3.

    Args:
        label_map: (X, Y, Z), class indices.
        ranges: lowest and highest share of each structure, ``None`` where they are not known.

    Returns:
        (structures,), 1 or 0; 1 for a structure that the label map lacks or whose range is not known.

    Examples:
        >>> import torch
        >>> from mapseg_components.quality import within_shares
        >>> within_shares(torch.tensor([[[0, 1, 1, 1, 2, 3]]]), [(0.1, 0.3), (0.7, 0.9), None]).tolist()
        [1.0, 0.0, 1.0]
    """
    counts = torch.bincount(label_map.flatten().long(), minlength=len(ranges) + 1)[1:].double()
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    inside = [
        share == 0 or ends is None or ends[0] / FACTOR <= share <= ends[1] * FACTOR
        for share, ends in zip(shares, ranges, strict=True)
    ]
    return torch.tensor(inside).float()


def reconciled(first: np.ndarray, second: np.ndarray, agreement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimated Dice of two models, no further apart than their agreement allows.

    1 - Jaccard is a metric (Levandowsky and Winter, Nature 234, 1971), so whatever the truth is, the Jaccard indices of
    two label maps with it differ by at most 1 - their Jaccard index with each other. Estimates that differ by more are
    moved towards their middle by the same amount.

    Args:
        first: estimated Dice per structure, of one model.
        second: that of the other.
        agreement: Dice between their label maps; NaN where neither has the structure.

    Returns:
        both estimates; NaN where one of them is.
    """
    one, other, common = (dice / (2 - dice) for dice in (first, second, np.nan_to_num(agreement, nan=1.0)))
    half = np.minimum(np.abs(one - other), 1 - common) / 2
    middle, sign = (one + other) / 2, np.sign(one - other)
    jaccard = middle + sign * half, middle - sign * half
    return 2 * jaccard[0] / (1 + jaccard[0]), 2 * jaccard[1] / (1 + jaccard[1])


@dataclass(frozen=True)
class Calibration:
    """From signs of a good segmentation to its Dice, by labelled scans of the source.

    A sign is a number between 0 and 1 of each structure, such as `consistency` and `expected_dice`. Each has a straight
    line from it to Dice. The estimate is the lowest of theirs: a sign misses errors more easily than it makes them up.

    Args:
        lines: of each sign slope, never negative, and intercept.
        points: number of structures times scans it was fitted to.
        error: root mean square error on points of scans that were left out, one at a time; on the fitted points if
            there is only one scan.
        lowest: lowest value of the first sign seen. An estimate below it is a guess.
        highest: highest value of the first sign seen. An estimate above it is a guess.
        half_width: of the interval of the mean Dice of a segmentation, see `interval`; ``None`` with too few
            segmentations or a single scan.
    """

    lines: dict[str, tuple[float, float]]
    points: int
    error: float
    lowest: float
    highest: float
    half_width: float | None = None

    @classmethod
    def fit(
        cls,
        signs: Mapping[str, Sequence[Sequence[float]]],
        dice: Sequence[Sequence[float]],
        scans: Sequence[int] | None = None,
    ) -> Calibration | None:
        """Fit to segmentations, each a list of structures. ``None`` below three points.

        A structure whose Dice or first sign is NaN is left out; of another sign that is NaN there, its line does.

        Args:
            signs: of each sign one list per segmentation.
            dice: likewise.
            scans: the scan that each segmentation is of; by default, each of another one. All segmentations of a scan
                are left out together.
        """
        parts = []  # of each segmentation (structures, signs and Dice)
        for values in zip(*signs.values(), dice):
            columns = np.array(values, dtype=float).T
            parts.append(columns[np.isfinite(columns[:, [0, -1]]).all(axis=1)])
        points = np.concatenate(parts) if parts else np.zeros((0, len(signs) + 1))
        if len(points) < 3:
            return None
        lines = lines_of(points)
        residuals = points[:, -1] - along(lines, points[:, :-1])
        groups = range(len(parts)) if scans is None else scans
        half_width = None
        if len({*groups}) > 1:
            left_out, means = [], []
            for group, own in zip(groups, parts):
                others = lines_of(np.concatenate([one for other, one in zip(groups, parts) if other != group]))
                left_out.append(own[:, -1] - along(others, own[:, :-1]))
                if len(own):
                    means.append(abs(float(np.mean(left_out[-1]))))
            residuals = np.concatenate(left_out)
            half_width = conformal_quantile(means, COVERAGE)
        error = float(np.sqrt(np.mean(residuals**2)))
        lowest, highest = float(points[:, 0].min()), float(points[:, 0].max())
        return cls(dict(zip(signs, lines)), len(points), error, lowest, highest, half_width)

    def dice(self, **signs: float) -> float:
        """Expected Dice of a structure, between 0 and 1, from its signs by name, by those that are not NaN."""
        return float(along(list(self.lines.values()), np.array([[signs[name] for name in self.lines]]))[0])

    def interval(self, dice: float) -> tuple[float, float] | None:
        """Interval around an estimated mean Dice over structures, with the nominal coverage `COVERAGE`.

        Its half width is the conformal quantile of the absolute errors on labelled segmentations, whose scan was left
        out of the fit. The coverage is nominal: it holds for scans like the labelled ones, not for another contrast.
        """
        return None if self.half_width is None else (max(dice - self.half_width, 0.0), min(dice + self.half_width, 1.0))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**vars(self), "lines": {name: list(line) for name, line in self.lines.items()}}

    def covers(self, value: float) -> bool:
        """Whether the labelled scans had such a value of the first sign."""
        return self.lowest <= value <= self.highest


def positions_of(image: torch.Tensor, label_map: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the structures lie in a scan's foreground, and how large they are.

    The foreground is what is brighter than the scan's mean; its box leaves out 1 % of it at each end of an axis.

    Args:
        image: (C, X, Y, Z).
        label_map: (X, Y, Z).
        classes: number of classes, background included.

    Returns:
        centres (classes - 1, 3), 0 and 1 at the ends of the box; volumes (classes - 1,) in shares of the box. Both NaN
        for a structure that the label map lacks.
    """
    grey = image.float().mean(dim=0)
    mask = grey > grey.mean()
    low, high = torch.zeros(3), torch.zeros(3)
    for axis in range(3):
        counts = mask.sum(dim=[other for other in range(3) if other != axis]).double()
        shares = counts.cumsum(0) / counts.sum().clamp(min=1)
        low[axis], high[axis] = (torch.searchsorted(shares, share) for share in BOX_SHARES)
    size = high + 1 - low
    centres, volumes = torch.full((classes - 1, 3), torch.nan), torch.full((classes - 1,), torch.nan)
    for number in range(1, classes):
        found = (label_map == number).nonzero()
        if len(found):
            centres[number - 1] = (found.float().mean(dim=0) - low) / size
            volumes[number - 1] = len(found) / size.prod()
    return centres, volumes


@dataclass(frozen=True)
class Positions:
    """Where labelled scans have each structure. Scans must show the same part of the body.

    Args:
        centres: (structures, 3), means of `positions_of`.
        spread: (structures,), distance from them that counts as normal.
        radii: (structures,), of spheres of the structures' mean volume.
        always: (structures,), whether all scans have it.
    """

    centres: torch.Tensor
    spread: torch.Tensor
    radii: torch.Tensor
    always: torch.Tensor

    @classmethod
    def fit(cls, found: Sequence[tuple[torch.Tensor, torch.Tensor]], anywhere: bool = False) -> Positions:
        """From results of `positions_of` for labelled scans. anywhere: every distance counts as normal."""
        centres, volumes = (torch.stack(parts) for parts in zip(*found))
        distances = torch.zeros(len(centres), centres.shape[1])
        for number in range(len(centres)):
            others = torch.cat([centres[:number], centres[number + 1 :]])
            distances[number] = (centres[number] - others.nanmean(dim=0)).norm(dim=1).nan_to_num(0.0)
        spread = (SPREAD * distances.amax(dim=0)).clamp(min=LEAST_SPREAD)
        radii = (0.75 / torch.pi * volumes.nanmean(dim=0)) ** (1 / 3)
        always = ~volumes.isnan().any(dim=0)
        return cls(centres.nanmean(dim=0), spread + torch.inf if anywhere else spread, radii, always)

    def highest_dice(self, centres: torch.Tensor) -> torch.Tensor:
        """Upper bound of the Dice of a structure at a position: that of two spheres of its size at the excess distance.

        The excess distance is the distance from the mean position of labelled scans, less the normal spread.

        Args:
            centres: of a label map, by `positions_of`.

        Returns:
            (structures,) between 0 and 1; 0 for a structure that is missing and that all labelled scans have, NaN for
            another one that is missing.
        """
        off = ((centres - self.centres).norm(dim=1) - self.spread).clamp(min=0)
        share = (off / (2 * self.radii)).clamp(max=1)
        bound = torch.where(self.radii.isnan(), 1.0, 1 - 1.5 * share + 0.5 * share**3)
        missing = torch.where(self.always, 0.0, torch.nan)
        return torch.where(centres.isnan().any(dim=1), missing, bound)


def conformal_quantile(errors: Sequence[float], coverage: float) -> float | None:
    """The ceil((n + 1) coverage)-th smallest of n errors (Vovk et al. 2005); ``None`` where n is too small for it."""
    rank = math.ceil((len(errors) + 1) * coverage)
    return sorted(errors)[rank - 1] if 0 < rank <= len(errors) else None


def lines_of(points: np.ndarray) -> list[tuple[float, float]]:
    """Slope (0 or more) and intercept of the least-squares line from each sign to Dice, of points (N, signs + 1)."""
    found = []
    for sign in points[:, :-1].T:
        known = np.isfinite(sign)
        x, y = sign[known], points[known, -1]
        spread = float(np.var(x)) if len(x) else 0.0
        slope = max(float(np.mean((x - x.mean()) * (y - y.mean()))) / spread, 0.0) if spread > 1e-12 else 0.0
        found.append((slope, float(y.mean() - slope * x.mean()) if len(y) else 1.0))
    return found


def along(lines: Sequence[tuple[float, float]], signs: np.ndarray) -> np.ndarray:
    """The lowest Dice (N,) of the lines of signs (N, signs), between 0 and 1; NaN where all signs are."""
    slopes, intercepts = np.array(lines, dtype=float).T
    found = np.clip(signs * slopes + intercepts, 0.0, 1.0)
    return np.where(np.isnan(found).all(axis=1), np.nan, np.fmin.reduce(found, axis=1))
