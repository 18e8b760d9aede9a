# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Unpaired translation of slices between two domains that keeps what is labelled (COSMOS), as a MONAI trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.losses import PatchAdversarialLoss

from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.errors import ConfigError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, SOURCE, TARGET, TOTAL_LOSS
from mapseg_components.losses import LeavingOut, SliceDiceLoss
from mapseg_components.networks import DomainDiscriminators, DomainTranslators

__all__ = ["ReplayBuffer", "TranslationTrainer"]

CRITERIA = ("bce", "least_squares")
REMEDY = "slice_size, batch_size or width for a new run"


class ReplayBuffer:
    """Translated slices of earlier iterations, which a discriminator sees in place of half of the new ones.

    The game of generators and discriminators swings less if a discriminator remembers (Shrivastava et al. 2017, arXiv
    1612.07828, as in CycleGAN). It is drawn from PyTorch's generator; `state_dict` has the slices, so that a resumed
    run goes on with the same ones.

    Args:
        size: most slices that are kept of each domain (50 in CycleGAN); 0 passes all new ones through.

    Raises:
        ConfigError: the size is negative.

    Examples:
        >>> import torch
        >>> from mapseg_components.engines import ReplayBuffer
        >>> buffer = ReplayBuffer(size=2)
        >>> buffer.exchange("target", torch.tensor([1.0, 2.0])).tolist()  # it fills up first
        [1.0, 2.0]
        >>> sorted(buffer.exchange("target", torch.tensor([3.0])).tolist() + buffer.slices["target"].tolist())
        [1.0, 2.0, 3.0]
    """

    differs_by_process = True

    def __init__(self, size: int = 50) -> None:
        if size < 0:
            raise ConfigError(f"replay_size is {size}, expected 0 or more slices")
        self.size = size
        self.slices: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def exchange(self, domain: str, images: torch.Tensor) -> torch.Tensor:
        """Slices (B, ...) for the discriminator of a domain: each is new, or with probability 1/2 one kept before."""
        images = images.detach()
        kept = self.slices.get(domain, images[:0]).to(images.device)
        given = []
        for image in images:
            if len(kept) < self.size:
                kept = torch.cat([kept, image[None]])
            elif self.size and torch.rand(()).item() < 0.5:
                place = int(torch.randint(self.size, ()))
                image, kept = kept[place], torch.cat([kept[:place], image[None], kept[place + 1 :]])
            given.append(image)
        self.slices[domain] = kept
        return torch.stack(given)

    def state_dict(self) -> dict[str, Any]:
        """The slices of each domain."""
        return {"size": self.size, "slices": {domain: kept.cpu() for domain, kept in self.slices.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is of a buffer of another size.
        """
        if state["size"] != self.size:
            raise ValueError(f"replay_size was {state['size']}, now {self.size}")
        self.slices = dict(state["slices"])


class TranslationTrainer(SupervisedTrainer):
    """One step of two generators, then one of two discriminators (COSMOS, crossMoDA 2021, stage 1).

    The generators minimize ``cycle_weight`` times the mean absolute error of a slice that was translated there and
    back, ``adversarial_weight`` times what the discriminators tell of translated slices, ``identity_weight`` times the
    mean absolute error of a slice translated to its own domain, each summed over both directions, and
    ``segmentation_weight`` times the Dice loss of source slices segmented as they are and, after
    ``translated_segmentation_after`` epochs, translated. Target slices are never segmented. With
    ``segmentation_weight`` 0 it is a CycleGAN (arXiv 1703.10593).

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: yields ``{"source": batch, "target": batch}``, e.g. ``SourceTargetLoader``: ``image``
            (B, C, X, Y) or (B, C, X, Y, 1) in [0, 1], and ``label`` of class indices in the source's.
        network: the generators.
        optimizer: over the network's parameters.
        discriminators: one for each domain.
        discriminator_optimizer: over the discriminators' parameters.
        replay: translated slices that the discriminators see again.
        cycle_weight: of the cycle loss (0.01 in the paper).
        adversarial_weight: of the adversarial loss (0.1 in the paper).
        identity_weight: of the identity loss (0.5 in the paper).
        segmentation_weight: of the segmentation loss (1 in the paper); 0 leaves the segmentation decoders out.
        translated_segmentation_after: epochs after which translated source slices are segmented too (5 in the paper).
        criterion: adversarial loss, ``"least_squares"`` or ``"bce"`` (of the paper's Eq. 3).
        epoch_length: iterations per epoch, by default the loader's length.
        amp: ``"auto"``, ``"bf16"``, ``"fp16"`` or ``None``.
        max_grad_norm: gradient clipping, of generators and of discriminators each, or ``None``.
        train_handlers: handlers with ``attach``.

    Output:
        ``engine.state.output[0]`` (a list, as MONAI's handlers expect it) holds ``loss``, the generators' weighted
        sum, its unweighted terms ``cycle``, ``adversarial``, ``identity``, ``segmentation``, and ``discriminator``.

    Raises:
        ConfigError: the criterion is unknown, or a weight negative; or, while running, slices do not fit the networks.
        NonFiniteError: while running, if a loss or a gradient is NaN or infinite; the message names the cases.

    Examples:
        >>> import torch
        >>> from mapseg_components.engines import ReplayBuffer, TranslationTrainer
        >>> from mapseg_components.networks import DomainDiscriminators, DomainTranslators
        >>> network, judges = DomainTranslators(num_classes=2, width=4), DomainDiscriminators(width=4, layers=1)
        >>> optimizers = [torch.optim.Adam(one.parameters(), lr=1e-4) for one in (network, judges)]
        >>> label = torch.ones(1, 1, 16, 20)
        >>> batch = {"source": {"image": torch.rand(1, 1, 16, 20), "label": label}}
        >>> batch["target"] = {"image": torch.rand(1, 1, 16, 20)}
        >>> parts = network, optimizers[0], judges, optimizers[1], ReplayBuffer()
        >>> trainer = TranslationTrainer("cpu", 1, [batch], *parts)
        >>> trainer.run()
        >>> sorted(trainer.state.output[0])
        ['adversarial', 'cycle', 'discriminator', 'identity', 'loss', 'segmentation']
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: DomainTranslators,
        optimizer: torch.optim.Optimizer,
        discriminators: DomainDiscriminators,
        discriminator_optimizer: torch.optim.Optimizer,
        replay: ReplayBuffer,
        cycle_weight: float = 0.01,
        adversarial_weight: float = 0.1,
        identity_weight: float = 0.5,
        segmentation_weight: float = 1.0,
        translated_segmentation_after: int = 5,
        criterion: str = "least_squares",
        epoch_length: int | None = None,
        amp: str | None = None,
        max_grad_norm: float | None = None,
        train_handlers: Sequence | None = None,
    ) -> None:
        self.weights = {
            "cycle": cycle_weight,
            "adversarial": adversarial_weight,
            "identity": identity_weight,
            "segmentation": segmentation_weight,
        }
        negative = [f"{name}_weight" for name, weight in self.weights.items() if not weight >= 0]
        if negative:
            raise ConfigError(f"{', '.join(negative)} must be 0 or more, found {self.weights}")
        if criterion not in CRITERIA:
            raise ConfigError(f"criterion is {criterion!r}, expected one of {list(CRITERIA)}")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=self._total,
            epoch_length=epoch_length,
            train_handlers=train_handlers,
            decollate=False,
        )
        self.discriminators = discriminators
        self.replay = replay
        self.translated_segmentation_after = translated_segmentation_after
        self.dice = LeavingOut(SliceDiceLoss())
        # without this argument MONAI's least squares are those of a LeakyReLU of the scores
        self.adversarial: Callable[..., Any] = PatchAdversarialLoss(criterion=criterion, no_activation_leastsq=True)
        device = self.state.device
        self.optimization = OptimizationStep(network, optimizer, device, amp, max_grad_norm, accumulate_steps=1)
        self.discrimination = OptimizationStep(
            discriminators, discriminator_optimizer, device, amp, max_grad_norm, accumulate_steps=1
        )
        self.discrimination.scaler = self.optimization.scaler  # the checkpoint's

    def _iteration(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:  # type: ignore[override]
        cases = {side: list(batch.get(CASE_ID, [])) for side, batch in batchdata.items()}
        sizes = batchdata[SOURCE][IMAGE].shape
        stride = self.network.to_target.translator.encoder.stride
        if any(side % stride for side in sizes[2:4]):
            raise ConfigError(
                f"slice_size is {list(sizes[2:4])}, expected multiples of {stride} for a U-Net of this many levels"
            )
        with self.optimization.naming_errors(engine.state.iteration, cases, sizes, REMEDY):
            return [self._step(engine, batchdata)]

    def _step(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        source, target = (on_plane(batchdata[side][IMAGE], engine.state.device) for side in (SOURCE, TARGET))
        label = on_plane(batchdata[SOURCE][LABEL], engine.state.device) if self.weights["segmentation"] else None
        self.network.train()
        self.discriminators.train()
        losses, translated = self._generators(source, target, label, engine.state.epoch)
        self.optimization.backward(self.loss_function(losses))
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        terms = {name: loss.detach() for name, loss in losses.items()}
        self.optimization.finish(terms, ends=True)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        discriminator = self._discriminators({SOURCE: source, TARGET: target}, translated)
        self.discrimination.backward(discriminator)
        terms["discriminator"] = discriminator.detach()
        self.discrimination.finish({"discriminator": terms["discriminator"]}, ends=True)
        return {TOTAL_LOSS: self.loss_function(terms), **terms}

    def _generators(
        self, source: torch.Tensor, target: torch.Tensor, label: torch.Tensor | None, epoch: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Unweighted terms of the generators, and the slices that they translated, by the domain that these show."""
        to_target, to_source = self.network.to_target, self.network.to_source
        self.discriminators.requires_grad_(False)
        with self.optimization.autocast():
            both = torch.cat([source, target])
            features = to_target.translator.encode(both)
            as_target, same_target = to_target.translator.decode(features, both).split([len(source), len(target)])
            as_source, same_source = to_source.translator(torch.cat([target, source])).split([len(target), len(source)])
            again = to_source.translator.encode(as_target)
            back_source = to_source.translator.decode(again, as_target)
            back_target = to_target.translator.decode(to_target.translator.encode(as_source), as_source)
            scores = [self.discriminators(as_target, TARGET), self.discriminators(as_source, SOURCE)]
            logits = []
            if label is not None:
                logits = [to_target.segmentation([level[: len(source)] for level in features])]
                if epoch > self.translated_segmentation_after:
                    logits.append(to_source.segmentation(again))
        self.discriminators.requires_grad_(True)
        losses = {
            "cycle": F.l1_loss(back_source, source) + F.l1_loss(back_target, target),
            "adversarial": sum(self.adversarial(one, target_is_real=True, for_discriminator=False) for one in scores),
            "identity": F.l1_loss(same_source, source) + F.l1_loss(same_target, target),
        }
        if label is not None:
            losses["segmentation"] = torch.stack([self.dice(one, label) for one in logits]).sum()
        return losses, {TARGET: as_target, SOURCE: as_source}

    def _discriminators(self, real: Mapping[str, torch.Tensor], translated: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of the discriminators, the mean over real and translated slices and the sum over the domains."""
        losses = []
        for domain in (TARGET, SOURCE):
            images = [real[domain], self.replay.exchange(domain, translated[domain])]
            with self.discrimination.autocast():
                scores = self.discriminators(torch.cat(images), domain).split([len(one) for one in images])
            losses += [
                self.adversarial(one, target_is_real=is_real, for_discriminator=True)
                for one, is_real in zip(scores, (True, False))
            ]
        return torch.stack(losses).sum() / 2

    def _total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of the generators' terms."""
        return torch.stack([weight * terms[name] for name, weight in self.weights.items() if name in terms]).sum()


def on_plane(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Slices (B, C, X, Y) of a batch, on a device; crops of a volume come as (B, C, X, Y, 1)."""
    plain = images.as_subclass(torch.Tensor).to(device, non_blocking=True)
    return plain.squeeze(-1) if plain.ndim == 5 else plain
