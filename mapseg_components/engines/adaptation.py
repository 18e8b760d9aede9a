# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation by any `mapseg_components.methods.Method` as a MONAI trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.errors import ConfigError
from mapseg_components.keys import CASE_ID, IMAGE, TARGET_LOSS, TOTAL_LOSS
from mapseg_components.methods import Method, Pass
from mapseg_components.networks.passes import named_outputs

__all__ = ["AdaptationTrainer", "UDATrainer"]


class AdaptationTrainer(SupervisedTrainer):
    """One optimizer step along the weighted sum of the losses of a method's passes.

    A batch has the entries ``source`` and ``target``, or only one of them. What is done with them, and what they need
    to hold beside ``image``, is the method's knowledge.

    Args:
        device: where to train.
        max_epochs: epochs to run, warm-up included.
        train_data_loader: yields ``{"source": batch, "target": batch}``, e.g. ``SourceTargetLoader``, each with
            ``image`` (B, C, X, Y, Z) in [0, 1].
        network: returns named outputs (B, ...), e.g. ``PlainPass`` or ``GlobalLocalPass``.
        optimizer: over the network's parameters.
        method: see `mapseg_components.methods.Method`.
        epoch_length: iterations per epoch, by default the loader's length.
        batched_passes: run passes of equal shapes as one batch; otherwise one after the other, each with its own
            backward pass: the same gradients in a fraction of the memory. Layers with batch statistics see source and
            target together in the first case and apart in the second.
        amp: ``"auto"``, ``"bf16"``, ``"fp16"`` or ``None``.
        max_grad_norm: gradient clipping or ``None``.
        accumulate_steps: iterations per optimizer step.
        compile: run the network through ``torch.compile``: a slow first iteration; on a CPU no gain
            (docs/reference/performance.md).
        train_handlers: handlers with ``attach``, the method's teacher among them.

    Output:
        ``engine.state.output[0]`` (a list, as MONAI's handlers expect it) holds ``loss``, every unweighted term by
        name and, when there is a target, ``target_loss``: the mean of the terms in ``method.selection``, which the
        Score reads (section 3.7 of MAPSeg, arXiv 2303.09373).

    Raises:
        ConfigError: while running, the method makes no pass of a batch, or the network returns no named outputs.
        NonFiniteError: while running, if a loss is NaN or infinite; the message names the term and the cases.

    Examples:
        >>> import torch
        >>> from monai.losses import DiceCELoss
        >>> from mapseg_components.engines import AdaptationTrainer
        >>> from mapseg_components.methods import Supervised
        >>> from mapseg_components.networks import PlainPass
        >>> network = PlainPass(torch.nn.Conv3d(1, 2, kernel_size=1))
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> method = Supervised(DiceCELoss(to_onehot_y=True, softmax=True))
        >>> batch = {"source": {"image": torch.rand(1, 1, 4, 5, 6), "label": torch.ones(1, 1, 4, 5, 6)}}
        >>> trainer = AdaptationTrainer("cpu", 2, [batch], network, optimizer, method)
        >>> trainer.run()
        >>> trainer.state.iteration, sorted(trainer.state.output[0])
        (2, ['loss', 'source'])
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        epoch_length: int | None = None,
        batched_passes: bool = True,
        amp: str | None = None,
        max_grad_norm: float | None = None,
        accumulate_steps: int = 1,
        compile: bool = False,
        train_handlers: Sequence | None = None,
    ) -> None:
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
        if compile:
            network.compile()
        self.method = method
        self.batched_passes = batched_passes
        self.optimization = OptimizationStep(
            network, optimizer, self.state.device, amp, max_grad_norm, accumulate_steps
        )

    def _iteration(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        cases = {side: list(batch.get(CASE_ID, [])) for side, batch in batchdata.items()}
        sizes = next(iter(batchdata.values()))[IMAGE].shape
        with self.optimization.naming_errors(engine.state.iteration, cases, sizes):
            return [self._step(engine, batchdata)]

    def _step(self, engine: Any, batchdata: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        optimization, iteration = self.optimization, engine.state.iteration
        self.network.train()
        with optimization.autocast():  # a teacher may label
            passes = self.method.passes(
                {side: OnDevice(batch, engine.state.device) for side, batch in batchdata.items()}
            )
        if not passes:
            raise ConfigError(
                f"nothing to train on: {type(self.method).__name__} makes no pass of a batch of {sorted(batchdata)}; "
                "without source data set warmup_epochs to 0"
            )
        groups = list(grouped(passes).values()) if self.batched_passes else [[one] for one in passes]
        ends = optimization.ends(iteration, iteration % engine.state.epoch_length == 0)
        terms: dict[str, torch.Tensor] = {}
        for number, group in enumerate(groups):
            with optimization.synchronisation(ends and number == len(groups) - 1):
                losses = self._losses(group, terms.keys())
                optimization.backward(self.loss_function(losses))
            terms.update({name: loss.detach() for name, loss in losses.items()})
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        others = self._finish(terms, ends)
        if ends:
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
        output = {TOTAL_LOSS: self.loss_function(terms), **terms, **others}
        selected = [terms[name] for name in self.method.selection if name in terms]
        if selected:
            output[TARGET_LOSS] = torch.stack(selected).mean()
        return output

    def _finish(self, terms: Mapping[str, torch.Tensor], ends: bool) -> dict[str, torch.Tensor]:
        """Check and step after all backward passes; losses of other networks that learnt as well, for the output."""
        self.optimization.finish(terms, ends)
        return {}

    def _losses(self, group: list[Pass], taken: Set[str]) -> dict[str, torch.Tensor]:
        """Named, unweighted terms of several passes that run as one batch; ``taken`` are names of earlier passes."""
        inputs = {name: torch.cat([one.inputs[name] for one in group]) for name in group[0].inputs}
        with self.optimization.autocast():
            outputs = named_outputs(self.network, inputs)
        sizes = [len(next(iter(one.inputs.values()))) for one in group]
        parts = {name: output.split(sizes) for name, output in outputs.items()}
        losses: dict[str, torch.Tensor] = {}
        for number, one in enumerate(group):
            terms = one.terms({name: part[number] for name, part in parts.items()})
            unknown, twice = terms.keys() - self.method.weights.keys(), terms.keys() & (losses.keys() | taken)
            if unknown or twice:
                what = f"no weight for {sorted(unknown)}" if unknown else f"the term {sorted(twice)} in two passes"
                raise ConfigError(
                    f"{type(self.method).__name__} has {what}: give each term of a pass a name of its own, and a weight"
                )
            losses.update(terms)
        return losses

    def _total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum."""
        return torch.stack([self.method.weights[name] * term for name, term in terms.items()]).sum()


UDATrainer = AdaptationTrainer


class OnDevice(Mapping[str, torch.Tensor]):
    """The tensors of a batch, without metadata and on a device; each is moved when it is first asked for.

    Args:
        batch: entries that are no tensors are left out.
        device: where to.
    """

    def __init__(self, batch: Mapping[str, Any], device: torch.device) -> None:
        self._batch = batch
        self._device = device
        self._moved: dict[str, torch.Tensor] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._moved:
            value = self._batch[key]
            if not isinstance(value, torch.Tensor):
                raise KeyError(key)
            self._moved[key] = value.as_subclass(torch.Tensor).to(self._device, non_blocking=True)
        return self._moved[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(self._batch.get(key), torch.Tensor)  # type: ignore[call-overload]

    def __iter__(self) -> Any:
        return (key for key, value in self._batch.items() if isinstance(value, torch.Tensor))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def grouped(passes: Sequence[Pass]) -> dict[Any, list[Pass]]:
    """Passes by the names and shapes of their inputs: those of a group run as one batch."""
    groups: dict[Any, list[Pass]] = {}
    for one in passes:
        groups.setdefault(tuple((name, value.shape[1:]) for name, value in one.inputs.items()), []).append(one)
    return groups
