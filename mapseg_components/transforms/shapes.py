# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What label maps say of connected components and holes, and what that allows after the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.utils import optional_import
from scipy import ndimage

from mapseg_components.boxes import box_of_mask
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.structures import numbered, to_whole
from mapseg_components.transforms.components import AFTER_NETWORK, holes_of

__all__ = ["SPECK", "Shape", "plan_after", "shapes_in", "shapes_of"]

SPECK = 0.01  # of the largest component's voxels: smaller components are slips of the annotation
ALMOST_ALL = 0.9  # of the label maps in which a structure occurs
MOST = 3  # components that are kept of a structure
LARGEST, SEVERAL, HOLES = AFTER_NETWORK


@dataclass(frozen=True)
class Shape:
    """A structure in one label map.

    Args:
        components: connected by faces, edges or corners, without specks.
        holes: voxels in holes, see `mapseg_components.transforms.components.holes_of`.
    """

    components: int
    holes: int


def shapes_in(classes: np.ndarray, count: int) -> dict[int, Shape]:
    """Structures of a label map that occur in it, by class index.

    Args:
        classes: (X, Y, Z), integers: 0 background, 1 to ``count`` structures.
        count: number of structures.
    """
    found = {}
    for value, box in enumerate(ndimage.find_objects(classes, count), start=1):
        if box is not None:
            numbered, _ = ndimage.label(classes[box] == value, np.ones((3, 3, 3)))
            sizes = np.bincount(numbered.ravel())[1:]
            components = int((sizes >= SPECK * sizes.max()).sum())
            found[value] = Shape(components, int(holes_of(classes, value).sum()))
    return found


def shapes_of(label_maps: Sequence[str], labels: Mapping[str, int]) -> list[dict[int, Shape]]:
    """Structures of every label map. Values that are no structure count as background.

    Args:
        label_maps: files.
        labels: structures and their values; class indices count them from 1.

    Raises:
        DataError: a label map cannot be read.
    """
    shapes = []
    for path in label_maps:
        classes = numbered(to_whole(read_nifti(path).voxels), {name: [value] for name, value in labels.items()})
        shapes.append(shapes_in(around_structures(classes), len(labels)))
    return shapes


def around_structures(classes: np.ndarray) -> np.ndarray:
    """The part of a label map (X, Y, Z) that holds structures, with a voxel of what is around them where there is any:
    much less than a whole head to look through for each structure."""
    if not classes.any():
        return classes
    box = box_of_mask(classes != 0)
    return classes[tuple(slice(max(start - 1, 0), stop + 1) for start, stop in box)]


def plan_after(shapes: Sequence[Mapping[int, Shape]], names: Iterable[str]) -> dict[str, Any]:
    """What is done after the network, from the source's label maps.

    Only the largest component of a structure is kept if it has exactly one wherever it occurs. If it has another number
    in almost all label maps, as where left and right are one structure, and never more than three, as many as it has
    at most are kept. Its holes are filled if it has none anywhere.

    Args:
        shapes: of each label map, see `shapes_in`.
        names: structures, in the order of their class indices from 1.

    Returns:
        ``largest_component`` and ``fill_holes``, names each; ``kept_components``, names with numbers; ``reasons``, for
        each the reason by structure where it is not done; ``in_every_map``, structures that no label map lacks.
    """
    plan: dict[str, Any] = {LARGEST: [], SEVERAL: {}, HOLES: []}
    reasons: dict[str, dict[str, str]] = {LARGEST: {}, SEVERAL: {}, HOLES: {}}
    has_measure = optional_import("skimage.measure")[1]
    for value, name in enumerate(names, start=1):
        seen = [one[value] for one in shapes if value in one]
        several = [one.components for one in seen if one.components > 1]
        holed = sum(one.holes > 0 for one in seen)
        where = f"of {len(shapes)} label maps"
        absent = "" if seen else f"in none {where}"
        fewest, most = min(several, default=0), max(several, default=0)
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        parts = f"{number} components in {len(several)} {where}" if several else ""
        unfit = "" if has_measure else "scikit-image is not installed (pip install scikit-image)"
        against = {
            LARGEST: absent or parts or unfit,
            HOLES: absent or (f"holes in {holed} {where}" if holed else ""),
        }
        numbers = [one.components for one in seen]
        if several and not unfit and most <= MOST and max(map(numbers.count, numbers)) >= ALMOST_ALL * len(numbers):
            plan[SEVERAL][name] = most
            del against[LARGEST]
        for key, reason in against.items():
            if reason:
                reasons[key][name] = reason
            else:
                plan[key].append(name)
    everywhere = [name for value, name in enumerate(names, start=1) if all(value in one for one in shapes)]
    return plan | {"reasons": reasons, "in_every_map": everywhere}
