# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pseudo labels: what a teacher says about target images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from mapseg_components.contrast import contrast_view
from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE
from mapseg_components.networks.passes import named_outputs
from mapseg_components.structures import IGNORED

__all__ = ["ArgmaxLabels", "PseudoLabel", "Teacher", "ViewLabels", "mean_of", "tissue_of"]

LOGITS = "logits"


def tissue_of(image: torch.Tensor) -> torch.Tensor:
    """Where (B, X, Y, Z) images (B, C, X, Y, Z) of scans whose tissue is known are not 0."""
    return (image != 0).any(dim=1)


def mean_of(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Mean over all voxels, or over those that count; 0 where none does."""
    return values.mean() if counted is None else (values * counted).sum() / counted.sum().clamp(min=1)


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
        ignore_outside: give voxels of images that are 0 the label `mapseg_components.structures.IGNORED`, for scans
            whose tissue is above 0 everywhere, see `mapseg_components.transforms.RaiseTissued`.

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

    def __init__(self, teacher: Teacher, ignore_outside: bool = False) -> None:
        self.teacher = teacher
        self.ignore_outside = ignore_outside

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
            image = inputs.get(f"{name.removesuffix(LOGITS)}{IMAGE}")
            if self.ignore_outside and image is not None and image.shape[2:] == label.shape[2:]:
                label = label.masked_fill(~tissue_of(image)[:, None], IGNORED)
            labels[name] = PseudoLabel(label, confidence)
        return labels


class ViewLabels(ArgmaxLabels):
    """The class of highest probability, averaged over views of the scan in other contrasts.

    A teacher repeats what it says of one view, and its errors with it. An inverted T2w image looks like a T1w image:
    what it says of that view is new. Contrast does not move a voxel, so that the views are averaged as they are. A view
    changes all images of a sample alike: patch and global view. The views run one after the other, in the memory of
    one. Consistency over augmented inputs at test time: DG-TTA (arXiv 2312.06275).

    Args:
        teacher: see `ArgmaxLabels`.
        views: names, see `mapseg_components.contrast.contrast_view`. With ``as_is`` alone the labels are those of
            `ArgmaxLabels`, bit for bit.
        ignore_outside: see `ArgmaxLabels`.

    Raises:
        ConfigError: there is no view, a view twice, or an unknown one.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from mapseg_components.methods import ViewLabels
        >>> from mapseg_components.networks import PlainPass
        >>> network = torch.nn.Conv3d(1, 2, 1)
        >>> network.weight.data, network.bias.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1), torch.zeros(2)
        >>> labels = ViewLabels(SimpleNamespace(active=True, network=PlainPass(network)), ["as_is", "inverted"])
        >>> one, other = (torch.full((1, 1, 1, 1, 1), value) for value in (0.25, 0.75))  # views of each other
        >>> bool(labels.probabilities(image=one)["logits"].equal(labels.probabilities(image=other)["logits"]))
        True
    """

    def __init__(
        self,
        teacher: Teacher,
        views: Sequence[str] = ("as_is", "inverted", "gamma 0.7", "gamma 1.5"),
        ignore_outside: bool = False,
    ) -> None:
        super().__init__(teacher, ignore_outside)
        if isinstance(views, str) or not views or len({*views}) < len(views):
            raise ConfigError(f"teacher_views is {views!r}, expected a list of different views, such as ['as_is']")
        self.views = [contrast_view(name) for name in views]

    @torch.no_grad()
    def probabilities(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean over the views; arguments (each whose name ends with ``image`` is one), shapes and errors as above."""
        total: dict[str, torch.Tensor] = {}
        for view in self.views:
            seen = {name: view(value) if name.endswith(IMAGE) else value for name, value in inputs.items()}
            for name, value in super().probabilities(**seen).items():
                total[name] = total[name] + value if name in total else value
        return {name: value / len(self.views) for name, value in total.items()}
