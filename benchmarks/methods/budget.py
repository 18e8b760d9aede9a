# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The length of a method that a budget of processor time allows, from a short run of the same method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mapseg_components.commands.stages import read_history
from mapseg_components.plans.length import epochs_of_length

__all__ = ["Costs", "StageCosts", "costs_of"]

COMPARISON_SHARE = 0.1  # of the adaptation: what `mapseg adapt` allows the comparison of both models to cost
LONGEST = 1e4


@dataclass(frozen=True)
class StageCosts:
    """Processor seconds of one stage.

    Args:
        epochs: as planned.
        interval: epochs from one validation to the next, or ``None`` where there is none.
        start: what does not depend on the number of epochs.
        epoch: each.
        validation: each.
        adapts: whether it comes after the source-only model.
    """

    epochs: int
    interval: int | None
    start: float
    epoch: float
    validation: float
    adapts: bool = True

    def predicted(self, length: float) -> float:
        """Processor seconds of the stage by a factor of its epochs."""
        epochs = epochs_of_length(self.epochs, length)
        validations = epochs // min(self.interval, epochs) if self.interval else 0
        return self.start + epochs * self.epoch + validations * self.validation


@dataclass(frozen=True)
class Costs:
    """Processor seconds of a run of ``mapseg adapt``.

    Args:
        fixed: of what is no training: plan, check, label maps, report and the shortest comparison.
        stages: in their order.
        source_length: factor of the epochs of the stages up to the source-only model; ``None`` for the same as of the
            others.
    """

    fixed: float
    stages: tuple[StageCosts, ...]
    source_length: float | None = None

    def predicted(self, length: float) -> float:
        """Processor seconds of the run by a factor of the epochs."""
        given = self.source_length
        each = [stage.predicted(length if stage.adapts or given is None else given) for stage in self.stages]
        return self.fixed + sum(each) + (COMPARISON_SHARE * each[-1] if each else 0.0)

    def length_for(self, seconds: float) -> float | None:
        """The largest factor that keeps within so many processor seconds; ``None`` if even the smallest does not, or if
        no stage has epochs."""
        low, high = 0.0, LONGEST
        if not self.stages or self.predicted(low) > seconds:
            return None
        if self.predicted(high) <= seconds:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predicted(middle) <= seconds else (low, middle)
        return low or None


def costs_of(run: Path, processor_seconds: float, source_length: float | None = None) -> Costs:
    """What a finished run teaches about longer ones.

    A stage's history has the seconds of each epoch, with the validation that belongs to it; its processor seconds are
    spread over them in proportion, and the rest is its start. Epochs that were not validated tell what a validation
    costs; where all were, it counts as part of the epoch.

    Args:
        run: folder of ``mapseg adapt``.
        processor_seconds: of the whole command.
        source_length: see `Costs`.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    stages, trained, adapts = [], 0.0, False
    source_only = record["models"]["source_only"].partition("/")[0]
    for name, planned in record.get("epochs", {}).items():
        after, adapts = adapts, adapts or name == source_only
        used, passed = (record.get(kind, {}).get(name) for kind in ("processor_seconds", "seconds"))
        history = read_history(run / "stages" / name)
        if not used or not passed or not history or not isinstance(planned["max_epochs"], int):
            continue  # part of what is fixed
        trained += used
        rate = used / passed
        interval = planned["val_interval"] if isinstance(planned["val_interval"], int) else None
        every = min(interval, len(history)) if interval else 0
        validated = [rate * line["seconds"] for line in history if every and line["epoch"] % every == 0]
        plain = [rate * line["seconds"] for line in history if not every or line["epoch"] % every]
        epoch = mean(plain or validated)
        extra = max(mean(validated) - epoch, 0.0) if plain and validated else 0.0
        start = max(used - sum(validated) - sum(plain), 0.0)
        stages.append(StageCosts(planned["max_epochs"], interval, start, epoch, extra, after))
    return Costs(max(processor_seconds - trained, 0.0), tuple(stages), source_length)


def mean(values: list[float]) -> float:
    """Arithmetic mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
