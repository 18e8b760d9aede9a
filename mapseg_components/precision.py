# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The setting ``amp`` as PyTorch's autocast."""

from __future__ import annotations

import functools
import time
import warnings

import torch

from mapseg_components.errors import ConfigError

__all__ = ["autocast", "resolved_amp"]

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
OLDER_TORCH = {"unknown_bf16": True}  # neither claims AMX nor warns
TIMES_AS_FAST = 1.2  # that bf16 must be; it was 0.5 and 2 on the two kinds of processor with AVX512-BF16
REPEATS = 5


def autocast(device: torch.device | str, amp: str | None) -> torch.autocast:
    """Context for forward passes.

    Args:
        device: where they run.
        amp: ``"bf16"``, ``"fp16"``, ``"auto"`` or ``None`` for float32.

    Raises:
        ConfigError: ``amp`` is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.precision import autocast
        >>> with autocast("cpu", None):
        ...     (torch.rand(2, 3) @ torch.rand(3, 4)).dtype
        torch.float32
    """
    amp = resolved_amp(device, amp)
    return torch.autocast(torch.device(device).type, dtype=AMP_TYPES.get(amp or ""), enabled=amp is not None)


def resolved_amp(device: torch.device | str, amp: str | None) -> str | None:
    """The precision that a value of ``amp`` means on a device.

    ``"auto"`` is the fastest that trains as well as float32: on a GPU bf16, or fp16 before bf16 existed; on a CPU bf16
    if it multiplies bf16 matrices by AMX, float32 if it has no bf16 instructions, which is 25 times as fast there. A
    CPU with AVX512-BF16 alone is asked, by a convolution in both, see `bf16_gains`.

    Args:
        device: where the network runs.
        amp: ``"bf16"``, ``"fp16"``, ``"auto"`` or ``None`` for float32.

    Returns:
        ``"bf16"``, ``"fp16"`` or ``None``.

    Raises:
        ConfigError: ``amp`` is unknown.

    Examples:
        >>> from mapseg_components.precision import resolved_amp
        >>> resolved_amp("cpu", "auto") in ("bf16", None)
        True
    """
    if amp is not None and amp not in {*AMP_TYPES, AUTO}:
        raise ConfigError(f"amp is {amp!r}, expected one of {sorted({*AMP_TYPES, AUTO})} or null for float32")
    kind = torch.device(device).type
    if amp == AUTO:
        if kind == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if kind == "cpu" and bf16_gains() else None
    if amp == "bf16" and kind == "cpu" and not bf16_instructions():
        _warn_of_emulation()
    return amp


@functools.cache
def bf16_instructions() -> frozenset[str]:
    """Names of the instructions by which this processor computes in bf16; empty if it can only emulate it."""
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else OLDER_TORCH
    return frozenset(name for name, found in facts.items() if "bf16" in name and found)


@functools.cache
def bf16_gains() -> bool:
    """Whether this processor convolves faster in bf16 than in float32.

    With AMX it does, without any instructions it does not. With AVX512-BF16 alone some processors are twice as fast in
    it and others half as fast, and their flags do not tell which: there the best of a few turns of a thin 3D
    convolution decides, once in a process, in less than a tenth of a second. Both kinds are far from the limit, so that
    a run that goes on computes as before.
    """
    found = bf16_instructions()
    if "amx_bf16" in found or "avx512_bf16" not in found:
        return "amx_bf16" in found
    seconds = seconds_of_convolution()
    return seconds[torch.float32] > TIMES_AS_FAST * seconds[torch.bfloat16]


def seconds_of_convolution() -> dict[torch.dtype, float]:
    """Fewest seconds of a 3x3x3 convolution of 16 channels, 32 voxels along each axis, by the type of its numbers."""
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.inference_mode():
        sides = {
            dtype: (torch.zeros(2, 16, 32, 32, 32, dtype=dtype), torch.zeros(16, 16, 3, 3, 3, dtype=dtype))
            for dtype in seconds
        }
        for _ in range(1 + REPEATS):  # the first turn finds kernels, the fewest seconds leave it out
            for dtype, (image, weight) in sides.items():
                begin = time.perf_counter()
                torch.conv3d(image, weight, padding=1)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds


@functools.cache
def _warn_of_emulation() -> None:
    warnings.warn(
        "amp is bf16, which this processor has no instructions for: steps take about 25 times as long as in float32. "
        "Set amp to auto or null.",
        stacklevel=2,
    )
