# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A discriminator of patches: MONAI's, of which only the map of scores is used, for cubes and for flat patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

from mapseg_components.errors import ConfigError

__all__ = ["PatchScores"]

FLAT = 12  # voxels: along a shorter side there are too few to be halved twice
SMALLEST = 6  # voxels: half of them, and one less for each of the last two convolutions


class PatchScores(nn.Module):
    """Scores of places of a volume, or of places of each slice of a flat one, by MONAI's ``PatchDiscriminator``.

    MONAI's network returns a list of all feature maps, and its adversarial loss takes the mean over whatever list it is
    given. This one returns its last map. It has no normalization (MONAI's default is a batch normalization, whose
    statistics passes that train another network would move; AdvEnt's has none), and a bias instead.

    A patch of which one side has fewer than 12 voxels (thick slices, 2D images) is judged slice by slice in 2D. There
    are three halvings, or fewer where a patch is too small for them.

    Args:
        in_channels: of what is judged.
        patch_size: voxels per axis.
        channels: of the first convolution; each further one has twice as many (64 in AdvEnt).
        halvings: of the resolution, at most. The receptive field is 70 voxels for 3, 34 for 2.

    Raises:
        ConfigError: two sides or more are below 6 voxels, or a number is below 1; in a call, the channels or the
            number of axes are others.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import PatchScores
        >>> PatchScores(3, patch_size=(32, 48, 64), channels=2)(torch.zeros(2, 3, 32, 48, 64)).shape
        torch.Size([2, 1, 2, 4, 6])
        >>> PatchScores(3, patch_size=(32, 48, 4), channels=2)(torch.zeros(2, 3, 32, 48, 4)).shape  # 4 slices each
        torch.Size([8, 1, 2, 4])
    """

    def __init__(self, in_channels: int, patch_size: Sequence[int], channels: int = 16, halvings: int = 3) -> None:
        super().__init__()
        sides = list(patch_size)
        for name, value in {"channels": channels, "halvings": halvings}.items():
            if value < 1:
                raise ConfigError(f"{name} of the discriminator is {value}, expected 1 or more")
        self.in_channels = in_channels
        self.slices = sides.index(min(sides)) if sum(side < FLAT for side in sides) == 1 else None
        """Axis (0, 1 or 2) along which slices are judged one by one; ``None`` for whole volumes."""
        judged = [side for axis, side in enumerate(sides) if axis != self.slices]
        if min(judged) < SMALLEST:
            raise ConfigError(
                f"patch_size is {sides}, and a discriminator of patches needs {SMALLEST} voxels or more along two "
                "axes: enlarge patch_size"
            )
        while min(judged) >> halvings < SMALLEST // 2:
            halvings -= 1
        self.network = PatchDiscriminator(
            spatial_dims=len(judged),
            channels=channels,
            in_channels=in_channels,
            num_layers_d=halvings,
            norm=None,
            bias=True,
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Scores (B, 1, x, y, z) of maps (B, C, X, Y, Z); slice by slice (B * slices, 1, x, y), by sample."""
        if maps.ndim != 5 or maps.shape[1] != self.in_channels:
            raise ConfigError(
                f"the discriminator is shown {tuple(maps.shape)}, expected (B, {self.in_channels}, X, Y, Z): set its "
                "in_channels to the number of classes, background included"
            )
        if self.slices is not None:
            maps = maps.movedim(2 + self.slices, 1).flatten(0, 1)
        return self.network(maps)[-1]
