# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From a whole scan to one training sample: local patch, global view, and the patch's box in the view."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, LazyTrait, MapTransform, Randomizable, Transform
from monai.transforms.utils import create_rotate
from monai.utils import ensure_tuple, ensure_tuple_rep

from mapseg_components.boxes import expand_box, index_affine, relative_box, transformed_box
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import BOX, IMAGE, LABEL, VALID_BOX
from mapseg_components.transforms.deformation import RandomDeformation
from mapseg_components.transforms.foreground import foreground_extremes, voxels_of_classes
from mapseg_components.transforms.inputs import as_volume, require_spatial, scan_name
from mapseg_components.transforms.percentiles import LIMITS_POSTFIX
from mapseg_components.transforms.sampling import sample

__all__ = ["RandGlobalLocalCrop", "RandGlobalLocalCropd"]

IMAGE_MODE, LABEL_MODE = MODES = ("bilinear", "nearest")


class NotInvertibleError(ConfigError, NotImplementedError):
    """An inverse was asked for that does not exist."""


class RandGlobalLocalCrop(Randomizable, Transform):
    """Draw a random affine and a local patch; sample patch and global view from the scan, once each.

    The affine (isotropic scale, rotation about the centre of the foreground, flips) is drawn first. The foreground
    box of the *warped* scan follows from its extreme voxels, without warping anything. The box is grown symmetrically
    to the patch size where a scan is smaller; the patch lies anywhere inside it, and the whole box is the global
    view. Each output voxel is then looked up in the scan through one composed affine, linearly for images, nearest
    for labels; outside the scan both are 0. Source: MAPSeg (arXiv 2303.09373), sections 3.2, 3.4 and 4.1.

    Args:
        patch_size: voxels of the local patch, at the scan's own resolution. An axis of one voxel (2D images are
            volumes with one slice) is neither scaled nor turned.
        global_size: voxels of the global view, by default the patch size.
        prob: probability of an affine (0.35 in the paper).
        scale_range: of the isotropic scale, above 1 enlarges; ``(0.7, 1.4)`` for the source in the paper.
        rotate_range_deg: largest rotation about each axis, degrees; one number or one per axis. Thick slices are turned
            in their plane only.
        flip_prob: probability of a flip of each axis (0.5 in pretraining, 0 in adaptation), one number or one per axis.
        foreground_fraction: share of patches centred on a labelled voxel, its class drawn uniformly from the
            classes of the scan. For labelled (source) scans only: one without a label is refused.
        global_view: whether there is one; without it the crop is an ordinary random patch.
        image_mode: ``"bilinear"``, or ``"nearest"`` for an image that is a label map still.
        deformation: by which patch and view are deformed alike besides, or ``None``.

    Raises:
        ConfigError: a range or share is out of bounds.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalCrop
        >>> sample = RandGlobalLocalCrop(patch_size=(8, 8, 4), global_size=8)(torch.ones(1, 16, 32, 8))
        >>> tuple(sample["image"].shape), tuple(sample["global_image"].shape)
        ((1, 8, 8, 4), (1, 8, 8, 8))
        >>> (sample["box"][:, 1] - sample["box"][:, 0]).tolist()  # sides of the patch in voxels of the view
        [4.0, 2.0, 4.0]
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        prob: float = 0.35,
        scale_range: Sequence[float] = (1.0, 1.0),
        rotate_range_deg: Sequence[float] | float = 0.0,
        flip_prob: Sequence[float] | float = 0.0,
        foreground_fraction: float = 0.0,
        global_view: bool = True,
        image_mode: str = IMAGE_MODE,
        deformation: RandomDeformation | None = None,
    ) -> None:
        if image_mode not in MODES:
            raise ConfigError(f"image_mode is {image_mode!r}, expected {MODES[0]!r} or {MODES[1]!r}")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ConfigError(f"scale_range is {list(scale_range)}, expected 0 < lowest <= highest")
        flips = ensure_tuple_rep(flip_prob, 3)
        shares = {"prob": (prob,), "flip_prob": flips, "foreground_fraction": (foreground_fraction,)}
        for name, value in ((name, value) for name, values in shares.items() for value in values):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}, expected a share between 0 and 1")
        self.patch_size = ensure_tuple_rep(patch_size, 3)
        self.global_size = self.patch_size if global_size is None else ensure_tuple_rep(global_size, 3)
        self.prob = prob
        self.scale_range = tuple(scale_range)
        self.rotate_range_deg = rotate_range_deg
        self.flip_prob = flips
        self.foreground_fraction = foreground_fraction
        self.global_view = global_view
        self.image_mode = image_mode
        self.deformation = deformation
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
        if whole:
            start = self.box[:, 0] + self.R.randint(0, room + 1)
        else:
            drawn, slices = self.R.uniform(0, 1, 3), np.asarray(self.patch_size) == 1  # a slice is no mean of two
            start = self.box[:, 0] + np.where(slices, np.floor(drawn * (room + 1)), drawn * room)
        if self.R.uniform() < self.foreground_fraction and class_voxels is not None and len(class_voxels):
            classes = np.flatnonzero(np.bincount(class_voxels[:, 0]))
            rows = class_voxels[class_voxels[:, 0] == classes[self.R.randint(len(classes))], 1:]
            voxel = self.warp[:3, :3] @ rows[self.R.randint(len(rows))] + self.warp[:3, 3]
            start = np.clip(voxel + 0.5 - np.asarray(self.patch_size) / 2, self.box[:, 0], self.box[:, 0] + room)
            start = np.floor(start) if whole else start
        self.window = np.stack([start, start + np.asarray(self.patch_size)], axis=1).astype(float)
        if self.deformation is not None:
            self.deformation.draw(self.R, self.box, spacing, np.asarray(self.patch_size) == 1)

    def __call__(
        self,
        img: torch.Tensor,
        label: torch.Tensor | None = None,
        extremes: torch.Tensor | None = None,
        class_voxels: torch.Tensor | None = None,
        randomize: bool = True,
        limits: torch.Tensor | None = None,
        others: Mapping[str, tuple[torch.Tensor, str]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """One sample.

        Args:
            img: (C, X, Y, Z), tensor or array; foreground is what is not 0, or with limits what is above them.
            label: (1, X, Y, Z), class indices.
            extremes: ``boxes.axis_extremes`` of the foreground, found here if not given.
            class_voxels: see `randomize`; found here if not given and needed.
            randomize: draw anew, or repeat the last draw.
            limits: (C, 2), what becomes 0 and what becomes 1 in each channel: the image is clipped and scaled by them
                before it is sampled, see `RandPercentileClipd`.
            others: further volumes of the scan's grid by name, each with "bilinear" or "nearest".

        Returns:
            ``image`` (C, *patch_size), ``global_image`` (C, *global_size) and, with a label, ``label`` and
            ``global_label`` on the same grids, likewise ``<name>`` and ``global_<name>`` of further volumes, all with
            their own affine if the scan has one; ``box`` (3, 2) float32, the patch in voxels of the global view;
            ``valid_box`` (3, 2) float32, the part of the patch that the foreground box covers, in voxels of the patch.
            Without a global view nothing that begins with ``global_``, and no ``box``.

        Raises:
            ConfigError: a volume has pending operations of lazy resampling, or ``foreground_fraction`` has no label.
            DataError: the scan has no foreground, or volumes differ in shape.
        """
        volumes = {"image": (img, self.image_mode), **({} if label is None else {"label": (label, LABEL_MODE)})}
        volumes |= dict(others or {})
        tensors = {name: as_volume(volume) for name, (volume, _) in volumes.items()}
        img = tensors["image"]
        self._require_fitting(tensors)
        if randomize:
            lowest = None if limits is None else limits[:, 0]
            points = foreground_extremes(img, lowest) if extremes is None else np.asarray(extremes)
            if len(points) == 0:
                raise DataError(f"{scan_name(img)}: no voxel above 0, no foreground: leave the scan out")
            if self.foreground_fraction > 0 and class_voxels is None:
                if label is None:
                    raise ConfigError(
                        f"foreground_fraction is {self.foreground_fraction} and {scan_name(img)} has no label: "
                        "give its label, or set foreground_fraction to 0"
                    )
                class_voxels = torch.from_numpy(voxels_of_classes(label))
            voxels = None if class_voxels is None else np.asarray(class_voxels)
            spacing = img.pixdim.numpy() if isinstance(img, MetaTensor) else None
            self.randomize(np.asfortranarray(points, dtype=np.float64), voxels, spacing)
        unwarp = np.linalg.inv(self.warp)
        unwarp = np.round(unwarp) if not np.any(self.warp % 1) else unwarp
        modes = [mode for _, mode in volumes.values()]
        result: dict[str, torch.Tensor] = {}
        sides = [("", self.window, self.patch_size), ("global_", self.box, self.global_size)]
        for prefix, box, size in sides if self.global_view else sides[:1]:
            affine = unwarp @ index_affine(box, size)
            plain = [volume.as_subclass(torch.Tensor) for volume in tensors.values()]
            moved_by = None if self.deformation is None else self.deformation.field(box, size, unwarp)
            samples = sample(plain, affine, size, modes, [limits, *[None] * (len(plain) - 1)], moved_by)
            for (name, volume), data in zip(tensors.items(), samples):
                result[f"{prefix}{name}"] = placed(data, volume, affine)
        valid = np.clip(self.foreground - self.window[:, :1], 0, np.asarray(self.patch_size)[:, None])
        if self.global_view:
            result[BOX] = torch.from_numpy(relative_box(self.window, self.box, self.global_size)).float()
        result[VALID_BOX] = torch.from_numpy(valid).float()
        return result

    def _require_fitting(self, volumes: Mapping[str, torch.Tensor]) -> None:
        """Refuse volumes that are not, or not yet, on one grid."""
        img = volumes["image"]
        require_spatial(img, scan_name(img))
        for name, volume in volumes.items():
            if isinstance(volume, MetaTensor) and volume.has_pending_operations:
                raise ConfigError(
                    f"{name} has pending operations of lazy resampling, and patches are drawn from what they will "
                    "give: put ApplyPendingd before the crop, or set lazy to False"
                )
            if volume.ndim != 4 or volume.shape[1:] != img.shape[1:]:
                what = "label map" if name == "label" else name
                raise DataError(
                    f"{scan_name(img)} has shape {tuple(img.shape[1:])}, its {what} {scan_name(volume)} "
                    f"{tuple(volume.shape[1:])}: resample one to the other's grid"
                )

    def _draw_warp(self, centre: np.ndarray, spacing: np.ndarray) -> np.ndarray:
        """Voxel index of the scan to voxel index of the warped scan; rotations turn millimetres, not voxels."""
        linear = np.eye(4)
        if self.R.uniform() < self.prob:
            largest = np.asarray(self.rotate_range_deg, dtype=float)
            angles = np.deg2rad(self.R.uniform(-largest, largest, 3))
            scale = self.R.uniform(*self.scale_range)
            flat = np.asarray(self.patch_size) == 1
            for axis in np.flatnonzero(flat):
                angles[np.arange(3) != axis] = 0.0  # a slice is turned in its plane only
            linear = np.asarray(create_rotate(3, tuple(angles))) @ np.diag([*np.where(flat, 1.0, scale), 1.0])
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


class RandGlobalLocalCropd(Randomizable, MapTransform, InvertibleTransform, LazyTrait):
    """Dictionary version of `RandGlobalLocalCrop`.

    Each volume becomes its patch, under the same key, and ``global_<key>`` its view. Reads the entries
    ``<image_key>_extremes`` (`AxisExtremesd`), ``<label_key>_voxels`` (`ClassVoxelsd`) and
    ``<image_key>_limits`` (`RandPercentileClipd`, deferred) if they are there, and leaves these entries out of the
    result, so that samples collate; all other entries stay. An entry on the scan's grid that is not
    named would stay whole beside the patch, and is refused.

    In a lazy ``Compose`` it refuses scans with pending operations: their foreground, by which patches are drawn,
    depends on how they are resampled. It has no inverse: ``Invertd`` is refused.

    Args:
        patch_size: voxels of the local patch, see `RandGlobalLocalCrop`.
        global_size: voxels of the global view, by default the patch size.
        prob: probability of an affine.
        scale_range: of the isotropic scale, above 1 enlarges.
        rotate_range_deg: largest rotation about each axis, degrees; one number or one per axis. Thick slices are turned
            in their plane only.
        flip_prob: probability of a flip of each axis, one number or one per axis.
        foreground_fraction: share of patches centred on a labelled voxel.
        image_key: the scan.
        label_key: its label; may be absent from the data, as it is on the target side.
        other_keys: further volumes on the scan's grid, e.g. a mask or a second image; they become patches as well, with
            their views as ``global_<key>``.
        other_modes: ``"bilinear"`` or ``"nearest"``, one for all of them or one for each.
        allow_missing_keys: whether further volumes may be absent from the data.
        global_view: whether there is one; without it the crop is an ordinary random patch.
        image_mode: ``"bilinear"``, or ``"nearest"`` for an image that is a label map still.
        deformation: by which patch and view are deformed alike besides, or ``None``.

    Raises:
        ConfigError: a mode is unknown; or, in a call, an entry on the scan's grid is not named, or one would be
            overwritten.
        KeyError: in a call, the scan or a further volume is missing.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import RandGlobalLocalCropd
        >>> scan = {"image": torch.ones(1, 20, 24, 28), "label": torch.ones(1, 20, 24, 28)}
        >>> sample = RandGlobalLocalCropd(patch_size=(8, 8, 4))(scan)
        >>> sorted(sample)
        ['box', 'global_image', 'global_label', 'image', 'label', 'valid_box']
        >>> tuple(sample["image"].shape), tuple(sample["global_label"].shape)
        ((1, 8, 8, 4), (1, 8, 8, 4))
    """

    def __init__(
        self,
        patch_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        prob: float = 0.35,
        scale_range: Sequence[float] = (1.0, 1.0),
        rotate_range_deg: Sequence[float] | float = 0.0,
        flip_prob: Sequence[float] | float = 0.0,
        foreground_fraction: float = 0.0,
        image_key: str = IMAGE,
        label_key: str = LABEL,
        other_keys: KeysCollection = (),
        other_modes: Sequence[str] | str = LABEL_MODE,
        allow_missing_keys: bool = False,
        global_view: bool = True,
        image_mode: str = IMAGE_MODE,
        deformation: RandomDeformation | None = None,
    ) -> None:
        others = ensure_tuple(other_keys)
        MapTransform.__init__(self, [image_key, label_key, *others], allow_missing_keys)
        self.transform = RandGlobalLocalCrop(
            *(patch_size, global_size, prob, scale_range, rotate_range_deg, flip_prob),
            *(foreground_fraction, global_view, image_mode, deformation),
        )
        self.image_key, self.label_key = image_key, label_key
        self.other_modes = dict(zip(others, ensure_tuple_rep(other_modes, len(others)))) if others else {}
        if not set(self.other_modes.values()) <= set(MODES):
            raise ConfigError(f"other_modes is {other_modes}, expected {MODES[0]!r} or {MODES[1]!r}")
        if {IMAGE, LABEL, image_key, label_key} & set(others):
            raise ConfigError(f"other_keys {list(others)} name the scan or its label, which image_key and label_key do")

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandGlobalLocalCropd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    @property
    def lazy(self) -> bool:
        """True: a lazy ``Compose`` leaves pending operations as they are, for this transform to refuse."""
        return True

    @lazy.setter
    def lazy(self, enabled: bool) -> None:
        """Ignored, there is one behaviour."""

    @property
    def requires_current_data(self) -> bool:
        """False, see `lazy`."""
        return False

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """The sample of a case; ``lazy`` is what a ``Compose`` passes on and changes nothing."""
        result = dict(data)
        for key in (self.image_key, *self.other_modes):
            if key not in result and (key == self.image_key or not self.allow_missing_keys):
                raise KeyError(f"key {key!r} of {type(self).__name__} is missing in the data, which has {list(result)}")
        image, label = result.pop(self.image_key), result.pop(self.label_key, None)
        extremes = result.pop(f"{self.image_key}_extremes", None)
        class_voxels = result.pop(f"{self.label_key}_voxels", None)
        limits = result.pop(f"{self.image_key}_{LIMITS_POSTFIX}", None)
        others = {str(key): (result.pop(key), mode) for key, mode in self.other_modes.items() if key in result}
        whole = [key for key, entry in result.items() if shares_grid(entry, image)]
        if whole:
            raise ConfigError(
                f"entries {whole} lie on the grid of {self.image_key} and would stay whole beside the patch: name them "
                "in other_keys, with other_modes 'nearest' for masks and 'bilinear' for images, or delete them "
                "(DeleteItemsd)"
            )
        drawn = self.transform(image, label, extremes, class_voxels, limits=limits, others=others)
        names = {
            f"{view}{name}": f"{view}{key}"
            for view in ("", "global_")
            for name, key in ((IMAGE, self.image_key), (LABEL, self.label_key))
        }
        samples = {names.get(name, name): sample for name, sample in drawn.items()}
        taken = sorted(set(samples) & set(result))
        if taken:
            raise ConfigError(f"entries {taken} are there already and would be overwritten: rename them (CopyItemsd)")
        return {**result, **samples}

    def inverse(self, data: Any) -> dict[Hashable, Any]:
        """Refused.

        Raises:
            NotInvertibleError: always, with what to do instead.
        """
        raise NotInvertibleError(
            "RandGlobalLocalCropd has no inverse: invert only transforms that are not composed with it, and bring what "
            "lies on a patch back by its affine, with ResampleToMatch onto the scan"
        )


def shares_grid(entry: Any, image: Any) -> bool:
    """Whether an entry is a volume, with or without channels, on the grid of an image (C, X, Y, Z)."""
    volumes = isinstance(entry, (torch.Tensor, np.ndarray)) and entry.ndim >= 3
    return volumes and tuple(entry.shape[-3:]) == tuple(getattr(image, "shape", ())[-3:])
