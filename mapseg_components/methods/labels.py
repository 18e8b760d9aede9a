# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pseudo labels: what a teacher says about target images."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks.passes import named_outputs

__all__ = ["ArgmaxLabels", "PseudoLabel", "Teacher"]

LOGITS = "logits"


class Teacher(Protocol):
    """What labels need of a teacher; ``mapseg_components.handlers.EMATeacher`` has it."""

    network: nn.Module
    active: bool


class PseudoLabel(NamedTuple):
    """Label and confidence of each voxel, both (B, 1, X, Y, Z)."""

    label: torch.Tensor
    """Integer: the class of highest probability."""
    confidence: torch.Tensor
    """That probability."""


class ArgmaxLabels:
    """The class of highest probability of a teacher's logits.

    Args:
        teacher: its ``network`` returns named outputs, of which those that end with ``logits`` are labelled; ``active``
            says whether it labels already.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from mapseg_components.methods import ArgmaxLabels
        >>> from mapseg_components.networks import PlainPass
        >>> network = torch.nn.Conv3d(1, 3, 1)
        >>> network.bias.data = torch.tensor([0.0, 2.0, -1.0])
        >>> teacher = SimpleNamespace(active=True, network=PlainPass(network))
        >>> found = ArgmaxLabels(teacher)(image=torch.zeros(1, 1, 1, 1, 1))["logits"]
        >>> found.label.item(), round(found.confidence.item(), 3)
        (1, 0.844)
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @property
    def active(self) -> bool:
        """Whether there are labels already; before that a method leaves the target out."""
        return self.teacher.active

    @torch.no_grad()
    def probabilities(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probabilities (B, classes, X, Y, Z), float32, of each of the teacher's logits by name.

        Args:
            inputs: of the network.

        Raises:
            ConfigError: the network's output is no mapping, or holds no logits of two classes or more.
        """
        outputs = named_outputs(self.teacher.network, inputs)
        logits = {name: value for name, value in outputs.items() if name.endswith(LOGITS)}
        if not logits:
            raise ConfigError(
                f"the teacher's outputs are {sorted(outputs)}, expected one whose name ends with {LOGITS}"
            )
        for name, value in logits.items():
            if value.ndim < 3 or value.shape[1] < 2:
                raise ConfigError(
                    f"the teacher's {name} have shape {tuple(value.shape)}, expected (B, classes, X, Y, Z) with "
                    "background as a class"
                )
        return {name: value.float().softmax(dim=1) for name, value in logits.items()}

    def __call__(self, **inputs: torch.Tensor) -> dict[str, PseudoLabel]:
        """Labels by name of the logits they are for. Arguments and errors as those of `probabilities`."""
        labels = {}
        for name, probabilities in self.probabilities(**inputs).items():
            confidence, label = probabilities.max(dim=1, keepdim=True)
            labels[name] = PseudoLabel(label, confidence)
        return labels
