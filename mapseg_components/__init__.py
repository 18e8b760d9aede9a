# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Components of the MAPSeg bundles: unsupervised domain adaptation for 3D medical image segmentation.

The package does no work at import. Take what you need from the sub-packages ``networks``, ``transforms``,
``losses``, ``engines``, ``handlers``, ``inferers`` and ``data``.
"""

__version__ = "0.1.0"
