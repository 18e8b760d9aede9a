# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a user would pick instead, at equal work: nnU-Net v2, and MONAI without this package."""
