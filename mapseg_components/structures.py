# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Mappings of structure names to label values in their usual forms, and label values that are not whole numbers.

Structures have names and values from 1; 0 is background and no structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mapseg_components.errors import ConfigError

__all__ = [
    "IGNORED",
    "LARGEST_EXACT",
    "are_whole",
    "ignored_value",
    "listed_values",
    "number_text",
    "numbered",
    "parts_of",
    "structures_of",
    "to_whole",
    "unknown_values",
    "value_fault",
]

BACKGROUND = {"background", "bg"}
MAY_BE_BACKGROUND = {
    "unknown",
    "clear label",
    "unlabeled",
    "unlabelled",
    "void",
    "none",
    "null",
    "other",
    "rest",
    "air",
}
MAY_BE_BACKGROUND |= {"outside", "exterior", "nothing", "empty", "clear"}
LISTED_VALUES = 8  # that a message names
IGNORED = 255  # class index of voxels that count nowhere, see `mapseg_components.transforms.IgnoreOutsided`
IGNORE = "ignore"  # nnU-Net's name for voxels that nobody annotated
LARGEST_EXACT = 1 << 24  # float32, in which scans are read, has all whole numbers up to here
ROUNDING, FLOOR = 4 * float(np.finfo(np.float32).eps), 1e-5  # of a value, and at least: what scl_slope leaves


def structures_of(labels: Mapping[Any, Any], origin: str = "labels", ignore: bool = False) -> dict[str, int]:
    """Structure to value, without background, in the order given.

    Understood are name to value (``{"liver": 1}``, with or without ``"background": 0`` as nnU-Net has it) and value to
    name (``{"0": "background", "1": "liver"}``, as the Medical Segmentation Decathlon and nnU-Net v1 have it).

    Args:
        labels: the mapping.
        origin: for messages, the file or setting that it comes from.
        ignore: leave nnU-Net's ``ignore`` out, see `ignored_value`, instead of refusing it.

    Raises:
        ConfigError: no structure, a region of several values, a value that is no whole number from 1 or occurs twice,
            a structure of value 0, or ``ignore``.

    Examples:
        >>> from mapseg_components.structures import structures_of
        >>> structures_of({"background": 0, "liver": 1, "spleen": 5})
        {'liver': 1, 'spleen': 5}
        >>> structures_of({"0": "background", "1": "liver"})
        {'liver': 1}
    """
    found: dict[str, int] = {}
    for name, given in pairs_of(labels):
        if isinstance(given, (list, tuple)):
            raise ConfigError(
                f"{origin}: {name!r} is a region of the values {list(given)}; every voxel has one value here: name "
                "each value by itself (mapseg adapt merges several values of a structure)"
            )
        value = whole_value(given)
        if value is None or not 0 <= value <= LARGEST_EXACT:
            expected = f"expected a whole number from 1 to {LARGEST_EXACT}"
            raise ConfigError(f"{origin}: {name!r} is {given!r}, {expected}: name structures as in {{'liver': 1}}")
        plain = name.strip().casefold().replace("_", " ")
        if value == 0 and plain not in BACKGROUND | MAY_BE_BACKGROUND:
            what = f"{origin}: {name!r} is 0, but 0 is background and no structure"
            raise ConfigError(f"{what}: give the structure another value, in the label maps as well")
        if value != 0 and plain in BACKGROUND:
            what = f"{origin}: {name!r} is {value}, but background is 0 and no structure"
            raise ConfigError(f"{what}: take it out of labels, and name {value} in dropped_labels")
        if name.casefold() == IGNORE and not ignore:
            raise ConfigError(
                f"{origin}: 'ignore' is {value}, voxels that nobody annotated; training cannot ignore voxels: annotate "
                f"them, or take 'ignore' out of labels and name {value} in dropped_labels, then they are background"
            )
        if value == 0 or name.casefold() == IGNORE:
            continue
        if name in found or value in found.values():
            raise ConfigError(f"{origin}: {name!r} or its value {value} occurs twice: name each once")
        found[name] = value
    if not found:
        raise ConfigError(f"{origin} name no structure ({dict(labels)!r}): expected such as {{'liver': 1}}")
    return found


