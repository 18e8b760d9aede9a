# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file about a run of ``mapseg adapt``: what came out, and how far to trust it."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from mapseg_components.commands.stages import read_history
from mapseg_components.data import load_datalist
from mapseg_components.data.results import result_path
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_text

# the extra `report`
matplotlib, has_matplotlib = optional_import("matplotlib")
Figure, _ = optional_import("matplotlib.figure", name="Figure")
MaxNLocator, _ = optional_import("matplotlib.ticker", name="MaxNLocator")
Image, _ = optional_import("PIL", name="Image")

__all__ = ["report"]

logger = logging.getLogger(__name__)

MOST_SCANS = 12  # shown slice by slice; all are in the tables
MOST_SLICES = 32
PANE_WIDTH = 220  # pixels
# Okabe and Ito's colours, told apart with any colour vision; repeated for more than eight structures
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
INK = "#010203"  # of figures; becomes the page's text colour
MANIFEST = ("request", "plan", "seconds", "versions")
VERDICTS = {
    "adapted": "Adapted: use the adapted model.",
    "no gain": "No gain: the adapted model is not better; the bundle uses the source-only model.",
    "worse than source": "Worse than source: adaptation made it worse; the bundle uses the source-only model.",
}
QUALITY_NOTE = (
    "Estimated Dice: how alike a scan's segmentation stays when its intensities change, turned into a Dice by the "
    "labelled validation scans of the source, as they are and degraded. ± is the error on validation scans that were "
    "left out of the fit. Marked: less or more consistent than any of those, so the estimate is a guess."
)
VOLUMES_NOTE = (
    "Median over the target scans, in ml, and the range over the source's label maps. Marked: outside of that range. "
    "Another age or disease may well lie outside; a model that fails does too."
)


def report(directory: str, output: str | None = None) -> str:
    """Write the report of a run of ``mapseg adapt``.

    Args:
        directory: the run's folder, with ``run.json`` that holds an assessment, ``stages`` and ``predictions``.
        output: the file, ``report.html`` in the folder by default.

    Returns:
        its path.

    Raises:
        ConfigError: the folder holds no finished run, or matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    if not has_matplotlib:
        raise ConfigError("the report needs matplotlib: pip install 'mapseg-monai[report]'")
    folder = Path(directory)
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no run.json: name the output folder of mapseg adapt")
    run = json.loads(path.read_text(encoding="utf-8"))
    if "assessment" not in run:
        raise ConfigError(f"{path} has no assessment yet: repeat the mapseg adapt command, it goes on")
    assessment, names = run["assessment"], list(run["plan"]["labels"])
    cases = load_datalist(folder / "datalist.json", "target_training")
    verdict = assessment["verdict"]
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    plan = run["plan"]
    content = {
        "title": "Adaptation report",
        "subtitle": escaped(
            f"{plan['target']} target scans, {plan['source_training']} + {plan['source_validation']} source scans, "
            f"{len(names)} structures, preset {plan['preset']}, seed {run['request']['seed']}."
        ),
        "verdict": escaped(VERDICTS[verdict["verdict"]]),
        "verdict_class": verdict["verdict"].replace(" ", "-"),
        "why": "".join(f"<p>{escaped(sentence)}</p>" for sentence in verdict["why"]),
        "quality_note": escaped(QUALITY_NOTE),
        "cases": case_table(assessment),
        "viewer": viewers(folder, cases, assessment, names),
        "figures": figures(folder),
        "volumes_note": escaped(VOLUMES_NOTE),
        "volumes": volume_table(assessment, names),
        "validation": validation_table(assessment, names),
        "manifest": escaped(
            json.dumps({key: run[key] for key in ("request", "plan", "seconds", "versions")}, indent=2)
        ),
    }
    target = Path(output) if output else folder / "report.html"
    write_text(page.substitute(content), target)
    return str(target)


def escaped(text: object) -> str:
    """Text that is safe inside HTML."""
    return html.escape(str(text))


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], marked: Sequence[Sequence[bool]] | None = None) -> str:
    """A sortable HTML table; the first column is text, marked cells stand out."""
    head = "".join(f"<th scope=col><button>{escaped(text)}</button></th>" for text in heads)
    body = []
    for index, row in enumerate(rows):
        cells = []
        for column, value in enumerate(row):
            flag = marked is not None and marked[index][column]
            cells.append(f"<td{' class=flag' if flag else ''}>{escaped(value)}{' !' if flag else ''}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def case_table(assessment: Mapping[str, Any]) -> str:
    """Per target scan: both estimates, confidence, agreement."""
    before, after = (assessment["models"][name] for name in ("source_only", "adapted"))
    errors = [number((m["calibration"] or {}).get("error"), 2) for m in (before, after)]
    heads = ["scan", f"source-only (± {errors[0]})", f"adapted (± {errors[1]})", "confident", "agreement of both"]
    pairs = sorted(
        zip(before["cases"], after["cases"]),
        key=lambda pair: -1.0 if pair[1]["estimated_dice"] is None else pair[1]["estimated_dice"],
    )
    rows = [
        [
            a["case"],
            number(a["estimated_dice"]),
            number(b["estimated_dice"]),
            f"{100 * b['confident_share']:.0f} %",
            number(assessment["between"][a["case"]]),
        ]
        for a, b in pairs
    ]
    marked = [[False, not a["within_calibration"], not b["within_calibration"], False, False] for a, b in pairs]
    return table(heads, rows, marked)


def volume_table(assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Median volumes of both models beside the range of the source's labels."""
    rows, marked = [], []
    for name in names:
        prior = assessment["prior_ml"][name]
        medians = [
            float(np.median([case["volumes_ml"][name] for case in assessment["models"][model]["cases"]]))
            for model in ("source_only", "adapted")
        ]
        rows.append([name, *(number(value) for value in medians), f"{number(prior[0])} to {number(prior[-1])}"])
        marked.append([False, *(not prior[0] <= value <= prior[-1] for value in medians), False])
    return table(["structure", "source-only, ml", "adapted, ml", "source labels, ml"], rows, marked)


