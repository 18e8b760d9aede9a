# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Federated adaptation on tensors alone: what travels, what is refused, the weighted mean (MAPSeg, Algorithm 1).

No file, no network connection, no device and no random draw in here; both drivers, the simulation and NVFlare, use it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from mapseg_components.errors import ConfigError, FederationError

__all__ = [
    "Aggregation",
    "Broadcast",
    "Update",
    "WeightedMean",
    "cosine_rate",
    "local_names",
    "movement",
    "participants",
    "payload_bytes",
    "site_seed",
    "validate_update",
    "validate_weights",
]

Weights = Mapping[str, torch.Tensor]
LISTED = 3  # keys that a message names


@dataclass(frozen=True)
class Broadcast:
    """What a server sends: tensors, two counts and the federation's identity, nothing else.

    Args:
        round: number of the round, from 0.
        ema_steps: teacher updates that led to these weights, over all rounds so far.
        weights: name to tensor, of the whole network.
        federation: identity, drawn when it began and the same in all its rounds: what a party keeps from round to round
            is of this federation alone.
    """

    round: int
    ema_steps: int
    weights: Weights
    federation: str = ""


@dataclass(frozen=True)
class Update:
    """What a party sends back: weights and a few numbers. No image, no label, no name of a case.

    Args:
        site: name of the site, as the server knows it.
        round: the round of the broadcast that it answers.
        weights: name to tensor, of its teacher or its student (`mapseg_components.federated.Plan.upload`); names that
            stay at the site are absent.
        scans: |D_k|, number of scans it trained on.
        ema_steps: teacher updates that led to these weights.
        labels: names of its classes in the order of their index, background left out.
        losses: mean of every loss term over the round.
        seconds: that the round took there.
        privacy: budget that the update spent, see `mapseg_components.federated.privacy.PrivacyAccountant`; empty
            without noise.
    """

    site: str
    round: int
    weights: Weights
    scans: int
    ema_steps: int
    labels: Sequence[str]
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    privacy: Mapping[str, float] = field(default_factory=dict)


def validate_weights(weights: Weights, reference: Weights, who: str) -> None:
    """Accept weights only if they have exactly the reference's names, shapes and types, and finite values.

    Args:
        weights: what arrived.
        reference: what this side has.
        who: sender, for the message.

    Raises:
        FederationError: names sender, key, found and expected.
    """
    missing, extra = [n for n in reference if n not in weights], [n for n in weights if n not in reference]
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({listed(names)})"
            for what, names in (("missing", missing), ("extra", extra))
            if names
        ]
        raise FederationError(
            f"{who}: keys differ from this network's {len(reference)}, {' and '.join(parts)}: "
            "use the same network settings and local_layers everywhere"
        )
    for name, wanted in reference.items():
        found = weights[name]
        if not isinstance(found, torch.Tensor):
            raise FederationError(
                f"{who}: {name!r} is a {type(found).__name__}, expected a tensor: only tensors are taken"
            )
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise FederationError(
                f"{who}: {name!r} is {tuple(found.shape)} {found.dtype}, expected {tuple(wanted.shape)} "
                f"{wanted.dtype}: use the same network settings everywhere"
            )
        if not bool(torch.isfinite(found).all()):
            count = int((~torch.isfinite(found)).sum())
            raise FederationError(
                f"{who}: {name!r} has {count} of {found.numel()} values that are NaN or infinite, expected none: "
                "look at the losses in that site's history.jsonl, or lower the learning rate"
            )


def validate_update(
    update: Update, reference: Weights, number: int, labels: Sequence[str], max_movement: float | None = None
) -> float:
    """Accept an update of this round that fits the reference.

    Args:
        update: what a site sent.
        reference: what was broadcast to it, without the names that stay at sites.
        number: the round that is open.
        labels: class names of the federation in the order of their index.
        max_movement: refuse updates that moved further (see `movement`); ``None`` accepts any finite one.

    Returns:
        how far the site moved from the reference.

    Raises:
        FederationError: names site, key, found and expected.
    """
    if update.round != number:
        raise FederationError(
            f"{update.site}: its update is of round {update.round}, expected {number}: "
            "it came too late; raise round_timeout_s if that happens often"
        )
    if list(update.labels) != list(labels):
        raise FederationError(
            f"{update.site}: its labels are {list(update.labels)}, expected {list(labels)}: "
            "give labels alike, in the same order, at every site"
        )
    for what, value, least in (("scans", update.scans, 1), ("ema_steps", update.ema_steps, 0)):
        if not isinstance(value, int) or value < least:
            raise FederationError(f"{update.site}: {what} is {value!r}, expected a whole number of {least} or more")
    validate_weights(update.weights, reference, update.site)
    distance = movement(reference, update.weights)
    if max_movement is not None and distance > max_movement:
        raise FederationError(
            f"{update.site}: its weights moved by {distance:.3g} of their norm, max_movement is {max_movement:g}: "
            "look at the losses of that site, or raise max_movement"
        )
    return distance


