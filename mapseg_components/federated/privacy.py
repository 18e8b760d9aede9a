# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a site does to its update before it leaves: fewer values, a bounded length, noise; and what the noise is worth.

Everything acts on the difference between the weights that arrived and those that leave: only that part knows the scans.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from filelock import FileLock, Timeout

from mapseg_components.errors import ConfigError, FederationError, NonFiniteError, ResourceError
from mapseg_components.files import write_json

__all__ = ["PrivacyAccountant", "Privacy", "epsilon_of", "protect"]

BISECTIONS = 100  # halves an interval down to the last bit of a float
NORMAL = NormalDist()
LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Privacy:
    """Settings of one site; each of the three steps is off by default. They are taken in this order.

    Args:
        percentile: changes smaller than this percentile of all absolute changes are not sent, and larger ones are cut
            at ``limit`` (Shokri and Shmatikov 2015; as NVFlare's ``PercentilePrivacy``). No epsilon follows from it.
        limit: largest absolute change of a weight, with ``percentile``.
        clip: a difference whose L2 norm is more than this share of the norm of the weights that arrived is scaled back
            to it; the unit of ``movement`` and ``max_movement``.
        noise: standard deviation of the Gaussian noise on every value, as a multiple of the clipped norm; 0 for none.
        delta: of the budget that is reported, (epsilon, delta).
        max_epsilon: the site takes part in no further round that would bring its total above this; ``None`` for any.

    Raises:
        ConfigError: a value is out of range, or makes no sense without another one.
    """

    percentile: float | None = None
    limit: float = 0.01
    clip: float | None = None
    noise: float = 0.0
    delta: float = 1e-5
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        rules = [
            ("percentile", self.percentile is None or 0 <= self.percentile <= 100, "0 to 100, or null"),
            ("limit", self.limit > 0, "more than 0"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "a share of the norm above 0, or null"),
            ("noise", 0 <= self.noise < math.inf, "0 or more"),
            ("noise", self.noise == 0 or self.clip is not None, "0 without privacy_clip, which bounds what it hides"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
            ("max_epsilon", self.max_epsilon is None or self.max_epsilon > 0, "more than 0, or null"),
            ("max_epsilon", self.max_epsilon is None or self.noise > 0, "null without privacy_noise"),
        ]
        wrong = [
            f"privacy_{name} is {getattr(self, name)!r}, expected {what}" for name, good, what in rules if not good
        ]
        if wrong:
            raise ConfigError(f"{'; '.join(wrong)}: correct it in federated.json or on the command line")

    @property
    def active(self) -> bool:
        """Anything is done at all."""
        return self.percentile is not None or self.clip is not None

    @property
    def cost(self) -> float:
        """What one update costs: mu squared of Gaussian differential privacy, 0 without noise; costs are added up.

        Two updates of a site differ by twice the clipped norm at most, whatever its scans were, hence mu = 2 / noise.
        """
        return (2 / self.noise) ** 2 if self.noise else 0.0


def protect(
    weights: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    privacy: Privacy,
    generator: np.random.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Weights as they leave a site.

    Args:
        weights: name to tensor, after training.
        base: those that arrived, of the same shapes.
        privacy: see `Privacy`.
        generator: of the noise; by default a new one from the operating system's entropy. It must not follow from
            anything that the server knows, such as the seed of the federation: the server could take the noise off.

    Returns:
        new tensors; integer ones, such as counters, are passed on.

    Raises:
        NonFiniteError: a change is NaN or infinite, or overflows: it has no length, and nothing could bound the rest.
    """
    floating = [name for name, value in weights.items() if value.is_floating_point()]
    change = {name: (weights[name] - base[name]).numpy() for name in floating}
    if not math.isfinite(norm_of(change)):
        raise NonFiniteError(
            "its weights are NaN or infinite after training, nothing of them leaves: lower the learning rate"
        )
    if privacy.percentile is not None:
        keep_largest(change, privacy.percentile, privacy.limit)
    if privacy.clip is not None:
        bound = privacy.clip * norm_of({name: base[name].numpy() for name in floating})
        length = norm_of(change)
        generator = generator or np.random.default_rng()
        for value in change.values():
            if length > bound:
                value *= bound / length
            if privacy.noise:
                value += privacy.noise * bound * generator.standard_normal(value.shape, dtype=np.float32)
    return {name: base[name] + torch.from_numpy(change[name]) if name in change else weights[name] for name in weights}


def keep_largest(change: dict[str, np.ndarray], percentile: float, limit: float) -> None:
    """Set what is below the percentile to 0 and cut the rest, in place; a single number is passed on."""
    cutoff = np.percentile(np.concatenate([np.abs(value).ravel() for value in change.values()]), percentile)
    for value in change.values():
        if value.ndim:
            value[np.abs(value) < cutoff] = 0
            np.clip(value, -limit, limit, out=value)


def norm_of(arrays: Mapping[str, np.ndarray]) -> float:
    """L2 norm over all of them."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in arrays.values()))


def epsilon_of(cost: float, delta: float) -> float:
    """Epsilon of Gaussian noise at a delta, exactly (Balle and Wang 2018, theorem 8; Dong, Roth and Su 2022).

    Args:
        cost: mu squared, added up over all updates (see `Privacy.cost`): Gaussian mechanisms compose to one of them.
        delta: above 0, below 1.
    """
    mu = math.sqrt(cost)
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, cost / 2 + mu * max(-NORMAL.inv_cdf(delta), 0.0)  # delta of its first term alone
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def delta_of(epsilon: float, mu: float) -> float:
    """Delta of mu-GDP at an epsilon."""
    points = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    above, below = torch.special.log_ndtr(points).tolist()
    return math.exp(above) - math.exp(epsilon + below)


class PrivacyAccountant:
    """Privacy accountant of a site: a file with the budget spent so far, written before an update leaves.

    A round that is repeated, after a stop of the server, is a second update with new noise, and counted as one. Updates
    without noise have no epsilon and are not counted: a total holds for a site that has sent none.

    Args:
        path: of the file; it belongs to the scans of the site, and goes on being counted as long as it is there.
        privacy: settings of the site.
    """

    def __init__(self, path: Path, privacy: Privacy) -> None:
        self.path, self.privacy = path, privacy

    def require_budget(self) -> tuple[int, float]:
        """Another update fits into the budget.

        Returns:
            number and cost of the updates so far.

        Raises:
            FederationError: it does not, or the file cannot be used.
        """
        releases, cost = self._read()
        most = self.privacy.max_epsilon
        if most is None:
            return releases, cost
        after = epsilon_of(cost + self.privacy.cost, self.privacy.delta)
        if after > most:
            raise FederationError(
                f"its privacy budget is spent: after {releases} updates another one would bring epsilon to {after:.4g} "
                f"(delta {self.privacy.delta:g}), privacy_max_epsilon is {most:g}: leave the federation here, or agree "
                "at the site on a larger one"
            )
        return releases, cost

    def spend(self) -> dict[str, float]:
        """Count an update; what is reported with it.

        Returns:
            ``epsilon`` of this update and ``epsilon_total`` of all so far, at ``delta``; ``updates``, their number.
            Empty without noise.

        Raises:
            FederationError: the budget is spent, or the file cannot be used.
            ResourceError: it cannot be written; nothing may leave then.
        """
        if not self.privacy.noise:
            return {}
        with self._alone():  # another job of this site may spend from the same file
            releases, cost = self.require_budget()
            releases, cost = releases + 1, cost + self.privacy.cost
            write_json({"updates": releases, "cost": cost}, self.path)
        delta = self.privacy.delta
        return {
            "epsilon": epsilon_of(self.privacy.cost, delta),
            "epsilon_total": epsilon_of(cost, delta),
            "delta": delta,
            "updates": releases,
        }

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process reads or writes the file in this block."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_TIMEOUT_S)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ResourceError(f"{self.path} is in use by another job of this site: end that one first") from error
        except OSError as error:
            raise ResourceError(f"{self.path} cannot be locked ({error}): allow writing beside it") from error
        try:
            yield
        finally:
            lock.release()

    def _read(self) -> tuple[int, float]:
        if not self.privacy.noise or not self.path.exists():
            return 0, 0.0
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            releases, cost = int(content["updates"]), float(content["cost"])
            if releases < 1 or not 0 < cost < math.inf:
                raise ValueError(f"{releases} updates of cost {cost}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FederationError(
                f"{self.path} does not say what was spent ({type(error).__name__}: {error}): restore it; move it away "
                "only for scans that were never used before"
            ) from error
        return releases, cost
