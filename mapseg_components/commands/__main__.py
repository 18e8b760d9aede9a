# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m mapseg_components.commands`` is ``mapseg``."""

from __future__ import annotations

import sys

from mapseg_components.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
