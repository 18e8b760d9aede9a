# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From a whole scan to one training sample: local patch, global view, and the patch's box in the view."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from monai.transforms.utils import create_rotate
from monai.utils import ensure_tuple_rep

from mapseg_components.boxes import axis_extremes, expand_box, index_affine, relative_box, transformed_box
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import (
    GLOBAL_IMAGE,
    GLOBAL_LABEL,
    IMAGE,
    LABEL,
    LOCAL_BOX,
    LOCAL_IMAGE,
    LOCAL_LABEL,
    VALID_BOX,
)
from mapseg_components.transforms.intensity import LIMITS_POSTFIX, scan_name
from mapseg_components.transforms.sampling import sample

__all__ = ["RandGlobalLocalCrop", "RandGlobalLocalCropd"]

MODES = ("bilinear", "nearest")  # of an image, of its label


class RandGlobalLocalCrop(Randomizable):
    """Draw a random affine and a local patch; sample patch and global view from the scan, once each.

    The affine (isotropic scale, rotation about the centre of the foreground, flips) is drawn first. The foreground
    box of the *warped* scan follows from its extreme voxels, without warping anything. The box is grown symmetrically
    to the patch size where a scan is smaller; the patch lies anywhere inside it, and the whole box is the global
    view. Each output voxel is then looked up in the scan through one composed affine, linearly for images, nearest
    for labels; outside the scan both are 0. Source: MAPSeg (arXiv 2303.09373), sections 3.2, 3.4 and 4.1.

    Args:
        patch_size: voxels of the local patch, at the scan's own resolution.
        global_size: voxels of the global view, by default the patch size.
        prob: probability of an affine (0.35 in the paper).
        scale_range: of the isotropic scale, above 1 enlarges; ``(0.7, 1.4)`` for the source in the paper.
        rotate_range_deg: largest rotation about each axis, degrees.
        flip_prob: probability of a flip of each axis (0.5 in pretraining, 0 in adaptation).
        foreground_fraction: share of patches centred on a labelled voxel, its class drawn uniformly from the
            classes of the scan. For labelled (source) scans only.

    Raises:
        ConfigError: a range or share is out of bounds.
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        prob: float = 0.35,
        scale_range: Sequence[float] = (1.0, 1.0),
        rotate_range_deg: float = 0.0,
        flip_prob: float = 0.0,
        foreground_fraction: float = 0.0,
    ) -> None:
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ConfigError(f"scale_range is {list(scale_range)}, expected 0 < lowest <= highest")
        for name, value in {
            "prob": prob,
            "flip_prob": flip_prob,
            "foreground_fraction": foreground_fraction,
        }.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}, expected a share between 0 and 1")
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.global_size = self.patch_size if global_size is None else ensure_tuple_rep(global_size, 3)
        self.prob = prob
        self.scale_range = tuple(scale_range)
        self.rotate_range_deg = rotate_range_deg
        self.flip_prob = flip_prob
        self.foreground_fraction = foreground_fraction
        self.warp = np.eye(4)
        self.box = np.zeros((3, 2))
        self.window = np.zeros((3, 2))

    def randomize(
        self, extremes: np.ndarray, class_voxels: np.ndarray | None = None, spacing: np.ndarray | None = None
    ) -> None:
        """Draw the affine, the grown foreground box of the warped scan and the window of the patch.

        Args:
            extremes: (N, 3), voxel indices from ``boxes.axis_extremes``.
            class_voxels: (M, 4), rows (class, x, y, z), needed for ``foreground_fraction``.
            spacing: (3,), mm per voxel; by default voxels are cubes.
        """
        spacing = np.ones(3) if spacing is None else np.asarray(spacing, dtype=float)
        self.warp = self._draw_warp((extremes.min(0) + extremes.max(0)) / 2, spacing)
        foreground = transformed_box(extremes, self.warp)
        whole = not np.any(self.warp[:3, :3] % 1)  # a flip at most: voxels stay on voxels
        self.foreground = np.round(foreground).astype(int) if whole else foreground
        self.box = expand_box(self.foreground, self.patch_size)
        room = self.box[:, 1] - self.box[:, 0] - np.asarray(self.patch_size)
        start = self.box[:, 0] + (self.R.randint(0, room + 1) if whole else self.R.uniform(0, 1, 3) * room)
        if self.R.uniform() < self.foreground_fraction and class_voxels is not None and len(class_voxels):
            classes = np.flatnonzero(np.bincount(class_voxels[:, 0]))
            rows = class_voxels[class_voxels[:, 0] == classes[self.R.randint(len(classes))], 1:]
            voxel = self.warp[:3, :3] @ rows[self.R.randint(len(rows))] + self.warp[:3, 3]
            start = np.clip(voxel + 0.5 - np.asarray(self.patch_size) / 2, self.box[:, 0], self.box[:, 0] + room)
            start = np.floor(start) if whole else start
        self.window = np.stack([start, start + np.asarray(self.patch_size)], axis=1).astype(float)

    def __call__(
        self,
        img: torch.Tensor,
        label: torch.Tensor | None = None,
        extremes: torch.Tensor | None = None,
        class_voxels: torch.Tensor | None = None,
        randomize: bool = True,
        limits: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One sample.

        Args:
            img: (C, X, Y, Z); foreground is what is not 0, or with limits what is above them.
            label: (1, X, Y, Z), class indices.
            extremes: ``boxes.axis_extremes`` of the foreground, found here if not given.
            class_voxels: see `randomize`.
            randomize: draw anew, or repeat the last draw.
            limits: (C, 2), what becomes 0 and what becomes 1 in each channel: the image is clipped and scaled by them
                before it is sampled, see `RandPercentileClipd`.

        Returns:
            ``local_image`` (C, *patch_size), ``global_image`` (C, *global_size) and, with a label,
            ``local_label`` and ``global_label`` on the same grids, all with their own affine if the scan has one;
            ``local_box`` (3, 2) float32, the patch in voxels of the global view; ``valid_box`` (3, 2) float32, the part
            of the patch that the foreground box covers, in voxels of the patch.

        Raises:
            DataError: the scan has no foreground, or image and label differ in shape.
        """
        if label is not None and label.shape[1:] != img.shape[1:]:
            raise DataError(
                f"{scan_name(img)} has shape {tuple(img.shape[1:])}, its label map {scan_name(label)} "
                f"{tuple(label.shape[1:])}: resample one to the other's grid"
            )
        if randomize:
            if extremes is None:
                lowest = 0 if limits is None else limits[:, 0].view(-1, 1, 1, 1).to(img.device)
                extremes = axis_extremes(np.asarray((img.as_subclass(torch.Tensor) != lowest).any(0).cpu()))
            points = np.asarray(extremes)
            if len(points) == 0:
                raise DataError(f"{scan_name(img)}: no voxel above 0, no foreground: leave the scan out")
            voxels = None if class_voxels is None else np.asarray(class_voxels)
            spacing = img.pixdim.numpy() if isinstance(img, MetaTensor) else None
            self.randomize(np.asfortranarray(points, dtype=np.float64), voxels, spacing)
        unwarp = np.linalg.inv(self.warp)
        unwarp = np.round(unwarp) if not np.any(self.warp % 1) else unwarp
        grids = {
            (LOCAL_IMAGE, LOCAL_LABEL): (self.window, self.patch_size),
            (GLOBAL_IMAGE, GLOBAL_LABEL): (self.box, self.global_size),
        }
        volumes = [volume for volume in (img, label) if volume is not None]
        result: dict[str, torch.Tensor] = {}
        for keys, (box, size) in grids.items():
            affine = unwarp @ index_affine(box, size)
            plain = [volume.as_subclass(torch.Tensor) for volume in volumes]
            samples = sample(plain, affine, size, MODES, [limits, None][: len(plain)])
            result.update({key: placed(*pair, affine) for key, *pair in zip(keys, samples, volumes)})
        valid = np.clip(self.foreground - self.window[:, :1], 0, np.asarray(self.patch_size)[:, None])
        result[LOCAL_BOX] = torch.from_numpy(relative_box(self.window, self.box, self.global_size)).float()
        result[VALID_BOX] = torch.from_numpy(valid).float()
        return result

    def _draw_warp(self, centre: np.ndarray, spacing: np.ndarray) -> np.ndarray:
        """Voxel index of the scan to voxel index of the warped scan; rotations turn millimetres, not voxels."""
        linear = np.eye(4)
        if self.R.uniform() < self.prob:
            angles = np.deg2rad(self.R.uniform(-self.rotate_range_deg, self.rotate_range_deg, 3))
            scale = self.R.uniform(*self.scale_range)
            linear = np.asarray(create_rotate(3, tuple(angles))) @ np.diag([scale, scale, scale, 1.0])
            ratio = np.round(spacing / spacing.min(), 5)  # exactly 1 for voxels as wide as high
            linear[:3, :3] *= ratio[None, :] / ratio[:, None]
        flips = np.where(self.R.uniform(size=3) < self.flip_prob, -1.0, 1.0)
        linear = linear @ np.diag([*flips, 1.0])
        linear[:3, 3] = centre - linear[:3, :3] @ centre
        return linear


