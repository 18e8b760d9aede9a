# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg report``: one self-contained page about a run of ``mapseg adapt``, and how far to trust its result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.colours import structure_colours
from mapseg_components.commands.check import findings_table
from mapseg_components.commands.order import CHOICE, describe_order
from mapseg_components.commands.report_package import (
    CONSISTENCY,
    CONSISTENCY_NOTE,
    PACKAGE_NOTE,
    by_of,
    package_table,
    source_scans,
    title_of,
)
from mapseg_components.commands.report_rounds import (
    PICTURES_STYLE,
    adapted_stage,
    rounds_section,
    translation_section,
)
from mapseg_components.commands.report_sizes import MODELS, Unit, sizes, unit_of, volume_section
from mapseg_components.commands.source_choice import describe_choice
from mapseg_components.commands.stages import read_history
from mapseg_components.data import read_nifti
from mapseg_components.data.datalist import all_targets
from mapseg_components.data.results import result_path, uncertainty_path
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_text
from mapseg_components.plans.extents import describe_size
from mapseg_components.plans.initial_model import describe_initial
from mapseg_components.plans.recipes import INITIAL, Recipe, read_recipe, recipe_names
from mapseg_components.reports import (
    FIGURES_STYLE,
    SLICES_SCRIPT,
    SLICES_STYLE,
    answer,
    can_draw,
    curves,
    page,
    slice_viewer,
    sortable_table,
    uncertainty_section,
)
from mapseg_components.scans.files import is_picture
from mapseg_components.transforms.resampling import spacing_of, to_canonical

__all__ = ["report"]

MOST_SCANS = 12  # shown slice by slice; all are in the tables
MANIFEST = ("request", "plan", "seconds", "versions")
KINDS = {"adapted": "good", "no gain": "warning", "worse than source": "error"}
VERDICTS = {
    "adapted": "Adapted: use the adapted model.",
    "no gain": "No gain: the adapted model is not better; the bundle uses the source-only model.",
    "worse than source": "Worse than source: adaptation made it worse; the bundle uses the source-only model.",
}
OF_CONTINUED = {  # of a baseline, whose second model was trained on without the target
    "adapted": "Trained on: use the model that was trained on. No target was learnt from.",
    "no gain": "No gain: the model that was trained on is not better; the bundle uses the first source-only model.",
    "worse than source": "Worse: training on made it worse; the bundle uses the first source-only model.",
}
CONTINUED_NOTE = "In this page, adapted means trained on for as long as an adaptation: no target was learnt from."
QUALITY_NOTE = (
    "Estimated Dice: how alike a scan's segmentation stays when its intensities change, turned into a Dice by the "
    "labelled validation scans of the source, as they are and degraded; its error is that on validation scans that "
    "were left out of the fit. Interval: of the adapted model's mean Dice, nominal coverage 80 % for scans like these; "
    "of another contrast it holds less often; none with too few validation scans. A guess: no labelled scan was as "
    "consistent, or as inconsistent. Confident share: of the voxels that the adapted model labels, those with a "
    "probability above 0.95. Agreement: Dice between the label maps of both models."
)
HELD_OUT_NOTE = "All scans of this table were held out of adaptation."
ADAPTED_ON_NOTE = "No scan was held out: gains are judged on the scans adapted on, and may be less on others."
SYNTHETIC_NOTE = (
    "The source is label maps without images. Every Dice on its validation scans, here and below, is of synthetic "
    "images of label maps that were held out of training, and so is what the estimates on the target are calibrated by."
)
UNCERTAINTIES = {
    "where it agrees with the pseudo label": "target_uncertainty_agree",
    "where it differs": "target_uncertainty_differ",
}
CANNOT_KNOW = (
    "No label of the target was read. The estimates rest on how a model behaves on labelled scans of the source; "
    "errors that it makes alike however a scan is shown do not count against it.",
    "Adaptation itself trains a model to be consistent, so its estimates lean upwards. Small gains prove nothing.",
    "Whether a structure is where the anatomy has it: look at the scans above, the worst first.",
    "The model is for research, not for clinical use.",
)
STYLE = """
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; } .tables > div { max-width: 100%; min-width: 0; }
.choice { display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: center; }
select { font: inherit; max-width: 100%; } label { max-width: 100%; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; font-size: .8rem; }
@media (max-width: 30rem) { .tables > div { width: 100%; } }
"""
STYLES = FIGURES_STYLE + SLICES_STYLE + PICTURES_STYLE + STYLE
SCRIPT = """
var chooser = document.getElementById("scan"), painted = document.getElementById("painted");
var show = function () {
  document.querySelectorAll(".viewer").forEach(function (one) {
    one.hidden = one.dataset.case !== chooser.value; one.classList.toggle("plain", !painted.checked);
  });
};
chooser.addEventListener("change", show); painted.addEventListener("change", show); show();
"""


