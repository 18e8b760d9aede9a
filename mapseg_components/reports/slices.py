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

MOST_SLICES, MOST_ACROSS = 32, 1000
OPACITY = 170  # of 255
# plane: fixed axis, and what stands left and right of the picture
PLANES = {"sagittal": (0, "P", "A"), "coronal": (1, "R", "L"), "axial": (2, "R", "L")}
SLICES_STYLE = """
.viewer { margin: 1rem 0 2rem; } .planes { margin: 0 0 1.5rem; max-width: 56rem; }
.plane { display: grid; grid-template-columns: repeat(var(--panes), minmax(0, 1fr)); gap: .5rem; margin: 0 0 .25rem; }
.plane figure { margin: 0; max-width: none; } .plane figcaption { font-size: .8125rem; line-height: 1.3; }
.pane { background-color: #000; background-repeat: no-repeat; background-position: 0 0; image-rendering: pixelated;
  position: relative; width: 100%; }
.pane span { position: absolute; top: 50%; transform: translateY(-50%); padding: 0 .2em; color: #fff; font-size: .75rem;
  line-height: 1.3; background: #000a; } .pane span:first-child { left: 0; } .pane span:last-child { right: 0; }
.plain .pane { background-image: var(--scan) !important; }
.planes output { font-size: .875rem; font-variant-numeric: tabular-nums; }
input[type=range] { width: 100%; max-width: 26rem; display: block; accent-color: var(--series-1); }
@media (max-width: 30rem) { .plane { gap: .25rem; } }
"""
SLICES_SCRIPT = """
document.querySelectorAll(".planes input[type=range]").forEach(function (slider) {
  var place = slider.parentElement, panes = place.querySelectorAll(".pane"), text = place.querySelector("output");
  var numbers = slider.dataset.numbers.split(" ");
  var move = function () {
    panes.forEach(function (pane) { pane.style.backgroundPositionY = 100 * slider.value / (+slider.max || 1) + "%"; });
    text.textContent = slider.dataset.name + ", slice " + numbers[slider.value] + " of " + slider.dataset.count;
  };
  slider.addEventListener("input", move); move();
});
"""


def slice_viewer(
    scan: np.ndarray,
    spacing: Sequence[float],
    label_maps: Mapping[str, np.ndarray],
    classes: int,
    case: str,
    body: bool = True,
) -> str:
    """HTML of one scan; the page needs `SLICES_STYLE` and `SLICES_SCRIPT`.

    The panes of a plane stand side by side in windows of any width. Coronal and axial slices show the right side of the
    body on the left. At most 32 slices per plane are kept. Of a scan of one slice there is that alone, with every
    second pixel and so on where it has more than 1000 along a side.

    Args:
        scan: (X, Y, Z) on axes to the right, to the front and up.
        spacing: mm per axis.
        label_maps: title to class indices of the same shape.
        classes: number of classes, background included.
        case: name of the scan.
        body: the axes are those of a body, so that sides have letters.
    """
    flat = [axis for axis, side in enumerate(scan.shape) if side == 1]
    if len(flat) == 1:
        step = max(-(-max(scan.shape) // MOST_ACROSS), 1)
        scan = scan[::step, ::step, ::step]
        label_maps = {title: label_map[::step, ::step, ::step] for title, label_map in label_maps.items()}
    grey = grey_of(scan)
    image_type, _ = optional_import("PIL", name="Image")
    planes = []
    for plane, (axis, left, right) in PLANES.items():
        if len(flat) == 1 and axis != flat[0]:
            continue
        chosen = slices_of(grey, axis)
        across, up = (grey.shape[other] * float(spacing[other]) for other in range(3) if other != axis)
        strip = png(image_type.fromarray((stack(grey, axis, chosen) * 255).astype(np.uint8)))
        size = f"aspect-ratio:{across:g}/{up:g};background-size:100% {100 * len(chosen)}%"
        ends = f"<span>{left}</span><span>{right}</span>" if body else ""
        panes = [pane("scan", "var(--scan)", size, plane, ends)]
        for title, label_map in label_maps.items():
            coloured = png(overlay(stack(label_map, axis, chosen), classes))
            panes.append(pane(title, f"url({coloured}),var(--scan)", size, plane, ends))
        last = len(chosen) - 1
        planes.append(
            f'<div class="planes"><div class="plane" style="--panes:{len(panes)};--scan:url({strip})">{"".join(panes)}'
            f'</div><output></output><input type="range" min="0" max="{last}" value="{last // 2}" data-name="{plane}"'
            f' data-numbers="{" ".join(str(number + 1) for number in chosen)}" data-count="{grey.shape[axis]}"'
            f' aria-label="{plane} slice"></div>'
        )
    return f'<div class="viewer" data-case="{escape(case)}">{"".join(planes)}</div>'


def grey_of(scan: np.ndarray) -> np.ndarray:
    """Brightness from 0, the scan's least value, to 1, its 99.5th percentile; values that are not finite are black."""
    finite = scan[np.isfinite(scan)]
    low, high = (float(finite.min()), float(np.percentile(finite, 99.5))) if finite.size else (0.0, 0.0)
    return np.clip((np.nan_to_num(scan, nan=low, neginf=low) - low) / max(high - low, 1e-6), 0, 1)


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


def pane(title: str, image: str, size: str, plane: str, ends: str) -> str:
    """A window of one slice on picture strips, the first on top, as wide as its column."""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="pane" role="img"'
        f' aria-label="{escape(title)}, {plane}" style="background-image:{image};{size}">{ends}</div></figure>'
    )
