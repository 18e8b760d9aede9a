# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation by a method with a discriminator: two networks that learn in turns, each with its own optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import ignite.distributed as idist
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mapseg_components.engines.adaptation import AdaptationTrainer
from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.errors import ConfigError
from mapseg_components.methods import Method

__all__ = ["AdversarialMethod", "AdversarialTrainer"]


class AdversarialMethod(Method, Protocol):
    """A method some of whose terms come from a discriminator, such as `mapseg_components.methods.AdvEnt`."""

    def discriminator_losses(self, discriminator: nn.Module) -> dict[str, torch.Tensor]:
        """Named losses of the discriminator on what the last passes gave, without gradients to the network.

        Args:
            discriminator: called once at most, so that distributed training synchronises its gradients.
        """


class AdversarialTrainer(AdaptationTrainer):
    """One step of the network along its method's terms, then one of the discriminator along the mean of its losses.

    Both use the same forward passes of the network. The discriminator runs in float32 in any mode of ``amp``: it is
    small, and a binary cross-entropy of probabilities is refused in mixed precision. It is clipped and accumulated as
    the network is. All losses and both gradients are checked before either network is touched.

    Put discriminator and optimizer into the checkpoint (``TrainingCheckpoint(save_dict=...)``), as `advent.yaml` does;
    then a resumed run equals an uninterrupted one bit for bit on a CPU.

    Args:
        args: those of `AdaptationTrainer`, whose method is an `AdversarialMethod`.
        discriminator: moved to the device; in a distributed run each process has a copy of the first one's.
        discriminator_optimizer: over the discriminator's parameters alone.
        kwargs: see ``args``.

    Output:
        that of `AdaptationTrainer`, and the discriminator's losses, which are no part of ``loss``.

    Raises:
        ConfigError: the method has no discriminator, or the two optimizers share parameters.
        NonFiniteError: while running, a loss or gradient of either network is NaN or infinite; neither was touched.

    Examples:
        >>> import torch
        >>> from monai.losses import DiceCELoss
        >>> from mapseg_components.engines import AdversarialTrainer
        >>> from mapseg_components.methods import AdvEnt
        >>> from mapseg_components.networks import PatchScores, PlainPass
        >>> network, judge = PlainPass(torch.nn.Conv3d(1, 2, 1)), PatchScores(2, (12, 14, 16), channels=2)
        >>> optimizers = [torch.optim.Adam(one.parameters(), lr=1e-4) for one in (network, judge)]
        >>> source = {"image": torch.rand(1, 1, 12, 14, 16), "label": torch.ones(1, 1, 12, 14, 16)}
        >>> batch = {"source": source, "target": {"image": torch.rand(1, 1, 12, 14, 16)}}
        >>> method = AdvEnt(DiceCELoss(to_onehot_y=True, softmax=True), judge)
        >>> trainer = AdversarialTrainer(
        ...     "cpu", 2, [batch], network, optimizers[0], method,
        ...     discriminator=judge, discriminator_optimizer=optimizers[1],
        ... )
        >>> trainer.run()
        >>> [name for name in trainer.state.output[0] if name.startswith("discriminator")]
        ['discriminator_source', 'discriminator_target']
    """

    method: AdversarialMethod

    def __init__(
        self, *args: Any, discriminator: nn.Module, discriminator_optimizer: torch.optim.Optimizer, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.method, "discriminator_losses"):
            raise ConfigError(
                f"{type(self.method).__name__} has no discriminator: use AdaptationTrainer, or a method such as AdvEnt"
            )
        device, own = self.state.device, self.optimization
        discriminator.to(device).train()
        if idist.get_world_size() > 1:
            discriminator = DistributedDataParallel(discriminator, [device] if device.type == "cuda" else None)
        self.discriminator = discriminator
        self.opponent = OptimizationStep(
            discriminator, discriminator_optimizer, device, None, own.max_grad_norm, own.accumulate_steps
        )
        if {id(one) for one in own.parameters} & {id(one) for one in self.opponent.parameters}:
            raise ConfigError(
                "optimizer and discriminator_optimizer share parameters: give each those of one network alone"
            )

    def _finish(self, terms: Mapping[str, torch.Tensor], ends: bool) -> dict[str, torch.Tensor]:
        with self.opponent.synchronisation(ends):
            losses = self.method.discriminator_losses(self.discriminator)
            if losses:
                self.opponent.backward(torch.stack(list(losses.values())).mean())
        losses = {name: loss.detach() for name, loss in losses.items()}
        learns = self.opponent.pending
        self.optimization.prepare({**terms, **losses}, ends)
        if learns:
            self.opponent.prepare(losses, ends)
        if ends:
            self.optimization.step()
            if learns:
                self.opponent.step()
        return losses
