# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers of MAPSeg: teacher, selection by Score, checkpoints, weights, history, reports, progress."""

from mapseg_components.handlers.chain import HandlerChain
from mapseg_components.handlers.checkpointing import TrainingCheckpoint, WeightsLoader
from mapseg_components.handlers.diagnostics import TargetDiagnostics
from mapseg_components.handlers.ema_teacher import EMATeacher
from mapseg_components.handlers.history import DiceReport, EpochHistory, VolumesTable
from mapseg_components.handlers.label_rounds import PseudoLabelRounds
from mapseg_components.handlers.progress import LossProgressBar
from mapseg_components.handlers.scoring import ScoreCheckpoint, TeacherValidation
from mapseg_components.handlers.share_limits import ShareLimits
from mapseg_components.handlers.translation import TranslationPictures

__all__ = [
    "DiceReport",
    "EMATeacher",
    "EpochHistory",
    "HandlerChain",
    "LossProgressBar",
    "PseudoLabelRounds",
    "ScoreCheckpoint",
    "ShareLimits",
    "TargetDiagnostics",
    "TeacherValidation",
    "TrainingCheckpoint",
    "TranslationPictures",
    "VolumesTable",
    "WeightsLoader",
]
