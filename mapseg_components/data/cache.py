# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans decoded once: in memory, or in memory-mapped files that loader workers, processes and later runs share.

An entry of the cache on disk is a folder named by a digest of its origin: the bytes of the case's files, the settings
of the deterministic transforms, and the versions of the packages. It holds one ``.npy`` file per tensor and, written
last, ``entry.json``. Nothing in it is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from filelock import FileLock
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait

import mapseg_components
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import replacing, require_writable, sha256_of, sweep_temporaries, write_json
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.nifti import read_geometry

__all__ = ["MappedCacheDataset"]

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same settings make another entry
RECORD = "entry.json"
NAME = "filename_or_obj"  # the scan's file in MONAI's metadata
NARROW = (torch.uint8, torch.int16)
RUNNING = {"filenames", "_tracing"}  # attributes that MONAI's readers and spatial transforms set while they run


class MappedCacheDataset(CacheDataset):
    """MONAI's ``CacheDataset`` whose cache may lie on disk, for more scans than fit into memory.

    With ``cache_dir``, the results of the deterministic transforms are written once and memory-mapped: the operating
    system reads the voxels that a crop needs, caches them while there is memory, and shares them between processes. Of
    a scan's metadata the affine and the file's name are kept. Random transforms must not change what is cached.

    Args:
        data: cases; the path of a file stands for the file's content.
        transform: deterministic transforms, then random ones.
        cache_dir: folder of the entries, made if it is missing; ``None`` keeps them in memory. Runs may share it. Old
            entries stay; remove the folder between runs to free the space.
        cache_rate: share of the cases that are cached; the others are decoded for every sample.
        narrow: on disk, keep volumes of whole numbers as uint8 or int16, without loss; they come back as that.
        num_workers: threads that fill the cache.
        progress: show a bar while the cache is filled.

    Raises:
        ConfigError: the settings of a transform cannot be distinguished from others.
        DataError: a transform leaves something that is no tensor and was not in the case.
        ResourceError: the folder cannot be written, or its disk is full.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from monai.transforms import Compose, ScaleIntensityd
        >>> from mapseg_components.data import MappedCacheDataset
        >>> cases = [{"image": torch.tensor([[0.0, 50.0, 100.0]]), "case_id": "a"}]
        >>> transform = Compose([ScaleIntensityd("image")])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     MappedCacheDataset(cases, transform, cache_dir=folder, progress=False)[0]["image"].tolist()
        [[0.0, 0.5, 1.0]]
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_rate: float = 1.0,
        narrow: bool = True,
        num_workers: int = 1,
        progress: bool = True,
    ) -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.narrow = narrow
        self.entries: dict[int, Path] = {}
        if self.cache_dir is not None:
            require_writable(self.cache_dir)
            random = transform.get_index_of_first(
                lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
            )
            self.settings = describe(transform.transforms[:random])
        super().__init__(
            data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=progress, copy_cache=False
        )

    def __getstate__(self) -> dict[str, Any]:
        """State for a spawned (not forked) worker, which maps the entries again."""
        return self.__dict__ if self.cache_dir is None else {**self.__dict__, "_cache": [None] * len(self._cache)}

    def _load_cache_item(self, idx: int) -> dict[str, Any]:
        if self.cache_dir is None:
            made: dict[str, Any] = super()._load_cache_item(idx)
            return made
        case = self.data[idx]
        folder = self.entries.setdefault(idx, self.cache_dir / self._key(case))
        with FileLock(f"{folder}.lock"):  # of several processes one makes the entry
            tensors = read_entry(folder, case)
            if tensors is None:
                item = super()._load_cache_item(idx)
                sweep_temporaries(folder)
                write_entry(folder, tensors_of(item, case), self.narrow)
                tensors = read_entry(folder, case)
        if tensors is None:
            raise DataError(f"{folder}: the entry of the cache cannot be read back: remove the folder, check its disk")
        return {**case, **tensors}

    def _key(self, case: Mapping[str, Any]) -> str:
        """Name of a case's entry: a digest of files, settings and versions."""
        origin = {
            "format": [FORMAT, mapseg_components.__version__, monai.__version__, torch.__version__, self.narrow],
            "transforms": self.settings,
            "case": {key: content(value) for key, value in case.items()},
        }
        return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:40]


def content(value: Any) -> Any:
    """Digest of a file's content, of an image with where it lies, which may stand in a file beside it; any other entry
    of a case as it is."""
    if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
        digest = sha256_of(value)
        return [digest, read_geometry(value).affine.tolist()] if is_picture(value) else digest
    return describe(value)