def validation_table(assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Dice on the labelled validation scans of the source."""
    both = [assessment["models"][name]["validation_dice"] for name in ("source_only", "adapted")]
    rows = [[name, *(number(one["structures"][name]) for one in both)] for name in names]
    rows.append(["mean", *(number(one["mean"]) for one in both)])
    return table(["structure", "source-only, Dice", "adapted, Dice"], rows)


def figures(folder: Path) -> str:
    """Curves of the stages, as SVG in the page's own colours."""
    source, adapted = (read_history(folder / "stages" / name) for name in ("source", "adaptation"))
    parts = []
    parts.append(curves(source, {"student": "source_dice_student"}, "Source-only training", "Dice, source validation"))
    score = {"Score": "score", "source validation Dice, teacher": "source_dice_teacher"}
    score |= {"source validation Dice, student": "source_dice_student", "target loss": "target_loss"}
    parts.append(curves(adapted, score, "Adaptation: the Score and its two parts", "value"))
    moved = {"teacher and student agree": "target_agreement_teacher_student"}
    moved |= {"teacher agrees with its last look": "target_agreement_previous"}
    moved |= {"confident share": "target_confident_share"}
    parts.append(curves(adapted, moved, "Pseudo labels on target scans", "Dice, or share of voxels"))
    drift = [{k: v for k, v in line.items() if k.startswith("target_voxels_") or k == "epoch"} for line in adapted]
    keys = {key.removeprefix("target_voxels_"): key for line in drift for key in line if key != "epoch"}
    parts.append(curves(drift, keys, "Size of the teacher's structures", "voxels per scan"))
    return "".join(part for part in parts if part) or "<p>No epoch was validated.</p>"


def curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str, unit: str) -> str:
    """One figure with a curve per key over epochs; empty without data."""
    found = {
        name: [(line["epoch"], line[key]) for line in history if line.get(key) is not None]
        for name, key in keys.items()
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        return ""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, **dict.fromkeys(inked, INK)}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for index, (name, points) in enumerate(found.items()):
            style = "-" if index < len(COLOURS) else "--"
            axis.plot(*zip(*points), style, marker="o", markersize=3, color=COLOURS[index % len(COLOURS)], label=name)
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.patch.set_alpha(0)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return f"<figure role=img aria-label='{escaped(title)}'>{svg}<figcaption>{escaped(title)}</figcaption></figure>"


