# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Aggregations that one site cannot move far: medians and trimmed means (Yin et al., ICML 2018, arXiv 1803.01498)."""

from __future__ import annotations

import math

import torch

from mapseg_components.errors import ConfigError
from mapseg_components.federated.core import Weights

__all__ = ["CoordinateMedian", "TrimmedMean"]


class TrimmedMean:
    """Mean of each number over the sites, without the largest and the smallest ones.

    Every site counts alike, however many scans it has: weights would let one site outvote the others. Of n sites
    ``ceil(share n)`` are left out at either end, but one (n odd) or two (n even) always stay. So a site of another
    part of the body, or a broken one, moves no number beyond those of the others, as long as such sites are no more
    than those left out at one end; of two sites none is left out. Integer tensors are taken from the first one added.
    The models of all sites are held until the round is closed.

    Args:
        share: of the sites, left out at either end.

    Raises:
        ConfigError: the share is not above 0, at most 0.5.

    Examples:
        >>> import torch
        >>> from mapseg_components.federated import TrimmedMean
        >>> rule = TrimmedMean(0.25)
        >>> for value, scans in ((1.0, 5), (2.0, 5), (4.0, 5), (1000.0, 80)):
        ...     rule.add({"w": torch.tensor(value)}, scans)
        >>> rule.result()["w"].item(), rule.total
        (3.0, 95)
    """

    alike = True
    """Sites count alike in the log and the Score as well, those that are left out for some numbers among them."""

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 0.5:
            raise ConfigError(f"share of a trimmed mean is {share!r}, expected a number above 0, at most 0.5")
        self.share = share
        self.models: list[dict[str, torch.Tensor]] = []
        self.total = 0

    def add(self, weights: Weights, count: int) -> None:
        """Take one site's weights; its count of scans is added to `total` alone."""
        self.models.append(dict(weights))
        self.total += count

    @torch.no_grad()
    def result(self) -> dict[str, torch.Tensor]:
        """The mean of what is left, in the types that came in; empty if nothing was added."""
        number = len(self.models)
        left_out = min(math.ceil(round(self.share * number, 9)), (number - 1) // 2)
        found = {}
        for name, first in self.models[0].items() if self.models else ():
            if not first.is_floating_point():
                found[name] = first.clone()
                continue
            values, _ = torch.stack([model[name].double() for model in self.models]).sort(dim=0)
            found[name] = values[left_out : number - left_out].mean(dim=0).to(first.dtype)
        return found


class CoordinateMedian(TrimmedMean):
    """Median of each number over the sites, of an even number of sites the mean of the two in the middle.

    Examples:
        >>> import torch
        >>> from mapseg_components.federated import CoordinateMedian
        >>> rule = CoordinateMedian()
        >>> for value in (1.0, 2.0, 1000.0):
        ...     rule.add({"w": torch.tensor(value)}, 1)
        >>> rule.result()["w"].item()
        2.0
    """

    def __init__(self) -> None:
        super().__init__(0.5)
