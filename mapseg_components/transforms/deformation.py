# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Smooth random displacements, for samples of a volume whose structures have another shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapseg_components.errors import ConfigError

__all__ = ["RandomDeformation"]


class RandomDeformation:
    """A cubic B-spline over the box that patches are drawn from, whose control points are moved at random.

    A part of `RandGlobalLocalCrop`, which draws from it: MONAI's ``Rand3DElastic`` deforms the whole volume, and would
    interpolate twice. The same field holds for a patch and for the view of the whole box.

    Args:
        prob: probability of a deformation.
        std_range: of the standard deviation of the control points' movements along each axis, in units of the scan's
            shortest side of a voxel.
        spacing: distance between control points, in the same unit.

    Raises:
        ConfigError: a number is out of bounds.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.transforms.deformation import RandomDeformation
        >>> deformation = RandomDeformation(prob=1.0, std_range=(2.0, 2.0), spacing=16.0)
        >>> box = np.array([[0, 32], [0, 40], [0, 8]])
        >>> deformation.draw(np.random.RandomState(0), box, np.ones(3), np.array([False, False, True]))
        >>> field = deformation.field(box, (16, 20, 8), np.eye(4))
        >>> field.shape, bool(np.abs(field[:2]).max() > 1), bool(field[2].any())
        ((3, 16, 20, 8), True, False)
    """

    def __init__(self, prob: float, std_range: Sequence[float], spacing: float = 16.0) -> None:
        if not 0 <= prob <= 1:
            raise ConfigError(f"prob of the deformation is {prob}, expected a share between 0 and 1")
        if not 0 <= std_range[0] <= std_range[1]:
            raise ConfigError(f"std_range of the deformation is {list(std_range)}, expected 0 <= lowest <= highest")
        if not spacing > 0:
            raise ConfigError(f"spacing of the deformation is {spacing}, expected a distance above 0")
        self.prob = prob
        self.std_range = tuple(std_range)
        self.spacing = spacing
        self.controls: np.ndarray | None = None
        self.origin = np.zeros(3)
        self.steps = np.ones(3)

    def draw(self, random: np.random.RandomState, box: np.ndarray, spacing: np.ndarray, flat: np.ndarray) -> None:
        """Draw whether there is a deformation, and which.

        Args:
            random: source of the draws; without a probability nothing is drawn.
            box: (3, 2), in voxels.
            spacing: (3,), mm per voxel.
            flat: (3,), axes along which nothing is moved.
        """
        self.controls = None
        if self.prob == 0 or random.uniform() >= self.prob:
            return
        ratio = spacing / spacing.min()
        self.origin, self.steps = box[:, 0], self.spacing / ratio
        sides = np.ceil((box[:, 1] - box[:, 0]) / self.steps - 1e-9).astype(int)
        self.controls = random.normal(size=(3, *(np.maximum(sides, 1) + 3)))  # one lies before the box, two beyond it
        self.controls *= random.uniform(*self.std_range) / ratio[:, None, None, None]
        self.controls[flat] = 0.0

    def field(self, part: np.ndarray, size: Sequence[int], unwarp: np.ndarray) -> np.ndarray | None:
        """How far the voxels of a grid are moved.

        Args:
            part: (3, 2), box within the one that was drawn for.
            size: voxels per axis of a grid laid over the part.
            unwarp: (4, 4), from the box's voxels to those that are moved.

        Returns:
            (3, *size), float32, in the latter, or ``None`` without a deformation.
        """
        if self.controls is None:
            return None
        controls = np.einsum("ij,jxyz->ixyz", unwarp[:3, :3], self.controls)
        weights = []
        for (start, stop), first, step, number, points in zip(part, self.origin, self.steps, size, controls.shape[1:]):
            places = start + (np.arange(number) + 0.5) * (stop - start) / number - first
            distance = np.abs(places[:, None] / step - (np.arange(points) - 1)[None])
            near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
            weights.append(np.where(distance < 1, near, far))
        return np.einsum("cxyz,ix,jy,kz->cijk", controls, *weights, optimize=True).astype(np.float32)
