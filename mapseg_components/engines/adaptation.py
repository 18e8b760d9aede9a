# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation by masked pseudo-labelling as a MONAI trainer (MAPSeg, arXiv 2303.09373, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.errors import ConfigError
from mapseg_components.keys import (
    CASE_ID,
    GLOBAL_IMAGE,
    GLOBAL_LABEL,
    LOCAL_BOX,
    LOCAL_IMAGE,
    LOCAL_LABEL,
    SOURCE,
    TARGET,
    TARGET_SEGMENTATION,
    TOTAL_LOSS,
)
from mapseg_components.masking import block_grid, check_mask_value, draw_block_mask, expand_block_mask, hide

if TYPE_CHECKING:
    from mapseg_components.losses import AdaptationLoss

__all__ = ["PairPass", "Teacher", "UDATrainer"]

SCORED_TERM = "target_local_masked"  # of the loss; the clean one falls when pseudo labels repeat themselves


class Teacher(Protocol):
    """What the trainer needs of a teacher; ``mapseg_components.handlers.EMATeacher`` has it."""

    active: bool

    def attach(self, engine: Any) -> None:
        """Follow the engine's events."""

    def pseudo_label(
        self, local_image: torch.Tensor, global_image: torch.Tensor, local_box: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Local label, global label, local confidence, global confidence; each (B, 1, X, Y, Z)."""


@dataclass
class PairPass:
    """One pass of pairs through the network, with the labels it is compared to (B samples)."""

    side: str
    ending: str
    local_image: torch.Tensor
    global_image: torch.Tensor
    local_box: torch.Tensor
    labels: tuple[torch.Tensor, ...]


class UDATrainer(SupervisedTrainer):
    """Source pairs with labels, target pairs with the teacher's pseudo labels, one weighted sum.

    A batch has the entries ``source`` and ``target``, or only one of them. While the teacher is not active (the
    warm-up) the target is not looked at. Which passes each side needs (clean, masked) is the loss's knowledge.

    Args:
        device: where to train.
        max_epochs: epochs to run, warm-up included.
        train_data_loader: yields ``{"source": batch, "target": batch}``, e.g. ``SourceTargetLoader``. A batch has
            ``local_image``, ``global_image`` (B, C, X, Y, Z) in [0, 1], ``local_box`` (B, 3, 2) in voxels of the
            global view; the source has ``local_label`` and ``global_label`` (B, 1, X, Y, Z) as well.
        network: called with local image, global image and box; returns local logits, global logits, local
            features and context features, e.g. ``GlobalLocalPass``.
        optimizer: over the network's parameters.
        loss_function: an ``AdaptationLoss``.
        teacher: see `Teacher`, attached by the trainer; ``None`` trains on the source alone.
        mask_ratio: share of hidden blocks (0.7 in the paper).
        local_block_size: voxels per side of a hidden block of the local patch (8); global_block_size: of the
            global view (4). One number or one per axis.
        mask_value: what a hidden voxel shows, see ``masking.hide``; 0 in the paper.
        epoch_length: iterations per epoch, by default the loader's length.
        batched_passes: run all passes of an iteration as one batch; otherwise one after the other, each with its
            own backward pass: the same gradients in a fraction of the memory.
        amp: ``"bf16"``, ``"fp16"`` or ``None``. max_grad_norm: gradient clipping or ``None``. accumulate_steps:
            iterations per optimizer step. See `OptimizationStep`.
        compile: run the network through ``torch.compile``: a slow first iteration; on a CPU no gain
            (docs/reference/performance.md).
        train_handlers: handlers with ``attach``.

    Output:
        ``engine.state.output[0]`` (a list, as MONAI's handlers expect it) holds ``loss``, every unweighted term by
        name (see ``AdaptationLoss``) and, when there is a target, ``target_segmentation``: the local segmentation term
        of its masked pass, which the Score reads (section 3.7), whether or not there is a clean pass as well.

    Raises:
        ConfigError: the mask value is unknown; or, while running, the batch has neither side that can be trained on, or
            the network returns logits alone.
        NonFiniteError: while running, if a loss is NaN or infinite; the message names the term and the cases.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: AdaptationLoss,
        teacher: Teacher | None,
        mask_ratio: float,
        local_block_size: Sequence[int] | int,
        global_block_size: Sequence[int] | int,
        epoch_length: int | None = None,
        batched_passes: bool = True,
        amp: str | None = None,
        max_grad_norm: float | None = None,
        accumulate_steps: int = 1,
        compile: bool = False,
        train_handlers: Sequence | None = None,
        mask_value: float | str = 0.0,
    ) -> None:
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            epoch_length=epoch_length,
            train_handlers=[*(train_handlers or ()), *([] if teacher is None else [teacher])],
            decollate=False,
        )
        if compile:
            network.compile()
        self.teacher = teacher
        self.mask_ratio = mask_ratio
        self.mask_value = check_mask_value(mask_value)
        self.local_block_size = local_block_size
        self.global_block_size = global_block_size
        self.batched_passes = batched_passes
        self.optimization = OptimizationStep(
            network, optimizer, self.state.device, amp, max_grad_norm, accumulate_steps
        )

    def _iteration(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        cases = {side: list(batch.get(CASE_ID, [])) for side, batch in batchdata.items()}
        sizes = next(iter(batchdata.values()))[LOCAL_IMAGE].shape
        with self.optimization.naming_errors(engine.state.iteration, cases, sizes):
            return [self._step(engine, batchdata)]

    def _step(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        optimization, iteration = self.optimization, engine.state.iteration
        self.network.train()
        passes = self._plan(engine, batchdata)
        groups = [passes] if self.batched_passes else [[one] for one in passes]
        ends = optimization.ends(iteration, iteration % engine.state.epoch_length == 0)
        terms: dict[str, torch.Tensor] = {}
        for number, group in enumerate(groups):
            with optimization.synchronisation(ends and number == len(groups) - 1):
                losses = self._losses(group)
                if number == 0:
                    losses.update(self.loss_function.penalties())
                optimization.backward(self.loss_function(losses))
            terms.update({name: loss.detach() for name, loss in losses.items()})
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        optimization.finish(terms, ends)
        if ends:
            engine.fire_event(IterationEvents.MODEL_COMPLETED)

        output = {TOTAL_LOSS: self.loss_function(terms), **terms}
        if SCORED_TERM in terms:
            output[TARGET_SEGMENTATION] = terms[SCORED_TERM]
        return output

    def _plan(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> list[PairPass]:
        """The passes of this iteration, with source labels or fresh pseudo labels."""
        passes = []
        if SOURCE in batchdata:
            batch = self._on_device(engine, batchdata[SOURCE])
            passes += self._clean_and_masked(SOURCE, batch, (batch[LOCAL_LABEL], batch[GLOBAL_LABEL]))
        if TARGET in batchdata and self.teacher is not None and self.teacher.active:
            batch = self._on_device(engine, batchdata[TARGET])
            with self.optimization.autocast():
                labels = self.teacher.pseudo_label(batch[LOCAL_IMAGE], batch[GLOBAL_IMAGE], batch[LOCAL_BOX])
            passes += self._clean_and_masked(TARGET, batch, labels)
        if not passes:
            raise ConfigError(
                f"nothing to train on: the batch has {sorted(batchdata)} and the teacher is not active; "
                "without source data set warmup_epochs to 0"
            )
        return passes

    def _clean_and_masked(
        self, side: str, batch: Mapping[str, torch.Tensor], labels: tuple[torch.Tensor, ...]
    ) -> list[PairPass]:
        passes = []
        for ending in self.loss_function.passes(side):
            local_image, global_image = batch[LOCAL_IMAGE], batch[GLOBAL_IMAGE]
            if ending:
                local_image = self._hide(local_image, self.local_block_size)
                global_image = self._hide(global_image, self.global_block_size)
            passes.append(PairPass(side, ending, local_image, global_image, batch[LOCAL_BOX], labels))
        return passes

    def _losses(self, group: list[PairPass]) -> dict[str, torch.Tensor]:
        """Named, unweighted terms of several passes that run as one batch."""
        with self.optimization.autocast():
            output = self.network(
                torch.cat([one.local_image for one in group]),
                torch.cat([one.global_image for one in group]),
                torch.cat([one.local_box for one in group]),
            )
        if isinstance(output, torch.Tensor):
            raise ConfigError(
                f"network {type(self.network).__name__} returns one tensor, expected local logits, global logits, "
                "local features and context features: wrap it in mapseg_components.networks.GlobalLocalPass"
            )
        sizes = [len(one.local_image) for one in group]
        losses: dict[str, torch.Tensor] = {}
        for one, parts in zip(group, zip(*(tensor.split(sizes) for tensor in output))):
            losses.update(self.loss_function.terms((one.side, one.ending), parts, *one.labels))
        return losses

    def _hide(self, image: torch.Tensor, block_size: Sequence[int] | int) -> torch.Tensor:
        mask = draw_block_mask(len(image), block_grid(image.shape[2:], block_size), self.mask_ratio)
        mask = expand_block_mask(mask.to(image.device, non_blocking=True), image.shape[2:])
        return hide(image, mask, self.mask_value)

    @staticmethod
    def _on_device(engine: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {
            key: value.as_subclass(torch.Tensor).to(engine.state.device, non_blocking=True)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