def placed(data: torch.Tensor, volume: torch.Tensor, affine: np.ndarray) -> torch.Tensor:
    """Samples of a volume with their own affine and the name of its file, if the volume has them."""
    if not isinstance(volume, MetaTensor):
        return data
    meta = {key: volume.meta[key] for key in ("filename_or_obj",) if key in volume.meta}
    return MetaTensor(data, affine=volume.affine @ torch.from_numpy(affine).to(volume.affine), meta=meta)


class RandGlobalLocalCropd(Randomizable, MapTransform):
    """Dictionary version of `RandGlobalLocalCrop`.

    Reads the entries ``<image_key>_extremes`` (`AxisExtremesd`), ``<label_key>_voxels`` (`ClassVoxelsd`) and
    ``<image_key>_limits`` (`RandPercentileClipd`, deferred) if they are there. The whole volumes and these entries are
    left out of the result, so that samples collate; all other entries stay.

    Args:
        image_key: the scan. label_key: its label; may be absent from the data, as it is on the target side.
        The others are those of `RandGlobalLocalCrop`.
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        prob: float = 0.35,
        scale_range: Sequence[float] = (1.0, 1.0),
        rotate_range_deg: float = 0.0,
        flip_prob: float = 0.0,
        foreground_fraction: float = 0.0,
        image_key: str = IMAGE,
        label_key: str = LABEL,
    ) -> None:
        MapTransform.__init__(self, [image_key, label_key], allow_missing_keys=True)
        self.transform = RandGlobalLocalCrop(
            patch_size, global_size, prob, scale_range, rotate_range_deg, flip_prob, foreground_fraction
        )
        self.image_key, self.label_key = image_key, label_key

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandGlobalLocalCropd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        image, label = result.pop(self.image_key), result.pop(self.label_key, None)
        extremes = result.pop(f"{self.image_key}_extremes", None)
        class_voxels = result.pop(f"{self.label_key}_voxels", None)
        limits = result.pop(f"{self.image_key}_{LIMITS_POSTFIX}", None)
        result.update(self.transform(image, label, extremes, class_voxels, limits=limits))
        return result
