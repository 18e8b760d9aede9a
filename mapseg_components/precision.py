# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The setting ``amp`` as PyTorch's autocast."""

from __future__ import annotations

import torch

from mapseg_components.errors import ConfigError

__all__ = ["autocast"]

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device | str, amp: str | None) -> torch.autocast:
    """Context for forward passes.

    Args:
        device: where they run.
        amp: ``"bf16"``, ``"fp16"`` or ``None`` for float32.

    Raises:
        ConfigError: ``amp`` is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.precision import autocast
        >>> with autocast("cpu", "bf16"):
        ...     (torch.rand(2, 3) @ torch.rand(3, 4)).dtype
        torch.bfloat16
    """
    if amp is not None and amp not in AMP_TYPES:
        raise ConfigError(f"amp is {amp!r}, expected one of {sorted(AMP_TYPES)} or null for float32")
    return torch.autocast(torch.device(device).type, dtype=AMP_TYPES.get(amp or ""), enabled=amp is not None)