def parts_of(labels: Mapping[Any, Any], origin: str = "labels", ignore: bool = False) -> dict[str, list[int]]:
    """Structure to its values in label maps, of which it may have several, such as one for each side.

    Args:
        labels: as of `structures_of`; a value may be a list, or value to name may have a name twice.
        origin: for messages, the file or setting that it comes from.
        ignore: as of `structures_of`.

    Raises:
        ConfigError: a list is empty, a value occurs twice, or as `structures_of`.

    Examples:
        >>> from mapseg_components.structures import parts_of
        >>> parts_of({"hippocampus": [17, 53], "brainstem": 16})
        {'hippocampus': [17, 53], 'brainstem': [16]}
        >>> parts_of({"17": "hippocampus", "53": "hippocampus"})
        {'hippocampus': [17, 53]}
    """
    several: dict[str, list[int]] = {}
    for name, given in pairs_of(labels):
        for value in given if isinstance(given, (list, tuple)) else [given]:
            several.setdefault(name, []).append(value)
        if name not in several:
            raise ConfigError(f"{origin}: {name!r} has no value ({given!r}): give it one or more, as in [17, 53]")
    # every value by a name of its own, so that its faults are found
    names = {
        (name, number): f"{name}" if not number else f"{name}, value {number + 1}"
        for name, values in several.items()
        for number in range(len(values))
    }
    single = structures_of({text: several[name][number] for (name, number), text in names.items()}, origin, ignore)
    return {
        name: [single[names[name, number]] for number in range(len(values))]
        for name, values in several.items()
        if names[name, 0] in single
    }


def ignored_value(labels: Mapping[Any, Any]) -> int | None:
    """Value of nnU-Net's ``ignore``, voxels that nobody annotated; ``None`` without.

    Examples:
        >>> from mapseg_components.structures import ignored_value
        >>> ignored_value({"background": 0, "liver": 1, "ignore": 2})
        2
    """
    return next((whole_value(value) for name, value in pairs_of(labels) if name.casefold() == IGNORE), None)


