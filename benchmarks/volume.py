# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A synthetic brain: as large as a real one, with tissues, seven labelled structures and noise, made from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["SHAPE", "brain", "write_brain"]

SHAPE = (182, 218, 182)
"""Voxels of 1 mm: the grid of the usual brain templates."""

# centre (right of the middle; its mirror image is made too), radii, both as shares of the brain's half axes; intensity
STRUCTURES = [
    ((0.42, -0.18, -0.28), (0.09, 0.20, 0.09), 620),
    ((0.38, 0.08, -0.38), (0.11, 0.10, 0.10), 600),
    ((0.20, 0.22, 0.16), (0.08, 0.22, 0.12), 560),
    ((0.38, 0.10, 0.02), (0.09, 0.20, 0.14), 580),
    ((0.27, 0.06, 0.00), (0.06, 0.12, 0.10), 680),
    ((0.16, -0.16, 0.06), (0.12, 0.17, 0.12), 640),
    ((0.14, 0.22, -0.12), (0.06, 0.07, 0.06), 540),
]


def brain(shape: Sequence[int] = SHAPE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A scan without its skull and its label map.

    Args:
        shape: voxels (X, Y, Z); the brain fills four fifths of each axis.
        seed: of noise, of the intensity of each tissue and of small shifts of the structures.

    Returns:
        image int16 (X, Y, Z), 0 outside the brain and above 0 inside; label uint8 (X, Y, Z), 0 and 1 to 7.
    """
    generator = np.random.default_rng(seed)
    axes = [(np.arange(side) - (side - 1) / 2) / (0.4 * side) for side in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = np.sqrt(x**2 + y**2 + z**2)
    folds = 0.04 * (np.sin(14 * x) * np.sin(12 * y) + np.sin(13 * z) * np.cos(11 * y))
    image = np.zeros(shape, np.float32)
    image[radius < 1] = 180  # fluid
    image[radius < 0.95 + folds] = 520  # grey matter
    image[radius < 0.80 + 2 * folds] = 760  # white matter
    image[(np.abs(x) / 0.12) ** 2 + ((y + 0.02) / 0.35) ** 2 + ((z - 0.12) / 0.16) ** 2 < 1] = 200  # ventricles
    label = np.zeros(shape, np.uint8)
    for value, (centre, radii, intensity) in enumerate(STRUCTURES, start=1):
        right, front, up = np.asarray(centre) + generator.uniform(-0.01, 0.01, 3)
        inside = ((np.abs(x) - right) / radii[0]) ** 2 + ((y - front) / radii[1]) ** 2 + ((z - up) / radii[2]) ** 2 < 1
        image[inside] = intensity + generator.uniform(-20, 20)
        label[inside] = value
    noisy = image + 30 * generator.standard_normal(image.shape, dtype=np.float32)
    return np.where(image > 0, np.clip(noisy, 1, None), 0).astype(np.int16), label


def write_brain(folder: Path, shape: Sequence[int] = SHAPE, seed: int = 0) -> tuple[Path, Path]:
    """Write ``brain_<seed>.nii.gz`` and ``brain_<seed>_label.nii.gz`` (1 mm, RAS); returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"brain_{seed}.nii.gz", folder / f"brain_{seed}_label.nii.gz"
    for path, voxels in zip(paths, brain(shape, seed)):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return paths
