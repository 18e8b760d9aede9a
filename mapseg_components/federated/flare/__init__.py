# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Federated adaptation between real sites, on NVFlare (extra ``fl``). Import its modules by their names."""
