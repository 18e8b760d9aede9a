# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Connected components and holes of the structures of a label map, and the classes of structures that are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import FillHoles, KeepLargestConnectedComponent, Transform
from monai.utils import convert_to_dst_type, optional_import
from scipy import ndimage

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.structures import structures_of
from mapseg_components.transforms.dictionary import EachKey
from mapseg_components.transforms.inputs import as_volume, scan_name

__all__ = [
    "AFTER_NETWORK",
    "FillEnclosed",
    "FillEnclosedd",
    "KeepComponents",
    "KeepComponentsd",
    "holes_of",
    "named_classes",
    "named_numbers",
    "require_components",
]


def holes_of(classes: np.ndarray, value: int) -> np.ndarray:
    """Background that a structure alone encloses.

    A hole is a part of the background, voxels connected by faces, edges or corners, that touches neither another
    structure nor the edge of the volume. Along an axis of one voxel there is no edge: an image of one slice has holes
    in its plane.

    Args:
        classes: (X, Y, Z), 0 is background.
        value: of the structure.

    Returns:
        (X, Y, Z), ``True`` in a hole.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.transforms.components import holes_of
        >>> ring = np.ones((3, 4, 1), int)
        >>> ring[1, 1:3] = 0
        >>> int(holes_of(ring, 1).sum())
        2
        >>> ring[1, 2] = 2  # another structure in the ring
        >>> int(holes_of(ring, 1).sum())
        0
    """
    holes = np.zeros(classes.shape, bool)
    boxes = ndimage.find_objects((classes == value).astype(np.uint8))
    if not boxes:
        return holes
    box = boxes[0]  # a hole is within the structure's box, and does not touch its border
    flat = tuple(axis for axis, side in enumerate(classes.shape) if side == 1)
    part = np.squeeze(classes[box], axis=flat)
    if part.ndim == 0:
        return holes
    numbered, count = ndimage.label(part != value, np.ones((3,) * part.ndim))
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False
    enclosed[numbered[(part != value) & (part != 0)]] = False
    for axis in range(part.ndim):
        enclosed[numbered.take([0, -1], axis)] = False
    holes[box] = enclosed[numbered].reshape(classes[box].shape)
    return holes


class FillEnclosed(FillHoles):
    """Fill the holes of structures, see `holes_of`.

    MONAI's ``FillHoles`` gives a structure everything that it encloses, the blood within a myocardium as well; this
    one fills background that touches no other structure, so that no voxel of a structure is changed.

    Args:
        applied_labels: class indices of the structures.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import FillEnclosed
        >>> label_map = torch.ones(1, 3, 4, 5)
        >>> label_map[0, 1, 1, 2] = 0
        >>> FillEnclosed([1])(label_map).unique().tolist()
        [1.0]
    """

    def __init__(self, applied_labels: Sequence[int]) -> None:
        super().__init__(applied_labels=list(applied_labels))

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Label map (1, X, Y, Z) of the same type, metadata kept.

        Raises:
            ConfigError: it has several channels.
            DataError: it holds values that are not whole.
        """
        img = as_volume(img)
        classes = whole_classes(img)
        result = img.clone()
        for value in self.applied_labels or ():
            result[0][torch.from_numpy(holes_of(classes, value)).to(img.device)] = value
        return result


class FillEnclosedd(EachKey):
    """Dictionary version of `FillEnclosed`.

    Args:
        keys: label maps (1, X, Y, Z).
        applied_labels: class indices of the structures.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import FillEnclosedd
        >>> label_map = torch.ones(1, 3, 4, 5)
        >>> label_map[0, 1, 1, 2] = 0
        >>> FillEnclosedd("pred", [1])({"pred": label_map})["pred"].unique().tolist()
        [1.0]
    """

    def __init__(self, keys: KeysCollection, applied_labels: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = FillEnclosed(applied_labels)


def whole_classes(img: torch.Tensor) -> np.ndarray:
    """Values (X, Y, Z) of a label map (1, X, Y, Z).

    Raises:
        ConfigError: it has several channels.
        DataError: it holds values that are not whole.
    """
    if len(img) != 1:
        raise ConfigError(f"expected a label map of one channel, this has {len(img)}: argmax comes first")
    classes = img.as_subclass(torch.Tensor)[0].cpu().numpy()
    if not np.array_equal(classes, np.round(classes)):
        raise DataError(f"{scan_name(img)} has values that are not whole, and is no label map: argmax comes first")
    return classes


class KeepComponents(Transform):
    """MONAI's ``KeepLargestConnectedComponent`` with a number of its own for each structure.

    Where left and right are one structure, two components of it are kept, and specks elsewhere go.

    Args:
        numbers: class index to the number of components that are kept.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import KeepComponents
        >>> label_map = torch.tensor([1, 1, 0, 2, 2, 0, 1, 1, 1, 0, 1]).view(1, 11, 1, 1)
        >>> KeepComponents({1: 2})(label_map).flatten().tolist()
        [1, 1, 0, 2, 2, 0, 1, 1, 1, 0, 0]
    """

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self.steps = [
            KeepLargestConnectedComponent(applied_labels=[value], is_onehot=False, num_components=number)
            for value, number in numbers.items()
        ]

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Label map (1, X, Y, Z) of the same type, metadata kept. Errors as those of `FillEnclosed`."""
        img = as_volume(img)
        whole_classes(img)
        result = img
        for step in self.steps:
            result = step(result)
        return convert_to_dst_type(result, dst=img)[0]  # MONAI's gives metadata to every tensor


