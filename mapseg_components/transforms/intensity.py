# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Intensities that a scan must not have: an explicit policy for non-finite and for negative values."""

from __future__ import annotations

import torch
from monai.config import KeysCollection
from monai.transforms import Transform

from mapseg_components.errors import ConfigError
from mapseg_components.transforms.dictionary import EachKey
from mapseg_components.transforms.inputs import as_volume, scan_name, tissue_is_raised

__all__ = ["FillNonFinite", "FillNonFinited", "NegativeValues", "NegativeValuesd"]


class FillNonFinite(Transform):
    """Replace NaN and infinite voxels by background, or leave them, so that later steps refuse the scan.

    Args:
        policy: ``"background"`` gives them the lowest finite value of the scan; ``None`` leaves them.

    Raises:
        ConfigError: the policy is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import FillNonFinite
        >>> FillNonFinite("background")(torch.tensor([[2.0, float("nan"), 5.0]])).tolist()
        [[2.0, 2.0, 5.0]]
    """

    def __init__(self, policy: str | None = None) -> None:
        if policy not in (None, "background"):
            raise ConfigError(f"non_finite is {policy!r}, expected 'background', or null to refuse such scans")
        self.policy = policy

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Image of the same shape, any number of dimensions."""
        img = as_volume(img)
        finite = torch.isfinite(img)
        if self.policy is None or finite.all() or not finite.any():
            return img
        return torch.where(finite, img, img[finite].min())


class FillNonFinited(EachKey):
    """Dictionary version of `FillNonFinite`.

    Args:
        keys: images of any shape.
        policy: ``"background"`` or ``None``, see `FillNonFinite`.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: the policy is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import FillNonFinited
        >>> fill = FillNonFinited(keys="image", policy="background")
        >>> fill({"image": torch.tensor([[2.0, float("inf"), 5.0]])})["image"].tolist()
        [[2.0, 2.0, 5.0]]
    """

    def __init__(self, keys: KeysCollection, policy: str | None = None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = FillNonFinite(policy)


class NegativeValues(Transform):
    """What to do with negative intensities; the choice is always explicit.

    Args:
        policy: ``"clip"`` sets them to 0 (MR); ``"shift"`` first adds ``shift`` (CT in Hounsfield units, where air is
            -1024) and then clips at 0; ``"keep"`` leaves the scan as it is; ``None`` expects none and refuses a scan
            that has some.
        shift: added under ``"shift"``, in the scan's units.

    Raises:
        ConfigError: the policy is unknown; or, in a call, it is ``None`` and the scan has negative values.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import NegativeValues
        >>> ct = torch.tensor([[-1100.0, -1000.0, 50.0]])  # in HU
        >>> NegativeValues("shift")(ct).tolist()
        [[0.0, 24.0, 1074.0]]
        >>> NegativeValues("clip")(ct).tolist()
        [[0.0, 0.0, 50.0]]
    """

    def __init__(self, policy: str | None = None, shift: float = 1024.0) -> None:
        if policy not in (None, "clip", "shift", "keep"):
            raise ConfigError(
                f"negative_values is {policy!r}, expected 'clip' (MR), 'shift' (CT: adds {shift:g} first), 'keep', or "
                "null if there is none"
            )
        self.policy = policy
        self.shift = shift

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Image of the same shape, any number of dimensions."""
        img = as_volume(img)
        if self.policy == "keep" or tissue_is_raised(img):  # which is above 0, and all else is 0
            return img
        if self.policy is None:
            negative = (img < 0) & ~torch.isneginf(img)  # -inf is a damaged voxel, which later steps report
            if negative.any():
                raise ConfigError(
                    f"{scan_name(img)}: {int(negative.sum())} voxels are negative, and negative_values is null: set it "
                    f"to 'clip' (MR), 'shift' (CT: adds {self.shift:g} first) or 'keep'"
                )
            return img
        shifted = img + self.shift if self.policy == "shift" else img
        return torch.where(torch.isneginf(shifted), shifted, shifted.clamp(min=0))


class NegativeValuesd(EachKey):
    """Dictionary version of `NegativeValues`.

    Args:
        keys: images of any shape.
        policy: ``"clip"``, ``"shift"``, ``"keep"`` or ``None``, see `NegativeValues`.
        shift: added under ``"shift"``, in the scan's units.
        allow_missing_keys: pass over keys that a sample does not have; by default they are a ``KeyError``.

    Raises:
        ConfigError: as `NegativeValues`.

    Examples:
        >>> import torch
        >>> from mapseg_components.transforms import NegativeValuesd
        >>> clip = NegativeValuesd(keys="image", policy="clip")
        >>> clip({"image": torch.tensor([[-3.0, 0.0, 50.0]])})["image"].tolist()
        [[0.0, 0.0, 50.0]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        policy: str | None = None,
        shift: float = 1024.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = NegativeValues(policy, shift)
