# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of an adaptation on unlabelled scans while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import nn

from mapseg_components.data.volumes import voxel_ml
from mapseg_components.handlers.scoring import Activity
from mapseg_components.keys import IMAGE
from mapseg_components.quality import label_agreement

__all__ = ["TargetDiagnostics"]


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

    None of them is a Dice: a model can be stable, confident and wrong. Attach it before ``EpochHistory``.

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
    ) -> None:
        self.scans = scans
        self.names = list(names)
        self.inferer = inferer
        self.teacher = teacher
        self.teacher_network = teacher_network
        self.student = student
        self.interval = interval
        self.device = torch.device(device)
        self.confidence = confidence
        self._previous: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Measure at the end of every ``interval``-th epoch."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._look)

    def state_dict(self) -> dict[str, Any]:
        """The last label maps, so that a resumed run goes on with the same figures."""
        return {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._previous = [label_map.cpu() for label_map in state["previous"]]

    def _look(self, engine: Engine) -> None:
        if not len(self.scans) or not self.teacher.active or idist.get_rank() != 0:
            return
        classes = len(self.names) + 1
        label_maps, both, moved = [], [], []
        confident = structure = 0
        counts, ml = [], []
        for number in range(len(self.scans)):
            scan = torch.as_tensor(self.scans[number][IMAGE])
            image = scan.to(self.device)[None]
            probability, label_map = self._segment(image, self.teacher_network).softmax(dim=0).max(dim=0)
            other = self._segment(image, self.student).argmax(dim=0)
            both.append(label_agreement(label_map, other, classes))
            if number < len(self._previous):
                moved.append(label_agreement(label_map, self._previous[number].to(self.device), classes))
            confident += int((probability[label_map > 0] > self.confidence).sum())
            structure += int((label_map > 0).sum())
            counts.append(torch.bincount(label_map.flatten(), minlength=classes).cpu())
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

    @torch.no_grad()
    def _segment(self, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Logits (classes, X, Y, Z) of a scan (1, C, X, Y, Z)."""
        training = network.training
        network.eval()
        try:
            return self.inferer(image, network)[0].as_subclass(torch.Tensor).float()
        finally:
            network.train(training)
