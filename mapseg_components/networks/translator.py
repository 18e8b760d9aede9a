# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Translation of slices between two domains with a segmentation decoder (COSMOS, crossMoDA 2021), of MONAI's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetUpBlock
from monai.networks.nets import PatchDiscriminator
from torch import nn

from mapseg_components.errors import ConfigError

__all__ = ["DomainDiscriminators", "DomainTranslators", "SliceTranslator", "TargetAwareTranslator"]

NORMS: dict[str, Any] = {"instance": ("instance", {"affine": True}), "batch": "batch"}


def norm_of(name: str) -> Any:
    """MONAI's normalization layer for the setting ``norm``. Raises `ConfigError` for an unknown one."""
    if name not in NORMS:
        raise ConfigError(f"norm is {name!r}, expected one of {sorted(NORMS)}")
    return NORMS[name]


def filters_of(width: int, levels: int) -> list[int]:
    """Channels of each level. Raises `ConfigError` if there is none."""
    if width < 1 or levels < 1:
        raise ConfigError(f"width is {width} and levels is {levels}, expected 1 or more of each")
    return [width * 2**level for level in range(levels)]


class SliceEncoder(nn.Module):
    """One `UnetBasicBlock` a level, each after the first at half the resolution.

    Args:
        in_channels: image channels.
        filters: channels of each level.
        norm: as `norm_of` gives it.

    Shape:
        (B, in_channels, X, Y) to features of all levels, the deepest last.
    """

    def __init__(self, in_channels: int, filters: Sequence[int], norm: Any) -> None:
        super().__init__()
        self.stride = 2 ** (len(filters) - 1)
        steps = [1] + [2] * (len(filters) - 1)
        self.levels = nn.ModuleList(
            UnetBasicBlock(2, before, channels, 3, step, norm)
            for before, channels, step in zip([in_channels, *filters], filters, steps)
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        if image.shape[2] % self.stride != 0 or image.shape[3] % self.stride != 0:
            raise ValueError(
                f"slices of {list(image.shape[2:])} voxels, expected multiples of {self.stride} along both axes: "
                "choose another slice_size, or pad the slices"
            )
        features = [image]
        for level in self.levels:
            features.append(level(features[-1]))
        return features[1:]


class SliceDecoder(nn.Module):
    """From features of all levels back to the slice, with skip connections.

    Args:
        out_channels: of the result.
        filters: channels of each level.
        norm: as `norm_of` gives it.

    Shape:
        features, the deepest last, to (B, out_channels, X, Y), not activated.
    """

    def __init__(self, out_channels: int, filters: Sequence[int], norm: Any) -> None:
        super().__init__()
        pairs = list(zip(filters[1:], filters))[::-1]
        self.levels = nn.ModuleList(UnetUpBlock(2, deep, channels, 3, 1, 2, norm) for deep, channels in pairs)
        self.head = UnetOutBlock(2, filters[0], out_channels)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        result = features[-1]
        for number, level in enumerate(self.levels):
            result = level(result, features[len(features) - 2 - number])
        return self.head(result)


def surrounds(image: torch.Tensor) -> torch.Tensor:
    """1 where a voxel of slices (B, C, X, Y) or one within two voxels of it is not 0, else 0; float32 (B, 1, X, Y)."""
    filled = (image != 0).any(dim=1, keepdim=True).float()
    return F.max_pool2d(filled, kernel_size=5, stride=1, padding=2)


class SliceTranslator(nn.Module):
    """A U-Net that shows a slice as another domain would: the encoder ``G_E`` and the decoder ``G_D`` of COSMOS.

    Empty surroundings stay empty: where all voxels within two of one are 0, the result is 0. Otherwise a discriminator
    would tell translated slices by what is around the body, and that alone.

    Args:
        in_channels: image channels.
        width: channels of the first level; each further one has twice as many.
        levels: of the U-Net (3 in the paper).
        norm: ``"instance"`` or ``"batch"`` normalization.
        inverted: the decoder makes the other domain bright for dark, and a call turns it round. A buffer of that name
            keeps it with the weights.

    Shape:
        (B, in_channels, X, Y) to the same, in [0, 1]. Sides that ``2 ** (levels - 1)`` divides.

    Raises:
        ConfigError: a setting is out of bounds.
        ValueError: in a call, the strides do not divide the slice.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import SliceTranslator
        >>> SliceTranslator(in_channels=1, width=4)(torch.rand(2, 1, 12, 16)).shape
        torch.Size([2, 1, 12, 16])
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, levels: int = 3, norm: str = "instance", inverted: bool = False
    ) -> None:
        super().__init__()
        filters = filters_of(width, levels)
        self.register_buffer("inverted", torch.tensor(inverted))
        self.encoder = SliceEncoder(in_channels, filters, norm_of(norm))
        self.decoder = SliceDecoder(in_channels, filters, norm_of(norm))

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features of all levels of slices (B, in_channels, X, Y)."""
        return self.encoder(image)

    def decode(self, features: list[torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        """Translated slices (B, in_channels, X, Y) in [0, 1], as they are learnt, from slices and their features."""
        return torch.sigmoid(self.decoder(features).float()) * surrounds(image)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        translated = self.decode(self.encode(image), image)
        return torch.where(self.inverted, surrounds(image) - translated, translated)


class TargetAwareTranslator(nn.Module):
    """One direction of COSMOS: a `SliceTranslator` whose features a second decoder, ``G_S``, segments.

    Args:
        num_classes: with background.
        in_channels: image channels.
        width: see `SliceTranslator`.
        levels: see `SliceTranslator`.
        norm: see `SliceTranslator`.
        inverted: see `SliceTranslator`.

    Shape:
        (B, in_channels, X, Y) to the translated slices, as they are learnt, and to logits (B, num_classes, X, Y).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import TargetAwareTranslator
        >>> translated, logits = TargetAwareTranslator(num_classes=3, width=4)(torch.rand(2, 1, 12, 16))
        >>> tuple(translated.shape), tuple(logits.shape)
        ((2, 1, 12, 16), (2, 3, 12, 16))
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: int = 16,
        levels: int = 3,
        norm: str = "instance",
        inverted: bool = False,
    ) -> None:
        super().__init__()
        self.translator = SliceTranslator(in_channels, width, levels, norm, inverted)
        self.segmentation = SliceDecoder(num_classes, filters_of(width, levels), norm_of(norm))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.translator.encode(image)
        return self.translator.decode(features, image), self.segmentation(features)


class DomainTranslators(nn.Module):
    """Both directions: ``to_target`` translates source slices, ``to_source`` those of the target.

    Args:
        num_classes: with background.
        in_channels: image channels.
        width: see `SliceTranslator`.
        levels: see `SliceTranslator`.
        norm: see `SliceTranslator`.
        target_inverted: whether target slices come bright for dark. All that is learnt and compared is so; a call gives
            slices as the target shows them.

    Shape:
        source slices (B, in_channels, X, Y) to the same as the target shows them, in [0, 1].

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import DomainTranslators
        >>> network = DomainTranslators(num_classes=3, width=4)
        >>> network(torch.rand(2, 1, 12, 16)).shape, network.to_source(torch.rand(2, 1, 12, 16))[0].shape
        (torch.Size([2, 1, 12, 16]), torch.Size([2, 1, 12, 16]))
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: int = 16,
        levels: int = 3,
        norm: str = "instance",
        target_inverted: bool = False,
    ) -> None:
        super().__init__()
        self.to_target = TargetAwareTranslator(num_classes, in_channels, width, levels, norm, target_inverted)
        self.to_source = TargetAwareTranslator(num_classes, in_channels, width, levels, norm)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.to_target.translator(image)


class DomainDiscriminators(nn.Module):
    """One of MONAI's ``PatchDiscriminator`` for each domain, of which the last feature map, the score, is returned.

    ``PatchDiscriminator`` itself returns the feature maps of all layers, over which MONAI's ``PatchAdversarialLoss``
    would average, and has BatchNorm by default, in which the slices of a batch judge each other.

    Args:
        in_channels: image channels.
        width: channels of the first layer.
        layers: after the first one; each but the last halves the resolution. A score sees 16, 34 or 70 voxels along
            each axis with 1, 2 or 3 of them.
        norm: ``"instance"`` or ``"batch"`` normalization.

    Shape:
        (B, in_channels, X, Y) and the name of the domain, ``"source"`` or ``"target"``, to scores
        (B, 1, about X / 2 ** layers, about Y / 2 ** layers).

    Raises:
        ConfigError: the norm is unknown; or, in a call, a slice is too small for so many layers.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import DomainDiscriminators
        >>> DomainDiscriminators(in_channels=1, width=4, layers=2)(torch.rand(2, 1, 32, 48), "target").shape
        torch.Size([2, 1, 6, 10])
    """

    def __init__(self, in_channels: int = 1, width: int = 16, layers: int = 3, norm: str = "instance") -> None:
        super().__init__()
        self.layers = layers
        made = [PatchDiscriminator(2, width, in_channels, 1, layers, norm=norm_of(norm)) for _ in range(2)]
        self.source, self.target = made

    def forward(self, image: torch.Tensor, domain: str) -> torch.Tensor:
        least = 2 ** (self.layers + 2)
        if min(image.shape[2:]) < least:
            raise ConfigError(
                f"slices of {tuple(image.shape[2:])} voxels are too small for {self.layers} discriminator_layers, "
                f"expected {least} or more along both axes: choose a larger slice_size, or fewer layers"
            )
        scores: torch.Tensor = (self.source if domain == "source" else self.target)(image)[-1]
        return scores.float()
