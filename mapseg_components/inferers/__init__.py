# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference with global-local collaboration; mean probabilities of several weights."""

from mapseg_components.inferers.averaging import AveragingInferer
from mapseg_components.inferers.global_local import GlobalLocalSlidingWindowInferer

__all__ = ["AveragingInferer", "GlobalLocalSlidingWindowInferer"]
