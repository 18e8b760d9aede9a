# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What is fast, by how much, and whether it is still right: see docs/reference/performance.md."""
