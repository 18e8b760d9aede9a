# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A guard against structures that vanish, or swallow others, while a network adapts without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mapseg_components.errors import ConfigError

__all__ = ["ShareLimits"]

logger = logging.getLogger(__name__)

TEACHER = "teacher"


class ShareLimits:
    """Say when a structure's share leaves what the source's label maps ever showed, by a stated factor.

    Its share is that of the voxels of all structures: it depends neither on the field of view nor on the size of the
    person. A structure is watched from the first look on in which the teacher has it within its limits: before, the
    model has not found it yet, which adaptation is to mend; that is told once. When the teacher has it outside again,
    `reason` says so, `mapseg_components.handlers.TargetDiagnostics` ends the training, and `ScoreCheckpoint` keeps the
    weights of an earlier look. A student that is outside is not a candidate for the Score, and goes on.

    Args:
        ranges: structure to the lowest and highest share of any labelled source scan, see
            `mapseg_components.data.share_ranges`. A structure without a range is not watched.
        factor: above 1; the limits are lowest / factor and highest * factor.

    Raises:
        ConfigError: the factor is not above 1, or a range is none.

    Examples:
        >>> from mapseg_components.handlers import ShareLimits
        >>> limits = ShareLimits({"liver": (0.8, 0.9), "spleen": (0.1, 0.2)}, factor=2.0)
        >>> limits.look(5, {"teacher": {"liver": 0.85, "spleen": 0.15}, "student": {"liver": 0.98, "spleen": 0.02}})
        >>> sorted(limits.refused), limits.reason
        (['student'], None)
        >>> limits.look(10, {"teacher": {"liver": 0.97, "spleen": 0.03}, "student": {"liver": 1.0, "spleen": 0.0}})
        >>> limits.reason  # doctest: +ELLIPSIS
        'epoch 10: spleen is 0.03 of all structures on the target, the source has 0.1 to 0.2 (factor 2)...'
    """

    def __init__(self, ranges: Mapping[str, Sequence[float]], factor: float) -> None:
        if not (math.isfinite(factor) and factor > 1):
            raise ConfigError(f"the factor of the limits of shares is {factor}, expected a number above 1, such as 3")
        wrong = {name: ends for name, ends in ranges.items() if not (len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1)}
        if wrong:
            raise ConfigError(f"ranges of shares are {wrong}, expected 0 <= lowest <= highest <= 1")
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        self.factor = factor
        self.watched: set[str] = set()
        self.refused: frozenset[str] = frozenset()
        self.reason: str | None = None
        self.epoch: int | None = None

    def look(self, epoch: int, shares: Mapping[str, Mapping[str, float]]) -> None:
        """Judge an epoch.

        Args:
            epoch: of the training.
            shares: candidate (``teacher`` and others) to structure to mean share over target scans.
        """
        first = self.epoch is None
        outside = {who: self._outside(of) for who, of in shares.items()}
        gone = [name for name in outside[TEACHER] if name in self.watched]
        self.watched |= self.ranges.keys() - {*outside[TEACHER]}
        self.refused = frozenset(who for who, names in outside.items() if self.watched & {*names})
        self.epoch = epoch
        if gone:
            told = "; ".join(self._told(name, shares[TEACHER][name]) for name in gone)
            self.reason = (
                f"epoch {epoch}: {told} (factor {self.factor:g}): training ends with the weights of an earlier epoch; "
                "lower learning_rate, raise prior_weight, or raise the factor if the target does differ so much"
            )
        elif first and outside[TEACHER]:
            told = "; ".join(self._told(name, shares[TEACHER][name]) for name in outside[TEACHER])
            logger.warning(f"Epoch {epoch}: {told}. Not found by the source model; watched once it is within limits.")

    def looked_in(self, epoch: int) -> bool:
        """Whether this epoch was judged."""
        return self.epoch == epoch

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        state = {"watched": sorted(self.watched), "refused": sorted(self.refused)}
        return {**state, "reason": self.reason, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.watched, self.refused = set(state["watched"]), frozenset(state["refused"])
        self.reason, self.epoch = state["reason"], state["epoch"]

    def _outside(self, shares: Mapping[str, float]) -> list[str]:
        limits = {name: (low / self.factor, high * self.factor) for name, (low, high) in self.ranges.items()}
        return [name for name, (low, high) in limits.items() if not low <= shares[name] <= high]

    def _told(self, name: str, share: float) -> str:
        low, high = self.ranges[name]
        return f"{name} is {share:.2g} of all structures on the target, the source has {low:.2g} to {high:.2g}"
