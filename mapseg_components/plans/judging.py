# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the comparison of two models segments: which scans, in which degraded versions, at what cost at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.transforms import GaussianSmooth, SpatialCropd

from mapseg_components.contrast import contrast_view

__all__ = [
    "DEGRADATIONS",
    "affordable_images",
    "count_windows",
    "evenly",
    "judged_images",
    "judged_region",
    "middle_of_image",
    "versions_of",
]

# the bound of the cost: (MOST_VERSIONS + MOST_TARGETS) images per model, each segmented once and once per view
MOST_VALIDATION, MOST_VERSIONS, MOST_TARGETS = 5, 12, 10
FEWEST_VERSIONS, FEWEST_TARGETS = 4, 2
MOST_WINDOWS_OF_AXIS = 4  # of an image of one slice
COST = 0.1  # of the adaptation's
PASSES_OF_A_SAMPLE = 3  # forward passes that a training sample is worth, at least: one forward and one backward


def blurred(image: torch.Tensor) -> torch.Tensor:
    """Smoothed by a Gaussian of 1.5 voxels."""
    return torch.as_tensor(GaussianSmooth(1.5)(image)).as_subclass(torch.Tensor) * (image > 0)


def noisy(image: torch.Tensor) -> torch.Tensor:
    """With Gaussian noise of a fixed seed, standard deviation 0.15."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 0.15 * noise).clamp(0, 1) * (image > 0)


def shaded(image: torch.Tensor) -> torch.Tensor:
    """Under a field that rises from one third to 1 along the second axis."""
    field = torch.linspace(1 / 3, 1, image.shape[2]).view(1, 1, -1, 1)
    return image * field


# degraded versions of the labelled scans, whose truth is still known: they widen the range of the calibration
DEGRADATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "inverted": contrast_view("inverted"),
    "dark": contrast_view("gamma 2.5"),
    "noise": noisy,
    "shaded": shaded,
    "half inverted": lambda image: (1 - (2 * image - 0.7).abs()).clamp(0, 1) * (image > 0),
    "blurred": blurred,
    "bright": contrast_view("gamma 0.4"),
}


def affordable_images(windows: int, samples: int) -> int:
    """Whole scans whose segmentation costs a tenth of an adaptation, from the number of its training samples.

    Args:
        windows: sliding windows that each image takes, with its views, of all models.
        samples: training samples (patches).
    """
    return int(COST * PASSES_OF_A_SAMPLE * samples / windows)


def count_windows(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> int:
    """Sliding windows over a scan."""
    return math.prod(max(math.ceil((side - window) / step), 0) + 1 for side, window, step in zip(shape, patch, stride))


def judged_region(shape: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> tuple[slice, ...]:
    """The middle of an image of one slice, of 4 sliding windows per axis at most; all of a volume or smaller image.

    Args:
        shape: (X, Y, Z).
        patch: sliding window.
        stride: from one window to the next.

    Returns:
        slices of X, Y, Z.

    Examples:
        >>> from mapseg_components.plans.judging import judged_region
        >>> judged_region((2000, 600, 1), (192, 192, 1), (160, 160, 1))
        (slice(664, 1336, None), slice(0, 600, None), slice(0, 1, None))
    """
    most = [window + (MOST_WINDOWS_OF_AXIS - 1) * step for window, step in zip(patch, stride)]
    sides = [min(side, limit) if shape[2] == 1 else side for side, limit in zip(shape, most)]
    starts = [(side - part) // 2 for side, part in zip(shape, sides)]
    return tuple(slice(start, start + part) for start, part in zip(starts, sides))


def middle_of_image(
    data: Mapping[Hashable, torch.Tensor], window: Sequence[int], stride: Sequence[int]
) -> dict[Hashable, torch.Tensor]:
    """Image and label map of `judged_region`; all of them where a structure lies beyond it.

    Args:
        data: sample with ``image`` and ``label``, (C, X, Y, Z).
        window: see `judged_region`; stride likewise.

    Examples:
        >>> import torch
        >>> from mapseg_components.plans.judging import middle_of_image
        >>> sample = {"image": torch.rand(1, 90, 90, 1), "label": torch.ones(1, 90, 90, 1)}
        >>> middle_of_image(sample, (16, 16, 1), (12, 12, 1))["image"].shape
        torch.Size([1, 52, 52, 1])
        >>> sample["label"][0, 0, 0] = 2
        >>> middle_of_image(sample, (16, 16, 1), (12, 12, 1))["image"].shape
        torch.Size([1, 90, 90, 1])
    """
    label = data["label"]
    region = judged_region(label.shape[1:], window, stride)
    lost = set(label.unique().tolist()) - set(label[(slice(None), *region)].unique().tolist())
    return dict(data) if lost else SpatialCropd(["image", "label"], roi_slices=list(region))(data)


def judged_images(targets: int, affordable: int | None, labelled: bool = True) -> tuple[int, int]:
    """Versions of validation scans and number of target scans that are segmented.

    Args:
        targets: number of target scans that may be judged.
        affordable: images that may be segmented per model, or ``None``.
        labelled: whether there are validation scans.
    """
    if not labelled:
        most = MOST_TARGETS if affordable is None else max(affordable, FEWEST_TARGETS)
        return 0, min(most, MOST_TARGETS, targets)
    versions, most = MOST_VERSIONS, min(MOST_TARGETS, targets)
    if affordable is not None and affordable < versions + most:
        versions = min(max(affordable // 2, affordable - most, FEWEST_VERSIONS), MOST_VERSIONS)
        most = min(max(affordable - versions, FEWEST_TARGETS), most)
    return versions, most


def versions_of(scans: int, most: int) -> list[tuple[int, str | None]]:
    """Scan and degradation (``None``: as it is), at most so many pairs: a half of them as they are at most."""
    plain = min(scans, MOST_VALIDATION, max(most // 2, 1))
    found: list[tuple[int, str | None]] = [(number, None) for number in range(plain)]
    names = list(DEGRADATIONS)
    for index in range(min(most - plain, plain * len(names))):  # plain is below 7, a prime: no pair comes twice
        found.append((index % plain, names[index % len(names)]))
    return found


def evenly(cases: Sequence[dict], number: int) -> list[dict]:
    """So many cases, evenly spaced."""
    return [cases[int(index)] for index in np.linspace(0, len(cases) - 1, number).round()]
