# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a translation looks like while it is learnt: pictures, and figures that need no label of the target."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from monai.metrics import compute_dice
from monai.networks.utils import one_hot

from mapseg_components.keys import CASE_ID, IMAGE, LABEL
from mapseg_components.networks import DomainTranslators, TargetAwareTranslator
from mapseg_components.reports.preview import can_draw
from mapseg_components.reports.translation import draw_translation
from mapseg_components.structures import IGNORED
from mapseg_components.transforms.background import background_of

__all__ = ["TranslationPictures"]

logger = logging.getLogger(__name__)

QUANTILES = np.linspace(0, 1, 101)
LOOKED_AT = 9  # slices of a scan


class TranslationPictures:
    """Translate slices of a few whole scans, and write ``translation_0010.png`` for epoch 10.

    Each row shows a slice of a source scan, as the target would show it, translated back, and a slice of a target
    scan at the same height. The same slices give figures in the trainer's ``state.metrics``, for ``EpochHistory``:

    - ``intensity_distance``: mean difference between the quantiles of translated and target foreground, 0 to 1
      (1-Wasserstein distance). Small says that grey values are distributed alike, not that they are in the right place.
    - ``translated_dice``: mean Dice of the structures where the translated slices are segmented by ``to_source``'s
      decoder: whether the structures are still there. Absent without segmentation.

    No label of the target is read; neither figure chooses weights. Nothing is drawn at random.

    Args:
        source: preprocessed source scans, mappings with ``image`` (C, X, Y, Z) in [0, 1], ``label`` and ``case_id``.
        target: preprocessed target scans, with ``image``.
        network: the translators that are looked at, such as the average of those in training.
        inferer: runs a network of slices on a volume, e.g. MONAI's ``SliceInferer`` along the last axis.
        output_dir: folder of the pictures.
        interval: every so many epochs.
        device: where the networks are.
        segmented: whether the segmentation decoders are trained.
        target_inverted: whether the target is trained on bright for dark; pictures show it as it is.

    Examples:
        >>> import os, tempfile
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai.inferers import SliceInferer
        >>> from mapseg_components.handlers import TranslationPictures
        >>> from mapseg_components.networks import DomainTranslators, TargetAwareTranslator
        >>> scans = [{"image": torch.rand(1, 12, 8, 5), "label": torch.ones(1, 12, 8, 5), "case_id": "a"}]
        >>> network, inferer = DomainTranslators(num_classes=2, width=4), SliceInferer(2, roi_size=(12, 8))
        >>> engine = Engine(lambda engine, batch: None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TranslationPictures(scans, scans, network, inferer, folder, interval=1, device="cpu").attach(engine)
        ...     state = engine.run([0])
        ...     os.listdir(folder), sorted(state.metrics)
        (['translation_0001.png'], ['intensity_distance', 'translated_dice'])
    """

    def __init__(
        self,
        source: Sequence[Mapping[str, Any]],
        target: Sequence[Mapping[str, Any]],
        network: DomainTranslators,
        inferer: Inferer,
        output_dir: str,
        interval: int,
        device: torch.device | str,
        segmented: bool = True,
        target_inverted: bool = False,
    ) -> None:
        self.source, self.target = source, target
        self.network = network
        self.inferer = inferer
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.device = torch.device(device)
        self.segmented = segmented
        self.target_inverted = target_inverted

    def attach(self, engine: Engine) -> None:
        """Look at the end of every ``interval``-th epoch."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._look)

    @torch.no_grad()
    def _look(self, engine: Engine) -> None:
        if idist.get_rank() != 0 or not len(self.source) or not len(self.target):
            return
        training = self.network.training
        self.network.eval()
        rows, names, translated, dice = [], [], [], []
        of_target = [np.asarray(torch.as_tensor(case[IMAGE])) for case in self.target]
        for number in range(len(self.source)):
            case = self.source[number]
            image = torch.as_tensor(case[IMAGE]).as_subclass(torch.Tensor).float()
            label = torch.as_tensor(case[LABEL]).as_subclass(torch.Tensor)
            ignored = label == IGNORED
            label = label.masked_fill(ignored, 0)
            chosen, shown, height = slices_of(image, label)
            volume = image[None, ..., chosen].to(self.device)
            there = self._run(volume, Part(self.network.to_target, 0))
            back = self._run(there, Part(self.network.to_source, 0))
            translated.append(there[there > 0.02].cpu().numpy())
            if self.segmented:
                dice += self._dice(there, label[None, ..., chosen], ignored[None, ..., chosen])
            beside = of_target[number % len(of_target)]
            place = slice_at(beside[0], height)
            columns = [volume[0, 0, ..., shown], there[0, 0, ..., shown], back[0, 0, ..., shown]]
            slices = [column.float().cpu() for column in (*columns, torch.as_tensor(beside[0, ..., place]))]
            if self.target_inverted:  # as the scans are
                slices[1] = (1 - slices[1]).masked_fill(background_of(image)[..., chosen[shown]], 0.0)
                slices[3] = (1 - slices[3]).masked_fill(background_of(torch.as_tensor(beside))[..., place], 0.0)
            rows.append([one.numpy() for one in slices])
            names.append(str(case.get(CASE_ID, number + 1)))
        self.network.train(training)
        metrics = engine.state.metrics
        metrics["intensity_distance"] = distance(translated, [volume[volume > 0.02] for volume in of_target])
        if dice:
            metrics["translated_dice"] = float(np.mean(dice))
        if can_draw():
            epoch = engine.state.epoch
            draw_translation(rows, names, f"epoch {epoch}", self.output_dir / f"translation_{epoch:04d}.png")
        elif engine.state.epoch == self.interval:
            logger.warning("No picture of the translation is drawn: pip install matplotlib.")

    def _run(self, volume: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
        output = self.inferer(volume, network)
        assert isinstance(output, torch.Tensor)
        return output

    def _dice(self, there: torch.Tensor, label: torch.Tensor, ignored: torch.Tensor) -> list[float]:
        """Dice of the structures that the slices have, but for ignored voxels."""
        logits = self._run(there, Part(self.network.to_source, 1))
        classes, found = logits.shape[1], logits.argmax(dim=1, keepdim=True).cpu().masked_fill(ignored, 0)
        maps = [one_hot(one, classes) for one in (found, label.long())]
        found = compute_dice(*maps, include_background=False)[0]
        return found[torch.isfinite(found)].tolist()


class Part(torch.nn.Module):
    """One output of a direction as it is learnt: 0 for translated slices, 1 for logits."""

    def __init__(self, direction: TargetAwareTranslator, number: int) -> None:
        super().__init__()
        self.direction = direction
        self.number = number

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = self.direction(image)[self.number]
        return part.float()


def slices_of(image: torch.Tensor, label: torch.Tensor) -> tuple[list[int], int, float]:
    """Slices of a volume (C, X, Y, Z) along its last axis to look at.

    Returns:
        their indices, evenly spaced over the foreground, the one with the most labelled voxels among them; which of
        them that is; and its height in the foreground, 0 to 1.
    """
    filled = filled_slices(image[0].numpy())
    chosen = {int(place) for place in np.linspace(filled[0], filled[-1], LOOKED_AT).round()}
    shown = (
        int((label > 0).sum(dim=(0, 1, 2)).argmax()) if bool((label > 0).any()) else sorted(chosen)[len(chosen) // 2]
    )
    indices = sorted({*chosen, shown})
    return indices, indices.index(shown), (shown - filled[0]) / max(filled[-1] - filled[0], 1)


def slice_at(volume: np.ndarray, height: float) -> int:
    """Slice of a volume (X, Y, Z) at a height in its foreground."""
    filled = filled_slices(volume)
    return round(filled[0] + height * (filled[-1] - filled[0]))


def filled_slices(volume: np.ndarray) -> list[int]:
    """Slices of a volume (X, Y, Z) with foreground; all if none has any."""
    found = np.flatnonzero((volume > 0).any(axis=(0, 1)))
    return [int(place) for place in found] or list(range(volume.shape[2]))


def distance(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean difference between the quantiles of two samples, each in several arrays; NaN-free: 1 where one is empty."""
    both = [np.concatenate([one.ravel() for one in arrays]) for arrays in (first, second)]
    if not all(len(one) for one in both):
        return 1.0
    return float(np.abs(np.quantile(both[0], QUANTILES) - np.quantile(both[1], QUANTILES)).mean())
