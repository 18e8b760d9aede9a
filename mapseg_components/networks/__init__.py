# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks of MAPSeg: residual encoder, multi-scale masked autoencoder, global-local segmenter."""

from mapseg_components.networks.decoders import ASPP, ReconstructionDecoder, SegmentationHead
from mapseg_components.networks.encoder import ResidualBlock, ResidualEncoder
from mapseg_components.networks.mae import MultiScaleMAE
from mapseg_components.networks.recomputation import Recomputable, prepare_network
from mapseg_components.networks.segmenter import GlobalLocalDeepLabV3, GlobalLocalOutput, GlobalLocalPass

__all__ = [
    "ASPP",
    "GlobalLocalDeepLabV3",
    "GlobalLocalOutput",
    "GlobalLocalPass",
    "MultiScaleMAE",
    "Recomputable",
    "ReconstructionDecoder",
    "ResidualBlock",
    "ResidualEncoder",
    "SegmentationHead",
    "prepare_network",
]
