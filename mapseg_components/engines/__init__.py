# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainers of MAPSeg on MONAI's and Ignite's engines."""

from mapseg_components.engines.adaptation import UDATrainer
from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.engines.pretraining import MAETrainer

__all__ = ["MAETrainer", "OptimizationStep", "UDATrainer"]
