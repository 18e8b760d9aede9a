# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What server and sites of a federation agree on before it starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mapseg_components.configs import locate
from mapseg_components.errors import ConfigError
from mapseg_components.federated.core import Aggregation, WeightedMean, cosine_rate, local_names
from mapseg_components.federated.privacy import Privacy, epsilon_of
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["AVERAGE", "BEST", "BROADCAST", "LAST", "STUDENT", "TEACHER", "Plan"]

STUDENT, TEACHER, BROADCAST, AVERAGE = "student", "teacher", "broadcast", "average"  # weights
BEST, LAST = "best", "last"  # rounds


@dataclass(frozen=True)
class Plan:
    """Settings of a federation (MAPSeg, Algorithm 1).

    Args:
        rounds: R (100 in the paper).
        server_steps: T_s, optimizer iterations on the labelled source in a round; ``None`` for as many as it has scans
            (over the batch size); 0 for none: there is no source, and the server passes the average on.
        client_steps: T_t, likewise at each site.
        first_learning_rate: start of the cosine over the rounds (1e-4 in the paper).
        last_learning_rate: its end (1e-6 in the paper).
        min_sites: sites whose update a round needs to be closed.
        participation: share of the sites asked in a round, in (0, 1].
        round_timeout_s: seconds that a site may take for a round; ``None`` waits without end (simulation only). Who is
            left out is decided by the clock: then a run is not repeatable.
        max_movement: updates that moved further, as a share of the weights' norm, are refused; ``None`` for none.
        spacing_range_mm: least and greatest voxel side that scans of any site may have; ``None`` for any.
        local_layers: shell patterns of tensors that never leave a site, e.g. ``["*norm*"]``.
        aggregation: makes the `Aggregation` of a round.
        upload: what a party, server or site, sends after its steps: its ``"teacher"`` (Algorithm 1) or its
            ``"student"``.
        keep_moments: a party keeps the moments of its optimizer, and its teacher, from round to round of a federation.
            By default a round depends on nothing before it.
        labels_by: pseudo labels at a site are those of its ``"teacher"``, or of the weights that arrived, which stand
            still for the round (``"broadcast"``).
        ship: weights of a round that become ``model.pt``: the sites' ``"average"``, or what the server sends next,
            after its labelled steps on it (``"broadcast"``).
        select: the round whose weights these are: the ``"best"`` by the Score, or the ``"last"``.
        privacy: what a site does to its update before it leaves; the server's value is ignored.
        seed: of draws of participants, and with its name of the draws of a site.

    Raises:
        ConfigError: a value is out of range.
    """

    rounds: int
    server_steps: int | None
    client_steps: int | None
    first_learning_rate: float
    last_learning_rate: float
    min_sites: int
    participation: float = 1.0
    round_timeout_s: float | None = None
    max_movement: float | None = None
    spacing_range_mm: Sequence[float] | None = None
    local_layers: Sequence[str] = ()
    aggregation: Callable[[], Aggregation] = WeightedMean
    upload: str = TEACHER
    keep_moments: bool = False
    labels_by: str = TEACHER
    ship: str = AVERAGE
    select: str = BEST
    privacy: Privacy = field(default_factory=Privacy)
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("rounds", is_whole(self.rounds, 1), "1 or more, a whole number"),
            ("server_steps", self.server_steps is None or is_whole(self.server_steps, 0), "0 or more, or null"),
            ("client_steps", self.client_steps is None or is_whole(self.client_steps, 1), "1 or more, or null"),
            ("first_learning_rate", self.first_learning_rate > 0, "more than 0"),
            ("last_learning_rate", 0 < self.last_learning_rate, "more than 0"),
            ("min_sites", self.min_sites >= 1, "1 or more"),
            ("participation", 0 < self.participation <= 1, "a share above 0, at most 1"),
            ("round_timeout_s", self.round_timeout_s is None or self.round_timeout_s > 0, "seconds, or null"),
            ("max_movement", self.max_movement is None or self.max_movement > 0, "more than 0, or null"),
            (
                "spacing_range_mm",
                self.spacing_range_mm is None
                or (len(self.spacing_range_mm) == 2 and 0 < self.spacing_range_mm[0] <= self.spacing_range_mm[1]),
                "two lengths such as [0.5, 1.5], or null",
            ),
            ("aggregation", callable(self.aggregation), "a class, '$mapseg_components.federated.CoordinateMedian'"),
            ("upload", self.upload in (STUDENT, TEACHER), "student or teacher"),
            ("keep_moments", isinstance(self.keep_moments, bool), "true or false"),
            ("keep_moments", self.keep_moments is not True or self.upload == STUDENT, "false where upload is teacher"),
            ("labels_by", self.labels_by in (TEACHER, BROADCAST), "teacher or broadcast"),
            ("ship", self.ship in (AVERAGE, BROADCAST), "average or broadcast"),
            ("ship", self.ship != BROADCAST or self.server_steps != 0, "average where server_steps is 0"),
            ("select", self.select in (BEST, LAST), "best or last"),
        ]
        wrong = [f"{name} is {getattr(self, name)!r}, expected {what}" for name, good, what in rules if not good]
        if wrong:
            raise ConfigError(f"{'; '.join(wrong)}: correct it in federated.json or on the command line")

    def learning_rate(self, number: int) -> float:
        """Learning rate of a round, counted from 0; a pass of the server after the last round has that round's."""
        return cosine_rate(min(number, self.rounds - 1), self.rounds, self.first_learning_rate, self.last_learning_rate)

    def local_names(self, names: Iterable[str]) -> set[str]:
        """Those of a network's tensors that never leave a site. Raises `ConfigError`, see `core.local_names`."""
        return local_names(names, self.local_layers)

    def check_budget(self, rounds: int) -> None:
        """Refuse a privacy budget that is spent before the last round at every site; where all are asked in each.

        Args:
            rounds: of the federation.

        Raises:
            ConfigError: says how many rounds fit.
        """
        most, cost, delta = self.privacy.max_epsilon, self.privacy.cost, self.privacy.delta
        if most is None or self.participation < 1:
            return
        whole = epsilon_of(rounds * cost, delta)
        if whole > most:
            fit = sum(epsilon_of(number * cost, delta) <= most for number in range(1, rounds))
            raise ConfigError(
                f"privacy_max_epsilon is {most:g}, and {rounds} rounds cost every site epsilon {whole:.4g} "
                f"(delta {delta:g}); rounds that fit: {fit}: set rounds to that, "
                "raise privacy_noise, or agree on a larger epsilon"
            )

    def check_method(self, method: Any, side: str) -> None:
        """Refuse a method that cannot learn from a side by itself, or takes its labels from elsewhere.

        Args:
            method: its config, as MONAI merges it.
            side: ``"source"`` or ``"target"``.

        Raises:
            ConfigError: says which, and the remedy.
        """
        target = method.get("_target_") if isinstance(method, Mapping) else None  # an expression shows in a round
        if side not in getattr(locate(target), "alone", (SOURCE, TARGET)):
            name = str(target).rpartition(".")[2]
            raise ConfigError(
                f"{name} learns nothing from the source, and server_steps is {self.server_steps}: set it to 0"
                if side == SOURCE
                else f"{name} needs patches of the source beside those of the target, and a site has none: choose "
                "another method, such as MAPSeg (docs/how-to/federated.md lists them)"
            )
        asks = "@pseudo_labels" in json.dumps(method, default=str)
        if self.labels_by == BROADCAST and side == TARGET and not asks:
            raise ConfigError("labels_by is broadcast, and this method has no '@pseudo_labels': set it to teacher")


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of so much at least."""
    return type(value) is int and value >= least
