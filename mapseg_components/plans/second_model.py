# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A shipped model of any contrast beside the adapted one, where the target is far from the source."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.files import write_json, write_text
from mapseg_components.plans.initial_model import shipped_model
from mapseg_components.shipped_files import bundle_of
from mapseg_components.structures import structures_of

__all__ = ["SECOND", "SPACING_OF_SECOND", "add_second_model", "describe_second", "second_model_for"]

SECOND = "second_model"  # folder in the bundle, setting of its inference.json, and entry of run.json
SPACING_OF_SECOND = "second_model_spacing"  # setting of its inference.json
TOLD = ("negative_values", "assume_orientation", "non_finite")  # of a scan, by the user: of both models
COPIED = ("configs/inference.json", "configs/metadata.json", "models/model.pt", "LICENSE", "docs/data_license.txt")


def second_model_for(structures: Iterable[str], target_mm: list[float] | None) -> dict[str, Any] | None:
    """A shipped model that segments the structures in images of any contrast, at the size of the target's bodies.

    Args:
        structures: names; all of them must be among the model's.
        target_mm: median extent of the target's bodies, see `mapseg_components.scans.extents.median_extent`.

    Returns:
        ``bundle``, its name, and ``working_spacing``, mm; ``None`` where no model suits, or the extent is not known.
    """
    names = set(structures)
    suiting = shipped_model(names, target_mm)
    if suiting is None or not names <= set(structures_of(suiting[1]["labels"])):
        return None
    return {"bundle": suiting[0].name, "working_spacing": suiting[2]}


def add_second_model(folder: Path, found: Mapping[str, Any]) -> None:
    """Copy the model into a bundle that ``mapseg adapt`` makes, whose inference averages both from then on.

    Args:
        folder: the bundle.
        found: see `second_model_for`.

    Raises:
        ResourceError: the disk is full.
    """
    home = bundle_of(found["bundle"])
    for name in COPIED:
        (folder / SECOND / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / name, folder / SECOND / name)
    path = folder / "configs" / "inference.json"
    config = ConfigParser.load_config_file(path)
    config |= {SECOND: f"$@bundle_root + '/{SECOND}'", SPACING_OF_SECOND: found["working_spacing"]}
    config["evaluator"] = config["evaluator"] | {
        "inferer": {
            "_target_": "mapseg_components.inferers.SecondModelInferer",
            "inferer": "@inferer",
            "bundle": f"@{SECOND}",
            "labels": "@labels",
            "settings": {"working_spacing": f"@{SPACING_OF_SECOND}", **{name: f"@{name}" for name in TOLD}},
        }
    }
    write_json(config, path)
    readme, line = folder / "docs" / "README.md", f"\n{describe_second(found)}\n"
    text = readme.read_text(encoding="utf-8")
    if line not in text:
        write_text(text + line, readme)


def describe_second(found: Mapping[str, Any]) -> str:
    """The model in words, for the terminal, the report and the bundle's README."""
    spacing = " x ".join(f"{side:g}" for side in found["working_spacing"])
    return (
        f"Label maps are the mean of this model and of {found['bundle']}, which was trained on images of any contrast "
        f"and works on voxels of {spacing} mm here (another choice: {SECOND})."
    )
