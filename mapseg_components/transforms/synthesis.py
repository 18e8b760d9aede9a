# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Images of any contrast from label maps: a random Gaussian for each label value, then what a scanner does to it.

Source: SynthSeg (Billot et al. 2023, Medical Image Analysis, arXiv 2107.09559). Its bias field and gamma are those of
`RandGlobalLocalBiasFieldd` and `RandGlobalLocalAdjustContrastd`, which follow this transform; its affine is the crop's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_dst_type

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import BOX, IMAGE
from mapseg_components.structures import to_whole
from mapseg_components.transforms.inputs import as_volume, scan_name

__all__ = ["RandGlobalLocalSynthesisd"]

LEAST_BLUR = 0.1  # voxels; a Gaussian narrower than this changes nothing


class RandGlobalLocalSynthesisd(Randomizable, MapTransform):
    """From raw label values to an image in [0, 1] of a random contrast, alike in patch and global view.

    All draws are made once for a scan: mean and standard deviation of each value, blur, resolution, noise. The noise
    of a voxel is drawn in each image. Voxels of 0, the background, stay exactly 0 unless the background is drawn to
    have a tissue of its own. The label of a sample is another entry and stays as it is.

    Args:
        keys: label maps (1, X, Y, Z) of raw values, cropped by nearest neighbour.
        mean: range of a value's mean intensity.
        std: range of its standard deviation.
        alike: groups of values that share one Gaussian, such as those of the left and the right side.
        optional: values that become background together in a share of the scans, such as those outside of the brain.
        optional_prob: that share.
        background_prob: share of the scans in which background has a Gaussian as well.
        blur: range of the standard deviation of a Gaussian filter, in voxels of the patch: partial volume.
        low_resolution_prob: share of the scans of a lower resolution, along one axis (thick slices) or along all.
        low_resolution: range of the factor by which voxels are wider then.
        noise: range of the standard deviation of the noise on top.
        local_key: which of the keys is the patch; the others are views of the whole box.
        box_key: (3, 2), the patch in voxels of the view, for blur and resolution in mm alike. Without it voxels of all
            images count as equally wide.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: a range or a share is out of bounds, or a value is in two groups.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalSynthesisd
        >>> synthesis = RandGlobalLocalSynthesisd("image", std=(0, 0), blur=(0, 0), low_resolution_prob=0, noise=(0, 0))
        >>> labels = torch.tensor([0.0, 17, 53, 17]).view(1, 4, 1, 1)
        >>> image = synthesis.set_random_state(0)({"image": labels})["image"].flatten()
        >>> bool(image[0] == 0 and image[1] == image[3] != image[2])
        True
    """

    def __init__(
        self,
        keys: KeysCollection,
        mean: Sequence[float] = (0.05, 1.0),
        std: Sequence[float] = (0.0, 0.1),
        alike: Sequence[Sequence[int]] = (),
        optional: Sequence[int] = (),
        optional_prob: float = 0.5,
        background_prob: float = 0.05,
        blur: Sequence[float] = (0.0, 0.8),
        low_resolution_prob: float = 0.35,
        low_resolution: Sequence[float] = (1.5, 4.0),
        noise: Sequence[float] = (0.0, 0.05),
        local_key: str = IMAGE,
        box_key: str = BOX,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        ranges = {"mean": mean, "std": std, "blur": blur, "noise": noise, "low_resolution": low_resolution}
        for name, (ends, lowest, highest) in {
            name: (ends, 1.0 if name == "low_resolution" else 0.0, 1.0 if name == "mean" else np.inf)
            for name, ends in ranges.items()
        }.items():
            if len(ends) != 2 or not lowest <= ends[0] <= ends[1] <= highest:
                expected = f"expected {lowest:g} <= lowest <= highest{'' if highest == np.inf else f' <= {highest:g}'}"
                raise ConfigError(f"{name} is {list(ends)}, {expected}")
        shares = {"optional_prob": optional_prob, "background_prob": background_prob}
        for name, share in (shares | {"low_resolution_prob": low_resolution_prob}).items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is {share}, expected a share between 0 and 1")
        groups = [[int(value) for value in group] for group in alike]
        listed = [value for group in groups for value in group]
        if len(set(listed)) != len(listed) or 0 in listed or 0 in optional:
            raise ConfigError(
                f"alike is {groups}, optional {list(optional)}: name each value in one group, and 0 in none"
            )
        self.mean, self.std, self.blur, self.noise = tuple(mean), tuple(std), tuple(blur), tuple(noise)
        self.first = {value: group[0] for group in groups for value in group}
        self.optional = [int(value) for value in optional]
        self.optional_prob, self.background_prob = optional_prob, background_prob
        self.low_resolution, self.low_resolution_prob = tuple(low_resolution), low_resolution_prob
        self.local_key, self.box_key = local_key, box_key

    def randomize(self, values: Sequence[float]) -> None:
        """Draw for a scan.

        Args:
            values: all values of its images, ascending.
        """
        optional = self.R.uniform() < self.optional_prob
        self.bright_background = bool(self.R.uniform() < self.background_prob)
        left_out = self.optional if optional else []
        # a left out value is background, and background is a value of its own
        names = [0 if value in left_out else self.first.get(int(value), value) for value in values]
        draws = {name: (self.R.uniform(*self.mean), self.R.uniform(*self.std)) for name in sorted({0, *names})}
        self.background = torch.tensor([name == 0 for name in names])
        self.means = torch.tensor([draws[name][0] for name in names], dtype=torch.float32)
        self.stds = torch.tensor([draws[name][1] for name in names], dtype=torch.float32)
        self.sigma = self.R.uniform(*self.blur)
        coarse = self.R.uniform() < self.low_resolution_prob
        factor, axis = self.R.uniform(*self.low_resolution), self.R.randint(6)  # half of the draws are thick slices
        along = np.ones(3, bool) if axis > 2 else np.arange(3) == axis
        self.factors = np.where(along & coarse, factor, 1.0)
        self.level = self.R.uniform(*self.noise)
        self.generator = torch.Generator().manual_seed(int(self.R.randint(2**31)))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same entries, each image float32 of its own shape, with its metadata.

        Raises:
            DataError: an image has several channels, or values that are not whole.
        """
        result = dict(data)
        keys = list(self.key_iterator(result))
        maps = {key: whole_values(result[key]) for key in keys}
        if not maps:
            return result
        values = torch.unique(torch.cat([torch.unique(one) for one in maps.values()]))
        self.randomize(values.tolist())
        for key, label_map in maps.items():
            image = self.image_of(torch.searchsorted(values, label_map), self.width(key, result))
            result[key] = convert_to_dst_type(image, dst=as_volume(result[key]), dtype=torch.float32)[0]
        return result

    def width(self, key: Hashable, data: Mapping[Hashable, Any]) -> np.ndarray:
        """Voxels of an image per voxel of the patch along each axis, (3,): below 1 in a view of more than the patch."""
        if key == self.local_key or self.box_key not in data or self.local_key not in data:
            return np.ones(3)
        box = np.asarray(data[self.box_key], dtype=float)
        return (box[:, 1] - box[:, 0]) / np.asarray(data[self.local_key].shape[1:])

    def image_of(self, places: torch.Tensor, width: np.ndarray) -> torch.Tensor:
        """Image (1, X, Y, Z) of the last draw.

        Args:
            places: (1, X, Y, Z), of each voxel's value among those that `randomize` was given.
            width: see `width`.
        """
        drawn = torch.randn(places.shape, generator=self.generator)
        dark = self.background[places] if not self.bright_background else torch.zeros(places.shape, dtype=torch.bool)
        image = (self.means[places] + self.stds[places] * drawn).masked_fill(dark, 0.0)
        image = coarser(blurred(image, self.sigma * width), self.factors * width)
        if self.level:
            image = image + self.level * torch.randn(image.shape, generator=self.generator)
        return image.clamp(0.0, 1.0).masked_fill(dark, 0.0)


def whole_values(label_map: Any) -> torch.Tensor:
    """A label map (1, X, Y, Z) without metadata, its values exact. Raises `DataError`."""
    volume = as_volume(label_map).as_subclass(torch.Tensor)
    if volume.ndim != 4 or len(volume) != 1:
        raise DataError(f"{scan_name(label_map)} has shape {tuple(volume.shape)}, expected a label map (1, X, Y, Z)")
    values = torch.from_numpy(np.asarray(to_whole(volume.numpy())))
    if values.is_floating_point() and bool((values != values.round()).any()):
        raise DataError(
            f"{scan_name(label_map)} has values that are not whole: images are made from label maps, and cropped and "
            "resampled by nearest neighbour"
        )
    return values.contiguous()


def blurred(image: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """An image (1, X, Y, Z) after a Gaussian filter of these standard deviations in voxels; borders are repeated."""
    widths = [0.0 if side == 1 else float(sigma) for side, sigma in zip(image.shape[1:], sigmas)]
    kernels = [gaussian_1d(torch.tensor(s), 3.0) if s > LEAST_BLUR else torch.ones(1) for s in widths]
    if all(len(kernel) == 1 for kernel in kernels):
        return image
    return separable_filtering(image[None], kernels, mode="replicate")[0]


def coarser(image: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """An image (1, X, Y, Z) as if its voxels were so many times wider: means over them, then linear between them."""
    sides = image.shape[1:]
    coarse = [max(round(side / factor), 1) if factor > 1 else side for side, factor in zip(sides, factors)]
    if coarse == list(sides):
        return image
    small = F.interpolate(image[None], size=coarse, mode="area")
    return F.interpolate(small, size=tuple(sides), mode="trilinear", align_corners=False)[0]