def pairs_of(labels: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """Name and value of each entry, of name to value as of value to name."""
    inverted = bool(labels) and all(whole_value(key) is not None for key in labels)
    inverted &= all(isinstance(value, str) for value in labels.values())
    return [(str(value), key) if inverted else (str(key), value) for key, value in labels.items()]


def whole_value(given: Any) -> int | None:
    """A whole number, also as text or as 1.0; ``None`` for anything else."""
    if isinstance(given, bool):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def are_whole(values: np.ndarray) -> np.ndarray:
    """Which values are whole numbers but for float32 rounding, such as 1.0000000149 by a ``scl_slope`` of 0.1.

    Args:
        values: of any shape.

    Returns:
        bool, of the same shape; ``False`` where a value is not finite.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.structures import are_whole
        >>> are_whole(np.array([0, 1.0000000149, 1.5, np.nan])).tolist()
        [True, True, False, False]
    """
    if values.dtype.kind in "iub":
        return np.ones(values.shape, bool)
    with np.errstate(invalid="ignore"):
        exact = values.astype(np.float64)
        return np.abs(exact - np.rint(exact)) <= np.maximum(FLOOR, ROUNDING * np.abs(exact))


def numbered(values: np.ndarray, parts: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Numbers of the structures, from 1 in the order given, in the place of their values; 0 for all other values.

    Args:
        values: of a label map, any shape; whole numbers, as numbers of any type.
        parts: structure to its values, as of `parts_of`.

    Returns:
        int32, of the same shape.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.structures import numbered
        >>> numbered(np.array([0.0, 53, 17, 2, 16]), {"hippocampus": [17, 53], "brainstem": [16]}).tolist()
        [0, 1, 1, 0, 2]
    """
    listed = [value for part in parts.values() for value in part]
    low = min(listed) - 1  # the table's first and last place are for all that lies outside
    table = np.zeros(max(listed) - low + 2, np.int32)
    for number, part in enumerate(parts.values(), start=1):
        table[np.asarray(part) - low] = number
    wide = values if np.issubdtype(values.dtype, np.floating) else values.astype(np.int64)
    return table[(np.clip(wide, low, low + len(table) - 1) - low).astype(np.int32)]


def to_whole(values: np.ndarray) -> np.ndarray:
    """Values with those that are whole but for float32 rounding made exact; the others as they are. Any shape.

    Examples:
        >>> import numpy as np
        >>> from mapseg_components.structures import to_whole
        >>> to_whole(np.array([0, 1.0000000149, 1.5])).tolist()
        [0.0, 1.0, 1.5]
    """
    if values.dtype.kind in "iub":
        return values
    rounded = np.rint(values)
    return np.where(are_whole(values), rounded, values) if not np.array_equal(rounded, values) else values


def number_text(value: float) -> str:
    """A value with as many digits as float32 distinguishes.

    Examples:
        >>> from mapseg_components.structures import number_text
        >>> number_text(1.0), number_text(0.9882)
        ('1', '0.9882')
    """
    if float(value).is_integer():
        return f"{int(value)}"
    return str(np.float32(value)) if np.isfinite(value) else str(value)


def value_fault(
    counts: Iterable[tuple[float, int]], exact: bool = False, more_values: int = 0
) -> tuple[str, str] | None:
    """Values of a file that cannot be labels.

    Args:
        counts: each distinct value, by `to_whole`, with its number of voxels.
        exact: values are read as integers; else as float32, which has all whole numbers up to `LARGEST_EXACT`.
        more_values: number of distinct values that are not in ``counts``.

    Returns:
        what is wrong, and the remedy; ``None`` if all values may be labels.

    Examples:
        >>> from mapseg_components.structures import value_fault
        >>> value_fault([(0, 60), (1, 40)]) is None
        True
        >>> value_fault([(0, 60), (0.5, 40)])[0]
        'label map has fractions: 0.5 (40 voxels)'
    """
    pairs = list(counts)
    faults = (
        (
            [pair for pair in pairs if not float(pair[0]).is_integer()],
            "fractions",
            "a label map has whole numbers: name it as it was annotated, before it was rescaled or resampled by "
            "interpolation; a scan and probabilities are none",
        ),
        ([pair for pair in pairs if pair[0] < 0], "negative values", "number structures from 1, background is 0"),
        (
            [pair for pair in pairs if not exact and pair[0] > LARGEST_EXACT],
            f"values above {LARGEST_EXACT}",
            "renumber structures: scans are read as float32, which does not distinguish such values",
        ),
    )
    for found, name, remedy in faults:
        if found:
            return f"label map has {name}: {listed_values(found, more_values)}", remedy
    return None


def unknown_values(
    counts: Iterable[tuple[float, int]], known: Iterable[int], more_values: int = 0
) -> tuple[str, str] | None:
    """Values of a label map that are not among the known ones.

    Args:
        counts: each distinct value, by `to_whole`, with its number of voxels.
        known: values that may occur, besides 0.
        more_values: number of distinct values that are not in ``counts``.

    Returns:
        what is wrong, and the remedy; ``None`` if all values are known.

    Examples:
        >>> from mapseg_components.structures import unknown_values
        >>> unknown_values([(0, 60), (1, 30), (7, 10)], known=[1, 2])[0]
        'label map has unknown values 7 (10 voxels), known are [0, 1, 2]'
    """
    allowed = sorted({0, *known})
    unknown = [(value, count) for value, count in counts if value not in allowed]
    if not unknown:
        return None
    positive = [pair for pair in unknown if not (pair[0] < 0 and float(pair[0]).is_integer())]  # others may be dropped
    fault = value_fault(positive, more_values=more_values)
    if fault is not None:
        return fault
    what = f"label map has unknown values {listed_values(unknown, more_values)}, known are {allowed}"
    remedy = "name them in labels or in dropped_labels"
    if [value for value, _ in unknown] == [255]:
        remedy += " (the structure of a mask of 0 and 255 is named as in {'liver': 255})"
    return what, remedy


def listed_values(counts: Sequence[tuple[float, int]], more_values: int = 0) -> str:
    """The first eight values with their voxels, and how many more there are, for messages.

    Examples:
        >>> from mapseg_components.structures import listed_values
        >>> listed_values([(1, 30), (2.5, 10)], more_values=3)
        '1 (30 voxels), 2.5 (10 voxels) and 3 more'
    """
    listed = ", ".join(f"{number_text(value)} ({count} voxels)" for value, count in counts[:LISTED_VALUES])
    more = max(len(counts) - LISTED_VALUES, 0) + more_values
    return f"{listed}{f' and {more} more' if more else ''}"
