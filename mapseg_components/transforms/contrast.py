# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random intensity curves of a scan, the same for its local patch and its global view.

MONAI's curves run between the extremes of the image that they change. A patch and a view of one scan have different
extremes, so that MONAI gives the same tissue a different intensity in each. Here one curve runs between the extremes of
all keys together. The view shows the whole foreground box, so that these are the scan's extremes. No range is assumed:
images in any unit keep theirs, and images in [0, 1] stay there with 0, the background, at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import RandAdjustContrastd, RandHistogramShift, RandHistogramShiftd
from monai.utils import convert_to_dst_type

from mapseg_components.transforms.inputs import as_volume

__all__ = ["RandGlobalLocalAdjustContrastd", "RandGlobalLocalHistogramShiftd", "RandGlobalLocalIntensityCurved"]


class RandGlobalLocalAdjustContrastd(RandAdjustContrastd):
    """MONAI's ``RandAdjustContrastd`` (gamma) with one curve for all keys: equal intensities stay equal.

    Draws, arguments and the curve are MONAI's; the extremes, and with ``retain_stats`` mean and standard deviation, are
    those of all keys together.

    Args:
        keys: the images of one scan.
        prob: probability of a curve.
        gamma: range of the random exponent, (lowest, highest); a number g above 0.5 stands for (0.5, g).
        invert_image: apply the curve to the inverted image.
        retain_stats: restore mean and standard deviation after the curve.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalAdjustContrastd
        >>> adjust = RandGlobalLocalAdjustContrastd(["image", "global_image"], prob=1.0, gamma=(2.0, 2.0))
        >>> sample = {"image": torch.tensor([[0.0, 0.5]]), "global_image": torch.tensor([[0.0, 0.5, 1.0]])}
        >>> [values.round(decimals=3).tolist() for values in adjust(sample).values()]  # x -> x ** 2
        [[[0.0, 0.25]], [[0.0, 0.25, 1.0]]]
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same entries, each image (C, ...) with its own shape and metadata."""
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            self.adjuster.randomize(None)
            change_together(result, list(self.key_iterator(result)), self.adjuster)
        return result


class RandGlobalLocalHistogramShiftd(RandHistogramShiftd):
    """MONAI's ``RandHistogramShiftd`` with one random monotone curve for all keys: equal intensities stay equal.

    Draws, arguments and the curve are MONAI's; the extremes are those of all keys together.

    Args:
        keys: the images of one scan.
        num_control_points: points of the curve, one number or the range of a random one.
        prob: probability of a curve.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalHistogramShiftd
        >>> shift = RandGlobalLocalHistogramShiftd(["image", "global_image"], prob=1.0)
        >>> sample = {"image": torch.tensor([[0.0, 0.5]]), "global_image": torch.tensor([[0.0, 0.5, 1.0]])}
        >>> shifted = shift(sample)
        >>> [round(value, 3) for value in shifted["global_image"][0, [0, 2]].tolist()]  # the extremes stay
        [0.0, 1.0]
        >>> bool(shifted["image"][0, 1] == shifted["global_image"][0, 1])  # equal intensities stay equal
        True
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same entries, each image (C, ...) with its own shape and metadata."""
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            self.shifter.randomize(None)
            change_together(result, list(self.key_iterator(result)), self.shifter)
        return result


class RandGlobalLocalIntensityCurved(RandGlobalLocalHistogramShiftd):
    """A random curve of intensities that may fall as well as rise, one for all keys.

    A monotone curve keeps the order of tissues, and bright for dark turns it round. Where a target has another order,
    as T2w scans of newborns beside T1w scans of adults (white matter above grey in both, fluid above all in one), the
    heights of the curve are drawn each for itself, as images made of label maps give each tissue any intensity (Billot
    et al. 2023, SynthSeg). The lowest intensity, background, stays; tissues may come to look alike.

    Args:
        keys: the images of one scan.
        num_control_points: of the curve, evenly spaced, one number or the range of a random one.
        prob: probability of a curve.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalIntensityCurved
        >>> curve = RandGlobalLocalIntensityCurved(["image", "global_image"], prob=1.0).set_random_state(0)
        >>> sample = {"image": torch.tensor([[0.0, 0.5]]), "global_image": torch.tensor([[0.0, 0.5, 1.0]])}
        >>> changed = curve(sample)["global_image"][0]
        >>> changed[0].item(), bool(changed[1] > changed[2])
        (0.0, True)
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_control_points: tuple[int, int] | int = (4, 7),
        prob: float = 0.1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, num_control_points, prob, allow_missing_keys)
        self.shifter = RandIntensityCurve(num_control_points, prob=1.0)


class RandIntensityCurve(RandHistogramShift):
    """MONAI's ``RandHistogramShift`` with heights between 0 and 1 that are drawn each for itself; the first is 0."""

    def randomize(self, data: Any | None = None) -> None:
        """Draw the number of points and their heights."""
        super().randomize(data)
        if self._do_transform:
            points = len(self.reference_control_points)
            self.floating_control_points = np.concatenate([[0.0], self.R.uniform(0.0, 1.0, points - 1)])


def change_together(data: dict[Hashable, Any], keys: Sequence[Hashable], change: Callable[..., Any]) -> None:
    """Change the images of these keys as one image, with the draw that ``change`` already has."""
    if not keys:
        return
    images = [as_volume(data[key]) for key in keys]
    joined = torch.cat([image.as_subclass(torch.Tensor).flatten().float() for image in images])
    changed = torch.as_tensor(change(joined, randomize=False)).as_subclass(torch.Tensor)
    for key, image, part in zip(keys, images, changed.split([image.numel() for image in images])):
        data[key] = convert_to_dst_type(part.view(image.shape), dst=image)[0]
