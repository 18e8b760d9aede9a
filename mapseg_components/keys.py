# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Names of everything that travels in a batch or in an engine's output."""

from __future__ import annotations

IMAGE = "image"
LABEL = "label"
PRED = "pred"
DOMAIN = "domain"
CASE_ID = "case_id"
# Of a case without an image: the label map whose values an image is synthesised from. It stands for the image as well.
TISSUES = "tissues"
MASK = "mask"  # file of a mask, 0 where the scan does not count

# What inference may add to a case: the largest probability of each voxel, and the probabilities of all classes.
CONFIDENCE = "confidence"
PROBABILITIES = "probabilities"
# ... and the mean absolute uncertainty of its logits, of a network with two heads.
UNCERTAINTY = "uncertainty"

# What a crop with a global view adds to image and label, see `mapseg_components.transforms.RandGlobalLocalCropd`.
BOX = "box"
VALID_BOX = "valid_box"
GLOBAL_IMAGE = "global_image"
GLOBAL_LABEL = "global_label"

# The two sides of an adaptation batch, see `mapseg_components.data.SourceTargetLoader`.
SOURCE = "source"
TARGET = "target"

# Engine outputs: the weighted sum; every other entry is one unweighted loss term.
TOTAL_LOSS = "loss"
# Mean of the terms that the method names for selection, the label-free half of the Score.
TARGET_LOSS = "target_loss"
