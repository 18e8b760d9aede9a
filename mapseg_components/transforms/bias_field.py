# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One random bias field for a scan, the same in its local patch and its global view."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import RandBiasFieldd

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import BOX, GLOBAL_IMAGE, IMAGE
from mapseg_components.transforms.inputs import as_volume

__all__ = ["RandGlobalLocalBiasFieldd", "legendre_field"]


def legendre_field(coefficients: np.ndarray, box: np.ndarray, size: Sequence[int]) -> torch.Tensor:
    """Sum of products of Legendre polynomials at the voxel centres of a grid laid over a box.

    The box is axis-aligned, so that the sum factors into one small matrix product per axis.

    Args:
        coefficients: (D, D, D), of the products of polynomials of degrees 0 to D - 1 along x, y and z.
        box: (3, 2), edges of the grid; the polynomials live on [-1, 1].
        size: voxels of the grid.

    Returns:
        float32 (*size).
    """
    field = torch.from_numpy(np.asarray(coefficients)).float()
    for (start, stop), number in zip(box, size):
        centres = start + (np.arange(number) + 0.5) * (stop - start) / number
        values = torch.from_numpy(np.polynomial.legendre.legvander(centres, len(coefficients) - 1)).float()
        field = torch.tensordot(field, values, dims=([0], [1]))  # the axis done moves to the end: after three, in order
    return field


class RandGlobalLocalBiasFieldd(RandBiasFieldd):
    """MONAI's ``RandBiasFieldd`` with one field per scan: the patch has the part of the global view's that it covers.

    Draws and their meaning are MONAI's: the image times the exponential of a sum of Legendre polynomials with random
    coefficients, from -1 to 1 over the image. Here that image is the global view, from edge to edge. MONAI evaluates
    the polynomials over each image separately: the same anatomy may be bright in the patch and dark in the view.

    Args:
        keys: images of `RandGlobalLocalCropd`. Without the global view among them the field is MONAI's, over the patch.
        degree: largest degree of the polynomials, at least 1.
        coeff_range: range of the random coefficients, (lowest, highest).
        prob: probability of a field.
        local_key: which of the keys is the patch; the others are views of the whole box.
        global_key: the image whose voxels ``box_key`` counts.
        box_key: (3, 2), the patch in voxels of the global view.
        maximum: largest intensity afterwards. Where the field lifts an image above it, all images are divided by the
            same number, which is a change of the field's constant term; nothing is cut off. By default there is none.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: the maximum is not above 0.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalBiasFieldd
        >>> shade = RandGlobalLocalBiasFieldd(["image", "global_image"], prob=1.0, local_key="image", box_key="box")
        >>> sample = {"image": torch.ones(1, 4, 6, 5), "global_image": torch.ones(1, 8, 6, 5)}
        >>> sample["box"] = torch.tensor([[0, 4], [0, 6], [0, 5]])  # the patch is the first half of the view
        >>> shaded = shade(sample)
        >>> torch.allclose(shaded["image"], shaded["global_image"][:, :4])
        True
    """

    def __init__(
        self,
        keys: KeysCollection,
        degree: int = 3,
        coeff_range: tuple[float, float] = (0.0, 0.1),
        prob: float = 0.1,
        local_key: str = IMAGE,
        global_key: str = GLOBAL_IMAGE,
        box_key: str = BOX,
        maximum: float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, degree, coeff_range, prob=prob, allow_missing_keys=allow_missing_keys)
        if maximum is not None and not maximum > 0:
            raise ConfigError(f"maximum is {maximum}, expected a number above 0, or null for none")
        self.maximum = maximum
        self.local_key, self.global_key, self.box_key = local_key, global_key, box_key

    def coefficients(self) -> np.ndarray:
        """The last draw, (degree + 1,) * 3: in MONAI's order, the products of at most this degree."""
        degree = self.rand_bias_field.degree
        result = np.zeros((degree + 1,) * 3)
        result[np.indices(result.shape).sum(0) <= degree] = self.rand_bias_field._coeff
        return result

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same entries, each image times its part of the field.

        Raises:
            DataError: the patch is there without its box or without the global view.
        """
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        self.rand_bias_field.randomize(img_size=(1, 1, 1))  # only the number of axes counts
        coefficients = self.coefficients()
        shaded = {}
        for key in self.key_iterator(result):
            part = key == self.local_key and self.global_key in self.keys
            box = self.relative_box(result) if part else np.array([[-1.0, 1.0]] * 3)
            image = as_volume(result[key])
            field = legendre_field(coefficients, box, image.shape[1:]).exp_().to(image.device)
            shaded[key] = image * field  # keeps the metadata of a MetaTensor
        highest = max((float(image.max()) for image in shaded.values()), default=0.0)
        if self.maximum is not None and highest > self.maximum:
            shaded = {key: (image / (highest / self.maximum)).clamp(max=self.maximum) for key, image in shaded.items()}
        result.update(shaded)
        return result

    def relative_box(self, data: Mapping[Hashable, Any]) -> np.ndarray:
        """Box (3, 2) of the patch where the view runs from -1 to 1."""
        missing = [key for key in (self.box_key, self.global_key) if key not in data]
        if missing:
            raise DataError(f"sample without {missing} beside {self.local_key}: RandGlobalLocalCropd gives all of them")
        sides = np.asarray(data[self.global_key].shape[1:])[:, None]
        return np.asarray(data[self.box_key], dtype=np.float64) * 2 / sides - 1
