# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Intensities scaled to [0, 1] by a percentile of the scan, fixed or drawn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms.inputs import as_volume, channel_name, scan_name, tissue_is_raised

__all__ = [
    "PercentileClip",
    "PercentileClipd",
    "PercentileTabled",
    "RandPercentileClip",
    "RandPercentileClipd",
    "clip_limits",
    "clipped",
    "percentile_table",
]

TABLE_LOWEST, TABLE_STEPS = 90.0, 1001
TABLE_POSTFIX = "percentiles"
LIMITS_POSTFIX = "limits"


def percentile_table(image: torch.Tensor, foreground: bool = False) -> torch.Tensor:
    """Minimum of each channel of a volume, and its percentiles from 90 to 100 in steps of 0.01.

    After `RaiseTissued` the minimum is 0, and percentiles are those of the tissue.

    Args:
        image: (C, ...), in any unit.
        foreground: take the percentiles over the non-zero voxels only.

    Returns:
        float32 (C, 1 + 1001), in the image's unit: the minimum, then the percentiles.

    Raises:
        DataError: a channel is constant, or holds NaN or infinite values; the message names file and channel.
    """
    values = np.asarray(as_volume(image).detach().cpu(), dtype=np.float32).reshape(len(image), -1)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise DataError(f"{scan_name(image)}: {bad} voxels are NaN or infinite: repair the scan or leave it out")
    rows = []
    raised = tissue_is_raised(image)
    for number, channel in enumerate(values):
        lowest = np.float32(0.0) if raised else channel.min()
        if lowest == channel.max():
            raise DataError(
                f"{channel_name(image, number)}: all voxels are {lowest:g}, no contrast to segment: leave the scan out"
            )
        counted = channel[channel != 0] if foreground or raised else channel
        rows.append([lowest, *np.percentile(counted, np.linspace(TABLE_LOWEST, 100, TABLE_STEPS))])
    return torch.tensor(np.asarray(rows), dtype=torch.float32)


def clip_limits(
    image: torch.Tensor, table: torch.Tensor, percentile: float, otherwise: float | None = None
) -> torch.Tensor:
    """Intensities that `clipped` maps to 0 and to 1 in each channel: its minimum and its percentile.

    Args:
        image: (C, ...), the volume or a part of it.
        table: `percentile_table` of the whole volume.
        percentile: from 90 to 100; linear between the table's steps.
        otherwise: percentile of channels whose own one equals their minimum.

    Returns:
        float32 (C, 2), for `clipped`.

    Raises:
        ConfigError: a percentile is out of bounds.
        DataError: a channel's percentile equals its minimum, or image and table differ in their channels.
    """
    if table.ndim != 2 or len(table) != len(image):
        raise DataError(
            f"{scan_name(image)}: an image of {len(image)} channels, its percentile table has shape "
            f"{tuple(table.shape)}, expected one row per channel: make it from the same image"
        )
    lowest, top = table[:, 0], percentile_of(table, percentile)
    if otherwise is not None:
        top = torch.where(top > lowest, top, percentile_of(table, otherwise))
        percentile = otherwise
    flat = torch.nonzero(top <= lowest).flatten().tolist()
    if flat:
        raise DataError(
            f"{channel_name(image, flat[0])}: its percentile {percentile:g} equals its minimum "
            f"({float(lowest[flat[0]]):g}), nearly all voxels are background: crop the scan, or take the percentiles "
            "over the foreground (percentile_foreground)"
        )
    return torch.stack([lowest, top], dim=1)


def percentile_of(table: torch.Tensor, percentile: float) -> torch.Tensor:
    """One percentile of each channel, (C,), of a `percentile_table`. Raises `ConfigError`."""
    if not TABLE_LOWEST <= percentile <= 100:
        raise ConfigError(f"percentile {percentile} is outside [{TABLE_LOWEST:g}, 100]")
    position = (percentile - TABLE_LOWEST) / (100 - TABLE_LOWEST) * (TABLE_STEPS - 1)
    below = min(int(position), TABLE_STEPS - 2)
    return torch.lerp(table[:, 1 + below], table[:, 2 + below], position - below)


