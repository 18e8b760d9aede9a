# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The setting ``amp`` as PyTorch's autocast."""

from __future__ import annotations

import functools
import warnings

import torch

from mapseg_components.errors import ConfigError

__all__ = ["autocast", "resolved_amp"]

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
OLDER_TORCH = {"unknown_bf16": True}  # neither claims AMX nor warns


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
    if it multiplies bf16 matrices by AMX, else float32. It depends on the hardware alone, so that a run that goes on
    computes as before. Without AMX bf16 is slower than float32 on a CPU, without any bf16 instructions 25 times.

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
        return "bf16" if kind == "cpu" and "amx_bf16" in bf16_instructions() else None
    if amp == "bf16" and kind == "cpu" and not bf16_instructions():
        _warn_of_emulation()
    return amp


@functools.cache
def bf16_instructions() -> frozenset[str]:
    """Names of the instructions by which this processor computes in bf16; empty if it can only emulate it."""
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else OLDER_TORCH
    return frozenset(name for name, found in facts.items() if "bf16" in name and found)


@functools.cache
def _warn_of_emulation() -> None:
    warnings.warn(
        "amp is bf16, which this processor has no instructions for: steps take about 25 times as long as in float32. "
        "Set amp to auto or null.",
        stacklevel=2,
    )
