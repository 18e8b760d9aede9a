# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoder, masked autoencoder, segmenters with one head and with two; translators; training passes of any network."""

from mapseg_components.networks.decoders import ASPP, ReconstructionDecoder, SegmentationHead
from mapseg_components.networks.discriminator import PatchScores
from mapseg_components.networks.encoder import ResidualBlock, ResidualEncoder
from mapseg_components.networks.heads import TwoHeadDynUNet, TwoHeads, both_heads, has_uncertainty
from mapseg_components.networks.mae import MultiScaleMAE
from mapseg_components.networks.passes import GlobalLocalPass, PlainPass, training_pass
from mapseg_components.networks.recomputation import Recomputable, prepare_network
from mapseg_components.networks.segmenter import GlobalLocalDeepLabV3
from mapseg_components.networks.translator import (
    DomainDiscriminators,
    DomainTranslators,
    SliceTranslator,
    TargetAwareTranslator,
)
from mapseg_components.networks.unet import GlobalLocalUNet, UNetEncoder, UNetMAE

__all__ = [
    "ASPP",
    "DomainDiscriminators",
    "DomainTranslators",
    "GlobalLocalDeepLabV3",
    "GlobalLocalPass",
    "GlobalLocalUNet",
    "MultiScaleMAE",
    "PatchScores",
    "PlainPass",
    "Recomputable",
    "ReconstructionDecoder",
    "ResidualBlock",
    "ResidualEncoder",
    "SegmentationHead",
    "SliceTranslator",
    "TargetAwareTranslator",
    "TwoHeadDynUNet",
    "TwoHeads",
    "UNetEncoder",
    "UNetMAE",
    "both_heads",
    "has_uncertainty",
    "prepare_network",
    "training_pass",
]
