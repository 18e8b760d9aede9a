# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The uncertainty of a network with two heads as a map of one number a voxel."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from mapseg_components.errors import ConfigError
from mapseg_components.keys import UNCERTAINTY
from mapseg_components.transforms.probabilities import beside, plain

__all__ = ["Uncertaintyd"]


class Uncertaintyd(MapTransform):
    """Split what both heads give: logits stay, and ``uncertainty`` (1, X, Y, Z), float32, is added to the case.

    It is the mean over the classes of abs(V), the standard deviation of the logits that the network trained with. A
    case whose network shows its logits alone, as MONAI Label runs it, stays as it is.

    Args:
        keys: logits and uncertainty (2 num_classes, X, Y, Z), see `mapseg_components.networks.both_heads`.
        num_classes: background included.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: in a call, there are other numbers of channels.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import Uncertaintyd
        >>> both = torch.stack([torch.full((4, 5, 6), value) for value in (2.0, 1.0, -0.5, 1.5)])
        >>> case = Uncertaintyd(keys="pred", num_classes=2)({"pred": both})
        >>> tuple(case["pred"].shape), tuple(case["uncertainty"].shape), case["uncertainty"].unique().tolist()
        ((2, 4, 5, 6), (1, 4, 5, 6), [1.0])
    """

    def __init__(self, keys: KeysCollection = "pred", num_classes: int = 2, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Case with logits alone and ``uncertainty``."""
        case = dict(data)
        for key in self.key_iterator(case):
            both, classes = case[key], self.num_classes
            if len(both) == classes:
                continue
            if len(both) != 2 * classes:
                raise ConfigError(
                    f"{key!r} has {len(both)} channels, expected logits and uncertainty of {classes} classes: set "
                    "uncertainty_map to false, or use the labels that the network was trained with"
                )
            case[UNCERTAINTY] = beside(plain(both[classes:]).float().abs().mean(0, keepdim=True), both)
            case[key] = beside(plain(both[:classes]), both)
        return case
