# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference with global-local collaboration."""

from mapseg_components.inferers.global_local import GlobalLocalSlidingWindowInferer

__all__ = ["GlobalLocalSlidingWindowInferer"]
