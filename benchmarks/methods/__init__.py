# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The methods of ``mapseg adapt`` side by side on a task, see docs/reference/benchmark.md: ``make benchmark``."""