def clipped(image: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Image (C, ...) scaled so that each channel's limits, (C, 2), become 0 and 1, and clipped there."""
    lowest, top = limits.to(image.device).view(len(image), 2, *[1] * (image.ndim - 1)).unbind(1)
    scaled = as_volume(image) - lowest  # keeps the metadata of a MetaTensor
    scaled.as_subclass(torch.Tensor).div_(top - lowest).clamp_(0.0, 1.0)
    return scaled


class PercentileTabled(MapTransform):
    """Store the `percentile_table` of a volume as ``<key>_percentiles``: computed once, cached, used by every draw.

    Args:
        keys: whole volumes (C, ...).
        foreground: take the percentiles over the non-zero voxels only (the paper takes the whole volume).
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        DataError: in a call, as `percentile_table`.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import PercentileTabled
        >>> sample = PercentileTabled(keys="image")({"image": torch.arange(101.0).reshape(1, 101)})
        >>> table = sample["image_percentiles"]
        >>> tuple(table.shape), table[0, [0, 1, -1]].tolist()  # minimum, 90th and 100th percentile
        ((1, 1002), [0.0, 90.0, 100.0])
    """

    def __init__(self, keys: KeysCollection, foreground: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.foreground = foreground

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[f"{key}_{TABLE_POSTFIX}"] = percentile_table(result[key], self.foreground)
        return result


class PercentileClip(Transform):
    """Clip each channel at a percentile and scale it to [0, 1] (99.5 at inference, MAPSeg section 4.1).

    A channel's minimum becomes 0, its percentile 1.

    Args:
        percentile: from 90 to 100.
        foreground: take the percentile over the non-zero voxels only.

    Raises:
        ConfigError: in a call, the percentile is out of bounds.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import PercentileClip
        >>> image = torch.arange(101.0).reshape(1, 101)
        >>> scaled = PercentileClip(percentile=90)(image)
        >>> scaled[0, [0, 45, 90, 100]].tolist()
        [0.0, 0.5, 1.0, 1.0]
    """

    def __init__(self, percentile: float = 99.5, foreground: bool = False) -> None:
        self.percentile = percentile
        self.foreground = foreground

    def __call__(self, img: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Image of the same shape in [0, 1].

        Args:
            img: (C, ...), the volume, or a part of it if its table is given.
            table: `percentile_table` of the whole volume.

        Raises:
            DataError: a channel has no contrast or non-finite values.
        """
        img = as_volume(img)
        return clipped(img, self.limits(img, table))

    def limits(self, img: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Intensities that become 0 and 1 in each channel, float32 (C, 2)."""
        table = percentile_table(img, self.foreground) if table is None else table
        return clip_limits(img, table, self.percentile)


class PercentileClipd(MapTransform):
    """Dictionary version of `PercentileClip`; uses ``<key>_percentiles`` (`PercentileTabled`) if it is there.

    Args:
        keys: images (C, ...).
        percentile: from 90 to 100.
        foreground: take the percentile over the non-zero voxels only.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: in a call, the percentile is out of bounds.
        DataError: in a call, a channel has no contrast or non-finite values.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import PercentileClipd
        >>> sample = PercentileClipd(keys="image", percentile=90)({"image": torch.arange(101.0).reshape(1, 101)})
        >>> sample["image"][0, [0, 45, 90, 100]].tolist()
        [0.0, 0.5, 1.0, 1.0]
    """

    def __init__(
        self,
        keys: KeysCollection,
        percentile: float = 99.5,
        foreground: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = PercentileClip(percentile, foreground)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key], result.pop(f"{key}_{TABLE_POSTFIX}", None))
        return result


class RandPercentileClip(RandomizableTransform):
    """Clip at a random percentile with probability ``prob``, at the default one otherwise, and scale to [0, 1].

    The defaults are the paper's (MAPSeg, section 4.1). Channels whose random percentile is their minimum, because so
    few of their voxels lie above it, are clipped at the default one.

    Args:
        lower: smallest random percentile, from 90.
        upper: largest random percentile, up to 100.
        prob: probability of a random one.
        default: percentile otherwise.
        foreground: take percentiles over the non-zero voxels only.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandPercentileClip
        >>> clip = RandPercentileClip(lower=90, upper=90, prob=1.0)
        >>> clip(torch.arange(101.0).reshape(1, 101))[0, [0, 45, 90, 100]].tolist()
        [0.0, 0.5, 1.0, 1.0]
        >>> clip.percentile  # of the last draw
        90.0
    """

    def __init__(
        self,
        lower: float = 99.0,
        upper: float = 100.0,
        prob: float = 0.35,
        default: float = 99.5,
        foreground: bool = False,
    ) -> None:
        super().__init__(prob)
        self.lower, self.upper, self.default = lower, upper, default
        self.foreground = foreground
        self.percentile = default

    def randomize(self, data: Any = None) -> None:
        super().randomize(None)
        self.percentile = float(self.R.uniform(self.lower, self.upper)) if self._do_transform else self.default

    def __call__(self, img: torch.Tensor, table: torch.Tensor | None = None, randomize: bool = True) -> torch.Tensor:
        """Image of the same shape in [0, 1]; see `PercentileClip`."""
        if randomize:
            self.randomize()
        img = as_volume(img)
        return clipped(img, self.limits(img, table))

    def limits(self, img: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Intensities that become 0 and 1 in each channel by the last draw, float32 (C, 2)."""
        table = percentile_table(img, self.foreground) if table is None else table
        return clip_limits(img, table, self.percentile, otherwise=self.default)


class RandPercentileClipd(Randomizable, MapTransform):
    """Dictionary version of `RandPercentileClip`: one draw for all keys, and one table.

    Args:
        keys: the volume, or images that are parts of one volume.
        lower: smallest random percentile, from 90.
        upper: largest random percentile, up to 100.
        prob: probability of a random one.
        default: percentile otherwise.
        foreground: take percentiles over the non-zero voxels only.
        table_key: entry with the volume's `percentile_table`, removed afterwards; without it each image has its own.
        deferred: leave the volume as it is and store the intensities that become 0 and 1, float32 (C, 2), as
            ``<key>_limits``. `RandGlobalLocalCropd` clips the voxels that it reads by them, before it interpolates: the
            same samples as of a clipped volume, without clipping all of it in every draw.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandPercentileClipd
        >>> clip = RandPercentileClipd(keys="image", lower=90, upper=90, prob=1.0, deferred=True)
        >>> sample = clip({"image": torch.arange(101.0).reshape(1, 101)})
        >>> sample["image_limits"].tolist()  # these become 0 and 1
        [[0.0, 90.0]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 99.0,
        upper: float = 100.0,
        prob: float = 0.35,
        default: float = 99.5,
        foreground: bool = False,
        table_key: str = f"image_{TABLE_POSTFIX}",
        deferred: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.transform = RandPercentileClip(lower, upper, prob, default, foreground)
        self.table_key = table_key
        self.deferred = deferred

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandPercentileClipd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        table = result.pop(self.table_key, None)
        self.transform.randomize()
        for key in self.key_iterator(result):
            if self.deferred:
                result[f"{key}_{LIMITS_POSTFIX}"] = self.transform.limits(result[key], table)
            else:
                result[key] = self.transform(result[key], table, randomize=False)
        return result
