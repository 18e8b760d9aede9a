# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of an adaptation on unlabelled scans while it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import nn

from mapseg_components.data.volumes import voxel_ml
from mapseg_components.errors import ConfigError
from mapseg_components.handlers.scoring import Activity
from mapseg_components.handlers.share_limits import ShareLimits
from mapseg_components.keys import IMAGE
from mapseg_components.quality import label_agreement
from mapseg_components.transforms.inputs import outside_tissue

__all__ = ["TargetDiagnostics"]

logger = logging.getLogger(__name__)


class TargetDiagnostics:
    """Segment a few whole target scans with teacher and student, and log figures that need no label.

    Once the teacher exists, every ``interval`` epochs, these figures are put into the trainer's ``state.metrics``, from
    where ``EpochHistory`` and MONAI's loggers take them:

    - ``target_agreement_teacher_student``: Dice between their label maps, mean over structures and scans.
    - ``target_agreement_previous``: between the teacher's label maps and its previous ones: how much the pseudo labels
      still change. Absent the first time.
    - ``target_confident_share``: share of the voxels that the teacher labels as a structure with a probability
      above ``confidence``.
    - ``target_ml_<structure>``: mean volume per scan in the teacher's label maps, in ml. ``target_voxels_<structure>``,
      in voxels, if a scan has no affine.

    None of them is a Dice: a model can be stable, confident and wrong. With ``limits``, training ends when a structure
    vanishes or swallows others. Attach it before ``ScoreCheckpoint`` and ``EpochHistory``.

    Args:
        scans: whole preprocessed target scans, mappings with ``image`` (C, X, Y, Z) in [0, 1]; empty for none.
        names: structures in the order of their class index, background left out.
        inferer: segments a scan.
        teacher: an ``EMATeacher``, or any object with ``active``.
        teacher_network: the teacher's segmenter, called as the student is.
        student: the segmenter in training.
        interval: every so many epochs.
        device: where the networks are.
        confidence: probability above which a voxel counts as confident.
        limits: of the structures' shares, see `ShareLimits`; ``None`` for none.

    Raises:
        ConfigError: there are limits, and no scan to look at.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai.inferers import SimpleInferer
        >>> from mapseg_components.handlers import TargetDiagnostics
        >>> engine, network = Engine(lambda engine, batch: None), torch.nn.Identity()
        >>> scan = torch.tensor([0.0, 9.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 5)  # the logits of two classes
        >>> teacher = SimpleNamespace(active=True)
        >>> handler = TargetDiagnostics(
        ...     [{"image": scan}], ["liver"], SimpleInferer(), teacher, network, network, interval=1, device="cpu"
        ... )
        >>> handler.attach(engine)
        >>> engine.run([0]).metrics
        {'target_agreement_teacher_student': 1.0, 'target_confident_share': 1.0, 'target_voxels_liver': 60.0}
    """

    def __init__(
        self,
        scans: Sequence[Any],
        names: Sequence[str],
        inferer: Inferer,
        teacher: Activity,
        teacher_network: nn.Module,
        student: nn.Module,
        interval: int,
        device: torch.device | str,
        confidence: float = 0.95,
        limits: ShareLimits | None = None,
    ) -> None:
        if limits is not None and not len(scans):
            raise ConfigError(
                "there are limits of shares and no target scan to look at: set diagnostics_scans to 2 or "
                "more, or leave share_limits.yaml out"
            )
        self.scans = scans
        self.names = list(names)
        self.inferer = inferer
        self.teacher = teacher
        self.teacher_network = teacher_network
        self.student = student
        self.interval = interval
        self.device = torch.device(device)
        self.confidence = confidence
        self.limits = limits
        self._previous: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Measure at the end of every ``interval``-th epoch; a run that limits have ended does not go on."""
        engine.add_event_handler(Events.STARTED, self._end_if_collapsed)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._look)

    def state_dict(self) -> dict[str, Any]:
        """The last label maps, so that a resumed run goes on with the same figures."""
        limits = {} if self.limits is None else {"limits": self.limits.state_dict()}
        return {"previous": self._previous, **limits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._previous = [label_map.cpu() for label_map in state["previous"]]
        if self.limits is not None and "limits" in state:
            self.limits.load_state_dict(state["limits"])

    def _look(self, engine: Engine) -> None:
        if not len(self.scans) or not self.teacher.active:
            return
        shares = self._measure(engine) if idist.get_rank() == 0 else torch.zeros(2, len(self.names))
        if self.limits is not None:
            student, teacher = idist.broadcast(shares, src=0).tolist()
            found = {"student": dict(zip(self.names, student)), "teacher": dict(zip(self.names, teacher))}
            self.limits.look(engine.state.epoch, found)
            self._end_if_collapsed(engine)

    def _end_if_collapsed(self, engine: Engine) -> None:
        if self.limits is not None and self.limits.reason is not None:
            logger.error(self.limits.reason)
            engine.terminate()

    def _measure(self, engine: Engine) -> torch.Tensor:
        """Put the figures into the metrics; shares of the structures by student and teacher (2, structures)."""
        classes = len(self.names) + 1
        label_maps, both, moved = [], [], []
        confident = structure = 0
        counts, of_student, ml = [], [], []
        for number in range(len(self.scans)):
            scan = torch.as_tensor(self.scans[number][IMAGE])
            outside, image = outside_tissue(scan), scan.to(self.device)[None]
            probability, label_map = self._segment(image, self.teacher_network).softmax(dim=0).max(dim=0)
            other = self._segment(image, self.student).max(dim=0).indices
            if outside is not None:
                label_map, other = (one.masked_fill(outside.to(self.device), 0) for one in (label_map, other))
            both.append(label_agreement(label_map, other, classes))
            if number < len(self._previous):
                moved.append(label_agreement(label_map, self._previous[number].to(self.device), classes))
            confident += int((probability[label_map > 0] > self.confidence).sum())
            structure += int((label_map > 0).sum())
            counts.append(torch.bincount(label_map.flatten(), minlength=classes).cpu())
            of_student.append(torch.bincount(other.flatten(), minlength=classes).cpu())
            ml.append(voxel_ml(scan))
            label_maps.append(label_map.to(torch.uint8 if classes < 256 else torch.int16).cpu())
        self._previous = label_maps
        metrics = engine.state.metrics
        metrics["target_agreement_teacher_student"] = float(torch.stack(both).nanmean())
        if moved:
            metrics["target_agreement_previous"] = float(torch.stack(moved).nanmean())
        metrics["target_confident_share"] = confident / max(structure, 1)
        unit, factors = ("ml", torch.tensor(ml)) if all(ml) else ("voxels", torch.ones(len(ml)))
        sizes = (torch.stack(counts) * factors[:, None]).mean(dim=0)
        for name, size in zip(self.names, sizes[1:].tolist()):
            metrics[f"target_{unit}_{name}"] = size
        return torch.stack([mean_shares(of_student), mean_shares(counts)])

    @torch.no_grad()
    def _segment(self, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Logits (classes, X, Y, Z) of a scan (1, C, X, Y, Z)."""
        training = network.training
        network.eval()
        try:
            return self.inferer(image, network)[0].as_subclass(torch.Tensor).float()
        finally:
            network.train(training)


def mean_shares(counts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over scans of each structure's share of the voxels of all structures; counts (classes,) have background."""
    found = torch.stack(list(counts))[:, 1:].float()
    return (found / found.sum(dim=1, keepdim=True).clamp(min=1)).mean(dim=0)
