# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One colour per structure, the same in figures, label lookup files and reports.

The first seven are those of Okabe and Ito (2008), distinct for any colour vision; the eighth stands for their black,
which does not show on a scan. Beyond eight structures lighter and darker tones follow, and from 24 on they repeat.
"""

from __future__ import annotations

__all__ = ["structure_colours"]

BASE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#882255")
# share of white, then of black, in the tones of the second and third round
TINT, SHADE = 0.55, 0.45


def structure_colours(count: int) -> list[str]:
    """Colours ``#RRGGBB`` of structures 1 to ``count``; the background has none."""
    tones = [*BASE, *(mixed(colour, 255, TINT) for colour in BASE), *(mixed(colour, 0, SHADE) for colour in BASE)]
    return [tones[number % len(tones)] for number in range(count)]


def channels(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#RRGGBB``, each 0 to 255."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue


def mixed(colour: str, other: int, share: float) -> str:
    """A colour mixed with a grey level."""
    return "#" + "".join(f"{round(value * (1 - share) + other * share):02X}" for value in channels(colour))
