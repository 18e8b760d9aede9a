# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale masked autoencoding as a MONAI trainer (MAPSeg, arXiv 2303.09373, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.keys import CASE_ID, GLOBAL_IMAGE, IMAGE, TOTAL_LOSS
from mapseg_components.masking import BlockMask

__all__ = ["MAETrainer"]

TERMS = {IMAGE: "local_reconstruction", GLOBAL_IMAGE: "global_reconstruction"}


class MAETrainer(SupervisedTrainer):
    """Hide blocks of a local patch and of its global view, reconstruct both, sum the two errors.

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: yields batches with ``image`` and ``global_image``, both (B, C, X, Y, Z) in [0, 1].
        network: image with hidden blocks to reconstruction, e.g. ``MultiScaleMAE``.
        optimizer: over the network's parameters.
        loss_function: called with reconstruction, image and mask, e.g. ``MaskedReconstructionLoss``.
        mask_ratio: share of hidden blocks (0.7 in the paper).
        local_block_size: voxels per side of a hidden block of the local patch, one number or one per axis (8 in the
            paper).
        global_block_size: voxels per side of a hidden block of the global view, likewise (4 in the paper).
        epoch_length: iterations per epoch, by default the loader's length.
        batched_passes: encode both scales as one batch (needs equal sizes); otherwise one after the other, in
            about half the memory.
        amp: ``"auto"``, ``"bf16"``, ``"fp16"`` or ``None`` for float32.
        max_grad_norm: clip the gradient's norm to this value, ``None`` for no clipping.
        accumulate_steps: iterations per optimizer step.
        compile: run the network through ``torch.compile``: a slow first iteration; on a CPU no gain
            (docs/reference/performance.md).
        train_handlers: handlers with ``attach``.
        mask_value: value of hidden voxels, see ``masking.hide``; 0 in the paper.

    Output:
        ``engine.state.output[0]`` holds ``loss`` and the terms ``local_reconstruction`` and ``global_reconstruction``.

    Raises:
        ConfigError: the mask value is unknown.
        NonFiniteError: while running, if the loss is NaN or infinite; the message names the cases.

    Examples:
        >>> import torch
        >>> from monai.data import DataLoader, Dataset
        >>> from mapseg_components.engines import MAETrainer
        >>> from mapseg_components.losses import MaskedReconstructionLoss
        >>> from mapseg_components.networks import MultiScaleMAE
        >>> from mapseg_components.transforms import RandGlobalLocalCropd
        >>> scans = Dataset([{"image": torch.rand(1, 20, 24, 28)}] * 3, RandGlobalLocalCropd(patch_size=(16, 8, 8)))
        >>> network = MultiScaleMAE(in_channels=1, width=8, depth=1, decoder_channels=(4, 2))
        >>> optimizer, loss = torch.optim.Adam(network.parameters()), MaskedReconstructionLoss()
        >>> trainer = MAETrainer(
        ...     "cpu", 1, DataLoader(scans), network, optimizer, loss,
        ...     mask_ratio=0.75, local_block_size=8, global_block_size=4,
        ... )
        >>> trainer.run()
        >>> trainer.state.iteration, sorted(trainer.state.output[0])
        (3, ['global_reconstruction', 'local_reconstruction', 'loss'])
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable,
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
            train_handlers=train_handlers,
            decollate=False,
        )
        if compile:
            network.compile()
        self.masks = {
            IMAGE: BlockMask(mask_ratio, local_block_size, mask_value),
            GLOBAL_IMAGE: BlockMask(mask_ratio, global_block_size, mask_value),
        }
        self.batched_passes = batched_passes
        self.optimization = OptimizationStep(
            network, optimizer, self.state.device, amp, max_grad_norm, accumulate_steps
        )

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:  # type: ignore[override]
        with self.optimization.naming_errors(engine.state.iteration, batchdata.get(CASE_ID), batchdata[IMAGE].shape):
            return [self._step(engine, batchdata)]

    def _step(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        optimization, iteration = self.optimization, engine.state.iteration
        self.network.train()
        images = {
            key: batchdata[key].as_subclass(torch.Tensor).to(engine.state.device, non_blocking=True)
            for key in self.masks
        }
        masks = {key: self.masks[key].draw(image) for key, image in images.items()}

        ends = optimization.ends(iteration, iteration % engine.state.epoch_length == 0)
        groups = [list(images)] if self.batched_passes else [[key] for key in images]
        terms: dict[str, torch.Tensor] = {}
        for number, group in enumerate(groups):
            with optimization.synchronisation(ends and number == len(groups) - 1):
                with optimization.autocast():
                    hidden = [self.masks[key].hide(images[key], masks[key]) for key in group]
                    outputs = self.network(torch.cat(hidden)).chunk(len(group))
                losses = {
                    TERMS[key]: self.loss_function(output, images[key], masks[key])
                    for key, output in zip(group, outputs)
                }
                optimization.backward(torch.stack(list(losses.values())).sum())
            terms.update({name: loss.detach() for name, loss in losses.items()})
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        optimization.finish(terms, ends)
        if ends:
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return {TOTAL_LOSS: torch.stack(list(terms.values())).sum(), **terms}
