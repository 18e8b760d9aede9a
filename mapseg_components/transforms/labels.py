# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Map the values of a label map to consecutive class indices; no value is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapLabelValue, Transform

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.structures import IGNORED, structures_of, to_whole, unknown_values, value_fault
from mapseg_components.transforms.dictionary import EachKey
from mapseg_components.transforms.inputs import as_volume, scan_name

__all__ = ["SelectLabels", "SelectLabelsd"]

OTHERS = "others"  # dropped: every value that is not kept


class SelectLabels(Transform):
    """Map the kept values of a label map to 1, 2, ... in the order given; dropped values and 0 become background.

    Args:
        kept: values in the order of their class index, or a mapping of structure name to value.
        dropped: values that the dataset has and this task does not want; ``"others"`` for all that are not kept.

    Raises:
        ConfigError: a value is named twice, 0 is among them, or there are more values than 254, as 255 is ignored.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import SelectLabels
        >>> select = SelectLabels(kept={"left hippocampus": 17, "right hippocampus": 53}, dropped=[2])
        >>> select(torch.tensor([[0, 2, 17, 53]])).tolist()
        [[0, 0, 1, 2]]
    """

    def __init__(self, kept: Sequence[int] | Mapping[str, int], dropped: Sequence[int] | str = ()) -> None:
        if isinstance(dropped, str) and dropped != OTHERS:
            raise ConfigError(f"dropped_labels is {dropped!r}, expected a list of values or {OTHERS!r}")
        self.others = dropped == OTHERS
        dropped = () if isinstance(dropped, str) else dropped
        named_values = structures_of(kept).values() if isinstance(kept, Mapping) else kept
        values = [int(value) for value in named_values]
        named = [*values, *(int(value) for value in dropped)]
        if len(set(named)) != len(named) or 0 in named:
            raise ConfigError(
                f"labels {values} and dropped_labels {list(dropped)} must name each value once, and 0 is background"
            )
        if len(values) >= IGNORED:
            raise ConfigError(f"labels name {len(values)} structures, expected {IGNORED - 1} at most: merge some")
        self.known = torch.tensor(sorted([0, *named]))
        targets = [*range(1, len(values) + 1), *([0] * len(dropped))]
        self.mapping = MapLabelValue(orig_labels=named, target_labels=targets, dtype=torch.uint8)
        self.kept = torch.tensor(values)

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Label of class indices, uint8, of the same shape.

        Raises:
            DataError: a value is neither kept nor dropped (fractions included); the message names the file. A value
                that differs from a whole number by float32 rounding alone counts as that number.
        """
        img = as_volume(img)
        found, counts = torch.unique(img.as_subclass(torch.Tensor), return_counts=True)
        values = found.cpu().numpy()
        exact = to_whole(values)
        pairs = list(zip(exact.tolist(), counts.tolist()))
        unknown = value_fault(pairs) if self.others else unknown_values(pairs, self.known.tolist())
        if unknown is not None:
            raise DataError(f"{scan_name(img)}: {': '.join(unknown)}")
        if self.others:
            img = img.round()
            img = img * torch.isin(img.as_subclass(torch.Tensor), self.kept.to(img))
        return self.mapping(img if np.array_equal(exact, values) else img.round())


class SelectLabelsd(EachKey):
    """Dictionary version of `SelectLabels`.

    Args:
        keys: label maps of any shape.
        kept: values in the order of their class index, or a mapping of structure name to value.
        dropped: values that the dataset has and this task does not want; ``"others"`` for all that are not kept.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: a value is named twice, 0 is among them, or there are more than 254.
        DataError: in a call, a value is neither kept nor dropped; the message names the file.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import SelectLabelsd
        >>> select = SelectLabelsd(keys="label", kept=[17, 53], dropped=[2])
        >>> select({"label": torch.tensor([[0, 2, 17, 53]])})["label"].tolist()
        [[0, 0, 1, 2]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        kept: Sequence[int] | Mapping[str, int],
        dropped: Sequence[int] | str = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = SelectLabels(kept, dropped)
