# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The hand-over package: all that a target site gets from a source site, and no image (MAPSeg, section 3.6).

A package is a folder of two files::

    weights.pt      the segmenter's weights, tensors only
    handover.json   the network and settings, label table, voxel size and extent of the source's scans, checksum of the
                    weights, source validation Dice, volumes of the structures (rounded, over several scans), versions

A folder and not an archive: a person can read ``handover.json`` before it is sent, and every tool that takes weights
takes ``weights.pt`` as it is.
"""

from mapseg_components.handover.from_bundle import package_of_bundle
from mapseg_components.handover.package import HandoverPackage, SourceOnlyWeights
from mapseg_components.handover.resizing import resize_package, resized_spacing
from mapseg_components.handover.writing import volume_priors, write_handover

__all__ = [
    "HandoverPackage",
    "SourceOnlyWeights",
    "package_of_bundle",
    "resize_package",
    "resized_spacing",
    "volume_priors",
    "write_handover",
]
