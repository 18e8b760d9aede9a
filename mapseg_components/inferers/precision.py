# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The setting ``amp`` for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from mapseg_components.errors import NonFiniteError
from mapseg_components.precision import autocast, resolved_amp

__all__ = ["AutocastInferer"]


class AutocastInferer(Inferer):
    """Another inferer in mixed precision, on whatever device the network is.

    The ``amp`` of MONAI 1.6.1's evaluators is ``torch.autocast("cuda")``, which does nothing on a CPU.

    Args:
        inferer: any inferer of MONAI.
        amp: ``"auto"``, ``"bf16"``, ``"fp16"`` or ``None`` for float32.

    Raises:
        ConfigError: ``amp`` is unknown.
        NonFiniteError: in a call, the output holds NaN or infinite values, which an arg-max would make background.

    Examples:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> from mapseg_components.inferers import AutocastInferer
        >>> inferer = AutocastInferer(SimpleInferer(), amp="bf16")
        >>> inferer(torch.rand(1, 1, 4, 5, 6), torch.nn.Conv3d(1, 2, kernel_size=1)).dtype
        torch.bfloat16
    """

    def __init__(self, inferer: Inferer, amp: str | None) -> None:
        super().__init__()
        resolved_amp("meta", amp)  # refuses an unknown one, wherever the network will be
        self.inferer = inferer
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of the inferer for ``inputs`` (B, C, X, Y, Z) and network under autocast; errors as of it."""
        parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
        device = next((parameter.device for parameter in parameters), inputs.device)  # windows may be moved to it
        with autocast(device, self.amp):
            output = self.inferer(inputs, network, *args, **kwargs)
        if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
            raise NonFiniteError("the network's output is NaN or infinite: check the weights and amp")
        return output
