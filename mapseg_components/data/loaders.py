# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Drawing from several domains, and pairing source with target batches, reproducibly by (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data.utils import set_rnd
from torch.utils.data import DataLoader, Sampler

from mapseg_components.errors import ConfigError
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["DomainBalancedSampler", "EpochLoader", "SourceTargetLoader"]


class DomainBalancedSampler(Sampler[int]):
    """Draw a domain, then one of its scans, both uniformly, with replacement.

    In a distributed run each process draws its own sequence.

    Args:
        domains: domain of each case; all equal for a single domain.
        num_samples: draws per epoch.
        seed: draws depend on the seed, the epoch and the process, on nothing else.
    """

    def __init__(self, domains: Sequence[str], num_samples: int, seed: int = 0) -> None:
        if not domains or num_samples < 1:
            raise ConfigError(f"cannot draw {num_samples} samples from {len(domains)} cases: both must be at least 1")
        self.members = [np.flatnonzero(np.asarray(domains) == domain) for domain in sorted(set(domains))]
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch, process_rank()])
        for _ in range(self.num_samples):
            members = self.members[generator.integers(len(self.members))]
            yield int(members[generator.integers(len(members))])


class EpochLoader:
    """A data loader whose draws and random transforms depend on (seed, epoch) alone.

    MONAI seeds random transforms when a loader is made; here they are seeded again at the start of every epoch, so
    that a resumed run sees what an uninterrupted one would have seen, with any number of workers.

    Args:
        loader: batches of one side.
        seed: see above.

    Raises:
        ConfigError: the loader keeps its workers from epoch to epoch, where no new seed reaches them.
    """

    def __init__(self, loader: DataLoader, seed: int = 0) -> None:
        self.loaders = {"": loader}
        self._refuse_persistent_workers()
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return min(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[Any]:
        (loader,) = self._next_epoch()
        yield from loader

    def state_dict(self) -> dict[str, int]:
        """Epochs begun so far."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that epoch."""
        self.epoch = state["epoch"]

    def _refuse_persistent_workers(self) -> None:
        if any(loader.persistent_workers for loader in self.loaders.values()):
            raise ConfigError("persistent_workers is true, but an epoch's seed reaches new workers only: set it false")

    def _next_epoch(self) -> list[DataLoader]:
        for side, loader in enumerate(self.loaders.values()):
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(self.epoch)
            seed = int(np.random.SeedSequence([self.seed, self.epoch, process_rank(), side]).generate_state(1)[0])
            set_rnd(loader.dataset, seed=seed)
            if loader.generator is None and loader.num_workers > 0:
                # workers are seeded from the loader's generator; without one, from torch's global state
                loader.generator = torch.Generator()
            if loader.generator is not None:
                loader.generator.manual_seed(seed)
        self.epoch += 1
        return list(self.loaders.values())


class SourceTargetLoader(EpochLoader):
    """Source and target batches side by side: ``{"source": batch, "target": batch}``.

    Args:
        source_loader: labelled batches, or ``None``. target_loader: unlabelled batches, or ``None``. The entry of
            one that is ``None`` is absent. An epoch is as long as the shorter of the two.
        seed: see `EpochLoader`.

    Raises:
        ConfigError: both are ``None``, or see `EpochLoader`.
    """

    def __init__(self, source_loader: DataLoader | None, target_loader: DataLoader | None, seed: int = 0) -> None:
        sides = {SOURCE: source_loader, TARGET: target_loader}
        self.loaders = {side: loader for side, loader in sides.items() if loader is not None}
        if not self.loaders:
            raise ConfigError("neither source nor target data: give at least one loader")
        self._refuse_persistent_workers()
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loaders = self._next_epoch()
        for batches in zip(*loaders):
            yield dict(zip(self.loaders, batches))


def process_rank() -> int:
    """Rank in a distributed run, else 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
