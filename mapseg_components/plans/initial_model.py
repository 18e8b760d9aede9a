# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A shipped model of any contrast that the source is learnt from, in the place of random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from mapseg_components.boxes import is_thick
from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.files import sha256_of, write_text
from mapseg_components.handover import resized_spacing
from mapseg_components.keys import IMAGE
from mapseg_components.plans.bundle import configs_of, of_method
from mapseg_components.plans.extents import factor_between
from mapseg_components.plans.recipes import ADAPTATION, INITIAL, INITIAL_WEIGHTS, Recipe
from mapseg_components.plans.sizes import preset_for
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.shipped_files import bundles_folder, shipped_bundles
from mapseg_components.sides import without_side
from mapseg_components.structures import structures_of
from mapseg_components.transforms.resampling import spacing_of

__all__ = ["describe_initial", "initial_model_for", "shipped_model", "write_initial"]

ANY_CONTRAST = ("brain_any_contrast",)  # shipped bundles whose models learnt images of any contrast
OWN = {"network_def", "in_channels", "uncertainty", "working_spacing", "working_directions", "patch_size"}
OWN |= {"global_view", "encoder_weights", "initial_weights"}
PLANNED = ("filters", "kernel_size", "strides")  # of a network, from the voxels
NO_MATTER = {"area", "proper", "nucleus", "cerebral", "globus"}  # words of atlases
DATA_LICENSE, LICENSE_COPY = "data_license.txt", "initial_model_license.txt"
HEAD = "head."  # of its tensors: those with a row for each class


def initial_model_for(
    structures: Iterable[str],
    labelled: Sequence[Mapping[str, Any]],
    target: Sequence[Mapping[str, Any]],
    foreground_mm: Sequence[float] | None,
    recipe: Recipe,
    request: Mapping[str, Any],
) -> dict[str, Any] | None:
    """A shipped model that has learnt the structures in images of any contrast, at the size of the target's bodies.

    Args:
        structures: names; each must be one of the model's, a side and such words as "area" aside.
        labelled: cases of the source.
        target: all cases.
        foreground_mm: median extent of what the source's scans show, at the size they are trained on, see
            `mapseg_components.plans.extents.sized_source`.
        recipe: of the method, which must learn the source's images in random contrasts by the model's kind of network,
            and then from the target.
        request: arguments of ``mapseg adapt``; settings of the user for network, spacing, patch or weights rule a model
            out. Without ``match_size`` it works on its own voxels.

    Returns:
        ``bundle``, its name; ``classes``, structure to that of the model; ``network``, what is planned otherwise of
        one; and ``settings`` of the bundles that its weights ask for. ``None`` where no model suits.
    """
    others = any(stage.bundle != ADAPTATION for stage in recipe.stages)  # such as a translation
    if not request.get(INITIAL) or recipe.order is None or others or recipe.learns_source_alone:
        return None
    if OWN & set(request["settings"] or {}):
        return None
    suiting = shipped_model(structures, foreground_mm, bool(request["match_size"]))
    if suiting is None:
        return None
    home, config, spacing = suiting
    network = config["network_def"]
    preset, _ = preset_for(request)
    own = of_method(configs_of(ADAPTATION).parent, "train.json", recipe, preset)
    if own["uncertainty"] or network["_target_"] != own["network_def"]["_target_"]:
        return None
    if any(is_thick(spacing_of(read_geometry(case[IMAGE]).affine)) for case in (*labelled, *target)):
        return None
    settings = {"working_spacing": spacing, **{key: config[key] for key in ("patch_size", "global_view")}}
    return {
        "bundle": home.name,
        "classes": counterparts(structures, structures_of(config["labels"])),
        "network": {key: network[key] for key in PLANNED},
        "settings": settings,
    }


