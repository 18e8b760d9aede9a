# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Drawing from several domains, and pairing source with target batches, reproducibly by (seed, epoch, sample)."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError
from mapseg_components.keys import CASE_ID, SOURCE, TARGET

__all__ = ["DomainBalancedSampler", "EpochLoader", "SeededDataset", "SourceTargetLoader"]


GRACE_S = 20  # seconds that a worker may take to end


class DomainBalancedSampler(Sampler[tuple[int, int]]):
    """Draw a domain, then one of its scans, both uniformly, with replacement; every draw has a seed.

    In a distributed run each process draws its own sequence.

    Args:
        domains: domain of each case; all equal for a single domain.
        num_samples: draws per epoch.
        seed: draws depend on the seed, the epoch, the stream and the process, on nothing else.

    Yields:
        (index of the scan, seed of its random transforms), for `SeededDataset`.
    """

    def __init__(self, domains: Sequence[str], num_samples: int, seed: int = 0) -> None:
        if not domains or num_samples < 1:
            raise ConfigError(f"cannot draw {num_samples} samples from {len(domains)} cases: both must be at least 1")
        self.members = [np.flatnonzero(np.asarray(domains) == domain) for domain in sorted(set(domains))]
        self.num_samples = num_samples
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, stream: int = 0, start: int = 0) -> None:
        """Choose what comes next: the epoch, the stream (0 source, 1 target), and the first draw of it."""
        self.epoch, self.stream, self.start = epoch, stream, start

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        origin = np.random.SeedSequence([self.seed, self.epoch, process_rank(), self.stream])
        of_draws, of_samples = origin.spawn(2)
        generator, seeds = np.random.default_rng(of_draws), of_samples.generate_state(self.num_samples)
        for number in range(self.num_samples):
            members = self.members[generator.integers(len(self.members))]
            index = int(members[generator.integers(len(members))])
            if number >= self.start:
                yield index, int(seeds[number])


class SeededDataset(Dataset):
    """A MONAI dataset whose random transforms are seeded for each sample by itself.

    So a sample depends neither on the samples before it nor on the worker that makes it: any number of workers yields
    the same batches, and a run that was interrupted goes on with the sample that comes next.

    Args:
        dataset: its ``transform`` has ``set_random_state``, e.g. MONAI's ``Compose``; its ``data`` are cases.

    Raises:
        DataError: a transform failed; the message begins with the case.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        self.dataset.transform.set_random_state(seed=seed)  # type: ignore[attr-defined]
        try:
            return self.dataset[index]
        except Exception as error:
            cause: BaseException = error  # MONAI wraps what a transform raises
            while cause.__cause__ is not None and not isinstance(cause, MAPSegError):
                cause = cause.__cause__
            reason = next(iter(str(cause).strip().splitlines()), "")
            if not isinstance(cause, MAPSegError):
                reason = f"{type(cause).__name__}: {reason}"
            kind = ResourceError if isinstance(cause, (MemoryError, ResourceError)) else DataError
            raise kind(f"case {case_ids(self.dataset)[index]}: {reason}") from error


class EpochLoader:
    """A data loader whose batches depend on (seed, epoch) alone, and that can go on in the middle of an epoch.

    Args:
        loader: batches of one side, from a `SeededDataset` drawn by a `DomainBalancedSampler`.

    Raises:
        ConfigError: the loader keeps its workers from epoch to epoch, or has another dataset or sampler.
        DataError: while iterating: a sample could not be made; the message begins with its case.
        ResourceError: while iterating: a worker was killed, mostly for memory.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._set_loaders({"": loader})

    def __len__(self) -> int:
        return min(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[Any]:
        for (batch,) in self._batches():
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epochs begun, batches yielded of the last one, and the cases that are drawn from."""
        cases = {side: case_ids(loader.dataset.dataset) for side, loader in self.loaders.items()}
        return {"epoch": self.epoch, "batches": self.batches, "cases": cases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that batch.

        Raises:
            ValueError: the cases are others than those of the state.
        """
        for side, now in self.state_dict()["cases"].items():
            before = state["cases"].get(side)
            if before != now:
                raise ValueError(f"{side} scans were {before}, now {now}"[:400])
        self.epoch, self.batches = state["epoch"], state["batches"]
        self._unfinished = 0 < self.batches < len(self)

    def _set_loaders(self, loaders: dict[str, DataLoader]) -> None:
        self.loaders, self.epoch, self.batches, self._unfinished = loaders, 0, 0, False
        for loader in loaders.values():
            if loader.persistent_workers:
                raise ConfigError(
                    "persistent_workers is true, but the next epoch's draws reach new workers only: set it false"
                )
            if not isinstance(loader.dataset, SeededDataset) or not isinstance(loader.sampler, DomainBalancedSampler):
                raise ConfigError(
                    f"a loader has dataset {type(loader.dataset).__name__}, sampler {type(loader.sampler).__name__}, "
                    "expected SeededDataset and DomainBalancedSampler: wrap the dataset, or a resumed run would differ"
                )
            if loader.generator is None:  # the seed of workers comes from here and not from torch's global state
                loader.generator = torch.Generator()
            loader.worker_init_fn = functools.partial(start_worker, loader.worker_init_fn)

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        if self._unfinished:
            self._unfinished = False
        else:
            self.epoch, self.batches = self.epoch + 1, 0
        for stream, loader in enumerate(self.loaders.values()):
            loader.generator.manual_seed(self.epoch)
            loader.sampler.set_epoch(self.epoch - 1, stream, self.batches * (loader.batch_size or 1))
        iterator = zip(*self.loaders.values())
        while True:
            try:
                batches = next(iterator)
            except StopIteration:
                return
            except (DataError, ResourceError) as error:  # a worker's error arrives with its traceback as the message
                last = str(error).strip().splitlines()[-1]
                raise type(error)(last.partition("Error: ")[2] if str(error).startswith("Caught ") else last) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ResourceError(
                    f"{str(error).splitlines()[0]}: mostly the memory is used up; lower num_workers or cache_rate"
                ) from error
            self.batches += 1
            yield batches


class SourceTargetLoader(EpochLoader):
    """Source and target batches side by side: ``{"source": batch, "target": batch}``.

    Args:
        source_loader: labelled batches, or ``None``.
        target_loader: unlabelled batches, or ``None``. The entry of one that is ``None`` is absent. An epoch is as long
            as the shorter of the two. See `EpochLoader`.

    Raises:
        ConfigError: both are ``None``, or see `EpochLoader`.
    """

    def __init__(self, source_loader: DataLoader | None, target_loader: DataLoader | None) -> None:
        sides = {SOURCE: source_loader, TARGET: target_loader}
        loaders = {side: loader for side, loader in sides.items() if loader is not None}
        if not loaders:
            raise ConfigError("neither source nor target data: give at least one loader")
        self._set_loaders(loaders)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batches in self._batches():
            yield dict(zip(self.loaders, batches))


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Leave Ctrl-C and termination to the main process, which ends its iteration and saves; outlive it by no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))  # the alarm ends the worker
    if then is not None:
        then(worker)


def case_ids(dataset: Any) -> list[str]:
    """Case ids of a MONAI dataset, or numbers."""
    return [str(case.get(CASE_ID, number)) for number, case in enumerate(dataset.data)]


def process_rank() -> int:
    """Rank in a distributed run, else 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
