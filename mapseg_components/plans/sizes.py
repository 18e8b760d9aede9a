# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Preset, patch, strides, dilations and blocks for scans and a machine. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mapseg_components.boxes import THICK
from mapseg_components.errors import ConfigError
from mapseg_components.plans.components import describe_after

__all__ = [
    "PRESETS",
    "describe",
    "plan_sizes",
    "plan_slices",
    "plan_unet",
    "preset_for",
    "settings_of",
]

# overlays of the adaptation bundle (and of pretraining, where it has one of that name); side of the patch; stride
PRESETS: dict[str, dict[str, Any]] = {
    # measured on newborns, docs/reference/results.md: with random contrasts the finer features carry over
    "small-data-cpu": {"overlays": ["small_data.yaml", "unet.yaml"], "patch": 64, "fine_patch": 48, "stride": 2},
    "single-gpu": {"overlays": ["single_gpu.yaml"], "patch": 96, "stride": 4},
    "paper": {"overlays": ["paper.yaml"], "patch": 96, "stride": 4},
}
MEASURED = "small-data-cpu"
SHORT = (MEASURED,)  # presets of few steps
FILTERS = [12, 24, 48, 96, 160]  # of a U-Net's levels
FILTERS_REDUCED = [32, 64, 128, 160]  # of one that begins at half the resolution
FILTERS_NNUNET = [32, 64, 128, 256, 320, 320, 320]  # of the network of that paper, with deep supervision
IN_PLANE_DEG = 15  # rotation of thick slices
MOST_SLICES, MOST_IN_PLANE = 8, 192  # sides of a flat patch
MOST_OF_SLICE = {True: 112, False: 256}  # side of a slice that is translated: in presets of few steps, in others
SHARE = 0.28  # of a cube's voxels: few scans have few slices, and many patches are seen


def preset_for(request: Mapping[str, Any]) -> tuple[str, str]:
    """Preset and the reason, for the arguments of ``mapseg adapt``; ``auto`` is the one whose results are known.

    Raises `ConfigError` for an unknown one.
    """
    if request["preset"] == "auto":
        return MEASURED, "the one that was measured"
    check_preset(request["preset"])
    return request["preset"], "asked for"


