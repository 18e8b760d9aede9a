# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Samples of several domains, and pairs of source and target batches, reproducible by (seed, epoch, sample)."""

from __future__ import annotations

import functools
import signal
import traceback
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

    It yields pairs (index of the scan, seed of its random transforms), for `SeededDataset`. In a distributed run each
    process draws a different sequence.

    Args:
        domains: domain of each case; all equal for a single domain.
        num_samples: draws per epoch.
        seed: draws depend on the seed, the epoch, the stream and the process, on nothing else.

    Raises:
        ConfigError: there is no case, or ``num_samples`` is below 1.

    Examples:
        >>> from mapseg_components.data import DomainBalancedSampler
        >>> domains = ["site 1"] * 9 + ["site 2"]  # nine scans of one site, one of the other
        >>> sampler = DomainBalancedSampler(domains, num_samples=1000, seed=0)
        >>> share = sum(domains[index] == "site 2" for index, seed in sampler) / 1000
        >>> 0.45 < share < 0.55
        True
        >>> list(sampler) == list(sampler)  # the next epoch differs by set_epoch
        True
    """

    def __init__(self, domains: Sequence[str], num_samples: int, seed: int = 0) -> None:
        if not domains or num_samples < 1:
            raise ConfigError(f"cannot draw {num_samples} samples from {len(domains)} cases: both must be at least 1")
        self.members = [np.flatnonzero(np.asarray(domains) == domain) for domain in sorted(set(domains))]
        self.num_samples = num_samples
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, stream: int = 0, start: int = 0) -> None:
        """Choose the draws that come next.

        Args:
            epoch: from 0.
            stream: 0 for the source, 1 for the target.
            start: first draw of the epoch, so that a resumed run continues within it.
        """
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
    """A MONAI dataset whose random transforms are seeded anew for each sample.

    A sample therefore depends neither on the samples before it nor on the worker that makes it: any number of workers
    yields the same batches, and a resumed run continues with the sample that comes next. An index is a pair
    (index of the case, seed), see `DomainBalancedSampler`.

    Args:
        dataset: its ``transform`` has ``set_random_state``, e.g. MONAI's ``Compose``; its ``data`` are cases.

    Raises:
        DataError: a transform failed; the message begins with the case.
        ResourceError: the memory did not suffice; likewise.

    Examples:
        >>> import torch
        >>> from monai.data import Dataset
        >>> from monai.transforms import Compose, RandFlipd
        >>> from mapseg_components.data import SeededDataset
        >>> cases = [{"image": torch.rand(1, 5, 6, 7)}]
        >>> dataset = SeededDataset(Dataset(cases, Compose([RandFlipd("image", prob=0.5)])))
        >>> torch.equal(dataset[0, 123]["image"], dataset[0, 123]["image"])  # case 0 with seed 123
        True
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
    """A data loader whose batches depend on (seed, epoch) alone, and that can continue within an epoch.

    Args:
        loader: batches of one side, from a `SeededDataset` drawn by a `DomainBalancedSampler`.

    Raises:
        ConfigError: the loader keeps its workers from epoch to epoch, or has another dataset or sampler.
        DataError: while iterating: a sample could not be made; the message begins with its case.
        ResourceError: while iterating: a worker was killed, usually because the memory was full.

    Examples:
        >>> import torch
        >>> from monai.data import DataLoader, Dataset
        >>> from monai.transforms import Compose
        >>> from mapseg_components.data import DomainBalancedSampler, EpochLoader, SeededDataset
        >>> cases = [{"image": torch.full((1, 5, 6, 7), number)} for number in range(3)]
        >>> sampler = DomainBalancedSampler(["site 1", "site 1", "site 2"], num_samples=8)
        >>> loader = EpochLoader(DataLoader(SeededDataset(Dataset(cases, Compose([]))), batch_size=2, sampler=sampler))
        >>> [tuple(batch["image"].shape) for batch in loader]
        [(2, 1, 5, 6, 7), (2, 1, 5, 6, 7), (2, 1, 5, 6, 7), (2, 1, 5, 6, 7)]
        >>> loader.epoch, loader.batches  # its state_dict has them, for a resumed run
        (1, 4)
    """

    def __init__(self, loader: DataLoader) -> None:
        self._set_loaders({"": loader})

    def __len__(self) -> int:
        return min(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[Any]:
        for (batch,) in self._batches():
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Number of epochs begun, batches yielded in the last one, and the ids of all cases."""
        cases = {side: case_ids(loader.dataset.dataset) for side, loader in self.loaders.items()}
        return {"epoch": self.epoch, "batches": self.batches, "cases": cases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that batch.

        Raises:
            ValueError: the cases differ from those of the state.
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
        iterator: Iterator[tuple[Any, ...]] = zip(*self.loaders.values())
        while True:
            try:
                batches = next(iterator)
            except StopIteration:
                return
            except (DataError, ResourceError) as error:
                last = str(error).strip().splitlines()[-1]
                if str(error).startswith("Caught "):  # a worker's error arrives with its traceback as the message
                    last, iterator = last.partition("Error: ")[2], iter(())
                    end_workers(error)
                raise type(error)(last) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                iterator = iter(())
                end_workers(error)
                raise ResourceError(
                    f"{str(error).splitlines()[0]}: usually the memory is full; lower num_workers or cache_rate"
                ) from error
            self.batches += 1
            yield batches


class SourceTargetLoader(EpochLoader):
    """Source and target batches side by side: ``{"source": batch, "target": batch}``.

    Args:
        source_loader: labelled batches, see `EpochLoader`; ``None`` leaves the entry out.
        target_loader: unlabelled batches, likewise. An epoch is as long as the shorter of the two.

    Raises:
        ConfigError: both are ``None``, or as `EpochLoader`.

    Examples:
        >>> import torch
        >>> from monai.data import DataLoader, Dataset
        >>> from monai.transforms import Compose
        >>> from mapseg_components.data import DomainBalancedSampler, SeededDataset, SourceTargetLoader
        >>> def loader_of(value, num_samples):
        ...     dataset = SeededDataset(Dataset([{"image": torch.full((1, 5, 6, 7), value)}], Compose([])))
        ...     return DataLoader(dataset, sampler=DomainBalancedSampler(["site"], num_samples))
        >>> loader = SourceTargetLoader(loader_of(1.0, num_samples=4), loader_of(2.0, num_samples=3))
        >>> len(loader), {side: batch["image"].unique().tolist() for side, batch in next(iter(loader)).items()}
        (3, {'source': [1.0], 'target': [2.0]})
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
    """Leave Ctrl-C and SIGTERM to the main process, which saves; end at most ``GRACE_S`` seconds after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))  # the alarm ends the worker
    if then is not None:
        then(worker)


def end_workers(error: BaseException) -> None:
    """Free the loader's iterators, so that their workers end now.

    The frames of an error keep them. Freed by the garbage collector or at the end of the process, their queues are
    closed before the workers are told to end, and each is waited for until `GRACE_S` is over.
    """
    traceback.clear_frames(error.__traceback__)


def case_ids(dataset: Any) -> list[str]:
    """Case ids of a MONAI dataset, or numbers."""
    return [str(case.get(CASE_ID, number)) for number, case in enumerate(dataset.data)]


def process_rank() -> int:
    """Rank in a distributed run, else 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
