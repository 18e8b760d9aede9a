# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation by networks that nnU-Net has planned and trained, in the place of a bundle's own network."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils.module import optional_import, version_geq

from mapseg_components.checkpoints import load_weights, read_checked
from mapseg_components.errors import CheckpointError, ConfigError

__all__ = ["NNUNetInferer", "mirrored_axes", "require_nnunet"]

PACKAGE, LEAST = "nnunetv2", "2.8.0"
PLANS = ".json"  # beside the weights: plans, dataset and configuration


def require_nnunet() -> None:
    """Refuse to go on without nnU-Net, before hours of training. Raises `ConfigError`."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or not version_geq(found, LEAST):
        what = f"{PACKAGE} is {found}" if found else f"{PACKAGE} is not installed"
        raise ConfigError(
            f"the setting engine is 'nnunet', which needs {PACKAGE} {LEAST} or newer, and {what}: "
            "pip install 'mapseg-monai[nnunet]', or leave the setting out"
        )


def mirrored_axes(flip_axes: Sequence[int], transposed: Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Axes of a network of nnU-Net along which scans may be mirrored.

    nnU-Net's arrays are (Z, Y, X), which a plan may lay in another order, so that the axis of thick slices comes first;
    a network of two dimensions sees the last two of these axes.

    Args:
        flip_axes: axes of a scan (X, Y, Z).
        transposed: ``transpose_forward`` of the plan: the axis of (Z, Y, X) that each axis of a laid array is.
        dimensions: of the network, 2 or 3.

    Examples:
        >>> from mapseg_components.inferers.nnunet import mirrored_axes
        >>> mirrored_axes([0], [0, 1, 2], 3), mirrored_axes([0], [2, 0, 1], 3), mirrored_axes([0, 2], [0, 1, 2], 2)
        ((2,), (0,), (1,))
    """
    laid = [2 - axis for axis in transposed][3 - dimensions :]
    return tuple(number for number, axis in enumerate(laid) if axis in flip_axes)


class NNUNetInferer(Inferer):
    """Run networks of nnU-Net on a scan with its preprocessing, its sliding window and its resampling.

    It takes the place of a bundle's inferer, so that the evaluator and what follows it stay as they are; the
    evaluator's own network is not asked. nnU-Net crops, normalizes and resamples by its plan: the scan comes with its
    own intensities, on its own grid.

    Args:
        first: weights that `mapseg_components.engines.NNUNetTraining` has written, its plan beside them.
        weights: further ones, of the same plan; their logits are averaged.
        flip_axes: spatial axes of a scan (0 to 2); all combinations of flips along them are averaged.
        device: where the networks run.

    Raises:
        ConfigError: nnU-Net is missing.

    Examples:
        >>> from mapseg_components.inferers import NNUNetInferer
        >>> inferer = NNUNetInferer("runs/cosmos/stages/teacher/nnunet.pt", flip_axes=[0])  # doctest: +SKIP
        >>> inferer(scan, network=None).shape  # scan: MetaTensor (1, 1, 40, 48, 36)  # doctest: +SKIP
        torch.Size([1, 3, 40, 48, 36])
    """

    def __init__(
        self,
        first: str | os.PathLike[str],
        weights: Sequence[str | os.PathLike[str]] = (),
        flip_axes: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        require_nnunet()
        self.weights = [Path(path) for path in (first, *weights)]
        self.flip_axes = list(flip_axes)
        self.device = torch.device(device)
        self._predictor: Any = None

    def __call__(self, inputs: torch.Tensor, network: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logarithm of the probabilities: its argmax gives the label.

        Args:
            inputs: (1, C, X, Y, Z), one scan with its affine.
            network: not asked.
            args: not asked either.
            kwargs: nor these.

        Returns:
            (1, classes, X, Y, Z), float32, on the CPU.

        Raises:
            CheckpointError: weights or plans are missing, damaged, or of different plans.
            ConfigError: the input is no scan with an affine.
        """
        if not isinstance(inputs, MetaTensor) or len(inputs) != 1:
            raise ConfigError(
                f"nnU-Net segments one scan with its affine at a time, found a {type(inputs).__name__} of shape "
                f"{tuple(inputs.shape)}: set the batch size to 1"
            )
        if self._predictor is None:
            self._predictor = self._load()
        affine = np.asarray(inputs.affine, dtype=float).reshape(-1, 4, 4)[0]
        image = np.asarray(inputs[0].cpu().as_subclass(torch.Tensor), dtype=np.float32).transpose(0, 3, 2, 1)
        spacing = nib.affines.voxel_sizes(affine)[::-1].tolist()
        _, found = self._predictor.predict_single_npy_array(image, {"spacing": spacing}, None, None, True)
        probabilities = torch.as_tensor(np.asarray(found, dtype=np.float32).transpose(0, 3, 2, 1).copy())
        logits = probabilities.clamp_(min=torch.finfo(torch.float32).tiny).log_()[None]
        return MetaTensor(logits).copy_meta_from(inputs)

    def _load(self) -> Any:
        """A predictor of nnU-Net with all weights."""
        described = [read_plans(path) for path in self.weights]
        for path, one in zip(self.weights, described):
            if one["plans"]["configurations"] != described[0]["plans"]["configurations"]:
                raise CheckpointError(f"{path} is of another plan than {self.weights[0]}: name models of one plan")
        dataset, name = described[0]["dataset"], described[0]["configuration"]
        plans = part("utilities.plans_handling.plans_handler", "PlansManager")(described[0]["plans"])
        configuration = plans.get_configuration(name)
        axes = mirrored_axes(self.flip_axes, plans.transpose_forward, len(configuration.patch_size))
        channels = part("utilities.label_handling.label_handling", "determine_num_input_channels")
        heads = plans.get_label_manager(dataset).num_segmentation_heads
        trainer = part("training.nnUNetTrainer.nnUNetTrainer", "nnUNetTrainer")
        counts = channels(plans, configuration, dataset), heads
        network = trainer.build_network_architecture(plans, configuration, *counts, enable_deep_supervision=False)
        for path in reversed(self.weights):  # refuses what does not fit; the first stay
            load_weights(network, path)
        members = [read_checked(path) for path in self.weights]
        predictor = part("inference.predict_from_raw_data", "nnUNetPredictor")(
            use_mirroring=bool(axes), device=self.device, allow_tqdm=False
        )
        predictor.manual_initialization(network, plans, configuration, members, dataset, trainer.__name__, axes or None)
        return predictor


def part(module: str, name: str) -> Any:
    """A class or function of nnU-Net, which is loaded where it is first needed: it is an extra, and takes seconds."""
    return optional_import(f"{PACKAGE}.{module}", name=name)[0]


def read_plans(weights: Path) -> dict[str, Any]:
    """``plans``, ``dataset`` and ``configuration`` beside weights. Raises `CheckpointError`."""
    path = weights.with_suffix(PLANS)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("plans", "dataset", "configuration")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no plan of nnU-Net ({error}): it belongs beside {weights.name}") from error
