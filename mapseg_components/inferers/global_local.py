# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Sliding windows that know the whole scan (MAPSeg, arXiv 2303.09373, sections 3.4 and 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer
from monai.utils import BlendMode, ensure_tuple_rep
from torch import nn

from mapseg_components.boxes import box_of_mask, expand_box, resample_box
from mapseg_components.errors import ConfigError, DataError, NonFiniteError
from mapseg_components.memory import naming_memory_errors, require_memory

__all__ = ["GlobalLocalSlidingWindowInferer"]


class GlobalLocalSlidingWindowInferer(Inferer):
    """Segment a whole scan by windows, each decoded with its part of the scan's global features.

    Per scan: the box of its foreground (non-zero voxels), grown to the window where the scan is smaller, is resampled
    to the global view, whose features are computed once. Unique windows over the box are encoded in batches, windows
    without foreground are skipped, and the logits of overlapping windows are averaged. Outside the box is background.

    Args:
        roi_size: window, voxels per axis.
        global_size: global view, voxels per axis; by default the window's size.
        stride: steps between windows, voxels per axis (80 for windows of 96 in the paper); by default
            5/6 of the window.
        sw_batch_size: windows per batch.
        mode: ``"constant"`` for a plain mean (the paper), ``"gaussian"`` to weight a window's centre more.
        stitching_device: where logits of the whole scan are kept, e.g. ``"cpu"`` for large scans (4 bytes per class
            and voxel); by default the input's device.
        background_margin: logit that background has over every other class where no window looked.

    A network without ``encode``, ``context`` and ``decode`` is called on each window alone.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        stride: Sequence[int] | int | None = None,
        sw_batch_size: int = 4,
        mode: str = "constant",
        stitching_device: torch.device | str | None = None,
        background_margin: float = 10.0,
    ) -> None:
        super().__init__()
        self.roi_size = ensure_tuple_rep(roi_size, 3)
        self.global_size = self.roi_size if global_size is None else ensure_tuple_rep(global_size, 3)
        default_stride = tuple(max(side * 5 // 6, 1) for side in self.roi_size)
        self.stride = default_stride if stride is None else ensure_tuple_rep(stride, 3)
        if any(not 1 <= step <= side for step, side in zip(self.stride, self.roi_size)):
            raise ConfigError(
                f"window stride {self.stride} must be between 1 and the window {self.roi_size} on every axis, "
                "or voxels would be left out"
            )
        self.sw_batch_size = sw_batch_size
        self.mode = BlendMode(mode)
        self.stitching_device = stitching_device
        self.background_margin = background_margin

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Logits of whole scans.

        Args:
            inputs: (B, C, X, Y, Z), in [0, 1], background 0.
            network: e.g. ``GlobalLocalDeepLabV3``.

        Returns:
            (B, classes, X, Y, Z), float32.

        Raises:
            DataError: a scan has no foreground.
            NonFiniteError: the network's output holds NaN or infinite values.
            ResourceError: the logits of a scan do not fit into memory, which is checked before they are allocated.
        """
        scans = []
        for image in inputs:
            windows = f"windows of {self.roi_size}, {self.sw_batch_size} at a time, on {image.device}"
            remedy = "window_batch_size, or set stitching_device or device to cpu, or crop the scan"
            with naming_memory_errors(f"{name_of(image)}, {windows}", remedy):
                scans.append(self._segment(image, network, *args, **kwargs))
        logits = scans[0][None] if len(scans) == 1 else torch.stack(scans)
        return MetaTensor(logits, meta=inputs.meta) if isinstance(inputs, MetaTensor) else logits

    def _segment(self, scan: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(C, X, Y, Z) to (classes, X, Y, Z)."""
        name = name_of(scan)
        image = scan.as_subclass(torch.Tensor)
        foreground = (image != 0).any(dim=0)
        if not foreground.any():
            raise DataError(f"{name}: no voxel above 0, no foreground to segment: check its intensities")
        box = expand_box(box_of_mask(foreground.cpu().numpy()), self.roi_size)
        region = crop_with_zeros(image, box)
        windows = self._windows(crop_with_zeros(foreground[None], box)[0])
        forward = self._forward(region, network, *args, **kwargs)

        weight = compute_importance_map(self.roi_size, mode=self.mode, sigma_scale=0.125, device=self._stitcher(image))
        total: torch.Tensor | None = None
        count = torch.zeros(image.shape[1:], device=weight.device)
        for start in range(0, len(windows), self.sw_batch_size):
            batch = windows[start : start + self.sw_batch_size]
            logits = forward(batch).float()
            if total is None:
                self._require_memory(name, len(logits[0]), image, weight.device)
            if not torch.isfinite(logits).all():
                raise NonFiniteError(f"{name}: the network's output is NaN or infinite: check the weights and amp")
            if total is None:
                total = torch.zeros((logits.shape[1], *image.shape[1:]), device=weight.device)
            for window, one in zip(batch, logits.to(weight.device)):
                target, source = overlap(window, box, image.shape[1:])
                total[(slice(None), *target)].addcmul_(weight[source], one[(slice(None), *source)])
                count[target] += weight[source]
        assert total is not None  # a foreground has at least one window
        unseen = count == 0
        total /= count.clamp_(min=1e-6)  # in place: for a large scan these are gigabytes
        for number, one in enumerate(total):
            one.masked_fill_(unseen, -self.background_margin if number else 0.0)
        return total

    def _require_memory(self, name: str, classes: int, image: torch.Tensor, device: torch.device) -> None:
        """Compare with the device's memory what stitching takes: sum of logits, count and a mask of the whole scan; and
        the scan itself where it lies on the same device but is not counted as used."""
        voxels = image[0].numel()
        values = (classes + 1) * voxels + (image.numel() if device.type == "cpu" else 0)
        remedy = "crop the scan or resample it to larger voxels"
        if device.type != "cpu":
            remedy = f"set stitching_device to cpu, or {remedy}"
        shape = tuple(image.shape[1:])
        require_memory(4 * values + voxels, device, f"{name}: {classes} classes of shape {shape}", remedy)

    def _windows(self, foreground: torch.Tensor) -> list[tuple[slice, ...]]:
        """Unique windows over a region (X, Y, Z) that hold foreground."""
        windows = dict.fromkeys(
            tuple((s.start, s.stop) for s in window)
            for window in dense_patch_slices(tuple(foreground.shape), self.roi_size, self.stride)
        )
        slices = [tuple(slice(*ends) for ends in window) for window in windows]
        return [window for window in slices if foreground[window].any()]

    def _forward(
        self, region: torch.Tensor, network: Any, *args: Any, **kwargs: Any
    ) -> Callable[[list[tuple[slice, ...]]], torch.Tensor]:
        """Function from windows of a region (C, X, Y, Z) to their logits (N, classes, *roi_size)."""

        def stack(windows: list[tuple[slice, ...]]) -> torch.Tensor:
            return torch.stack([region[(slice(None), *window)] for window in windows])

        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module  # the wrapper hides encode, context and decode
        if not all(hasattr(network, part) for part in ("encode", "context", "decode")):
            return lambda windows: network(stack(windows), *args, **kwargs)

        sides = torch.tensor(region.shape[1:], dtype=torch.float32, device=region.device)
        whole = torch.stack([torch.zeros_like(sides), sides], dim=1)[None]
        global_features = network.encode(resample_box(region[None], whole, list(self.global_size)))
        scale = torch.tensor(self.global_size, dtype=torch.float32, device=region.device) / sides

        def collaborate(windows: list[tuple[slice, ...]]) -> torch.Tensor:
            features = network.encode(stack(windows))
            ends = torch.tensor([[[s.start, s.stop] for s in window] for window in windows], dtype=torch.float32)
            context = network.context(
                global_features.expand(len(windows), *[-1] * 4),
                ends.to(region.device) * scale[:, None],
                list(self.global_size),
                list(features.shape[2:]),
            )
            return network.decode(features, context)

        return collaborate

    def _stitcher(self, image: torch.Tensor) -> torch.device:
        return image.device if self.stitching_device is None else torch.device(self.stitching_device)


def name_of(scan: torch.Tensor) -> str:
    """File of a scan, for messages."""
    return str(scan.meta.get("filename_or_obj", "the scan")) if isinstance(scan, MetaTensor) else "the scan"


def crop_with_zeros(volume: torch.Tensor, box: np.ndarray) -> torch.Tensor:
    """Part of a volume (C, X, Y, Z) inside an integer box, with 0 where the box leaves the volume."""
    shape = volume.shape[1:]
    padding = [[max(-int(start), 0), max(int(stop) - side, 0)] for (start, stop), side in zip(box, shape)]
    inner = tuple(slice(max(int(start), 0), min(int(stop), side)) for (start, stop), side in zip(box, shape))
    return F.pad(volume[(slice(None), *inner)], [size for pair in reversed(padding) for size in pair])


def overlap(
    window: Sequence[slice], box: np.ndarray, shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a window of a box lies in a volume (X, Y, Z), and which part of the window that is."""
    target, source = [], []
    for part, start, side in zip(window, box[:, 0].astype(int).tolist(), shape):
        first = start + part.start
        low, high = max(first, 0), min(start + part.stop, side)
        target.append(slice(low, high))
        source.append(slice(low - first, high - first))
    return tuple(target), tuple(source)
