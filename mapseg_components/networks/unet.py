# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A U-Net of MONAI's DynUNet blocks with MAPSeg's global-local collaboration at its bottleneck."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetUpBlock
from torch import nn

from mapseg_components.boxes import resample_box
from mapseg_components.networks.decoders import PatchUpsample, conv_norm_relu
from mapseg_components.networks.heads import TwoHeads
from mapseg_components.networks.slices import as_slices

__all__ = ["GlobalLocalUNet", "UNetEncoder", "UNetMAE"]

Sides = Sequence[Sequence[int] | int]


def group_norm_of(channels: int, groups: int) -> tuple[str, dict[str, int | bool]]:
    """MONAI's name of a GroupNorm with the largest number of groups up to ``groups`` that divides the channels."""
    return "group", {"num_groups": math.gcd(channels, groups), "affine": True}


class UNetEncoder(nn.Module):
    """One `UnetBasicBlock` a level; the first one may reduce the grid as well, which makes the network cheap.

    Args:
        in_channels: image channels.
        filters: channels of each level.
        kernel_size: of each level, one number or one per axis.
        strides: of each level; the first is that of the image.
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, X, Y, Z) to features of all levels, the deepest first.

    Raises:
        ValueError: in a call, the strides do not divide the image.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import UNetEncoder
        >>> encoder = UNetEncoder(1, filters=[8, 16], kernel_size=[3, 3], strides=[(2, 2, 1), 2])
        >>> [tuple(level.shape) for level in encoder(torch.rand(1, 1, 8, 12, 4))]
        [(1, 16, 2, 3, 2), (1, 8, 4, 6, 4)]
    """

    def __init__(
        self, in_channels: int, filters: Sequence[int], kernel_size: Sides, strides: Sides, norm_groups: int = 8
    ) -> None:
        super().__init__()
        steps = [(step,) * 3 if isinstance(step, int) else tuple(step) for step in strides]
        self.stride = [math.prod(step[axis] for step in steps) for axis in range(3)]
        self.levels = nn.ModuleList(
            UnetBasicBlock(3, before, channels, kernel, step, group_norm_of(channels, norm_groups))
            for before, channels, kernel, step in zip([in_channels, *filters], filters, kernel_size, steps)
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        for axis, step in enumerate(self.stride):
            if image.shape[2 + axis] % step != 0:
                raise ValueError(
                    f"image of spatial shape {list(image.shape[2:])} is not divisible by the network's strides, "
                    f"together {self.stride}: choose a patch size that they divide, or pad the image"
                )
        features = [image]
        for level in self.levels:
            features.insert(0, level(features[0]))
        return features[:-1]


class GlobalLocalUNet(TwoHeads):
    """U-Net ``f(x) = h(g(x) + crop(g(X)))``: skip connections of the patch, context of the view at the bottleneck.

    What `GlobalLocalDeepLabV3` is to the paper's sizes, this is to short trainings: a first level of half the
    resolution, skip connections, and kernels and strides that follow the voxels' sides. An image alone is its own
    context.

    Args:
        in_channels: image channels.
        num_classes: output channels, background included.
        filters: channels of each level.
        kernel_size: of each level, one number or one per axis.
        strides: of each level; the first is that of the image, undone by the last layer.
        norm_groups: groups of each GroupNorm.
        variance: of an uncertainty of each logit, see `TwoHeads`; ``None`` for none.

    Shape:
        image (B, in_channels, X, Y, Z) to logits (B, num_classes, X, Y, Z).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import GlobalLocalUNet
        >>> network = GlobalLocalUNet(1, 3, filters=[8, 16], kernel_size=[3, 3], strides=[(2, 2, 1), 2])
        >>> patch, view = torch.rand(1, 1, 16, 8, 12), torch.rand(1, 1, 8, 8, 8)
        >>> box = torch.tensor([[[0.0, 4.0], [0.0, 8.0], [2.0, 6.0]]])  # the patch in voxels of the view
        >>> network(patch).shape, network(patch, view, box).shape
        (torch.Size([1, 3, 16, 8, 12]), torch.Size([1, 3, 16, 8, 12]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        filters: Sequence[int],
        kernel_size: Sides,
        strides: Sides,
        norm_groups: int = 8,
        variance: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = UNetEncoder(in_channels, filters, kernel_size, strides, norm_groups)
        self.fusion = conv_norm_relu(2 * filters[-1], filters[-1], 1, norm_groups)
        self.levels = nn.ModuleList(
            UnetUpBlock(3, below, channels, kernel, 1, step, group_norm_of(channels, norm_groups))
            for channels, below, kernel, step in zip(filters, filters[1:], kernel_size, list(strides)[1:])
        )
        first = [strides[0]] * 3 if isinstance(strides[0], int) else list(strides[0])
        channels = self.channels(num_classes, variance)
        self.head: nn.Module = UnetOutBlock(3, filters[0], channels)
        if first != [1, 1, 1]:
            self.head = PatchUpsample(filters[0], channels, first)
        self.set_heads(variance, self.head)
        as_slices(self)

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features of an image (B, in_channels, X, Y, Z), the deepest level first."""
        return self.encoder(image)

    def context(
        self, global_features: torch.Tensor, box: torch.Tensor, global_size: list[int], feature_size: list[int]
    ) -> torch.Tensor:
        """See `GlobalLocalDeepLabV3.context`; of features of the deepest level."""
        per_voxel = [global_features.shape[2 + axis] / global_size[axis] for axis in range(3)]
        scale = torch.tensor(per_voxel, device=box.device, dtype=torch.float32)
        return resample_box(global_features, box.to(torch.float32) * scale[:, None], feature_size)

    def decode(self, features: list[torch.Tensor], context: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, num_classes, X, Y, Z) from features of all levels and context of the deepest."""
        deep = features[0]
        result = self.fusion(deep if context is None else torch.cat([deep, context], dim=1))
        last = len(self.levels) - 1
        for step in range(len(self.levels)):
            for number, level in enumerate(self.levels):  # the deepest first: TorchScript has no reversed
                if number == last - step:
                    result = level(result, features[1 + step])
        return self.shown(self.head(result))

    def forward(
        self, image: torch.Tensor, global_image: torch.Tensor | None = None, box: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `GlobalLocalDeepLabV3.forward`."""
        features = self.encode(image)
        if global_image is None and box is None:
            return self.decode(features)
        if global_image is None or box is None:
            raise ValueError("global_image and box belong together: give both for collaboration, none for one image")
        context = self.context(
            self.encode(global_image)[0], box, list(global_image.shape[2:]), list(features[0].shape[2:])
        )
        return self.decode(features, context)


class UNetMAE(GlobalLocalUNet):
    """The masked autoencoder whose encoder is that of a `GlobalLocalUNet`, for `mapseg_pretraining`.

    Args:
        in_channels: image channels.
        filters: channels of each level, here and below as of the network that will be trained.
        kernel_size: of each level.
        strides: of each level.
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, X, Y, Z) to the same, in [0, 1].

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import UNetMAE
        >>> network = UNetMAE(1, filters=[8, 16], kernel_size=[3, 3], strides=[2, 2])
        >>> network(torch.rand(1, 1, 8, 12, 4)).shape
        torch.Size([1, 1, 8, 12, 4])
    """

    def __init__(
        self, in_channels: int, filters: Sequence[int], kernel_size: Sides, strides: Sides, norm_groups: int = 8
    ) -> None:
        super().__init__(in_channels, in_channels, filters, kernel_size, strides, norm_groups)

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Reconstruction of an image whose hidden blocks are replaced."""
        return torch.sigmoid(self.decode(self.encode(image)))
