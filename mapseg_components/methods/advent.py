# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Target predictions that a discriminator takes for the source's (AdvEnt, CVPR 2019, arXiv 1811.12833)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from monai.losses import PatchAdversarialLoss
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, SOURCE, TARGET
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.consistency import Supervised

__all__ = ["AdvEnt", "self_information"]


class AdvEnt(Supervised):
    """The labelled source, and target maps of self-information that a discriminator takes for the source's.

    A discriminator learns to tell maps of `self_information` of the source from those of the target; the segmenter
    learns to be taken for the source. So the target's predictions become sure where those of the source are, and
    have borders where those have. The two networks learn in turns in each iteration, from the same forward passes
    (`mapseg_components.engines.AdversarialTrainer`): the term of the segmenter moves no weight of the discriminator,
    and the discriminator sees maps without a gradient.

    Terms are ``source``, ``target_adversarial`` and, with weight 0, ``target_entropy``, which the Score reads: how well
    a discriminator is misled says more of the discriminator than of the segmenter. Losses of the discriminator in the
    history are ``discriminator_source`` and ``discriminator_target``, both 0.69 where it guesses.

    Args:
        loss: of the source, see `Supervised`.
        discriminator: from maps (B, classes, X, Y, Z) to scores, e.g. `mapseg_components.networks.PatchScores`.
        weight: of the adversarial term (0.001 in the paper).
        adversarial_loss: called as MONAI's ``PatchAdversarialLoss``, by default its binary cross-entropy (the paper).

    Raises:
        ConfigError: the discriminator has batch normalization, or the weight is negative; in a call, a batch has a
            target and no source, or patches of both sides differ in size.

    Examples:
        >>> from mapseg_components.methods import AdvEnt
        >>> from mapseg_components.networks import PatchScores
        >>> AdvEnt(loss=None, discriminator=PatchScores(2, (16, 16, 16), channels=2)).weights
        {'source': 1.0, 'target_adversarial': 0.001, 'target_entropy': 0.0}
    """

    alone = (SOURCE,)
    selection = ("target_entropy",)

    def __init__(
        self,
        loss: nn.Module,
        discriminator: nn.Module,
        weight: float = 0.001,
        adversarial_loss: Callable[[torch.Tensor, bool, bool], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(loss)
        if not 0.0 <= weight < math.inf:
            raise ConfigError(f"weight of the adversarial term is {weight}, expected 0 or more")
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in discriminator.modules()):
            raise ConfigError(
                "the discriminator has batch normalization, whose statistics the segmenter's passes would move: use "
                "mapseg_components.networks.PatchScores, or another network without it"
            )
        self.discriminator = discriminator
        self.adversarial_loss = adversarial_loss or PatchAdversarialLoss(criterion="bce")
        self.weights |= {"target_adversarial": weight, "target_entropy": 0.0}
        self._maps: dict[str, torch.Tensor] = {}

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """The source's pass, and one over the target's images."""
        self._maps = {}
        passes = super().passes(batch)
        if TARGET not in batch:
            return passes
        if SOURCE not in batch:
            raise ConfigError(
                "AdvEnt compares the target with the source, and there is no source (test-time, or a site of a "
                "federation): choose MAPSeg there"
            )
        source, target = batch[SOURCE][IMAGE], batch[TARGET][IMAGE]
        if source.shape != target.shape:
            raise ConfigError(
                f"source patches are {tuple(source.shape)}, target patches {tuple(target.shape)}, expected equal "
                "sizes: give both one batch_size and patch_size"
            )
        supervised = passes[0].terms

        def source_terms(output: Tensors) -> dict[str, torch.Tensor]:
            self._maps[SOURCE] = self_information(output["logits"].detach())
            return supervised(output)

        def target_terms(output: Tensors) -> dict[str, torch.Tensor]:
            maps = self_information(output["logits"])
            self._maps[TARGET] = maps.detach()
            with fixed(self.discriminator):
                misled = self.adversarial_loss(self.discriminator(maps), True, False)
            return {"target_adversarial": misled, "target_entropy": maps.detach().sum(dim=1).mean()}

        return [Pass(passes[0].inputs, source_terms), Pass({IMAGE: target}, target_terms)]

    def discriminator_losses(self, discriminator: nn.Module) -> dict[str, torch.Tensor]:
        """Losses of the discriminator on the maps of the last passes, each once; empty without a target.

        Args:
            discriminator: the method's, or a wrapper of it that distributed training synchronises.
        """
        maps, self._maps = self._maps, {}
        if TARGET not in maps:
            return {}
        of_source, of_target = discriminator(torch.cat([maps[SOURCE], maps[TARGET]])).chunk(2)
        return {
            "discriminator_source": self.adversarial_loss(of_source, True, True),
            "discriminator_target": self.adversarial_loss(of_target, False, True),
        }


def self_information(logits: torch.Tensor) -> torch.Tensor:
    """Self-information of each class, weighted by its probability: ``-p log p / log C``, float32.

    Args:
        logits: (B, C, X, Y, Z), of two classes or more.

    Returns:
        maps of the same shape, 0 or more; their sum over classes is the entropy, from 0 (sure) to 1 (all alike).

    Examples:
        >>> import torch
        >>> from mapseg_components.methods import self_information
        >>> self_information(torch.zeros(1, 4, 1, 1, 1)).flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    logarithms = logits.float().log_softmax(dim=1)
    return -(logarithms.exp() * logarithms) / math.log(logits.shape[1])


@contextlib.contextmanager
def fixed(network: nn.Module) -> Iterator[None]:
    """Context whose forward passes give no gradient to the network's weights, only to what it is shown."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
