# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainers on MONAI's and Ignite's engines."""

from mapseg_components.engines.adaptation import AdaptationTrainer, UDATrainer
from mapseg_components.engines.adversarial import AdversarialTrainer
from mapseg_components.engines.nnunet import NNUNetTraining
from mapseg_components.engines.optimization import OptimizationStep
from mapseg_components.engines.pretraining import MAETrainer
from mapseg_components.engines.translation import ReplayBuffer, TranslationTrainer

__all__ = [
    "AdaptationTrainer",
    "AdversarialTrainer",
    "MAETrainer",
    "NNUNetTraining",
    "OptimizationStep",
    "ReplayBuffer",
    "TranslationTrainer",
    "UDATrainer",
]
