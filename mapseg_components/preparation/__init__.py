# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``mapseg prepare`` is made of: settings, jobs, the processing of one scan, and the run over all."""
