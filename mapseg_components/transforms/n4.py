# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Bias field of MR scans by N4 (Tustison et al. 2010, https://doi.org/10.1109/TMI.2010.2046908), as ITK has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.utils import optional_import

from mapseg_components.errors import DataError
from mapseg_components.transforms.resampling import resample, spacing_of

__all__ = ["MASKS", "bias_field"]

itk, _ = optional_import("itk")  # loaded at its first use, since that takes seconds

MASKS = ("otsu", "foreground")
OTSU_BINS = 200
SMALLEST_SIDE = 16  # voxels that shrinking leaves of an axis
NEEDED_SIDE = 4  # voxels; a cubic spline has four coefficients


def bias_field(
    voxels: np.ndarray,
    affine: np.ndarray,
    mask: str,
    shrink: int,
    iterations: Sequence[int],
    convergence: float,
) -> np.ndarray:
    """Multiplicative bias field of a scan; dividing by it corrects the scan.

    The field is fitted on every ``shrink``-th voxel and evaluated between them linearly. One thread, so that equal
    scans give equal fields on any number of cores.

    Args:
        voxels: (X, Y, Z), not negative.
        affine: (4, 4), from voxel index to mm, for the spacing.
        mask: where the field is fitted: ``"otsu"``, above Otsu's threshold, or ``"foreground"``, above 0 (for scans
            whose background is 0, such as skull-stripped ones).
        shrink: see above; less along an axis of which fewer than 16 voxels would be left.
        iterations: maximum number at each level; each level halves the distance of the spline's knots.
        convergence: a level ends when the field's change falls below it.

    Returns:
        float32 (X, Y, Z), positive.

    Raises:
        DataError: an axis has fewer than 4 voxels, the mask is empty, or the field is not finite.
    """
    if min(voxels.shape) < NEEDED_SIDE:
        raise DataError(
            f"shape {voxels.shape}, bias correction needs {NEEDED_SIDE} voxels along each axis: set bias_correction "
            "to false"
        )
    steps = [max(1, min(shrink, side // SMALLEST_SIDE)) for side in voxels.shape]
    small = voxels[tuple(slice(step // 2, None, step) for step in steps)].astype(np.float32)
    small_affine = affine @ np.array(
        [
            [steps[0], 0, 0, steps[0] // 2],
            [0, steps[1], 0, steps[1] // 2],
            [0, 0, steps[2], steps[2] // 2],
            [0, 0, 0, 1],
        ]
    )
    image = to_itk(small, spacing_of(small_affine))
    inside = small > (otsu_threshold(image) if mask == "otsu" else 0)
    if not inside.any():
        raise DataError(f"no voxel is above the threshold of bias_mask {mask!r}: set bias_correction to false")
    region = to_itk(inside.astype(np.uint8), spacing_of(small_affine))
    n4 = itk.N4BiasFieldCorrectionImageFilter[type(image), type(region), type(image)].New(image, MaskImage=region)
    n4.SetNumberOfFittingLevels(len(iterations))
    n4.SetMaximumNumberOfIterations([int(number) for number in iterations])
    n4.SetConvergenceThreshold(convergence)
    n4.SetNumberOfWorkUnits(1)
    n4.Update()
    field = itk.array_from_image(n4.ReconstructBiasField(n4.GetLogBiasFieldControlPointLattice())).T
    field = np.exp(resample(field, small_affine, voxels.shape, affine, "linear"))
    if not (np.isfinite(field).all() and field.min() > 0):
        raise DataError("N4 found no finite bias field: set bias_mask to the other choice, or bias_correction to false")
    return field


def otsu_threshold(image: itk.Image) -> float:
    """Threshold between dark and bright voxels, https://doi.org/10.1109/TSMC.1979.4310076."""
    otsu = itk.OtsuThresholdImageFilter.New(image, NumberOfHistogramBins=OTSU_BINS)
    otsu.SetNumberOfWorkUnits(1)
    otsu.Update()
    return float(otsu.GetThreshold())


def to_itk(voxels: np.ndarray, spacing: np.ndarray) -> itk.Image:
    """An ITK image of (X, Y, Z) voxels; N4 asks for no direction."""
    image = itk.image_from_array(np.ascontiguousarray(voxels.T))
    image.SetSpacing([float(side) for side in spacing])
    return image
