# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What an adaptation will do, before it does it: cases and structures, sizes, stages of a method, the new bundle."""
