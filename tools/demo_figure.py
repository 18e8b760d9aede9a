#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw a finished ``mapseg demo`` for the README: python tools/demo_figure.py [runs/demo] [docs/images/demo.png].

A slice of a source scan with its labels, a slice of a test scan with the truth, and the label maps of the three models
with their mean Dice. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.boxes import box_of_mask
from mapseg_components.colours import structure_colours
from mapseg_components.commands.demo_adapt import FIGURES, MODELS, PREDICTIONS
from mapseg_components.data import load_datalist, read_nifti
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import replacing
from mapseg_components.shipped_files import sample_folder
from mapseg_components.transforms.resampling import to_canonical

ROOT = Path(__file__).resolve().parents[1]
PIXELS = 900  # width of the README's column; letters are readable without a click
DPI = 200
LEVEL = 0.55  # of the brain's height, from below: the lateral ventricles
BRIGHTEST = 99.0  # percentile of the brain that is shown as white
MARGIN = 2  # voxels around the brain


def axial(*paths: str | Path) -> list[np.ndarray]:
    """The same axial slice of scans on one grid, cropped to the first one's brain; anterior is up, right is left."""
    volumes = []
    for path in paths:
        scan = read_nifti(path)
        volumes.append(to_canonical(scan.voxels, scan.affine)[0])
    box = box_of_mask(volumes[0] > 0)
    level = round(box[2, 0] + LEVEL * (box[2, 1] - box[2, 0]))
    part = tuple(slice(max(low - MARGIN, 0), high + MARGIN) for low, high in box[:2])
    return [volume[part][:, :, level].T[::-1, ::-1] for volume in volumes]


def demo_figure(folder: Path) -> Figure:
    """The figure of a demo's folder. Raises `ConfigError` if no demo on the adults has finished there."""
    if not (folder / FIGURES).is_file():
        raise ConfigError(f"{folder} has no {FIGURES}: let mapseg demo finish there first")
    results: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    if not set(MODELS) <= set(results):
        raise ConfigError(f"{folder / FIGURES} lacks {sorted(set(MODELS) - set(results))}: it is of another demo")
    sample = sample_folder(results["sample"])
    source, test = (load_datalist(sample, section)[0] for section in ("source_training", "target_test"))
    found = [folder / PREDICTIONS / own / f"{test['case_id']}_seg.nii.gz" for own in MODELS.values()]
    source_grey, source_map = axial(source["image"], source["label"])
    grey, *maps = axial(test["image"], test["label"], *found)
    names = list(results["adapted"]["structures"])
    palette = structure_colours(len(names))

    panels: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [
        ("T1w", "has labels", source_grey, None),
        ("its labels", "", source_grey, source_map),
        ("T2w, another person", "has no labels", grey, None),
        ("trained on T1w", f"Dice {results['source-only']['mean']:.2f}", grey, maps[1]),
        ("… in random contrasts", f"Dice {results['source-only, random contrasts']['mean']:.2f}", grey, maps[2]),
        ("… and adapted to T2w", f"Dice {results['adapted']['mean']:.2f}", grey, maps[3]),
        ("truth (silver labels)", "", grey, maps[0]),
    ]
    # the first row is what there is, the second what comes out
    figure = Figure(figsize=(PIXELS / 100, 6.4), facecolor="white")
    grid = figure.add_gridspec(2, 12, left=0.01, right=0.99, top=0.94, bottom=0.11, wspace=0.15, hspace=0.32)
    places = [grid[0, start : start + 3] for start in (1, 4, 8)] + [grid[1, 3 * k : 3 * k + 3] for k in range(4)]
    for place, (title, below, image, labels) in zip(places, panels):
        axis = figure.add_subplot(place)
        white = np.percentile(image[image > 0], BRIGHTEST)
        shown = np.ma.masked_equal(image, 0)  # the page shows through outside of the brain
        axis.imshow(shown, cmap="gray", vmin=0, vmax=white, interpolation="bilinear" if labels is None else "nearest")
        if labels is not None:
            overlay = np.ma.masked_equal(labels, 0)
            axis.imshow(overlay, cmap=ListedColormap(palette), vmin=1, vmax=len(names), interpolation="nearest")
        axis.set_title(title, fontsize=13, pad=5)
        strong = "bold" if title.endswith("adapted to T2w") else "normal"
        axis.text(0.5, -0.03, below, transform=axis.transAxes, ha="center", va="top", fontsize=14, fontweight=strong)
        axis.axis("off")
    handles = [Patch(color=colour, label=name) for colour, name in zip(palette, names)]
    figure.legend(handles=handles, loc="lower center", ncol=len(names), frameon=False, fontsize=13)
    return figure


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "runs" / "demo", help="of a finished demo")
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "docs" / "images" / "demo.png", help="a PNG")
    arguments = parser.parse_args()
    try:
        figure = demo_figure(arguments.folder)
        with replacing(arguments.output) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
    except MAPSegError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(arguments.output)


if __name__ == "__main__":
    main()
