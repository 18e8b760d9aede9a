# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The segmenter of MAPSeg with global-local collaboration (arXiv 2303.09373, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from mapseg_components.boxes import resample_box
from mapseg_components.networks.decoders import ASPP, SegmentationHead
from mapseg_components.networks.encoder import ResidualEncoder
from mapseg_components.networks.heads import TwoHeads

__all__ = ["GlobalLocalDeepLabV3"]


class GlobalLocalDeepLabV3(TwoHeads):
    """Encoder g, decoder h (ASPP and head): ``f(x) = h(g(x) + crop(g(X)))``, where + concatenates channels.

    On one image alone the feature is duplicated, ``f(X) = h(g(X) + g(X))``: tools that know nothing of a global view
    (sliding windows, exporters, bundle verification) call ``network(image)``.

    Args:
        in_channels: image channels.
        num_classes: output channels, background included.
        width: channels of the encoder and of ASPP's branches (512 in the paper).
        depth: residual blocks of the encoder (8 in the paper).
        stride: the encoder's reduction, one number or one per axis (4 in the paper).
        dilations: of ASPP's 3x3x3 branches, in feature voxels (4, 8, 16 in the paper).
        head_channels: channels of the head at full resolution (64 in the paper).
        dropout: after ASPP's projection (0.1 in the paper).
        norm_groups: groups of each GroupNorm of the encoder.
        decoder_norm_groups: groups of each GroupNorm of the decoder.
        variance: of an uncertainty of each logit, see `TwoHeads`; ``None`` (the paper) for none.

    Shape:
        image (B, in_channels, X, Y, Z) to logits (B, num_classes, X, Y, Z).

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import GlobalLocalDeepLabV3
        >>> network = GlobalLocalDeepLabV3(in_channels=1, num_classes=3, width=8, depth=1, dilations=[1])
        >>> patch, view = torch.rand(1, 1, 16, 8, 12), torch.rand(1, 1, 8, 8, 8)
        >>> network(patch).shape
        torch.Size([1, 3, 16, 8, 12])
        >>> box = torch.tensor([[[0.0, 4.0], [0.0, 8.0], [2.0, 6.0]]])  # the patch in voxels of the view
        >>> network(patch, view, box).shape
        torch.Size([1, 3, 16, 8, 12])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int,
        depth: int,
        stride: Sequence[int] | int = 4,
        dilations: Sequence[int | Sequence[int]] = (4, 8, 16),
        head_channels: int = 64,
        dropout: float = 0.1,
        norm_groups: int = 32,
        decoder_norm_groups: int = 8,
        variance: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = ResidualEncoder(in_channels, width, depth, stride, norm_groups)
        self.aspp = ASPP(2 * width, width, dilations, dropout, decoder_norm_groups)
        channels = self.channels(num_classes, variance)
        self.head = SegmentationHead(width, channels, stride, head_channels, decoder_norm_groups)
        self.set_heads(variance, self.head)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Features (B, width, X/s, Y/s, Z/s) of an image (B, in_channels, X, Y, Z)."""
        return self.encoder(image)

    def context(
        self, global_features: torch.Tensor, box: torch.Tensor, global_size: list[int], feature_size: list[int]
    ) -> torch.Tensor:
        """The part of the global features that covers a local patch, on the grid of the local features.

        Args:
            global_features: (B, width, ...), from `encode` of the global view.
            box: (B, 3, 2), the local patch in voxels of the global view, continuous and half-open.
            global_size: voxels per axis of the global view.
            feature_size: grid of the local features.

        Returns:
            (B, width, *feature_size).
        """
        per_voxel = [global_features.shape[2 + axis] / global_size[axis] for axis in range(3)]
        scale = torch.tensor(per_voxel, device=box.device, dtype=torch.float32)
        return resample_box(global_features, box.to(torch.float32) * scale[:, None], feature_size)

    def decode(self, features: torch.Tensor, context: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Logits (B, num_classes, X, Y, Z) from local features and context, both (B, width, X/s, Y/s, Z/s).

        Without context the features are their own; ASPP then folds its weights instead of reading them twice.
        """
        found = self.head(self.aspp(features if context is None else torch.cat([features, context], dim=1)))
        return self.shown(found)

    def forward(
        self, image: torch.Tensor, global_image: Optional[torch.Tensor] = None, box: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Logits of an image, with global-local collaboration if a global view and the image's box in it are given.

        Args:
            image: (B, in_channels, X, Y, Z).
            global_image: (B, in_channels, X', Y', Z'), the whole foreground on the patch grid.
            box: (B, 3, 2), the image in voxels of ``global_image``, continuous and half-open.

        Returns:
            logits (B, num_classes, X, Y, Z).

        Raises:
            ValueError: only one of ``global_image`` and ``box`` is given.
        """
        features = self.encode(image)
        if global_image is None and box is None:
            return self.decode(features)
        if global_image is None or box is None:
            raise ValueError("global_image and box belong together: give both for collaboration, none for one image")
        context = self.context(self.encode(global_image), box, list(global_image.shape[2:]), list(features.shape[2:]))
        return self.decode(features, context)
