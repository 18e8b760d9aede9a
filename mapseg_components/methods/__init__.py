# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Methods of adaptation, one file each; all run in `mapseg_components.engines.AdaptationTrainer`.

Those with a discriminator run in its subclass `mapseg_components.engines.AdversarialTrainer`.
"""

from mapseg_components.methods.advent import AdvEnt, self_information
from mapseg_components.methods.base import Method, Pass
from mapseg_components.methods.buda_seg import BUDASeg, uncertainty_of
from mapseg_components.methods.consistency import MaskedConsistency, MeanTeacher, Supervised
from mapseg_components.methods.copy_paste import CopyPaste
from mapseg_components.methods.entropy import EntropyMinimization, norm_parameters
from mapseg_components.methods.fourier import FourierMixing, low_frequencies_from
from mapseg_components.methods.labels import ArgmaxLabels, PseudoLabel, Teacher, ViewLabels
from mapseg_components.methods.mapseg import MAPSeg
from mapseg_components.methods.self_training import SelfTraining, deep_weights

__all__ = [
    "AdvEnt",
    "ArgmaxLabels",
    "BUDASeg",
    "CopyPaste",
    "EntropyMinimization",
    "FourierMixing",
    "MAPSeg",
    "MaskedConsistency",
    "MeanTeacher",
    "Method",
    "Pass",
    "PseudoLabel",
    "SelfTraining",
    "Supervised",
    "Teacher",
    "ViewLabels",
    "deep_weights",
    "low_frequencies_from",
    "norm_parameters",
    "self_information",
    "uncertainty_of",
]
