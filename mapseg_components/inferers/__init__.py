# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference with global-local collaboration, in mixed precision; mean probabilities of several weights; nnU-Net's;
ONNX Runtime's."""

from mapseg_components.inferers.averaging import AveragingInferer
from mapseg_components.inferers.global_local import GlobalLocalSlidingWindowInferer
from mapseg_components.inferers.nnunet import NNUNetInferer
from mapseg_components.inferers.onnx_runtime import OnnxInferer
from mapseg_components.inferers.precision import AutocastInferer

__all__ = [
    "AutocastInferer",
    "AveragingInferer",
    "GlobalLocalSlidingWindowInferer",
    "NNUNetInferer",
    "OnnxInferer",
]
