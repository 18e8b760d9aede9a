# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random contrasts of a batch on its device, for what a method shows to a student or a teacher.

Drawn from PyTorch's generator, whose state checkpoints keep: a resumed run draws what an uninterrupted one would.
MONAI's random transforms have generators of their own, for the data's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mapseg_components.errors import ConfigError

__all__ = ["RandomContrast", "inverted"]


class RandomContrast:
    """Gamma, inversion and noise of the foreground, drawn for each image; background, 0, stays 0.

    Args:
        gamma: range of the exponent, drawn evenly on the logarithmic scale.
        invert_prob: probability of bright for dark, see `inverted`.
        noise: standard deviation of Gaussian noise.

    Raises:
        ConfigError: a range or a probability is out of bounds.

    Examples:
        >>> import torch
        >>> from mapseg_components.contrast import RandomContrast
        >>> image = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 3, 1, 1)
        >>> RandomContrast(gamma=(0.5, 0.5))(image).flatten().tolist()
        [0.0, 0.5, 1.0]
    """

    def __init__(self, gamma: Sequence[float] = (0.7, 1.5), invert_prob: float = 0.0, noise: float = 0.0) -> None:
        if not (len(gamma) == 2 and 0 < gamma[0] <= gamma[1]):
            raise ConfigError(f"gamma is {list(gamma)}, expected 0 < lowest <= highest")
        if not 0 <= invert_prob <= 1:
            raise ConfigError(f"invert_prob is {invert_prob}, expected a probability between 0 and 1")
        if noise < 0:
            raise ConfigError(f"noise is {noise}, expected a standard deviation of 0 or more")
        self.gamma = tuple(gamma)
        self.invert_prob = invert_prob
        self.noise = noise

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, C, X, Y, Z) in [0, 1] in other contrasts, in [0, 1]."""
        lowest, highest = (math.log(end) for end in self.gamma)
        shape = (len(image), *[1] * (image.ndim - 1))
        exponents = torch.exp(lowest + (highest - lowest) * torch.rand(shape)).to(image.device)
        inverts = (torch.rand(shape) < self.invert_prob).to(image.device)
        changed = image.pow(exponents)
        changed = torch.where(inverts, inverted(changed), changed)
        if self.noise:
            changed = changed + self.noise * torch.randn(image.shape).to(image.device)
        return torch.where(image > 0, changed.clamp(0.0, 1.0), torch.zeros_like(image))


def inverted(image: torch.Tensor) -> torch.Tensor:
    """Bright for dark with the background kept: 1 - image where the image is above 0."""
    return torch.where(image > 0, 1.0 - image, image)
