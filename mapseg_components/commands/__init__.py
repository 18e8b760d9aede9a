# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands of `mapseg`, as functions of the same names and arguments."""

from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.report import report

__all__ = ["adapt", "report"]