class KeepComponentsd(EachKey):
    """Dictionary version of `KeepComponents`.

    Args:
        keys: label maps (1, X, Y, Z) of class indices.
        numbers: class index to the number of components that are kept.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import KeepComponentsd
        >>> label_map = torch.tensor([1, 1, 0, 2, 2, 0, 1, 1, 1, 0, 1]).view(1, 11, 1, 1)
        >>> KeepComponentsd("pred", {1: 2})({"pred": label_map})["pred"].flatten().tolist()
        [1, 1, 0, 2, 2, 0, 1, 1, 1, 0, 0]
    """

    def __init__(self, keys: KeysCollection, numbers: Mapping[int, int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = KeepComponents(numbers)


def named_numbers(setting: str, numbers: Any, labels: Mapping[str, int]) -> dict[int, int]:
    """Class indices of named structures, with a number for each.

    Args:
        setting: where the names come from, for messages.
        numbers: structure to a number from 1, or nothing.
        labels: structures and their values; class indices count them from 1.

    Raises:
        ConfigError: no mapping, an unknown name, no number from 1, or scikit-image is not installed.

    Examples:
        >>> from mapseg_components.transforms import named_numbers
        >>> named_numbers("kept_components", {"kidneys": 2}, {"liver": 4, "kidneys": 9})
        {2: 2}
    """
    numbers = numbers or {}
    if not isinstance(numbers, Mapping):
        raise ConfigError(f'{setting} is {numbers!r}, expected structures with numbers, such as {{"kidneys": 2}}')
    wrong = {name: number for name, number in numbers.items() if type(number) is not int or number < 1}
    if wrong:
        raise ConfigError(f"{setting} has {wrong}, expected whole numbers from 1")
    return dict(zip(named_classes(setting, list(numbers), labels), numbers.values()))


def named_classes(setting: str, names: Any, labels: Mapping[str, int]) -> list[int]:
    """Class indices of named structures.

    Args:
        setting: where the names come from, for messages: ``largest_component`` needs scikit-image.
        names: a list of structures.
        labels: structures and their values; class indices count them from 1.

    Raises:
        ConfigError: no list, an unknown name, or scikit-image is not installed.

    Examples:
        >>> from mapseg_components.transforms import named_classes
        >>> named_classes("fill_holes", ["spleen"], {"liver": 4, "spleen": 9})
        [2]
    """
    known = list(structures_of(labels))
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f'{setting} is {names!r}, expected a list of structures such as ["{known[0]}"], or []')
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise ConfigError(f"{setting} names {', '.join(unknown)}, the bundle has {', '.join(known)}")
    if names and setting != "fill_holes":
        require_components(setting)
    return [known.index(name) + 1 for name in names]


def require_components(setting: str) -> None:
    """Refuse what MONAI does by scikit-image where that is not installed. Raises `ConfigError`."""
    if not optional_import("skimage.measure")[1]:
        raise ConfigError(f"{setting} needs scikit-image, which is not installed: pip install scikit-image")


# settings of what follows after the network, and what checks them
AFTER_NETWORK = {"largest_component": named_classes, "kept_components": named_numbers, "fill_holes": named_classes}