def check_preset(preset: str) -> None:
    """Raises `ConfigError` for an unknown one."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown, expected one of {sorted(PRESETS)} or auto")


def plan_sizes(
    shapes: Sequence[Sequence[int]],
    spacings: Sequence[Sequence[float]],
    preset: str,
    fine: bool = False,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Sizes of patch and network for the median scan, as settings of the bundles.

    Axes with larger voxels get smaller patches (about the same millimetres), less stride and smaller blocks: slices
    four times as thick are not reduced at all. A patch is at most two thirds of the median scan, where that leaves 32
    voxels. An image has no thick slices, however much longer than wide its pixels are.

    Args:
        shapes: voxels per axis of each scan.
        spacings: mm per axis. Both in the working frame, thick slices on the last axis.
        preset: one of `PRESETS`.
        fine: a planned U-Net works at full resolution, on smaller patches: for structures a few voxels wide.
        asked: settings of the user; the other sizes follow from ``patch_size`` and ``window_size`` among them.

    Returns:
        ``patch_size``, ``window_stride``, ``stride``, ``dilations``, ``local_block_size``, ``global_block_size``, and
        for thick slices ``rotation_deg``, about the axis across them alone.

    Raises:
        ConfigError: the preset is unknown, or the network's stride does not divide the user's patch or window.
    """
    check_preset(preset)
    base, reduction = PRESETS[preset]["patch"], PRESETS[preset]["stride"]
    shape, spacing = np.median(shapes, axis=0), np.median(spacings, axis=0)
    flat = shape == 1  # 2D images are volumes with one slice
    planned = "unet.yaml" in PRESETS[preset]["overlays"]
    base = PRESETS[preset].get("fine_patch", base) if fine else base
    base = plane_side(shape, spacing, base) if planned else base
    ratio = np.where(flat, 1.0, spacing / spacing[~flat].min()) if not flat.all() else np.ones(3)
    thick = (ratio >= THICK) & ~flat.any()
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
        if planned:  # a level is halved three times where it can be
            step = max(step, 16 >> halvings[axis] * 2)
            whole = math.ceil(shape[axis] / step) * step
            most = base / ratio[axis] if flat.any() else base
            side = min(MOST_SLICES, max(whole, 4)) if thick[axis] else min(most, max(whole, 32))
        else:
            side = min(base / ratio[axis], max(shape[axis] * 2 / 3, 32 / ratio[axis]))
        patch.append(max(math.ceil(side / step - 0.5), 2) * step)
    asked = asked or {}
    if "patch_size" in asked:
        patch = checked_sides("patch_size", asked["patch_size"], stride)
        local_block = [math.gcd(side, block) for side, block in zip(patch, local_block)]
        global_block = [math.gcd(side, block) for side, block in zip(patch, global_block)]
    if min((side for side in patch if side > 1), default=1) <= 32:  # few blocks are left to hide
        local_block = [min(block, 4) for block in local_block]
    window = checked_sides("window_size", asked["window_size"], stride) if asked.get("window_size") else patch
    features = [side // s for side, s in zip(patch, stride)]
    settings: dict[str, Any] = {
        "patch_size": patch,
        "window_stride": [max(side * 5 // 6 // s * s, s) for side, s in zip(window, stride)],
        "stride": stride,
        "local_block_size": local_block,
        "global_block_size": global_block,
    }
    if preset == "paper" and patch == [96, 96, 96]:
        settings["dilations"] = [4, 8, 16]
    else:
        settings["dilations"] = [[max(round(side * share), 1) for side in features] for share in (1 / 6, 1 / 3, 1 / 2)]
    if thick.any():
        settings["rotation_deg"] = [IN_PLANE_DEG if one else 0 for one in thick]
    return settings


def checked_sides(name: str, sides: Any, stride: Sequence[int]) -> list[int]:
    """A patch or window as the user set it. Raises `ConfigError`."""
    whole = isinstance(sides, (list, tuple)) and len(sides) == 3 and all(type(side) is int for side in sides)
    if not whole or not all(side > 0 and side % step == 0 for side, step in zip(sides, stride)):
        raise ConfigError(
            f"settings: {name} is {sides!r}, expected three whole numbers of voxels, multiples of {[*stride]}, 1 along "
            "the slices of 2D images"
        )
    return [*sides]


def plan_slices(shapes: Sequence[Sequence[int]], preset: str) -> list[int]:
    """Sides of the slices that a translation works on, across the last axis of the working frame.

    Those of the median scan, in steps of 16 voxels, 32 at least; at most as large as the preset affords.

    Args:
        shapes: voxels per axis of each scan, in the working frame.
        preset: one of `PRESETS`.
    """
    median = np.median(shapes, axis=0)
    most = MOST_OF_SLICE[preset in SHORT]
    return [min(max(math.ceil(side / 16) * 16, 32), most) for side in median[:2]]


def plane_side(shape: np.ndarray, spacing: np.ndarray, base: int) -> int:
    """Side in the plane of flat patches, which cost as much as a cube of ``base`` or less."""
    if spacing.max() < THICK * spacing.min() and not (shape == 1).any():
        return base
    slices = 1 if (shape == 1).any() else MOST_SLICES
    return min(round(math.sqrt(base**3 * SHARE / slices) / 16) * 16, MOST_IN_PLANE)


def plan_unet(
    patch_size: Sequence[int],
    spacing: Sequence[float],
    reduced: bool = False,
    filters: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Kernels, strides and filters of a U-Net, after nnU-Net's rules (Isensee et al. 2021).

    An axis is halved while four voxels are left of the patch, it divides evenly and its voxels are less than twice as
    wide as the narrowest; along an axis whose voxels are wider still, kernels have one voxel.

    Args:
        patch_size: voxels per axis; of one voxel along the slices of 2D images.
        spacing: mm per axis.
        reduced: the first level has half the resolution already, and twice the filters.
        filters: of all levels that there may be, by default those of small machines.

    Returns:
        ``kernel_size``, ``strides``, ``upsample_kernel_size`` and ``filters``, a level each.
    """
    sides, widths = list(patch_size), [float(width) for width in spacing]
    wide = [side == 1 for side in sides]  # nothing to look at beside a single slice
    kernels: list[list[int]] = []
    strides: list[list[int]] = [] if reduced else [[1, 1, 1]]
    filters = filters or (FILTERS_REDUCED if reduced else FILTERS)
    while True:
        narrowest = min(width for width, flat in zip(widths, wide) if not flat)
        near = [width < 2 * narrowest and not flat for width, flat in zip(widths, wide)]
        kernels.append([3 if one else 1 for one in near])
        step = [2 if one and side % 2 == 0 and side // 2 >= 4 else 1 for one, side in zip(near, sides)]
        if step == [1, 1, 1] or len(strides) == len(filters):
            break
        strides.append(step)
        sides = [side // one for side, one in zip(sides, step)]
        widths = [width * one for width, one in zip(widths, step)]
    kernels = kernels[: len(strides)] if reduced else kernels
    while len(strides) < 3:  # the network's least
        strides.append([1, 1, 1])
        kernels.append(kernels[-1])
    return {
        "kernel_size": kernels[: len(strides)],
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": [*filters[: len(strides)]],
    }


def settings_of(known: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """The planned settings that a config has; rotations under the names that it has for them."""
    wanted = dict(planned)
    if "rotation_deg" in wanted:
        degrees = wanted.pop("rotation_deg")
        wanted |= dict.fromkeys(("rotation_deg", "source_rotation_deg", "target_rotation_deg"), degrees)
    return {name: value for name, value in wanted.items() if name in known}


def describe(plan: Mapping[str, Any]) -> str:
    """The plan in words, for the terminal."""
    sizes = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
    source = f"Source {plan['source_training']} + {plan['source_validation']} for validation"
    if "package" in plan:
        source = f"Network ({plan['network']['_target_']}) and sizes of the package, no source"
    return (
        f"Preset {plan['preset']} ({plan['reason']}). {source}, target {plan['target']}; median scan "
        f"{plan['median_shape']} voxels of {plan['median_spacing_mm']} mm, worked on as {plan['working_shape']} of "
        f"{plan['working_spacing_mm']} mm. "
        f"Structures: {', '.join(plan['labels'])}. {sizes}. "
        f"{describe_after(plan['after_network'])}"
    )
