# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One optimization step for every trainer: mixed precision, gradient accumulation and clipping."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mapseg_components.errors import ConfigError, NonFiniteError
from mapseg_components.memory import naming_memory_errors
from mapseg_components.precision import autocast, resolved_amp

__all__ = ["OptimizationStep"]

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10
SMALLER = "patch_size, batch_size or width for a new run, or set batched_passes to false and go on with this one"


class OptimizationStep:
    """Forward in mixed precision, backward, and a clipped optimizer step every few iterations.

    Args:
        network: under ``DistributedDataParallel`` its gradients are synchronised only in
            the last backward pass before a step.
        optimizer: its parameters are clipped and stepped; it may have some of the network's only.
        device: where the network runs.
        amp: ``"bf16"``, ``"fp16"`` (with loss scaling), ``"auto"`` for the faster of bf16 and float32 on ``device``, or
            ``None`` for float32.
        max_grad_norm: clip the gradient's norm to this value, ``None`` for no clipping.
        accumulate_steps: iterations whose gradients are averaged into one step.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Examples:
        >>> import torch
        >>> from mapseg_components.engines import OptimizationStep
        >>> network = torch.nn.ParameterList([torch.tensor(2.0)])
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        >>> step = OptimizationStep(
        ...     network, optimizer, torch.device("cpu"), amp=None, max_grad_norm=1.0, accumulate_steps=1
        ... )
        >>> loss = network[0].square()  # its gradient, 4, is clipped to 1
        >>> step.backward(loss)
        >>> step.finish({"loss": loss.detach()}, ends=True)
        >>> round(network[0].item(), 3)
        1.5
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str | None,
        max_grad_norm: float | None,
        accumulate_steps: int,
    ) -> None:
        self.amp = resolved_amp(device, amp)
        if amp != self.amp:
            logger.info("amp %s on this %s: %s.", amp, device.type, self.amp or "float32")
        if accumulate_steps < 1:
            raise ConfigError(f"accumulate_steps is {accumulate_steps}, expected 1 or more")
        self.network = network
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = device
        self.max_grad_norm = max_grad_norm
        self.accumulate_steps = accumulate_steps
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.pending = False
        """Whether gradients are accumulated but not applied; such a state can be neither saved nor resumed."""

    def autocast(self) -> torch.autocast:
        """Context for forward passes."""
        return autocast(self.device, self.amp)

    def ends(self, iteration: int, last_of_epoch: bool) -> bool:
        """Whether an iteration completes a step; the last one of an epoch always does."""
        return iteration % self.accumulate_steps == 0 or last_of_epoch

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss, scaled for the average over ``accumulate_steps`` iterations."""
        self.pending = True
        self.scaler.scale(loss / self.accumulate_steps).backward()

    @contextlib.contextmanager
    def naming_errors(self, iteration: int, cases: Any, sizes: Sequence[int], remedy: str = SMALLER) -> Iterator[None]:
        """Context of an iteration: numeric and memory errors name the iteration, the cases and the remedy.

        Args:
            iteration: counted from 1.
            cases: case ids of the batch, for the message.
            sizes: (B, C, X, Y, Z) of its local patches.
            remedy: settings that need less memory.
        """
        what = f"iteration {iteration} on {self.device}, batch of {sizes[0]} patches {tuple(sizes[2:])}"
        with naming_memory_errors(what, f"{remedy}: the last checkpoint is intact"):
            try:
                yield
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error} at iteration {iteration}, cases {cases}: check these scans for extreme values, "
                    "or lower the learning rate; checkpoints hold only what was before"
                ) from None

    @contextlib.contextmanager
    def synchronisation(self, wanted: bool) -> Iterator[None]:
        """Context of forward and backward; without ``wanted``, distributed workers do not exchange gradients."""
        if wanted or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self.network.no_sync():
                yield

    def finish(self, terms: Mapping[str, torch.Tensor], ends: bool) -> None:
        """End an iteration after its backward passes: check its numbers; where it ends a step, clip, step and clear.

        All numbers are checked at once, so that the host synchronises with a GPU once per iteration (with fp16 for the
        scale as well).

        Args:
            terms: scalar loss terms of the iteration, by name.
            ends: whether the iteration completes a step, see `ends`.

        Raises:
            NonFiniteError: a loss term, or the gradient of a step, is NaN or infinite; no weight has been touched. The
                loss scaling of fp16 skips a step with such a gradient, until the scale has become too small to be the
                cause.
        """
        self.prepare(terms, ends)
        if ends:
            self.step()

    def prepare(self, terms: Mapping[str, torch.Tensor], ends: bool) -> None:
        """The first half of `finish`, which touches no weight: clip and check. Arguments and errors are the same."""
        checked = dict(terms)
        if ends:
            self.scaler.unscale_(self.optimizer)
            if self.max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if not self.scaler.is_enabled():
                checked["gradient"] = norm
        if not torch.isfinite(torch.stack(list(checked.values()))).all():
            bad = [name for name, term in terms.items() if not torch.isfinite(term)]
            raise NonFiniteError(
                f"loss terms {bad} are NaN or infinite" if bad else f"the gradient's norm is {norm.item()}"
            )

    def step(self) -> None:
        """The second half of `finish`, where an iteration ends a step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(f"the gradient is NaN or infinite at every loss scale down to {SMALLEST_SCALE:g}")
        self.network.zero_grad(set_to_none=True)  # of parameters too that the optimizer does not have
        self.pending = False
