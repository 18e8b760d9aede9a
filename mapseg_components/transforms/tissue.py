# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Images whose lowest value is tissue: what counts is above 0, what is torn or missing is 0 and counts nowhere."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import IMAGE, LABEL, MASK, PRED
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.masks import outside_of
from mapseg_components.structures import IGNORED
from mapseg_components.transforms.inputs import MASK_FILE, as_volume, scan_name, tissue_is_raised

__all__ = ["ClearOutsided", "IgnoreOutsided", "RaiseTissued", "WithoutIgnoredd"]

FILE = "filename_or_obj"
STEPS = 255  # of the contrast: how far the darkest tissue lies above what is outside
BRIGHTEST = 99.5  # percentile that the contrast ends at
MOST_VALUES = 1 << 20  # drawn regularly for it


class RaiseTissued(MapTransform):
    """Raise a PNG or TIFF image above 0, and set what does not count to 0: there its mask is 0, or it is transparent.

    All other transforms take 0 as background that is not looked at. In such an image the darkest pixel is tissue like
    any other: its lowest value becomes a 255th of its contrast. So is that of any scan with a mask; other scans stay as
    they are. A label map of the same shape gets the image's affine, for a picture's pixel size may stand in one file
    alone.

    Put it right after loading. It takes the mask's file out of the case; `ClearOutsided` finds it in the metadata.

    Args:
        keys: scans (1, X, Y, Z), as loaded from files.
        label_key: their label map; may be absent.
        mask_key: file of a mask on the scan's grid, 0 outside; may be absent.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, a mask cannot be read, or has another shape than its scan.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from monai.transforms import LoadImaged
        >>> from PIL import Image
        >>> from mapseg_components.data import NiftiReader
        >>> from mapseg_components.transforms import RaiseTissued
        >>> load = LoadImaged("image", reader=NiftiReader, ensure_channel_first=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 255, 255]], np.uint8)).save(f"{folder}/a.png")
        ...     Image.fromarray(np.array([[1, 1, 0]], np.uint8)).save(f"{folder}/a_mask.png")
        ...     case = load({"image": f"{folder}/a.png", "mask": f"{folder}/a_mask.png"})
        ...     (RaiseTissued("image")(case)["image"] > 0).flatten().tolist()
        [True, True, False]
    """

    def __init__(
        self,
        keys: KeysCollection = IMAGE,
        label_key: str = LABEL,
        mask_key: str = MASK,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key, self.mask_key = label_key, mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case without its mask's file."""
        case = dict(data)
        mask = case.pop(self.mask_key, None)
        for key in self.key_iterator(case):
            image = as_volume(case[key])
            name = image.meta.get(FILE) if isinstance(image, MetaTensor) else None
            if name is None or not (is_picture(str(name)) or mask):
                continue
            case[key] = raised(image, outside_of(str(name), mask))
            case[key].meta[MASK_FILE] = "" if mask is None else str(mask)
            label = case.get(self.label_key)
            if isinstance(label, MetaTensor) and label.shape[1:] == image.shape[1:]:
                if is_picture(str(label.meta.get(FILE, ""))):
                    label.affine = image.affine.clone()
                    label.meta["original_affine"] = image.meta.get("original_affine", image.affine)
        return case


def raised(image: MetaTensor, outside: np.ndarray | None) -> MetaTensor:
    """See `RaiseTissued`; ``outside`` is (X, Y, Z) or ``None``."""
    if outside is not None and outside.shape != tuple(image.shape[1:]):
        what = f"{scan_name(image)} has shape {tuple(image.shape[1:])}, its mask {outside.shape}"
        raise DataError(f"{what}: draw the mask on the scan's own grid")
    values = np.asarray(image.as_subclass(torch.Tensor), dtype=np.float32)
    counted = values if outside is None else values[:, ~outside]
    drawn = counted.ravel()[:: max(counted.size // MOST_VALUES, 1)]
    lowest = float(counted.min())
    top = float(np.percentile(drawn, BRIGHTEST))
    top = top if top > lowest else float(counted.max())
    step = (top - lowest) / STEPS if top > lowest else 1.0
    found = values - np.float32(lowest - step)
    if outside is not None:
        found[:, outside] = 0.0
    return MetaTensor(torch.from_numpy(found)).copy_meta_from(image)


class IgnoreOutsided(MapTransform):
    """Set the label where nothing counts to `mapseg_components.structures.IGNORED`, which losses leave out.

    Args:
        keys: class indices (1, X, Y, Z) from 0.
        image_key: their scan after `RaiseTissued`, on the same grid.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: in a call, a class has the index that means ignored.

    Examples:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.transforms import IgnoreOutsided
        >>> image = MetaTensor(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1), meta={"mask_file": ""})
        >>> IgnoreOutsided("label")({"image": image, "label": torch.ones(1, 3, 1, 1)})["label"].flatten().tolist()
        [255.0, 1.0, 1.0]
    """

    def __init__(self, keys: KeysCollection = LABEL, image_key: str = IMAGE, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with the labels."""
        case = dict(data)
        keys, image = list(self.key_iterator(case)), case.get(self.image_key)
        if not tissue_is_raised(image):
            return case
        outside = (image.as_subclass(torch.Tensor) == 0).all(dim=0, keepdim=True)
        if not outside.any():
            return case
        for key in keys:
            label = as_volume(case[key])
            if label.shape[1:] != image.shape[1:]:
                continue  # the crop refuses it with both shapes
            if bool((label == IGNORED).any()):
                raise ConfigError(f"{scan_name(label)}: class {IGNORED} beside a mask, whose index it has: use fewer")
            case[key] = label.masked_fill(outside, IGNORED)
        return case


class WithoutIgnoredd(MapTransform):
    """Make label and prediction background where the label is ignored, so that a metric sees no difference there.

    Args:
        keys: logits (classes, X, Y, Z) of the prediction.
        label_key: class indices (1, X, Y, Z) on the same grid.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import WithoutIgnoredd
        >>> label = torch.tensor([255, 1]).view(1, 2, 1, 1)
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).view(2, 2, 1, 1)
        >>> case = WithoutIgnoredd("pred")({"pred": logits, "label": label})
        >>> case["pred"].argmax(dim=0).flatten().tolist(), case["label"].flatten().tolist()
        ([0, 1], [0, 1])
    """

    def __init__(self, keys: KeysCollection = PRED, label_key: str = LABEL, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with both."""
        case = dict(data)
        keys, label = list(self.key_iterator(case)), case.get(self.label_key)
        ignored = None if label is None else as_volume(label).as_subclass(torch.Tensor) == IGNORED
        if ignored is None or not bool(ignored.any()):
            return case
        for key in keys:
            logits = case[key].clone()
            inner = logits.as_subclass(torch.Tensor)
            inner.masked_fill_(ignored.to(inner.device), 0.0)
            inner[:1].masked_fill_(ignored.to(inner.device), 1.0)
            case[key] = logits
        case[self.label_key] = as_volume(label).masked_fill(ignored, 0)
        return case


class ClearOutsided(MapTransform):
    """Set label maps on the grid of the scan's file to 0 where nothing counts, see `RaiseTissued`.

    Args:
        keys: label maps (1, X, Y, Z).
        image_key: the scan after its preprocessing, whose metadata name its file and its mask's.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, a file cannot be read, or differs in its shape from the label map.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import ClearOutsided
        >>> case = {"pred": torch.ones(1, 2, 2, 1), "image": torch.ones(1, 2, 2, 1)}  # of no file: all counts
        >>> ClearOutsided("pred")(case)["pred"].sum().item()
        4.0
    """

    def __init__(self, keys: KeysCollection = PRED, image_key: str = IMAGE, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with the label maps."""
        case = dict(data)
        keys, image = list(self.key_iterator(case)), case.get(self.image_key)
        if not tissue_is_raised(image):
            return case
        outside = outside_of(str(image.meta[FILE]), image.meta[MASK_FILE] or None)
        if outside is None:
            return case
        for key in keys:
            if case[key] is None:  # an evaluator's output has the key without a label
                continue
            label_map = as_volume(case[key])
            if tuple(label_map.shape[1:]) != outside.shape:
                shape = tuple(label_map.shape[1:])
                raise DataError(f"{scan_name(image)}: label map of shape {shape}, its mask {outside.shape}")
            case[key] = label_map.masked_fill(torch.from_numpy(outside[None]).to(label_map.device), 0)
        return case