def require_matplotlib() -> None:
    """Raises `ConfigError` if a report could not be drawn."""
    if not can_draw():
        raise ConfigError("the report needs matplotlib: pip install matplotlib")


def recipe_of(run: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a run, unless this version has none of that name."""
    name = run["request"].get("method") or "mapseg"
    return read_recipe(name) if name in recipe_names() else None


def is_baseline(recipe: Recipe | None) -> bool:
    """Whether no stage of a method learns from the target: what is compared as ``adapted`` was trained on."""
    return recipe is not None and recipe.learns_source_alone


def verdict_line(run: Mapping[str, Any]) -> str:
    """The verdict of a run in a sentence or two."""
    lines = OF_CONTINUED if is_baseline(recipe_of(run)) else VERDICTS
    return lines[run["assessment"]["verdict"]["verdict"]]


def method_note(run: Mapping[str, Any]) -> str:
    """The method of a run, and where it is known to fail, as a paragraph."""
    recipe = recipe_of(run)
    if recipe is None:
        return ""
    fails = f" Known to fail {recipe.fails}." if recipe.fails else ""
    baseline = f" {CONTINUED_NOTE}" if is_baseline(recipe) else ""
    return f'<p class="quiet">Method: {escape(recipe.title)}.{escape(fails)}{baseline}</p>'


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
        ConfigError: the folder holds no finished run, output is a folder, or matplotlib is missing.
        ResourceError: the file cannot be written.
    """
    require_matplotlib()
    folder = Path(directory)
    target = Path(output) if output else folder / "report.html"
    if target.is_dir():
        raise ConfigError(f"output {target} is a folder: name the file to write, such as {target / 'report.html'}")
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no run.json: name the output folder of mapseg adapt")
    run = json.loads(path.read_text(encoding="utf-8"))
    if "assessment" not in run:
        raise ConfigError(f"{path} has no assessment yet: repeat the mapseg adapt command, it goes on")
    plan, assessment = run["plan"], run["assessment"]
    names, verdict = list(plan["labels"]), assessment["verdict"]
    unit = unit_of(next(iter(all_targets(folder / "datalist.json")))["image"])
    shown = key_figures(assessment)
    reasons = [text for text in verdict["why"] if not (shown and text.startswith(f"{title_of(assessment)} on"))]
    held = plan.get("target_heldout")
    held_out = f" ({len(held)} held out of adaptation: {escape(', '.join(held))})" if held else " (none held out)"
    note = HELD_OUT_NOTE if held else ADAPTED_ON_NOTE
    quality = CONSISTENCY_NOTE if by_of(assessment) == CONSISTENCY else QUALITY_NOTE
    body = [
        f'<p class="quiet">{plan["target"]} target scans{held_out}, {source_scans(plan)}, {len(names)} structures, '
        f"preset {escape(plan['preset'])}, seed {run['request']['seed']}.</p>",
        method_note(run),
        f'<p class="quiet">{PACKAGE_NOTE}</p>' if "package" in plan else "",
        f'<p class="quiet">{SYNTHETIC_NOTE}</p>' if run["request"].get("source_label_maps") else "",
        f'<p class="quiet">{escape(describe_choice(run[CHOICE]))}</p>' if CHOICE in run else "",
        f'<p class="quiet">{escape(describe_size(plan["size"]))}</p>' if "size" in plan else "",
        f'<p class="quiet">{escape(describe_initial(plan[INITIAL]))}</p>' if INITIAL in plan else "",
        f'<p class="quiet">{escape(describe_order(run["order"]))}</p>' if "order" in run else "",
        answer(KINDS[verdict["verdict"]], verdict_line(run), shown, reasons),
        f"<h2>Before and after</h2>{viewers(folder, assessment, names)}",
        f'<h2>Each judged target scan</h2><p class="quiet">{note} {escape(quality)}</p>{case_table(assessment)}',
        f'<h2>Each structure</h2><div class="tables"><div>{volume_section(assessment, names, unit)}</div>'
        f"<div><h3>Dice on the source's validation scans</h3>{validation_table(run, names)}</div></div>",
        translation_section(folder),
        rounds_section(run),
        uncertainty_section(uncertainties(folder), names),
        f"<h2>Training</h2>{figures(folder, assessment, names, unit, adapted_stage(run), source_stage(run))}",
        f"<h2>What this cannot know</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in CANNOT_KNOW)}</ul>",
        f"<h2>Check of the scans</h2>{check_section(run.get('check'))}",
        "<h2>Settings</h2><details><summary>Arguments, plan, seconds, versions</summary><pre>"
        f"{escape(json.dumps({key: run[key] for key in MANIFEST}, indent=2))}</pre></details>",
    ]
    write_text(page("Adaptation report", "\n".join(body), STYLES, SCRIPT + SLICES_SCRIPT), target)
    return str(target)


def worst_first(assessment: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Figures of each target scan by both models, the lowest estimate of the adapted model first."""
    pairs = zip(*(assessment["models"][name]["cases"] for name in MODELS))
    by = by_of(assessment)
    return sorted(pairs, key=lambda pair: -1.0 if pair[1][by] is None else pair[1][by])


def key_figures(assessment: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures behind the verdict: both estimates, their difference and its interval."""
    verdict = assessment["verdict"]
    if verdict["gain"] is None:
        return []
    by, what = by_of(assessment), title_of(assessment)
    pairs = [(a[by], b[by]) for a, b in worst_first(assessment) if a[by] is not None and b[by] is not None]
    result = []
    for (name, title), own in zip(MODELS.items(), zip(*pairs)):
        used = "this model is used" if verdict["ship"] == name else ""
        result.append((f"{what}, {title}", f"{np.mean(own):.3f}", used))
    interval = verdict["interval"] if len(pairs) > 1 else None
    ends = "one scan: no interval" if interval is None else "95 % interval {:+.3f} to {:+.3f}".format(*interval)
    result.append(("Difference", f"{verdict['gain']:+.3f}", ends))
    calibration = assessment["models"][verdict["ship"]]["calibration"]
    if calibration:
        result.append(("Error of an estimate", f"± {calibration['error']:.2f}", "of one structure in one scan"))
    return result


def case_table(assessment: Mapping[str, Any]) -> str:
    """Per target scan: estimates, whether they are extrapolated, confidence, agreement, unusual positions."""
    rows, by = [], by_of(assessment)
    for a, b in worst_first(assessment):
        estimates = a[by], b[by]
        guess = by != CONSISTENCY and not (a["within_calibration"] and b["within_calibration"])
        rows.append(
            [
                a["case"],
                *estimates,
                None if None in estimates else estimates[1] - estimates[0],
                "{:.2f} to {:.2f}".format(*b["interval"]) if b.get("interval") else "none",
                "a guess" if guess else "",
                b["confident_share"],
                assessment["between"][a["case"]],
                ", ".join(b.get("misplaced", [])),
            ]
        )
    head = ["scan", *MODELS.values(), "difference", "interval", "estimate", "confident share", "agreement"]
    caption = f"{title_of(assessment)} by both models, the lowest of the adapted one first"
    return sortable_table([*head, "missing or off their place"], rows, caption=caption)


def validation_table(run: Mapping[str, Any], names: Sequence[str]) -> str:
    """Dice on the labelled validation scans of the source; of a package, that of its weights as it says."""
    assessment = run["assessment"]
    if "package" in run["plan"]:
        return package_table(run["plan"]["package"]["validation"], names)
    both = [assessment["models"][name]["validation_dice"] for name in MODELS]
    rows = [[name, *(one["structures"][name] for one in both)] for name in names]
    rows.append(["mean", *(one["mean"] for one in both)])
    return sortable_table(["structure", *MODELS.values()], rows, compact=True)


def check_section(found: Mapping[str, Any] | None) -> str:
    """Findings of ``mapseg check`` in source and target before the first stage."""
    if found is None:
        return "<p>The scans were not checked by this version: run mapseg check on them.</p>"
    return f"<p>{escape(found['verdict'])}</p>{findings_table(found['findings']) if found['findings'] else ''}"


def source_stage(run: Mapping[str, Any]) -> str:
    """The stage that learnt the source first: of several the one that was chosen."""
    return str(run.get(CHOICE, {}).get("chosen", "source"))


def figures(
    folder: Path, assessment: Mapping[str, Any], names: Sequence[str], unit: Unit, stage: str, first: str
) -> str:
    """Curves of the first stage and of the one that the adapted model is from."""
    source, made, adapted = (read_history(folder / "stages" / name) for name in (first, "synthesis", stage))
    source = source or made
    dice = {"teacher": "source_dice_teacher", "student": "source_dice_student"}
    stability = {
        "teacher and student agree (Dice)": "target_agreement_teacher_student",
        "teacher agrees with its last look (Dice)": "target_agreement_previous",
        "voxels above 0.95 probability (share)": "target_confident_share",
    }
    parts = [
        curves(source, {"student": "source_dice_student"}, "Source-only training, source validation", "Dice (0 to 1)"),
        curves(adapted, dice, "Adaptation, source validation", "Dice (0 to 1)"),
        curves(adapted, {"Score": "score", "target loss": "target_loss"}, "Adaptation: the Score", "Value (no unit)"),
        curves(adapted, stability, "Pseudo labels on target scans", "Dice or share (0 to 1)"),
        curves(adapted, UNCERTAINTIES, "Uncertainty of the student's logits", "Mean of abs(V) (no unit)"),
    ]
    if not any(parts):
        return "<p>No epoch was validated.</p>"
    prior = {name: ml for name, ml in assessment["prior_ml"].items() if ml}
    return f'<div class="figures">{"".join(parts)}</div>{sizes(adapted, prior, names, unit)}'


def uncertainties(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The adapted model's map of uncertainty of each target scan that has one, its label map, the other model's."""
    for case in all_targets(folder / "datalist.json"):
        size = uncertainty_path(case["image"], folder / "predictions" / "adapted")
        if size.is_file():
            maps = (
                result_path(case["image"], folder / "predictions" / name, "seg") for name in ("adapted", "source_only")
            )
            adapted, source_only = (read_nifti(path).voxels for path in maps)
            yield read_nifti(size).voxels, adapted, source_only


def viewers(folder: Path, assessment: Mapping[str, Any], names: Sequence[str]) -> str:
    """Scans slice by slice with the label maps of both models, the least certain first."""
    cases = {case["case_id"]: case for case in all_targets(folder / "datalist.json")}
    shown = [cases[pair[1]["case"]] for pair in worst_first(assessment)[:MOST_SCANS]]
    key = "".join(
        f'<li><i class="swatch" style="background:{colour}"></i>{escape(name)}</li>'
        for name, colour in zip(names, structure_colours(len(names)))
    )
    options = "".join(f'<option value="{escape(case["case_id"])}">{escape(case["case_id"])}</option>' for case in shown)
    judged = len(worst_first(assessment))
    more = f" {judged - len(shown)} more are in the tables only." if judged > len(shown) else ""
    body = not is_picture(shown[0]["image"])
    sides = " Coronal and axial slices show the right side of the body on the left." if body else ""
    note = f"The least certain first.{more}{sides}"
    head = (
        f'<p class="quiet">{note}</p><p class="choice"><label>Scan <select id="scan">{options}</select></label>'
        f'<label><input type="checkbox" id="painted" checked> label maps</label></p><ul class="key">{key}</ul>'
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
    return slice_viewer(grey, spacing_of(canonical), maps, classes, case["case_id"], not is_picture(case["image"]))
