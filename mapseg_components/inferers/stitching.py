# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The outputs of many windows as one volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data.utils import compute_importance_map

__all__ = ["Stitching", "stitched_shape"]

Window = tuple[slice, ...]


class Stitching:
    """The weighted mean of one output of a network over the windows of a box, on the grid of the whole scan.

    Args:
        output: (channels, *sides), shape of the output of one window.
        roi_size: voxels per axis of the window.
        box: (3, 2), integer, the region of the scan that the windows cover.
        shape: (X, Y, Z) of the scan.
        device: where sum and count are kept.
        mode: ``"constant"`` or ``"gaussian"``, of MONAI's ``compute_importance_map``.
        sigma_scale: of the Gaussian, in windows.
    """

    def __init__(
        self,
        output: Sequence[int],
        roi_size: Sequence[int],
        box: np.ndarray,
        shape: Sequence[int],
        device: torch.device,
        mode: str,
        sigma_scale: Sequence[float] | float,
    ) -> None:
        self.roi_size, self.box = tuple(roi_size), box
        self.sides, self.shape = tuple(output[1:]), stitched_shape(shape, output[1:], roi_size)
        self.weight = compute_importance_map(self.sides, mode=mode, sigma_scale=sigma_scale, device=device)
        self.total = torch.zeros((output[0], *self.shape), device=device)
        self.count = torch.zeros(self.shape, device=device)

    def add(self, windows: Sequence[Window], outputs: torch.Tensor) -> None:
        """Add outputs (N, channels, *sides) of windows of the box."""
        for window, one in zip(windows, outputs.to(self.weight.device)):
            target, source = overlap(self._place(window), self.shape)
            self.total[(slice(None), *target)].addcmul_(self.weight[source], one[(slice(None), *source)])
            self.count[target] += self.weight[source]

    def mean(self, background_margin: float, uncertain: bool = False) -> torch.Tensor:
        """(channels, *shape); background where no window lies, and if the second half is an uncertainty, 0 of it."""
        unseen = self.count == 0
        self.total /= self.count.clamp_(min=1e-6)  # in place: for a large scan these are gigabytes
        for number, one in enumerate(self.total):
            background = number == 0 and len(self.total) > 1
            of_uncertainty = uncertain and number >= len(self.total) // 2
            one.masked_fill_(unseen, 0.0 if background or of_uncertainty else -background_margin)
        return self.total

    def _place(self, window: Window) -> Window:
        """Where a window's output lies on the scan's grid in the output's resolution; it may leave the scan."""
        starts = [
            round((int(start) + part.start) * side / roi)
            for start, part, side, roi in zip(self.box[:, 0], window, self.sides, self.roi_size)
        ]
        return tuple(slice(start, start + side) for start, side in zip(starts, self.sides))


def stitched_shape(shape: Sequence[int], sides: Sequence[int], roi_size: Sequence[int]) -> tuple[int, ...]:
    """Shape (X, Y, Z) of a scan in the resolution of an output that has these sides for a window."""
    return tuple(max(int(whole * side / roi), 1) for whole, side, roi in zip(shape, sides, roi_size))


def overlap(window: Window, shape: Sequence[int]) -> tuple[Window, Window]:
    """Where a window, which may leave a volume (X, Y, Z), lies in it, and which part of the window that is."""
    target, source = [], []
    for part, side in zip(window, shape):
        low, high = max(part.start, 0), max(min(part.stop, side), 0)
        target.append(slice(min(low, high), high))
        source.append(slice(min(low, high) - part.start, high - part.start))
    return tuple(target), tuple(source)