def viewers(
    folder: Path, cases: Sequence[Mapping[str, Any]], assessment: Mapping[str, Any], names: Sequence[str]
) -> str:
    """Scans slice by slice with the label maps of both models, the least certain first."""
    worst = sorted(
        assessment["models"]["adapted"]["cases"],
        key=lambda case: -1.0 if case["estimated_dice"] is None else case["estimated_dice"],
    )
    by_name = {case["case_id"]: case for case in cases}
    shown = [by_name[case["case"]] for case in worst[:MOST_SCANS]]
    key = "".join(
        f'<li><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escaped(name)}</li>'
        for i, name in enumerate(names)
    )
    options = "".join(f"<option>{escaped(case['case_id'])}</option>" for case in shown)
    left_out = len(cases) - len(shown)
    note = f" {left_out} more are in the tables only." if left_out else ""
    head = (
        f'<p><label>Scan <select id="scan">{options}</select></label> <span class="note">The least certain first.{note}'
        f' Coronal and axial slices show the right side of the body on the left.</span></p><ul class="key">{key}</ul>'
    )
    return head + "".join(viewer(folder, case) for case in shown)


def viewer(folder: Path, case: Mapping[str, Any]) -> str:
    """Three planes, each with a slider over its slices and three panes."""
    scan = nib.as_closest_canonical(nib.load(case["image"]))
    grey = np.asarray(scan.dataobj, dtype=np.float32)
    grey = np.clip(grey / max(float(np.percentile(grey, 99.5)), 1e-6), 0, 1)
    spacing = np.asarray(scan.header.get_zooms()[:3], dtype=float)
    maps = {}
    for title, model in (("source-only", "source_only"), ("adapted", "adapted")):
        path = result_path(case["image"], folder / "predictions" / model, "seg")
        maps[title] = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(np.int64)
    planes = []
    for plane, axis in PLANES.items():
        chosen = slices_of(grey, axis)
        width_axis, height_axis = (other for other in range(3) if other != axis)
        width = PANE_WIDTH
        across, up = grey.shape[width_axis] * spacing[width_axis], grey.shape[height_axis] * spacing[height_axis]
        height = max(round(width * up / across), 1)
        strip = png(Image.fromarray((stack(grey, axis, chosen) * 255).astype(np.uint8)))
        panes = [pane("scan", [strip], width, height, len(chosen))]
        for title, label_map in maps.items():
            panes.append(pane(title, [png(overlay(stack(label_map, axis, chosen))), strip], width, height, len(chosen)))
        last = len(chosen) - 1
        planes.append(
            f'<div><div class="plane">{"".join(panes)}</div><output></output>'
            f'<input type="range" min="0" max="{last}" value="{last // 2}" data-name="{plane}"'
            f' aria-label="{plane} slice"></div>'
        )
    return f'<div class="viewer" data-case="{escaped(case["case_id"])}">{"".join(planes)}</div>'


def slices_of(grey: np.ndarray, axis: int) -> np.ndarray:
    """Evenly spaced slices of the part that is not empty, at most `MOST_SLICES`."""
    filled = np.flatnonzero((grey > 0.02).any(axis=tuple(other for other in range(3) if other != axis)))
    low, high = (int(filled[0]), int(filled[-1])) if len(filled) else (0, grey.shape[axis] - 1)
    return np.unique(np.linspace(low, high, min(high - low + 1, MOST_SLICES)).round().astype(int))


def stack(volume: np.ndarray, axis: int, chosen: np.ndarray) -> np.ndarray:
    """Slices one below the other (rows, columns); up is up, and the first of the two axes runs from right to left."""
    slices = np.moveaxis(volume.take(chosen, axis=axis), axis, 0)  # (slices, across, up)
    if axis:
        slices = slices[:, ::-1]
    return slices[:, :, ::-1].transpose(0, 2, 1).reshape(-1, slices.shape[1])


def overlay(label_map: np.ndarray) -> Any:
    """Label map as a picture with a palette; background is transparent."""
    image = Image.fromarray(np.where(label_map > 0, (label_map - 1) % len(COLOURS) + 1, 0).astype(np.uint8), mode="P")
    palette = [0, 0, 0]
    for colour in COLOURS:
        palette += [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    image.putpalette(palette)
    image.info["transparency"] = bytes([0] + [170] * len(COLOURS))
    return image


def png(image: Any) -> str:
    """Data address of a picture."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True, transparency=image.info.get("transparency"))
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def pane(title: str, pictures: Sequence[str], width: int, height: int, count: int) -> str:
    """One picture strip behind a window of one slice."""
    images = ", ".join(f"url({picture})" for picture in pictures)
    style = f"width:{width}px;height:{height}px;background-image:{images};background-size:{width}px {height * count}px"
    return f'<div class="pane" data-height="{height}" style="{style}"><span>{escaped(title)}</span></div>'