def shipped_model(
    structures: Iterable[str], foreground_mm: Sequence[float] | None, match: bool
) -> tuple[Path, dict[str, Any], list[float]] | None:
    """The first shipped model of any contrast that knows the structures and suits the size of the bodies.

    Args:
        structures: names, see `counterparts`.
        foreground_mm: median extent of the bodies.
        match: whether sizes are compared at all.

    Returns:
        its bundle, config of inference, and the spacing to work on, mm; ``None`` where no model suits, or the extent is
        not known.
    """
    shipped, names = shipped_bundles(), [*structures]
    for home in (bundles_folder() / name for name in ANY_CONTRAST if name in shipped):
        config = ConfigParser.load_config_file(home / "configs" / "inference.json")
        factor = factor_between(config["foreground_mm"], foreground_mm) if match else 1.0
        known = counterparts(names, structures_of(config["labels"]))
        if factor is None or known is None or not weights_in(home).is_file():
            continue
        return home, config, resized_spacing(config["working_spacing"], None, config["working_directions"], factor)
    return None


def counterparts(structures: Iterable[str], known: Iterable[str]) -> dict[str, str] | None:
    """Structures to those of a model, by their names; ``None`` where one has none.

    Letters count alone, without plurals, sides and words that tell nothing apart: a model that does not know sides is
    where both begin.

    Examples:
        >>> from mapseg_components.plans.initial_model import counterparts
        >>> counterparts(["Left-Accumbens-area", "Brain-Stem"], ["brainstem", "accumbens"])
        {'Left-Accumbens-area': 'accumbens', 'Brain-Stem': 'brainstem'}
        >>> counterparts(["caudate", "cochlea"], ["caudate"]) is None
        True
    """
    own = {letters_of(name): name for name in known}
    found = {name: own.get(letters_of(name)) for name in structures}
    return None if None in found.values() else {name: str(other) for name, other in found.items()}


def letters_of(name: str) -> str:
    """What a structure's name is compared by."""
    letters = "".join(part for part in without_side(name) if part not in NO_MATTER)
    return letters.replace("pallidus", "pallidum").rstrip("s")


def weights_in(bundle: Path) -> Path:
    """The weights of a shipped bundle."""
    return bundle / "models" / "model.pt"


def write_initial(folder: Path, plan: Mapping[str, Any]) -> str:
    """Write the weights that the source is learnt from: the model's, with a class for each structure of the run.

    Args:
        folder: the new bundle; its README says what it was made from, and the licence of the model's data is beside it.
        plan: of the run, with ``initial_model`` (see `initial_model_for`) and ``labels``.

    Returns:
        checksum (SHA-256) of the model's file.

    Raises:
        CheckpointError: the model's weights are missing or damaged.
        ResourceError: the disk is full.
    """
    home = bundles_folder() / plan[INITIAL]["bundle"]
    config = ConfigParser.load_config_file(home / "configs" / "inference.json")
    known, classes = list(structures_of(config["labels"])), plan[INITIAL]["classes"]
    rows = torch.tensor([0, *(known.index(classes[name]) + 1 for name in plan["labels"])])
    weights = read_checked(weights_in(home))
    chosen = {name: value[rows] if name.startswith(HEAD) else value for name, value in weights.items()}
    path = folder / "stages" / INITIAL_WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(chosen, path)
    shutil.copyfile(home / "docs" / DATA_LICENSE, folder / "docs" / LICENSE_COPY)
    readme = folder / "docs" / "README.md"
    text, told = readme.read_text(encoding="utf-8"), describe_initial(plan[INITIAL])
    if told not in text:
        told = f"{told} What those were learnt from, and its licence: `{LICENSE_COPY}`."
        write_text(f"{text}\n{told}\n", readme)
    return sha256_of(weights_in(home))


def describe_initial(found: Mapping[str, Any]) -> str:
    """The model in words, for the terminal, the report and the bundle's README."""
    spacing = " x ".join(f"{side:g}" for side in found["settings"]["working_spacing"])
    return (
        f"The source is learnt from the weights of {found['bundle']}, in contrasts of any order, on voxels of "
        f"{spacing} mm (another choice: {INITIAL})."
    )
