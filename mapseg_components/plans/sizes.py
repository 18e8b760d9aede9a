# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Preset, patch, strides, dilations and blocks for scans and a machine. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch

from mapseg_components.errors import ConfigError

__all__ = [
    "PRESETS",
    "canonical_grid",
    "choose_preset",
    "describe",
    "gpu_gib",
    "plan_sizes",
    "plan_unet",
    "settings_of",
]

# overlays of the adaptation bundle (and of pretraining, where it has one of that name); side of the patch; stride
PRESETS: dict[str, dict[str, Any]] = {
    # measured on newborns, docs/reference/results.md: with random contrasts the finer features carry over
    "small-data-cpu": {"overlays": ["small_data.yaml", "fine.yaml"], "patch": 48, "stride": 2},
    "single-gpu": {"overlays": ["single_gpu.yaml"], "patch": 96, "stride": 4},
    "paper": {"overlays": ["paper.yaml"], "patch": 96, "stride": 4},
}
FILTERS = [12, 24, 48, 96, 160]  # of a DynUNet's levels
THICK = 2.5  # slices this many times thicker than the voxels in the plane are wide
PAPER_GIB, PAPER_SCANS = 70, 40


def choose_preset(gpu_gib: float, scans: int) -> tuple[str, str]:
    """Preset and the reason, for a GPU of so many GiB (0 without one) and so many scans, source and target."""
    if gpu_gib <= 0:
        return "small-data-cpu", "there is no GPU"
    if gpu_gib < PAPER_GIB or scans < PAPER_SCANS:
        return (
            "single-gpu",
            f"a GPU of {gpu_gib:.0f} GiB and {scans} scans (paper: {PAPER_GIB} GiB, {PAPER_SCANS} scans)",
        )
    return "paper", f"a GPU of {gpu_gib:.0f} GiB and {scans} scans"