class Aggregation(Protocol):
    """How a round's updates become one model: a new object for each round, `add` for each update, `result` once.

    A rule that takes sites alike, however many scans they have, says so by ``alike = True``: log and Score do so then.
    """

    total: int
    """Sum of the counts that were added."""

    def add(self, weights: Weights, count: int) -> None:
        """Take one site's weights, and the number of its scans."""

    def result(self) -> dict[str, torch.Tensor]:
        """The common weights, in the types that came in; empty if nothing was added."""


class WeightedMean:
    """``sum_k n_k theta_k / sum_k n_k``, added up one by one in float64: memory for one model however many sites.

    Integer tensors, such as counters, are taken from the first one added.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.types: dict[str, torch.dtype] = {}
        self.total = 0

    @torch.no_grad()
    def add(self, weights: Weights, count: int) -> None:
        """Add one site's weights, weighted by its count (1 or more)."""
        for name, value in weights.items():
            if name not in self.sums:
                self.types[name] = value.dtype
                self.sums[name] = value.double() * count if value.is_floating_point() else value.clone()
            elif value.is_floating_point():
                self.sums[name].add_(value, alpha=count)
        self.total += count

    def result(self) -> dict[str, torch.Tensor]:
        """The mean, in the types that came in; empty if nothing was added."""
        return {
            name: (value / self.total).to(self.types[name]) if value.is_floating_point() else value
            for name, value in self.sums.items()
        }


def movement(old: Weights, new: Weights) -> float:
    """How far weights moved: L2 norm of the difference over the L2 norm of the old ones, over all floating tensors."""
    difference = norm = 0.0
    for name, value in new.items():
        if value.is_floating_point():
            before = old[name].double()
            difference += float((value.double() - before).square().sum())
            norm += float(before.square().sum())
    return math.sqrt(difference / norm) if norm > 0 else math.inf if difference else 0.0


def cosine_rate(number: int, rounds: int, first: float, last: float) -> float:
    """Learning rate of a round: half a cosine from ``first`` in round 0 to ``last`` in round ``rounds - 1``."""
    share = number / (rounds - 1) if rounds > 1 else 0.0
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def local_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Names of tensors that never leave a site.

    Args:
        names: of the network's tensors.
        patterns: shell patterns such as ``"*norm*"``.

    Raises:
        ConfigError: a pattern fits no name, or nothing would be left to share.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise ConfigError(
                f"local_layers: {pattern!r} fits no tensor of the network, e.g. {listed(names)}: correct it"
            )
        found.update(fitting)
    if names and len(found) == len(names):
        raise ConfigError(f"local_layers {list(patterns)} keeps every tensor at the sites: nothing would be shared")
    return found


def participants(sites: Iterable[str], share: float, least: int, seed: int, number: int) -> list[str]:
    """The sites asked in a round: a share of them, ``least`` or more, drawn by seed and round alone; sorted."""
    names = sorted(sites)
    count = min(len(names), max(least, math.ceil(share * len(names))))
    drawn = np.random.default_rng([seed, number]).permutation(len(names))[:count]
    return [names[index] for index in sorted(drawn)]


def site_seed(seed: int, site: str) -> int:
    """Seed of a site's draws: by its name, whoever else takes part; 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {site}".encode()).digest()[:4], "big") >> 1


def payload_bytes(weights: Weights, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors, floating ones as ``dtype`` if given; a message has some per cent more around them."""
    return sum(
        value.numel() * (dtype if dtype is not None and value.is_floating_point() else value.dtype).itemsize
        for value in weights.values()
    )


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
