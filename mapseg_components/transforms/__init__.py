# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Transforms of MAPSeg in MONAI's conventions, for any MONAI ``Compose``."""

from mapseg_components.transforms.background import RestoreBackgroundd
from mapseg_components.transforms.bias_field import RandGlobalLocalBiasFieldd
from mapseg_components.transforms.block_mask import RandBlockMask, RandBlockMaskd
from mapseg_components.transforms.components import (
    FillEnclosed,
    FillEnclosedd,
    KeepComponents,
    KeepComponentsd,
    named_classes,
    named_numbers,
)
from mapseg_components.transforms.contrast import (
    RandGlobalLocalAdjustContrastd,
    RandGlobalLocalHistogramShiftd,
    RandGlobalLocalIntensityCurved,
)
from mapseg_components.transforms.foreground import AxisExtremesd, ClassVoxelsd
from mapseg_components.transforms.frame import WorkingFrame, WorkingFramed, WorkingSpacingd
from mapseg_components.transforms.intensity import FillNonFinite, FillNonFinited, NegativeValues, NegativeValuesd
from mapseg_components.transforms.labels import SelectLabels, SelectLabelsd
from mapseg_components.transforms.native import ArgmaxOnScand
from mapseg_components.transforms.orientation import AssumeOrientation, AssumeOrientationd
from mapseg_components.transforms.pairing import RandGlobalLocalCrop, RandGlobalLocalCropd
from mapseg_components.transforms.percentiles import (
    PercentileClip,
    PercentileClipd,
    PercentileTabled,
    RandPercentileClip,
    RandPercentileClipd,
)
from mapseg_components.transforms.probabilities import Confidenced, Probabilitiesd, save_probabilities
from mapseg_components.transforms.resampling import nearest_only
from mapseg_components.transforms.saving import SaveLabelMap, SaveLabelMapd, SaveVolume, SaveVolumed
from mapseg_components.transforms.synthesis import RandGlobalLocalSynthesisd
from mapseg_components.transforms.tissue import ClearOutsided, IgnoreOutsided, RaiseTissued, WithoutIgnoredd
from mapseg_components.transforms.uncertainty import Uncertaintyd

__all__ = [
    "ArgmaxOnScand",
    "FillEnclosed",
    "FillEnclosedd",
    "FillNonFinite",
    "FillNonFinited",
    "AssumeOrientation",
    "AssumeOrientationd",
    "AxisExtremesd",
    "ClassVoxelsd",
    "ClearOutsided",
    "Confidenced",
    "IgnoreOutsided",
    "KeepComponents",
    "KeepComponentsd",
    "NegativeValues",
    "NegativeValuesd",
    "PercentileClip",
    "PercentileClipd",
    "PercentileTabled",
    "Probabilitiesd",
    "RaiseTissued",
    "RandBlockMask",
    "RandBlockMaskd",
    "RandGlobalLocalAdjustContrastd",
    "RandGlobalLocalBiasFieldd",
    "RandGlobalLocalCrop",
    "RandGlobalLocalCropd",
    "RandGlobalLocalHistogramShiftd",
    "RandGlobalLocalIntensityCurved",
    "RandGlobalLocalSynthesisd",
    "RandPercentileClip",
    "RandPercentileClipd",
    "RestoreBackgroundd",
    "SaveLabelMap",
    "SaveLabelMapd",
    "SaveVolume",
    "SaveVolumed",
    "SelectLabels",
    "SelectLabelsd",
    "Uncertaintyd",
    "named_classes",
    "named_numbers",
    "nearest_only",
    "save_probabilities",
    "WithoutIgnoredd",
    "WorkingFrame",
    "WorkingFramed",
    "WorkingSpacingd",
]
