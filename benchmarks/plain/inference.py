# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Segment a whole scan window by window, each with the global view encoded again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.plain.data import foreground_box, pad_to
from benchmarks.plain.training import crop_features

__all__ = ["segment"]


@torch.no_grad()
def segment(network: Any, scan: torch.Tensor, patch: int, stride: int, skip_duplicates: bool = False) -> torch.Tensor:
    """Logits (classes, X, Y, Z) of a scan (1, X, Y, Z) in [0, 1]; background outside the foreground's box.

    Args:
        network: with ``encode`` and ``decode``, in evaluation mode.
        scan: on the network's device.
        patch: voxels per side of a window.
        stride: voxels between windows. The last window of an axis is moved back to the border, where it may lie on one
            that was there before; such windows count twice. ``skip_duplicates``: for a comparison voxel by voxel.
    """
    (x0, x1), (y0, y1), (z0, z1) = foreground_box(scan).tolist()
    region = pad_to(scan[:, x0:x1, y0:y1, z0:z1], patch)
    sides = region.shape[1:]
    view = F.interpolate(region[None], (patch, patch, patch), mode="trilinear", align_corners=False)
    total, count, seen = None, torch.zeros(sides, device=scan.device), set()
    for x in range(0, sides[0], stride):
        for y in range(0, sides[1], stride):
            for z in range(0, sides[2], stride):
                start = tuple(min(first, side - patch) for first, side in zip((x, y, z), sides))
                if skip_duplicates and start in seen:
                    continue
                seen.add(start)
                window = (slice(None), *(slice(first, first + patch) for first in start))
                box = torch.tensor([[[s * patch / n, (s + patch) * patch / n] for s, n in zip(start, sides)]])
                context = crop_features(network.encode(view), box.to(scan.device), patch)
                logits = network.decode(network.encode(region[window][None]), context)[0]
                if total is None:
                    total = torch.zeros((logits.shape[0], *sides), device=scan.device)
                total[window] += logits
                count[window[1:]] += 1
    mean = total / count
    canvas = torch.full((mean.shape[0], *scan.shape[1:]), -10.0, device=scan.device)
    canvas[0] = 0.0
    before = [max(patch - length, 0) // 2 for length in (x1 - x0, y1 - y0, z1 - z0)]
    inner = mean[:, before[0] : before[0] + x1 - x0, before[1] : before[1] + y1 - y0, before[2] : before[2] + z1 - z0]
    canvas[:, x0:x1, y0:y1, z0:z1] = inner
    return canvas
