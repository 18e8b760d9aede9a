# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg report``: one self-contained page about a run of ``mapseg adapt``, and how far to trust what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.colours import structure_colours
from mapseg_components.commands.check import findings_table
from mapseg_components.commands.stages import read_history
from mapseg_components.data import load_datalist, read_nifti
from mapseg_components.data.results import result_path
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_text
from mapseg_components.reports import (
    SLICES_SCRIPT,
    SLICES_STYLE,
    can_draw,
    curves,
    page,
    slice_viewer,
    sortable_table,
)
from mapseg_components.transforms.resampling import spacing_of, to_canonical

__all__ = ["report"]

MOST_SCANS = 12  # shown slice by slice; all are in the tables
MODELS = {"source_only": "source-only", "adapted": "adapted"}
MANIFEST = ("request", "plan", "seconds", "versions")
VERDICTS = {
    "adapted": "Adapted: use the adapted model.",
    "no gain": "No gain: the adapted model is not better; the bundle uses the source-only model.",
    "worse than source": "Worse than source: adaptation made it worse; the bundle uses the source-only model.",
}
QUALITY_NOTE = (
    "Estimated Dice: how alike a scan's segmentation stays when its intensities change, turned into a Dice by the "
    "labelled validation scans of the source, as they are and degraded. ± is the error on validation scans that were "
    "left out of the fit. A guess: no labelled scan was as consistent, or as inconsistent."
)
VOLUMES_NOTE = (
    "Median over the target scans, in ml, and the range over the source's label maps. Another age or disease may well "
    "lie outside of it; a model that fails does too."
)
CANNOT_KNOW = (
    "No label of the target was read. The estimates rest on how a model behaves on labelled scans of the source; "
    "errors that it makes alike however a scan is shown do not count against it.",
    "Adaptation itself trains a model to be consistent, so its estimates lean upwards. Small gains prove nothing.",
    "Whether a structure is where the anatomy has it: look at the scans above, the worst first.",
    "The model is for research, not for clinical use.",
)
STYLE = """
.verdict { border-left: 6px solid; padding: .6rem 1rem; background: var(--soft); }
.verdict strong { font-size: 1.2rem; } .verdict p { margin: .3rem 0; }
.adapted { border-color: #009E73; } .no-gain { border-color: #E69F00; } .worse-than-source { border-color: #D55E00; }
.quiet { font-size: .9rem; } figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; font-size: .9rem; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid var(--line);
  vertical-align: -.1em; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; font-size: .8rem; } select { font: inherit; }
"""
SCRIPT = """
var chooser = document.getElementById("scan");
var show = function () {
  document.querySelectorAll(".viewer").forEach(function (one) { one.hidden = one.dataset.case !== chooser.value; });
};
chooser.addEventListener("change", show); show();
"""


def require_matplotlib() -> None:
    """Raises `ConfigError` if a report could not be drawn."""
    if not can_draw():
        raise ConfigError("the report needs matplotlib: pip install matplotlib")


def report(directory: str, output: str | None = None) -> str:
    """Write the report of a run of ``mapseg adapt``: one HTML file that needs no network.

    It says whether adaptation helped and why, shows estimates per scan with what they cannot know, label maps before
    and after in three planes, curves of training, volumes, settings and versions.

    Args:
        directory: the output folder of ``mapseg adapt``.
        output: the file to write, report.html in that folder by default.

    Returns:
        its path.

    Raises:
        ConfigError: the folder holds no finished run, or matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    require_matplotlib()
    folder = Path(directory)
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no run.json: name the output folder of mapseg adapt")
    run = json.loads(path.read_text(encoding="utf-8"))
    if "assessment" not in run:
        raise ConfigError(f"{path} has no assessment yet: repeat the mapseg adapt command, it goes on")
    plan, assessment = run["plan"], run["assessment"]
    names, verdict = list(plan["labels"]), assessment["verdict"]
    reasons = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict["why"])
    body = [
        f'<p class="quiet">{plan["target"]} target scans, {plan["source_training"]} + {plan["source_validation"]} '
        f"source scans, {len(names)} structures, preset {escape(plan['preset'])}, seed {run['request']['seed']}.</p>",
        f'<section class="verdict {verdict["verdict"].replace(" ", "-")}" id="verdict">'
        f"<strong>{escape(VERDICTS[verdict['verdict']])}</strong>{reasons}</section>",
        f'<h2>Each target scan</h2><p class="quiet">{escape(QUALITY_NOTE)}</p>{case_table(assessment)}',
        f"<h2>Before and after</h2>{viewers(folder, assessment, names)}",
        f"<h2>Training</h2>{figures(folder)}",
        f'<h2>Volumes</h2><p class="quiet">{escape(VOLUMES_NOTE)}</p>{volume_table(assessment, names)}',
        f"<h2>Dice on the source's validation scans</h2>{validation_table(assessment, names)}",
        f"<h2>What this cannot know</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in CANNOT_KNOW)}</ul>",
        f"<h2>Check of the scans</h2>{check_section(run.get('check'))}",
        "<h2>Settings</h2><details><summary>Arguments, plan, seconds, versions</summary><pre>"
        f"{escape(json.dumps({key: run[key] for key in MANIFEST}, indent=2))}</pre></details>",
    ]
    target = Path(output) if output else folder / "report.html"
    write_text(page("Adaptation report", "\n".join(body), SLICES_STYLE + STYLE, SCRIPT + SLICES_SCRIPT), target)
    return str(target)


def worst_first(assessment: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Figures of each target scan by both models, the lowest estimate of the adapted model first."""
    pairs = zip(*(assessment["models"][name]["cases"] for name in MODELS))
    return sorted(pairs, key=lambda pair: -1.0 if pair[1]["estimated_dice"] is None else pair[1]["estimated_dice"])


