# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""An adaptation without the source: its package, whether the target fits it, and the plan that follows from both."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.handover import HandoverPackage, package_of_bundle, resize_package
from mapseg_components.keys import IMAGE
from mapseg_components.plans.components import TITLES
from mapseg_components.plans.extents import describe_size, find_size
from mapseg_components.plans.flips import find_flips
from mapseg_components.plans.frame import Frame, Grid, laid
from mapseg_components.plans.recipes import Recipe
from mapseg_components.plans.sizes import preset_for
from mapseg_components.scans.extents import median_extent
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.shipped_files import METADATA, bundle_of, bundles_folder, shipped_bundles
from mapseg_components.transforms.components import AFTER_NETWORK

__all__ = ["check_method", "open_package", "place_of", "plan_of_package", "refuse_of_source"]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set

MANIFEST = "handover.json"
AS_IT_IS, RESAMPLED = 3.0, 8.0  # ratio of voxel sides beyond which a target does not fit, by whether it is mended
OF_NETWORK = ("width", "depth", "stride", "dilations", "head_channels", "dropout", "uncertainty", "variance")
OF_SOURCE, OF_LABEL_MAPS = "source_", ("dropped_labels",)  # settings: how they begin, and others
UNCERTAIN, WITHOUT_VIEW = "uncertainty.yaml", "supervised.yaml"  # overlays of recipes: two heads; no global view


def place_of(package: str) -> Path:
    """Folder of a hand-over package or a bundle: a path, or the name of a bundle that comes with this package.

    Raises:
        ConfigError: there is no such folder, or it is neither.

    Examples:
        >>> from mapseg_components.plans.package import place_of
        >>> place_of("buda_seg").parts[-2:]
        ('bundles', 'buda_seg')
    """
    path = bundle_of(package)
    if not path.is_dir():
        raise ConfigError(
            f"package {Path(package).absolute()} is no folder: name a hand-over package, the folder of a bundle, or "
            f"one of the bundles {shipped_bundles()}"
        )
    if not ((path / MANIFEST).is_file() or (path / METADATA).is_file()):
        raise ConfigError(
            f"package {path.absolute()} has neither {MANIFEST}, as a hand-over package has, nor {METADATA}, as a "
            "bundle has: correct the path"
        )
    return path.absolute()


