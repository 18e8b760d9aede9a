# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Picture of the differences between the scans of several sites, from the output of a statistics job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import replacing
from mapseg_components.reports.preview import as_written

__all__ = ["draw_domain_gap", "sites_of"]

TOTAL = "Global"  # NVFlare's name of all sites together
INTENSITY = "intensity"
# feature: title, and whether its values are decimal logarithms of mm3, shown in ml
PANELS = {
    "log10_field_of_view_mm3": ("field of view, ml", True),
    "log10_foreground_mm3": ("foreground, ml", True),
    "least_voxel_side_mm": ("least voxel side, mm", False),
    "greatest_voxel_side_mm": ("greatest voxel side, mm", False),
}


def sites_of(statistics: dict[str, Any]) -> list[str]:
    """Sites with statistics, sorted."""
    return sorted(set(statistics[INTENSITY]["histogram"]) - {TOTAL})


def draw_domain_gap(result: str | Path, path: str | Path, asked: Sequence[str] = ()) -> list[str]:
    """Write a PNG: intensities of the foreground by site, and beside them volumes and voxel sides, mean and deviation.

    Args:
        result: JSON file of NVFlare's statistics job.
        path: PNG file to write.
        asked: sites of the job, to name those that are missing.

    Returns:
        the sites of ``asked`` without an answer.

    Raises:
        ConfigError: matplotlib is missing.
        DataError: the file is no such result.
        ResourceError: the picture cannot be written.
    """
    figure_module, drawable = optional_import("matplotlib.figure")
    if not drawable:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install matplotlib")
    try:
        statistics = json.loads(Path(result).read_text(encoding="utf-8"))
        sites = sites_of(statistics)
        histograms = {site: only(statistics[INTENSITY]["histogram"][site]) for site in sites}
        scans = {site: only(statistics[INTENSITY]["count"][site]) for site in sites}
        rows = {name: [[only(statistics[name][k][s]) for s in sites] for k in ("mean", "stddev")] for name in PANELS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{result} is no result of the statistics job ({type(error).__name__}: {error}): give domain_gap.json of "
            "its folder at the server"
        ) from error
    missing = sorted(set(asked) - set(sites))
    figure = figure_module.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axis = left.subplots()
    colours = {site: f"C{number % 10}" for number, site in enumerate(sites)}
    for site, bins in histograms.items():
        edges = [*(each[0] for each in bins), bins[-1][1]]
        axis.stairs([each[2] for each in bins], edges, color=colours[site], label=f"{site}, {scans[site]} scans")
    axis.set_xlabel("intensity (0: lowest value, 1: 99.5th percentile of each scan)")
    axis.set_ylabel("% of the foreground of an average scan")
    legend = axis.legend(fontsize=8, title=f"no answer: {', '.join(missing)}" if missing else None, title_fontsize=8)
    as_written(legend)
    legend.get_title().set_parse_math(False)
    for panel, (name, (title, logarithmic)) in zip(right.subplots(2, 2).ravel(), PANELS.items()):
        for number, (site, mean, spread) in enumerate(zip(sites, *rows[name])):
            panel.errorbar(mean, -number, xerr=spread, fmt="o", color=colours[site])
        if logarithmic:
            panel.xaxis.set_major_formatter(lambda value, _: f"{10**value / 1000:,.0f}")
        panel.locator_params(axis="x", nbins=4)
        panel.set_title(title, fontsize=9)
        panel.set_yticks([])
        panel.set_ylim(-len(sites) + 0.5, 0.5)
        panel.tick_params(labelsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return missing


def only(content: dict[str, Any]) -> Any:
    """The value of a dictionary with one entry."""
    (value,) = content.values()
    return value
