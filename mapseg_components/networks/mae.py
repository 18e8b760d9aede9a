# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The multi-scale masked autoencoder of MAPSeg (arXiv 2303.09373, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mapseg_components.networks.decoders import ReconstructionDecoder
from mapseg_components.networks.encoder import ResidualEncoder

__all__ = ["MultiScaleMAE"]


class MultiScaleMAE(nn.Module):
    """One encoder and one decoder that reconstruct the hidden blocks of local patches and global views.

    The two scales share all weights, so that a local patch and a global view of equal size may be one batch. The hidden
    blocks of the input are already replaced (see ``mapseg_components.masking``).

    Args:
        in_channels: image channels.
        width: channels of the encoder (512 in the paper).
        depth: residual blocks of the encoder (8 in the paper).
        stride: the encoder's reduction, one number or one per axis (4 in the paper).
        decoder_channels: channels of the decoder (32 and 16 in the paper).
        norm_groups: groups of each GroupNorm.

    Shape:
        (B, in_channels, X, Y, Z) to the same, in [0, 1].

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import MultiScaleMAE
        >>> network = MultiScaleMAE(in_channels=1, width=8, depth=1, decoder_channels=(4, 2))
        >>> network(torch.rand(2, 1, 8, 12, 4)).shape
        torch.Size([2, 1, 8, 12, 4])
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        stride: Sequence[int] | int = 4,
        decoder_channels: tuple[int, int] = (32, 16),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.encoder = ResidualEncoder(in_channels, width, depth, stride, norm_groups)
        self.decoder = ReconstructionDecoder(width, in_channels, stride, decoder_channels, norm_groups)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(image))