def open_package(place: Path, folder: Path) -> HandoverPackage:
    """Check a package and copy it, or make one of a bundle, so that a run keeps what it began from.

    Args:
        place: see `place_of`.
        folder: of the copy.

    Raises:
        ConfigError: it is damaged, of another version, or a bundle that cannot be adapted.
        CheckpointError: weights are missing, damaged or of another network.
        ResourceError: the folder cannot be written.
    """
    if not (place / MANIFEST).is_file():
        logger.info(f"{place} is a bundle: a hand-over package is made of its network, settings and weights.")
        return package_of_bundle(place, folder)
    given = HandoverPackage(place)
    given.network  # noqa: B018  its fingerprint is compared
    if os.path.realpath(place) != os.path.realpath(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (Path(given.weights), place / MANIFEST):  # this one last
            shutil.copyfile(path, folder / path.name)
    copied = HandoverPackage(folder)
    copied.weights  # noqa: B018  its checksum is compared
    return copied


def sized_package(
    package: HandoverPackage, target: Sequence[Mapping[str, Any]], match: bool, negative_values: str | None = None
) -> tuple[HandoverPackage, dict[str, Any]]:
    """A package for the size of what the target's scans show, if that is another than its source's.

    Args:
        package: see `open_package`.
        target: all cases.
        match: whether sizes are compared at all.
        negative_values: of the target's scans; by default as the package says.

    Returns:
        the package, and what the plan has of it, see `mapseg_components.plans.extents.sized_source`.

    Raises:
        ResourceError: the package cannot be written anew.
    """
    source_mm = package.content.get("foreground_mm")
    policy = negative_values or package.settings["training"].get("target_negative_values")
    size = find_size(source_mm, median_extent([case[IMAGE] for case in target], policy)) if match else None
    if size is None:
        return package, {"foreground_mm": source_mm}
    size["package"] = True
    logger.info(describe_size(size))
    resized = resize_package(package, size["factor"])
    if resized is None:
        logger.warning(
            "This is not done: the package does not say on which voxel size its model works. Have the source site set "
            "working_spacing."
        )
        return package, {"foreground_mm": source_mm}
    return resized, {"foreground_mm": size["target_mm"], "size": size}


def refuse_of_source(**given: Any) -> None:
    """Refuse arguments that a package answers itself. Raises `ConfigError`."""
    named = [name for name, value in given.items() if value not in (None, False)]
    if named:
        raise ConfigError(
            f"arguments {' and '.join(named)} are of a source, and the package's model has learnt its own: leave them "
            "out"
        )


def check_method(recipe: Recipe, package: HandoverPackage, settings: Mapping[str, Any]) -> None:
    """Refuse a method that cannot go on from a package, and settings that are the package's or its source's.

    Args:
        recipe: of the method.
        package: see `open_package`.
        settings: of the user.

    Raises:
        ConfigError: names the method or the settings, and what can be done instead.
    """
    bound = {"labels", "network_def", *OF_NETWORK, *package.settings["preprocessing"]}
    taken = sorted(set(settings) & bound)
    if taken:
        raise ConfigError(f"settings {taken} are the package's, which its weights were trained with: leave them out")
    taken = sorted(name for name in settings if name.startswith(OF_SOURCE) or name in OF_LABEL_MAPS)
    if taken:
        raise ConfigError(
            f"settings {taken} are of the source's scans and label maps, and a package has none: leave them out, or "
            "give the source in the place of the package"
        )
    if UNCERTAIN in recipe.overlays and package.variance is None:
        raise ConfigError(
            f"method {recipe.name} learns from the uncertainty of a network with two heads, and that of the package "
            "has one: take method test_time or entropy, or a package of mapseg adapt --method buda_seg or "
            "uncertainty.yaml"
        )
    if WITHOUT_VIEW in recipe.overlays and package.settings["preprocessing"]["global_view"]:
        raise ConfigError(
            f"method {recipe.name} adapts a network without a global view, and that of the package has one: take "
            "method test_time, or a package of a model that was trained with supervised.yaml"
        )


def plan_of_package(
    package: HandoverPackage, target: Sequence[Mapping[str, Any]], held_out: Sequence[Any], request: Mapping[str, Any]
) -> dict[str, Any]:
    """Preset, frame, network and sizes: the package's, for the scans of a target.

    Args:
        package: see `open_package`; it is written anew where the target's bodies are of another size.
        target: all cases.
        held_out: those that are judged apart.
        request: arguments of ``mapseg adapt``.

    Returns:
        what `mapseg_components.plans.plan.make_plan` returns, and of the package ``network``, its config, and
        ``package``: ``validation`` (source validation Dice), ``ranges_ml`` of the structures and
        ``share_ranges``, as far as it has them.

    Raises:
        ConfigError: the preset is unknown.
        DataError: the target does not fit the package, or a scan cannot be read.
        ResourceError: the package cannot be written.
    """
    asked = request["settings"] or {}
    match, policy = bool(request.get("match_size")), asked.get("target_negative_values")
    package, size = sized_package(package, target, match, policy)
    content = package.content
    preset, reason = preset_for(request)
    settings = {**package.settings["preprocessing"], **package.settings["training"]}
    settings["negative_values"] = asked.get("target_negative_values", settings["target_negative_values"])
    headers = [read_geometry(case["image"]) for case in target]
    directions = settings["working_directions"]
    grids = [laid(header.shape, header.affine, directions) for header in headers]
    require_fit(package, grids)
    frame = Frame(directions, settings["working_spacing"], grids)
    network = dict(content["network"])
    stride = network.get("stride") or [max(side // 2, 1) for side in settings["patch_size"]]
    settings |= {"stride": [stride] * 3 if isinstance(stride, int) else [*stride]}
    settings |= {"uncertainty": package.variance is not None, "variance": package.variance or "free"}
    known = ConfigParser.load_config_file(bundles_folder() / "mapseg_adaptation" / "configs" / "train.json")
    silent = dict.fromkeys(package.labels, "the package does not say")
    told = content.get("after_network", {}) | asked
    said = {name: told[name] for name in TITLES if name in told}
    for name, value in said.items():
        AFTER_NETWORK[name](name, value, package.labels)
    after = package.after_network | said
    reasons = {name: {} if name in said else silent for name in TITLES}
    return {
        "preset": preset,
        "reason": reason,
        "source_training": 0,
        "source_validation": 0,
        "target": len(target),
        "target_heldout": [case["case_id"] for case in held_out],
        **frame.figures,
        "fine": False,
        "labels": package.labels,
        "settings": {name: value for name, value in settings.items() if name in known or name == "negative_values"},
        "slice_size": [],
        "flip_axes": find_flips(package.labels, settings, preset, asked),
        "after_network": {**after, "reasons": reasons, "in_every_map": []},
        "network": network,
        "package": figures_of(package),
        **size,
    }


def figures_of(package: HandoverPackage) -> dict[str, Any]:
    """What a package says of its source, for the comparison and the report."""
    structures = package.content["volumes"].get("structures") or {}
    known = {name: one["volume_mm3"]["range"] for name, one in structures.items() if one and name in package.labels}
    shares = package.share_ranges
    without = [name for name in package.labels if name not in shares]
    if without:
        logger.warning(
            f"The package has no range of the shares of {', '.join(without)}: that such a structure vanishes, or "
            "swallows others, is not watched."
        )
    return {
        "validation": package.content["source_validation"],
        "ranges_ml": {name: [end / 1000 for end in ends] for name, ends in known.items()},
        "share_ranges": {name: list(ends) for name, ends in shares.items()},
    }


def require_fit(package: HandoverPackage, grids: Sequence[Grid]) -> None:
    """Refuse a target whose scans have other channels, dimensions or voxel sizes than the package is for.

    Args:
        package: see `open_package`.
        grids: of the target's scans in the working frame.

    Raises:
        DataError: says which, found and expected.
    """
    settings, remedy = package.settings["preprocessing"], "take the scans that the package is for, or another package"
    if settings["in_channels"] != 1:
        raise DataError(
            f"the package's network takes {settings['in_channels']} channels, and a scan of the target has 1: {remedy}"
        )
    flat = [bool((grid.shape == 1).any()) for grid in grids]
    for_images = 1 in settings["patch_size"]
    if any(one is not for_images for one in flat):
        found, expected = ("volumes", "2D images") if for_images else ("2D images", "volumes")
        number = sum(one is not for_images for one in flat)
        counted = f"{number} of {len(flat)} target scans are {found}"
        raise DataError(f"{counted}, and the package is for {expected}: {remedy}")
    working = settings["working_spacing"] or [0.0, 0.0, 0.0]
    if package.content["spacing_mm"] is None:
        logger.warning("The package does not say its source's voxel size: whether the target's fits is not checked.")
        return
    affine = np.diag([*package.content["spacing_mm"], 1.0])
    source = laid([1, 1, 1], affine, settings["working_directions"]).spacing
    target = np.median([grid.spacing for grid in grids], axis=0)
    for side, (own, other, resampled) in enumerate(zip(target, source, working)):
        most = RESAMPLED if resampled else AS_IT_IS
        if settings["patch_size"][side] > 1 and max(own, other) > most * min(own, other):
            shown = [f"{[float(f'{one:.4g}') for one in sides.tolist()]} mm" for sides in (target, source)]
            raise DataError(
                f"the target's median voxel size is {shown[0]}, that of the package's source {shown[1]}, more than "
                f"{most:g} times apart: correct the spacing in the headers, or {remedy}"
            )