def describe(value: Any, within: tuple[int, ...] = ()) -> Any:
    """JSON that is equal for equal settings of transforms, and differs for others.

    Raises:
        ConfigError: a part of the settings is code without a name, or refers to itself.
    """
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    inner = functools.partial(describe, within=(*within, id(value)))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [kind, str(value.dtype), list(value.shape), digest]
    if id(value) in within:
        raise ConfigError(
            f"a {kind} refers to itself, its settings cannot be compared: cache in memory (cache_dir: null)"
        )
    if isinstance(value, Mapping):
        return [kind, sorted(([inner(key), inner(item)] for key, item in value.items()), key=json.dumps)]
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(map(inner, value), key=json.dumps)]
    if isinstance(value, functools.partial):
        return [kind, inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, (type, Callable)) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        if "<lambda>" in value.__qualname__:
            raise ConfigError(
                f"the deterministic transforms contain a lambda of {value.__module__}; the cache on disk cannot "
                "distinguish one lambda from another: use a named function, or cache in memory (cache_dir: null)"
            )
        return [kind, value.__module__, value.__qualname__]
    if isinstance(value, (Enum, os.PathLike, torch.dtype, torch.device, np.dtype)):
        return [kind, str(value)]
    if hasattr(value, "__dict__"):
        return [kind, inner({name: item for name, item in vars(value).items() if name not in RUNNING})]
    raise ConfigError(
        f"the settings of a {kind} cannot be distinguished from others: cache in memory (cache_dir: null)"
    )


def tensors_of(item: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Entries that the deterministic transforms added or changed. Raises `DataError` if one is not a tensor."""
    made = {key: value for key, value in item.items() if key not in case or value is not case[key]}
    for key, value in made.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(f"entry {key!r} is a {type(value).__name__}, a cache on disk keeps tensors: convert it")
    return made


def write_entry(folder: Path, tensors: Mapping[str, torch.Tensor], narrow: bool) -> None:
    """Write tensors, each whole or not at all, and last the record that makes them an entry."""
    record: dict[str, Any] = {}
    for key, tensor in tensors.items():
        plain = tensor.as_subclass(torch.Tensor).detach().cpu()
        array = np.ascontiguousarray((narrowed(plain) if narrow else plain).numpy())
        path = folder / f"{key}.npy"
        with replacing(path) as temporary, open(temporary, "wb") as stream:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(stream, header)
            stream.write(array.reshape(-1).view(np.uint8).data)
        record[key] = {"bytes": path.stat().st_size}
        if isinstance(tensor, MetaTensor):
            record[key] |= {"affine": tensor.affine.tolist(), NAME: NAME in tensor.meta}
    write_json(record, folder / RECORD)


def narrowed(volume: torch.Tensor) -> torch.Tensor:
    """A volume (C, X, Y, Z) of whole numbers in the smallest type of `NARROW` that holds them; any other as it is."""
    if volume.ndim == 4 and volume.is_floating_point():
        for dtype in NARROW:
            if torch.equal(volume.to(dtype).to(volume.dtype), volume):
                return volume.to(dtype)
    return volume


def read_entry(folder: Path, case: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Tensors of an entry, memory-mapped; ``None`` if it is absent or incomplete.

    The mapping is private: changes that a process makes to a tensor are not written to the file.
    """
    if not (folder / RECORD).exists():
        return None
    tensors: dict[str, torch.Tensor] = {}
    try:
        for key, facts in json.loads((folder / RECORD).read_text()).items():
            tensor = map_array(folder / f"{key}.npy", facts["bytes"])
            if "affine" in facts:
                meta = {NAME: str(case.get(key))} if facts[NAME] else {}
                tensor = MetaTensor(tensor, affine=torch.tensor(facts["affine"], dtype=torch.float64), meta=meta)
            tensors[key] = tensor
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(f"{folder} is damaged ({error}): its scan is decoded again.")
        return None
    return tensors


def map_array(path: Path, expected: int) -> torch.Tensor:
    """A ``.npy`` file as a tensor on its mapped bytes; the file is not kept open.

    Raises:
        OSError, ValueError: it is absent, of another size than ``expected`` bytes, or no array of numbers.
    """
    with open(path, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{path.name} has version {version} of the format, expected (1, 0)")
        shape, reversed_axes, dtype = np.lib.format.read_array_header_1_0(stream)
        start, found = stream.tell(), os.fstat(stream.fileno()).st_size
    if reversed_axes or dtype.hasobject or found != expected or found != start + dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path.name} has {found} bytes, expected {expected} of a plain array")
    number_type = torch.from_numpy(np.empty(0, dtype)).dtype
    mapped = torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8)
    return mapped[start:].view(number_type).view(shape)
