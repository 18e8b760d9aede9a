# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's model on single scans in memory, with the preprocessing and the sliding window of its inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, Orientationd, Spacingd

from mapseg_components.checkpoints import load_weights
from mapseg_components.data.volumes import voxel_ml
from mapseg_components.keys import IMAGE, LABEL, MASK, SOURCE, TARGET
from mapseg_components.scans.nifti import affine_beside
from mapseg_components.structures import structures_of
from mapseg_components.transforms.inputs import outside_tissue

__all__ = ["TARGET_INVERTED", "TRANSLATED", "LabelLoader", "Trial"]

TARGET_INVERTED = "target_inverted"  # setting of the bundles
SCAN = "scan"  # the file beside which a label map lies
TRANSLATED = "translated"  # scans of the source in the target's contrast


class Trial:
    """Preprocessing, network and sliding window of a bundle's ``configs/inference.json``.

    Args:
        bundle: folder that ``mapseg adapt`` makes.
        settings: on top of the config's own.
    """

    def __init__(self, bundle: str | Path, **settings: Any) -> None:
        self.parser = ConfigParser()
        self.parser.read_config(str(Path(bundle) / "configs" / "inference.json"))
        for name, value in {"bundle_root": str(bundle), **settings}.items():
            self.parser[name] = value
        parts = (self.parser.get_parsed_content(name) for name in ("network", "device", "preprocessing", "inferer"))
        self.network, self.device, self.preprocessing, self.inferer = parts
        config, training = self.parser.get(), Path(bundle) / "configs" / "train.json"
        own = ConfigParser.load_config_file(training) if training.is_file() else {}
        # scans of the source are never shown bright for dark, and may have other negative values than the target's
        changes = {
            SOURCE: {
                TARGET_INVERTED: False,
                "negative_values": own.get("source_negative_values", config.get("negative_values")),
            },
            TRANSLATED: {"negative_values": "clip"},
        }
        self._shown = {TARGET: self.preprocessing} | {
            name: ConfigParser(config | change).get_parsed_content("preprocessing") for name, change in changes.items()
        }

    def load(self, weights: str | Path) -> None:
        """Take the weights of a file. Raises `CheckpointError` where they cannot be loaded."""
        load_weights(self.network, weights)
        self.network.eval()

    def scan(self, case: Mapping[str, Any], shown: str = TARGET) -> torch.Tensor:
        """A preprocessed scan (C, X, Y, Z), with its metadata.

        Args:
            case: ``image``, and ``mask`` if it has one.
            shown: as scans of the ``target`` are, those of the ``source``, or ``translated`` ones.
        """
        return self._shown[shown]({key: case[key] for key in (IMAGE, MASK) if case.get(key)})[IMAGE]

    def probabilities(self, image: torch.Tensor, outside: torch.Tensor | None = None) -> torch.Tensor:
        """Probabilities (classes, X, Y, Z), float32 in main memory, of a scan (C, X, Y, Z).

        Args:
            image: the scan.
            outside: (X, Y, Z), what is background whatever the network says.
        """
        with torch.no_grad():
            logits = self.inferer(image[None].to(self.device), self.network)[0].as_subclass(torch.Tensor)
        found = logits.float().softmax(dim=0).cpu()
        if outside is not None:
            found.masked_fill_(outside, 0)
            found[0].masked_fill_(outside, 1)
        return found


class LabelLoader:
    """From a case to its label map (X, Y, Z) of class indices on the axes of the preprocessed scan, and ml per voxel.

    Outside of the mask of a preprocessed scan that has one is background. Images have the scan's pixel size.

    Args:
        labels: structures and values.
        preprocessing: of the bundle; its reader, its orientation and its spacing are used.
    """

    def __init__(self, labels: Mapping[str, int], preprocessing: Compose) -> None:
        self.values = list(structures_of(labels).values())
        steps = [*preprocessing.transforms[:2], self._beside]  # LoadImaged, AssumeOrientationd
        steps += [step for step in preprocessing.transforms if isinstance(step, Orientationd)]
        for step in preprocessing.transforms:
            if isinstance(step, Spacingd):
                nearest = copy.copy(step)
                nearest.mode = ("nearest",)
                steps.append(nearest)
        self.loading = Compose(steps)

    @staticmethod
    def _beside(case: dict[str, Any]) -> dict[str, Any]:
        """With the affine that a label map has beside its scan."""
        own = case[IMAGE]
        own.affine = torch.as_tensor(affine_beside(own.meta["filename_or_obj"], own.affine.numpy(), case[SCAN]))
        return case

    def __call__(self, case: Mapping[str, Any], scan: torch.Tensor) -> tuple[torch.Tensor, float]:
        loaded = self.loading({IMAGE: case[LABEL], SCAN: case[IMAGE]})[IMAGE]
        values = loaded.as_subclass(torch.Tensor)[0].round().long()
        result = torch.zeros_like(values)
        for index, value in enumerate(self.values, start=1):
            result[values == value] = index
        outside = outside_tissue(scan)
        if outside is not None:
            result[outside] = 0
        return result, voxel_ml(loaded)
