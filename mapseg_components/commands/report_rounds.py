# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of ``mapseg report`` for methods with several trainings: pictures of a translation, rounds of pseudo labels."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mapseg_components.commands.stages import read_history
from mapseg_components.plans.recipes import PSEUDO_LABELS
from mapseg_components.reports import curves, sortable_table

__all__ = ["PICTURES_STYLE", "adapted_stage", "rounds_section", "translation_section"]

PICTURES_STYLE = ".pictures img { max-width: 100%; height: auto; background: #fff; }"
PICTURES_NOTE = (
    "Slices of validation scans of the source, as they are, translated, and translated back, beside slices of target "
    "scans: structures must stay where they are. The first and the last picture; all are in the stage's folder."
)
ROUNDS_NOTE = (
    "Target scans that a round's models segmented, and those left out because a structure that every label map of the "
    "source has is missing. Agreement: mean Dice between the label maps of this round and of the one before; once they "
    "hardly change, further rounds add little."
)


def adapted_stage(run: Mapping[str, Any]) -> str:
    """The stage that the adapted model is from."""
    return str(run.get("models", {}).get("adapted", "adaptation/model.pt")).partition("/")[0]


def translation_section(folder: Path) -> str:
    """First and last picture of each stage that has drawn some, and how well the structures stay; empty without any."""
    parts = []
    for stage in sorted(path for path in (folder / "stages").glob("*") if path.is_dir()):
        drawn = sorted(stage.glob("translation_*.png"))
        for path in dict.fromkeys((*drawn[:1], *drawn[-1:])):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            name = escape(path.stem)
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{name}"><figcaption>{name}</figcaption></figure>'
            )
        if drawn:
            kept = {"translated slices, segmented": "translated_dice"}
            parts.append(curves(read_history(stage), kept, "Structures after translation", "Dice (0 to 1)"))
    if not parts:
        return ""
    return f'<h2>Translation</h2><p class="quiet">{PICTURES_NOTE}</p><div class="pictures">{"".join(parts)}</div>'


def rounds_section(run: Mapping[str, Any]) -> str:
    """Pseudo labels of each round: how many are kept, how they change, what was left out and why; empty without any."""
    found = run.get(PSEUDO_LABELS, {})
    if not found:
        return ""
    names = list(run["plan"]["labels"])
    rows, left_out = [], []
    for stage, one in found.items():
        before = one.get("with_round_before", {})
        structures = [before.get("structures", {}).get(name) for name in names]
        rows.append([stage, one["scans"], len(one["kept"]), before.get("mean"), *structures])
        left_out += [[case["case"], stage, ", ".join(case["missing"])] for case in one["left_out"]]
    required = list(dict.fromkeys(itertools.chain(*(one["required"] for one in found.values()))))
    asked = f"Required: {', '.join(required)}." if required else "No structure is required."
    table = sortable_table(["stage", "scans", "kept", "agreement", *names], rows, compact=True)
    missing = (
        "<h3>Left out</h3>" + sortable_table(["scan", "stage", "missing"], left_out, compact=True)
        if left_out
        else "<p>No scan was left out.</p>"
    )
    return f'<h2>Pseudo labels</h2><p class="quiet">{escape(ROUNDS_NOTE)} {escape(asked)}</p>{table}{missing}'
