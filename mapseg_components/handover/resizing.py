# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A package for bodies of another size: its model works on voxels that are larger or smaller by a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mapseg_components.files import write_json
from mapseg_components.handover.package import MANIFEST, HandoverPackage

__all__ = ["resize_package", "resized_spacing"]


def resized_spacing(
    working: Sequence[float] | None, own: Sequence[float] | None, directions: Any, factor: float
) -> list[float] | None:
    """The working spacing on which bodies of another size fill as many voxels as before.

    Args:
        working: mm per axis of the working frame, 0 for an axis that stays as it is; ``None`` for all.
        own: mm per axis of RAS of the scans that the weights learnt from, if it is known.
        directions: of the working frame, ``None`` for the axes of RAS.
        factor: by which the bodies are larger.

    Returns:
        mm per axis, or ``None`` where an axis stays as it is and is of no known length.
    """
    sides = [0.0, 0.0, 0.0] if working is None else [*working]
    if not all(sides) and (own is None or directions):
        return None
    return [round((side or known) * factor, 4) for side, known in zip(sides, own or sides)]


def resize_package(package: HandoverPackage, factor: float) -> HandoverPackage | None:
    """Write a package anew, in its folder, for bodies of another size.

    Its network and weights stay as they are. Working spacing, voxel size, volumes and extents are those of the other
    bodies.

    Args:
        package: a copy that belongs to the caller.
        factor: by which the bodies are larger than those of its source.

    Returns:
        the package as it is now, or ``None``, and nothing is written, where it does not say on which spacing its model
        works.

    Raises:
        ResourceError: it cannot be written.
    """
    content = package.content
    preprocessing = content["settings"]["preprocessing"]
    frame = preprocessing["working_spacing"], content["spacing_mm"], preprocessing["working_directions"]
    spacing = resized_spacing(*frame, factor)
    if spacing is None:
        return None

    def times(values: Any, power: int) -> Any:
        """Numbers in lists and mappings, times the factor as often; others as they are."""
        if isinstance(values, dict):
            return {name: times(value, power) for name, value in values.items()}
        if isinstance(values, list):
            return [times(value, power) for value in values]
        return float(f"{values * factor**power:.4g}") if type(values) in (int, float) else values

    structures = content["volumes"].get("structures") or {}
    volumes = {
        name: one if one is None else {**one, "volume_mm3": times(one["volume_mm3"], 3)}
        for name, one in structures.items()
    }
    lengths = {name: times(content[name], 1) for name in ("spacing_mm", "foreground_mm") if name in content}
    changed = {
        **content,
        **lengths,
        "settings": {**content["settings"], "preprocessing": {**preprocessing, "working_spacing": spacing}},
        "volumes": {**content["volumes"], "structures": volumes},
    }
    write_json(changed, package.folder / MANIFEST)
    return HandoverPackage(package.folder)
