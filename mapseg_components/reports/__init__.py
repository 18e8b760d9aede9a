# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Output for people: tables of text, pages of HTML, pictures."""

from mapseg_components.reports.comparison import ComparedScan, draw_comparison
from mapseg_components.reports.curves import FIGURES_STYLE, curves, small_multiples
from mapseg_components.reports.page import answer, page, sortable_table
from mapseg_components.reports.preview import can_draw, draw_preview
from mapseg_components.reports.slices import SLICES_SCRIPT, SLICES_STYLE, slice_viewer
from mapseg_components.reports.tables import text_table
from mapseg_components.reports.uncertainty import uncertainty_section

__all__ = [
    "ComparedScan",
    "FIGURES_STYLE",
    "SLICES_SCRIPT",
    "SLICES_STYLE",
    "answer",
    "can_draw",
    "curves",
    "draw_comparison",
    "draw_preview",
    "page",
    "slice_viewer",
    "small_multiples",
    "sortable_table",
    "text_table",
    "uncertainty_section",
]
