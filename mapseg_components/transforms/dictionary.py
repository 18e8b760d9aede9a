# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Base class of dictionary versions of transforms."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform

__all__ = ["EachKey"]


class EachKey(MapTransform):
    """Apply ``self.transform``, set by a subclass, to each of the keys."""

    transform: Callable[[Any], Any]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key])
        return result
