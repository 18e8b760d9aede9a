# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Mean probabilities of a bundle's own network and of the model of another bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from monai.transforms import SpatialResample

from mapseg_components.errors import ConfigError
from mapseg_components.inferers.averaging import require_classes
from mapseg_components.inferers.trial import Trial
from mapseg_components.keys import IMAGE, MASK
from mapseg_components.networks.heads import shows_both
from mapseg_components.structures import structures_of
from mapseg_components.transforms.inputs import MASK_FILE, outside_tissue

__all__ = ["SecondModelInferer"]

INFERENCE = "configs/inference.json"


class SecondModelInferer(Inferer):
    """Average the probabilities of an inferer with those of a model that reads the scans by itself.

    The other model is that of a bundle: its preprocessing reads the scan's file anew, its inferer segments it on its
    own grid, and its probabilities are brought to the grid of the input. Structures are matched by name; what the other
    bundle has beyond them is background. Two models that learnt from different images are wrong in different places,
    so that their mean is a better teacher than either.

    Args:
        inferer: runs the evaluator's own network.
        bundle: folder of the other one, with ``configs/inference.json`` and weights.
        labels: structures of the own network, and their values.
        settings: of the other bundle's config to replace, such as ``working_spacing``.

    Raises:
        ConfigError: the folder holds no bundle, or its model lacks a structure.

    Examples:
        >>> from monai.inferers import SimpleInferer
        >>> from mapseg_components.inferers import SecondModelInferer
        >>> from mapseg_components.shipped_files import bundle_of
        >>> labels = {"caudate": 11, "putamen": 12}
        >>> inferer = SecondModelInferer(SimpleInferer(), bundle_of("brain_any_contrast"), labels)
        >>> inferer.classes  # of the other model: background, caudate, putamen
        [0, 3, 4]
    """

    def __init__(
        self,
        inferer: Inferer,
        bundle: str | os.PathLike[str],
        labels: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.inferer = inferer
        self.bundle = Path(bundle)
        if not (self.bundle / INFERENCE).is_file():
            raise ConfigError(f"{self.bundle} has no {INFERENCE}: name the folder of a bundle")
        self.settings = dict(settings or {})
        known = [*structures_of(ConfigParser.load_config_file(self.bundle / INFERENCE)["labels"])]
        names = [*structures_of(labels)]
        missing = [name for name in names if name not in known]
        if missing:
            raise ConfigError(f"{self.bundle} does not segment {missing}, its structures are {known}")
        self.classes = [0, *(known.index(name) + 1 for name in names)]
        self._model: Trial | None = None

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Logarithm of the mean probabilities: its softmax gives them, its argmax the label.

        Args:
            inputs: (B, C, X, Y, Z), scans with their affines and the names of their files.
            network: the own one.
            args: passed on to the own inferer.
            kwargs: passed on to it.

        Returns:
            (B, classes, X, Y, Z), float32; of a network that shows both heads the own uncertainty after them.

        Raises:
            CheckpointError: the other bundle's weights cannot be loaded.
            ConfigError: the input has no affine or file. Else as the inferer.
        """
        logits = self.inferer(inputs, network, *args, **kwargs)
        require_classes(logits)
        logits, *uncertainty = logits.chunk(2, dim=1) if shows_both(network) else [logits]
        mean = torch.softmax(logits.float(), dim=1)
        for own, scan in zip(mean, scans_of(inputs)):
            own.add_(self._probabilities(scan, inputs.device).to(own.device))
        return torch.cat([mean.div_(2).clamp_(min=torch.finfo(mean.dtype).tiny).log_(), *uncertainty], dim=1)

    def _probabilities(self, scan: MetaTensor, device: torch.device) -> torch.Tensor:
        """Of the other model, (classes, X, Y, Z) on the grid of a scan; outside of its own grid all is background."""
        if self._model is None:
            self._model = Trial(self.bundle, **self.settings, device=f"$torch.device('{device}')")  # the own network's
            self._model.load(self._model.parser.get_parsed_content("weights"))
        image = self._model.scan({IMAGE: scan.meta["filename_or_obj"], MASK: scan.meta.get(MASK_FILE)})
        found = self._model.probabilities(image, outside_tissue(image))[self.classes[1:]]
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=True, dtype=torch.float32)
        moved = resample(
            MetaTensor(found, affine=image.affine), dst_affine=scan.affine, spatial_size=scan.shape[1:]
        ).as_subclass(torch.Tensor)
        return torch.cat([1 - moved.sum(dim=0, keepdim=True), moved]).clamp_(0, 1)


def scans_of(inputs: torch.Tensor) -> list[MetaTensor]:
    """The scans (C, X, Y, Z) of a batch. Raises `ConfigError` if their affine or their file is not known."""
    scans = decollate_batch(inputs) if isinstance(inputs, MetaTensor) else []
    if not scans or any("filename_or_obj" not in scan.meta for scan in scans):
        raise ConfigError(
            "a second model reads a scan by itself, and the input does not name its file: give MetaTensors as MONAI's "
            "LoadImage makes them"
        )
    return scans
