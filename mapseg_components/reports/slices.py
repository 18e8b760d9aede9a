# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A scan and label maps slice by slice in three planes, as HTML with a slider per plane."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from monai.utils import optional_import

from mapseg_components.colours import channels, structure_colours

__all__ = ["SLICES_SCRIPT", "SLICES_STYLE", "slice_viewer"]

MOST_SLICES = 32
PANE_WIDTH = 220  # pixels
OPACITY = 170  # of 255
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
SLICES_STYLE = """
.viewer { margin: 1rem 0 2rem; } .plane { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
.pane { background-color: #000; background-repeat: no-repeat; image-rendering: pixelated; position: relative; }
.pane span { position: absolute; left: 4px; top: 2px; color: #fff; font-size: .75rem; text-shadow: 0 0 3px #000; }
input[type=range] { width: min(100%, 26rem); display: block; }
"""
SLICES_SCRIPT = """
document.querySelectorAll("input[type=range]").forEach(function (slider) {
  var panes = slider.parentElement.querySelectorAll(".pane"), text = slider.parentElement.querySelector("output");
  var move = function () {
    panes.forEach(function (pane) { pane.style.backgroundPositionY = -slider.value * pane.dataset.height + "px"; });
    text.textContent = slider.dataset.name + ", slice " + (+slider.value + 1) + " of " + (+slider.max + 1);
  };
  slider.addEventListener("input", move); move();
});
"""


def slice_viewer(
    scan: np.ndarray, spacing: Sequence[float], label_maps: Mapping[str, np.ndarray], classes: int, case: str
) -> str:
    """HTML of one scan; the page needs `SLICES_STYLE` and `SLICES_SCRIPT`.

    Coronal and axial slices show the right side of the body on the left. At most 32 slices per plane are kept.

    Args:
        scan: (X, Y, Z) on axes to the right, to the front and up. spacing: mm per axis.
        label_maps: title to class indices of the same shape. classes: number of classes, background included.
        case: name of the scan.
    """
    grey = np.clip(scan / max(float(np.percentile(scan, 99.5)), 1e-6), 0, 1)
    image_type, _ = optional_import("PIL", name="Image")
    planes = []
    for plane, axis in PLANES.items():
        chosen = slices_of(grey, axis)
        across, up = (grey.shape[other] * float(spacing[other]) for other in range(3) if other != axis)
        height = max(round(PANE_WIDTH * up / across), 1)
        strip = png(image_type.fromarray((stack(grey, axis, chosen) * 255).astype(np.uint8)))
        panes = [pane("scan", [strip], height, len(chosen))]
        for title, label_map in label_maps.items():
            coloured = png(overlay(stack(label_map, axis, chosen), classes))
            panes.append(pane(title, [coloured, strip], height, len(chosen)))
        last = len(chosen) - 1
        planes.append(
            f'<div><div class="plane">{"".join(panes)}</div><output></output>'
            f'<input type="range" min="0" max="{last}" value="{last // 2}" data-name="{plane}"'
            f' aria-label="{plane} slice"></div>'
        )
    return f'<div class="viewer" data-case="{escape(case)}">{"".join(planes)}</div>'


def slices_of(grey: np.ndarray, axis: int) -> np.ndarray:
    """Evenly spaced slices of the part that is not empty, at most `MOST_SLICES`."""
    filled = np.flatnonzero((grey > 0.02).any(axis=tuple(other for other in range(3) if other != axis)))
    low, high = (int(filled[0]), int(filled[-1])) if len(filled) else (0, grey.shape[axis] - 1)
    return np.unique(np.linspace(low, high, min(high - low + 1, MOST_SLICES)).round().astype(int))


def stack(volume: np.ndarray, axis: int, chosen: np.ndarray) -> np.ndarray:
    """Slices one below the other (rows, columns); up is up, and right is left except in sagittal slices."""
    slices = np.moveaxis(volume.take(chosen, axis=axis), axis, 0)  # (slices, across, up)
    if axis:
        slices = slices[:, ::-1]
    return slices[:, :, ::-1].transpose(0, 2, 1).reshape(-1, slices.shape[1])


def overlay(label_map: np.ndarray, classes: int) -> Any:
    """Label map as a picture with a palette; background is transparent."""
    image_type, _ = optional_import("PIL", name="Image")
    shown = min(classes, 256) - 1
    values = np.where(label_map > 0, (label_map - 1) % shown + 1, 0)
    image = image_type.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, *(value for colour in structure_colours(shown) for value in channels(colour))])
    image.info["transparency"] = bytes([0] + [OPACITY] * shown)
    return image


def png(image: Any) -> str:
    """Data address of a picture."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True, transparency=image.info.get("transparency"))
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def pane(title: str, pictures: Sequence[str], height: int, count: int) -> str:
    """A window of one slice on picture strips, the first on top."""
    images = ", ".join(f"url({picture})" for picture in pictures)
    size = f"{PANE_WIDTH}px {height * count}px"
    style = f"width:{PANE_WIDTH}px;height:{height}px;background-image:{images};background-size:{size}"
    return f'<div class="pane" data-height="{height}" style="{style}"><span>{escape(title)}</span></div>'
