# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan: its header, voxels and facts, from NIfTI or DICOM, and what is written beside it.

The public names are those of `mapseg_components.data`.
"""
