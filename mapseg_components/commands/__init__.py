# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands of ``mapseg``, each a function of the same name and arguments."""

from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.check import check
from mapseg_components.commands.evaluate import evaluate
from mapseg_components.commands.predict import predict
from mapseg_components.commands.prepare import prepare
from mapseg_components.commands.report import report
from mapseg_components.commands.restore import restore

__all__ = ["adapt", "check", "evaluate", "predict", "prepare", "report", "restore"]
