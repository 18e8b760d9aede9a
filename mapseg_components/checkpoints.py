# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of weights and of training state: written whole or not at all, read without running code."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch import nn

from mapseg_components.errors import CheckpointError
from mapseg_components.files import free_space_error, replacing

__all__ = [
    "fingerprint",
    "load_weights",
    "publish",
    "random_state",
    "read_checked",
    "restore_random_state",
    "weights_of",
    "write_atomic",
]

logger = logging.getLogger(__name__)


def write_atomic(
    content: Any, path: str | os.PathLike[str], keep_previous: str | os.PathLike[str] | None = None
) -> None:
    """Save tensors and plain values so that ``path`` holds either its old content or all of the new one.

    Written beside the target, flushed to disk, read back (every record's checksum), then renamed over it.

    Args:
        content: what ``torch.save`` can write and ``torch.load(weights_only=True)`` can read.
        path: the file; missing folders are made.
        keep_previous: keep the file's old content under this name.

    Raises:
        ResourceError: the disk is full, or the file does not read back as written; the old file is untouched.
    """
    with replacing(path, keep_previous) as temporary:
        try:
            with temporary.open("wb") as stream:
                torch.save(content, stream)
            with zipfile.ZipFile(temporary) as archive:
                damaged = archive.testzip()
        except (RuntimeError, zipfile.BadZipFile) as error:  # torch's words for a disk that is full
            raise free_space_error(Path(path), error) from error
        if damaged is not None:
            raise free_space_error(Path(path), RuntimeError(f"its record {damaged} does not read back"))


def read_checked(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> Any:
    """Read a file of tensors and plain values; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        elsewhere = "" if path.is_absolute() else f" (in {Path.cwd()}; from there, a bundle's own need --bundle_root)"
        raise CheckpointError(
            f"no weights at {path}{elsewhere}: run the stage that writes this file, or correct the path"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the records with their checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged (checksum of its record {damaged}): copy it again")
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values and was not loaded: "
            "save a state_dict, and use only files from people you trust"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes of a parser is not foreseeable
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__}): copy it again") from error


def fingerprint(network: nn.Module) -> str:
    """Sixteen hexadecimal digits that two networks share if their weights have equal names, shapes and types."""
    lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a network's ``state_dict`` on the CPU, in PyTorch's default memory format."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }


def load_weights(network: nn.Module, path: str | os.PathLike[str], prefix: str = "") -> int:
    """Load weights into a network, all of it or the part below a prefix; every parameter there must be found.

    Args:
        network: receives the weights.
        path: a state_dict. Entries outside the prefix are left out.
        prefix: e.g. ``"encoder."``, a prefix of names that file and network share.

    Returns:
        the number of tensors loaded, which is all that the network has below the prefix.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    weights = read_checked(path)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} holds no plain state_dict: it may be a resume file; name a file of weights")
    found = {name: value for name, value in weights.items() if name.startswith(prefix)}
    expected = {name: value for name, value in network.state_dict().items() if name.startswith(prefix)}
    problems = [f"{name} missing" for name in expected if name not in found]
    problems += [f"{name} not in the network" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems or not expected:
        covered = len(expected) - sum(
            name not in found or found[name].shape != expected[name].shape for name in expected
        )
        raise CheckpointError(
            f"{path} covers {covered} of {len(expected)} tensors of the network's {prefix or 'weights'!s} "
            f"({'; '.join(problems[:5]) or 'no such tensors'}{' ...' if len(problems) > 5 else ''}): "
            "use the network settings (width, depth, stride, in_channels, num_classes) it was trained with"
        )
    network.load_state_dict(found, strict=not prefix)
    return len(found)


def publish(
    trained: str | os.PathLike[str], folder: str | os.PathLike[str], network: nn.Module, name: str = "model.pt"
) -> None:
    """Put the weights of a finished training where the bundle's inference reads them; the earlier ones are kept.

    Args:
        trained: folder of the training: its ``model.pt`` is taken, else ``source_only.pt``, else, where no epoch was
            validated, the weights that the network has now. Nothing is done if it is ``folder`` itself.
        folder: receives ``name``; what stood there is kept as ``previous_<name>``.
        network: as it was trained.

    Raises:
        CheckpointError: the chosen file is damaged.
        ResourceError: the disk is full.
    """
    trained, folder = Path(trained), Path(folder)
    if trained.resolve() == folder.resolve() or idist.get_rank() != 0:
        return
    chosen = next((path for path in (trained / "model.pt", trained / "source_only.pt") if path.is_file()), None)
    if chosen is None:
        logger.warning("No epoch was validated, or every figure was NaN: the weights of the last epoch are taken.")
    write_atomic(
        weights_of(network) if chosen is None else read_checked(chosen), folder / name, folder / f"previous_{name}"
    )
    logger.info(f"{folder / name} holds {chosen or 'the weights of the last epoch'}; earlier ones: previous_{name}.")


def random_state() -> dict[str, Any]:
    """State of the generators of torch, CUDA, numpy and python, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), words_of_numpy, int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        for device, of_device in zip(range(torch.cuda.device_count()), state["cuda"]):
            torch.cuda.set_rng_state(of_device, device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
