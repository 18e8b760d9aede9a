# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random contrasts of a batch on its device, for what a method shows to a student or a teacher.

Drawn from PyTorch's generator, whose state checkpoints keep: a resumed run draws what an uninterrupted one would.
MONAI's random transforms have generators of their own, for the data's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mapseg_components.errors import ConfigError

__all__ = ["RandomContrast", "changed_alike", "contrast_view", "inverted"]

Change = Callable[[torch.Tensor], torch.Tensor]


class RandomContrast:
    """Histogram, gamma, inversion and noise of the foreground, drawn for each image; background, 0, stays 0.

    Args:
        gamma: range of the exponent, drawn evenly on the logarithmic scale.
        invert_prob: probability of bright for dark, see `inverted`.
        noise: standard deviation of Gaussian noise.
        histogram_prob: probability of a random monotone curve from [0, 1] to [0, 1] before the others.
        control_points: of that curve, evenly spaced, moved as by MONAI's ``RandHistogramShift``.

    Raises:
        ConfigError: a range or a probability is out of bounds.

    Examples:
        >>> import torch
        >>> from mapseg_components.contrast import RandomContrast
        >>> image = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 3, 1, 1)
        >>> RandomContrast(gamma=(0.5, 0.5))(image).flatten().tolist()
        [0.0, 0.5, 1.0]
    """

    def __init__(
        self,
        gamma: Sequence[float] = (0.7, 1.5),
        invert_prob: float = 0.0,
        noise: float = 0.0,
        histogram_prob: float = 0.0,
        control_points: int = 6,
    ) -> None:
        if not (len(gamma) == 2 and 0 < gamma[0] <= gamma[1]):
            raise ConfigError(f"gamma is {list(gamma)}, expected 0 < lowest <= highest")
        for name, value in {"invert_prob": invert_prob, "histogram_prob": histogram_prob}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, expected a probability between 0 and 1")
        if noise < 0:
            raise ConfigError(f"noise is {noise}, expected a standard deviation of 0 or more")
        if control_points < 3:
            raise ConfigError(f"control_points is {control_points}, expected 3 or more: the two ends do not move")
        self.gamma = tuple(gamma)
        self.invert_prob = invert_prob
        self.noise = noise
        self.histogram_prob = histogram_prob
        self.control_points = control_points

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, C, X, Y, Z) in [0, 1] in other contrasts, in [0, 1]."""
        lowest, highest = (math.log(end) for end in self.gamma)
        shape = (len(image), *[1] * (image.ndim - 1))
        exponents = torch.exp(lowest + (highest - lowest) * torch.rand(shape)).to(image.device)
        inverts = (torch.rand(shape) < self.invert_prob).to(image.device)
        changed = image
        if self.histogram_prob:
            shifts = (torch.rand(shape) < self.histogram_prob).to(image.device)
            curves = random_curves(len(image), self.control_points).to(image.device)
            changed = torch.where(shifts, along(curves, image), image)
        changed = changed.pow(exponents)
        changed = torch.where(inverts, inverted(changed), changed)
        if self.noise:
            changed = changed + self.noise * torch.randn(image.shape).to(image.device)
        return torch.where(image > 0, changed.clamp(0.0, 1.0), torch.zeros_like(image))


def inverted(image: torch.Tensor) -> torch.Tensor:
    """Bright for dark with the background kept: 1 - image where the image is above 0."""
    return torch.where(image > 0, 1.0 - image, image)


def contrast_view(name: str) -> Change:
    """A fixed change of contrast, by name; background, 0, stays 0, and no voxel moves.

    Args:
        name: ``as_is``, ``inverted`` (see `inverted`), ``gamma G`` (the power G) or ``inverted gamma G`` (the power of
            the inverted image).

    Returns:
        from an image of any shape in [0, 1] to one of the same shape in [0, 1].

    Raises:
        ConfigError: there is no such view.

    Examples:
        >>> import torch
        >>> from mapseg_components.contrast import contrast_view
        >>> image = torch.tensor([0.0, 0.5, 0.75])
        >>> contrast_view("gamma 2")(image).tolist(), contrast_view("inverted gamma 2")(image).tolist()
        ([0.0, 0.25, 0.5625], [0.0, 0.25, 0.0625])
    """
    words = str(name).split()
    inverts = words[:1] == ["inverted"]
    rest = words[1:] if inverts else words
    exponent = 1.0
    if len(rest) == 2 and rest[0] == "gamma":
        try:
            exponent = float(rest[1])
        except ValueError:
            exponent = math.nan
    elif not (words == ["as_is"] or words == ["inverted"]):
        exponent = math.nan
    if not (math.isfinite(exponent) and exponent > 0):
        raise ConfigError(
            f"the view {name!r} is unknown, expected 'as_is', 'inverted', 'gamma 0.7' or 'inverted gamma 0.7', with "
            "any exponent above 0"
        )

    def view(image: torch.Tensor) -> torch.Tensor:
        image = inverted(image) if inverts else image
        return image if exponent == 1.0 else image.clamp(min=0.0).pow(exponent)

    return view


def changed_alike(change: Change, *images: torch.Tensor) -> list[torch.Tensor]:
    """Images of the same samples, such as patch and global view, after one and the same draw of a change.

    Args:
        change: from images (B, C, X, Y, Z) to images of that shape, by the values of the voxels and not by their
            places, e.g. `RandomContrast`.
        images: (B, C, ...), each with its own sides.

    Examples:
        >>> import torch
        >>> from mapseg_components.contrast import RandomContrast, changed_alike
        >>> patch, view = torch.full((1, 1, 2, 3, 4), 0.25), torch.full((1, 1, 5, 6, 7), 0.25)
        >>> patch, view = changed_alike(RandomContrast(), patch, view)
        >>> patch.shape, view.shape, bool(torch.allclose(patch, view.mean()))  # one value still
        (torch.Size([1, 1, 2, 3, 4]), torch.Size([1, 1, 5, 6, 7]), True)
    """
    flat = [image.flatten(2) for image in images]
    changed = change(torch.cat(flat, dim=2)[..., None, None])[..., 0, 0]
    return [part.view(image.shape) for part, image in zip(changed.split([one.shape[2] for one in flat], dim=2), images)]


def random_curves(count: int, points: int) -> torch.Tensor:
    """Heights (count, points) of rising curves over evenly spaced points; the ends stay at 0 and 1."""
    places = torch.linspace(0.0, 1.0, points)
    draws = torch.rand(count, points)
    heights = [torch.zeros(count)]
    for number in range(1, points - 1):  # between the point before, moved already, and the one after, not moved yet
        heights.append(heights[-1] + draws[:, number] * (places[number + 1] - heights[-1]))
    return torch.stack([*heights, torch.ones(count)], dim=1)


def along(curves: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Images (B, ...) in [0, 1], each changed along its curve (B, points) by linear interpolation."""
    steps = curves.shape[1] - 1
    position = image.clamp(0.0, 1.0).flatten(1) * steps
    below = position.long().clamp(max=steps - 1)
    low, high = curves.gather(1, below), curves.gather(1, below + 1)
    return (low + (position - below) * (high - low)).view(image.shape)