def canonical_grid(shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and mm per axis of a scan once its axes are in the order right-left, back-front, down-up."""
    order = nib.orientations.io_orientation(affine)[:, 0].argsort()
    if not np.isfinite(order).all():
        raise ConfigError(f"the affine {np.asarray(affine).tolist()} names no axes: check the scan's header")
    return np.asarray(shape)[order], nib.affines.voxel_sizes(affine)[order]


def plan_sizes(shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]], preset: str) -> dict[str, Any]:
    """Sizes of patch and network for the median scan, as settings of the bundles.

    Axes with larger voxels get smaller patches (about the same millimetres), less stride and smaller blocks: slices
    four times as thick are not reduced at all. A patch is at most two thirds of the median scan, where that leaves 32
    voxels.

    Args:
        shapes: voxels per axis of each scan.
        spacings: mm per axis. Both in one order of axes.
        preset: one of `PRESETS`.

    Returns:
        ``patch_size``, ``window_stride``, ``stride``, ``dilations``, ``local_block_size``, ``global_block_size``, and
        for thick slices ``rotation_deg: 0``.

    Raises:
        ConfigError: the preset is unknown, or a patch would be smaller than 8 voxels.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown, expected one of {sorted(PRESETS)} or auto")
    base, reduction = PRESETS[preset]["patch"], PRESETS[preset]["stride"]
    shape, spacing = np.median(shapes, axis=0), np.median(spacings, axis=0)
    flat = shape == 1  # 2D images are volumes with one slice
    ratio = np.where(flat, 1.0, spacing / spacing[~flat].min()) if not flat.all() else np.ones(3)
    halvings = [min(round(math.log2(r)), int(math.log2(reduction))) for r in ratio]
    stride = [reduction >> k for k in halvings]
    local_block = [max(8 >> k, 4) for k in halvings]
    patch = []
    global_block = [4, 4, 4]
    for axis in range(3):
        if flat[axis]:
            stride[axis] = local_block[axis] = global_block[axis] = 1
            patch.append(1)
            continue
        step = max(stride[axis], local_block[axis])
        side = min(base / ratio[axis], max(shape[axis] * 2 / 3, 32 / ratio[axis]))
        patch.append(max(math.ceil(side / step - 0.5), 2) * step)
    if min(side for side in patch if side > 1) == 32:  # few blocks are left to hide
        local_block = [min(block, 4) for block in local_block]
    features = [side // s for side, s in zip(patch, stride)]
    settings: dict[str, Any] = {
        "patch_size": patch,
        "window_stride": [max(side * 5 // 6 // s * s, s) for side, s in zip(patch, stride)],
        "stride": stride,
        "local_block_size": local_block,
        "global_block_size": global_block,
    }
    if preset == "paper" and patch == [96, 96, 96]:
        settings["dilations"] = [4, 8, 16]
    else:
        settings["dilations"] = [[max(round(side * share), 1) for side in features] for share in (1 / 6, 1 / 3, 1 / 2)]
    if ratio.max() >= THICK:
        settings["rotation_deg"] = 0  # out of the plane of thick slices nothing can be rotated
    return settings


def plan_unet(patch_size: Sequence[int], spacing: Sequence[float]) -> dict[str, Any]:
    """Kernels, strides and filters of MONAI's ``DynUNet``, after nnU-Net's rules (Isensee et al. 2021).

    An axis is halved while four voxels are left of the patch, it divides evenly and its voxels are less than twice as
    wide as the narrowest; along an axis whose voxels are wider still, kernels have one voxel.

    Args:
        patch_size: voxels per axis; of one voxel along the slices of 2D images.
        spacing: mm per axis.

    Returns:
        ``kernel_size``, ``strides``, ``upsample_kernel_size`` and ``filters``.
    """
    sides, widths = list(patch_size), [float(width) for width in spacing]
    wide = [side == 1 for side in sides]  # nothing to look at beside a single slice
    kernels, strides = [], [[1, 1, 1]]
    while True:
        narrowest = min(width for width, flat in zip(widths, wide) if not flat)
        near = [width < 2 * narrowest and not flat for width, flat in zip(widths, wide)]
        kernels.append([3 if one else 1 for one in near])
        step = [2 if one and side % 2 == 0 and side // 2 >= 4 else 1 for one, side in zip(near, sides)]
        if step == [1, 1, 1] or len(strides) == len(FILTERS):
            break
        strides.append(step)
        sides = [side // one for side, one in zip(sides, step)]
        widths = [width * one for width, one in zip(widths, step)]
    while len(strides) < 3:  # the network's least
        strides.append([1, 1, 1])
        kernels.append(kernels[-1])
    return {
        "kernel_size": kernels,
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": FILTERS[: len(strides)],
    }


def settings_of(known: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """The planned settings that a config has; rotations under the names that it has for them."""
    wanted = dict(planned)
    if "rotation_deg" in wanted:
        degrees = wanted.pop("rotation_deg")
        wanted |= dict.fromkeys(("rotation_deg", "source_rotation_deg", "target_rotation_deg"), degrees)
    return {name: value for name, value in wanted.items() if name in known}


def gpu_gib(device: str) -> float:
    """Memory of the GPU that will be used; 0 without one."""
    if device == "cpu" or not torch.cuda.is_available():
        return 0.0
    number = torch.device("cuda" if device == "auto" else device).index or 0
    return torch.cuda.get_device_properties(number).total_memory / 2**30


def describe(plan: Mapping[str, Any]) -> str:
    """The plan in words, for the terminal."""
    sizes = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
    return (
        f"Preset {plan['preset']} ({plan['reason']}). Source {plan['source_training']} + "
        f"{plan['source_validation']} for validation, target {plan['target']}; median scan {plan['median_shape']} "
        f"voxels of {plan['median_spacing_mm']} mm. "
        f"Structures: {', '.join(plan['labels'])}. {sizes}."
    )
