# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``mapseg predict`` is made of: its input, bundle, output, the run over the scans, and the manifest."""