def case_table(assessment: Mapping[str, Any]) -> str:
    """Per target scan: both estimates, whether they are guesses; confidence, agreement, structures off their place."""
    head = ["scan"]
    for name, title in MODELS.items():
        calibration = assessment["models"][name]["calibration"]
        head.append(f"{title} (± {calibration['error']:.2f})" if calibration else title)
    rows = [
        [
            a["case"],
            a["estimated_dice"],
            b["estimated_dice"],
            "" if a["within_calibration"] and b["within_calibration"] else "a guess",
            b["confident_share"],
            assessment["between"][a["case"]],
            ", ".join(b.get("misplaced", [])),
        ]
        for a, b in worst_first(assessment)
    ]
    head += ["estimate", "share above 0.95 probability", "agreement of both, Dice", "missing or off their place"]
    return sortable_table(head, rows)


def volume_table(assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Median volumes of both models beside the range of the source's labels."""
    rows = []
    for name in names:
        prior = assessment["prior_ml"][name]
        medians = [
            float(np.median([case["volumes_ml"][name] for case in assessment["models"][model]["cases"]]))
            for model in MODELS
        ]
        outside = [title for title, value in zip(MODELS.values(), medians) if not prior[0] <= value <= prior[-1]]
        rows.append([name, *medians, f"{prior[0]:.3f} to {prior[-1]:.3f}", ", ".join(outside)])
    titles = [f"{title}, ml" for title in MODELS.values()]
    return sortable_table(["structure", *titles, "source's labels, ml", "outside"], rows)


def validation_table(assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Dice on the labelled validation scans of the source."""
    both = [assessment["models"][name]["validation_dice"] for name in MODELS]
    rows = [[name, *(one["structures"][name] for one in both)] for name in names]
    rows.append(["mean", *(one["mean"] for one in both)])
    return sortable_table(["structure", *MODELS.values()], rows)


def check_section(found: Mapping[str, Any] | None) -> str:
    """What ``mapseg check`` said of source and target before the first stage."""
    if found is None:
        return "<p>The scans were not checked by this version: run mapseg check on them.</p>"
    return f"<p>{escape(found['verdict'])}</p>{findings_table(found['findings']) if found['findings'] else ''}"


def figures(folder: Path) -> str:
    """Curves of the stages."""
    source, adapted = (read_history(folder / "stages" / name) for name in ("source", "adaptation"))
    score = {
        "Score": "score",
        "source validation Dice, teacher": "source_dice_teacher",
        "source validation Dice, student": "source_dice_student",
        "target loss": "target_loss",
    }
    stability = {
        "teacher and student agree": "target_agreement_teacher_student",
        "teacher agrees with its last look": "target_agreement_previous",
        "voxels above 0.95 probability": "target_confident_share",
    }
    prefix = "target_voxels_"
    sizes = {key.removeprefix(prefix): key for line in adapted for key in line if key.startswith(prefix)}
    parts = [
        curves(source, {"student": "source_dice_student"}, "Source-only training", "Dice, source validation"),
        curves(adapted, score, "Adaptation: the Score and its two parts", "value"),
        curves(adapted, stability, "Pseudo labels on target scans", "Dice, or share of voxels"),
        curves(adapted, sizes, "Size of the teacher's structures", "voxels per scan"),
    ]
    return "".join(parts) or "<p>No epoch was validated.</p>"


def viewers(folder: Path, assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Scans slice by slice with the label maps of both models, the least certain first."""
    cases = {case["case_id"]: case for case in load_datalist(folder / "datalist.json", "target_training")}
    shown = [cases[pair[1]["case"]] for pair in worst_first(assessment)[:MOST_SCANS]]
    key = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)}</li>'
        for name, colour in zip(names, structure_colours(len(names)))
    )
    options = "".join(f"<option>{escape(case['case_id'])}</option>" for case in shown)
    more = f" {len(cases) - len(shown)} more are in the tables only." if len(cases) > len(shown) else ""
    note = f"The least certain first.{more} Coronal and axial slices show the right side of the body on the left."
    head = (
        f'<p><label>Scan <select id="scan">{options}</select></label> <span class="quiet">{note}</span></p>'
        f'<ul class="key">{key}</ul>'
    )
    return head + "".join(viewer(folder, case, len(names) + 1) for case in shown)


def viewer(folder: Path, case: Mapping[str, Any], classes: int) -> str:
    """One scan and its two label maps."""
    voxels, maps = read_nifti(case["image"]).voxels, {}
    for model, title in MODELS.items():
        path = result_path(case["image"], folder / "predictions" / model, "seg")
        label_map = read_nifti(path)
        maps[title], canonical = to_canonical(label_map.voxels.astype(np.int64), label_map.affine)
    grey, _ = to_canonical(voxels.astype(np.float32), label_map.affine)  # the label maps are on the scan's grid
    return slice_viewer(grey, spacing_of(canonical), maps, classes, case["case_id"])
