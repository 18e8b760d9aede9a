# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a set of readable scans: one unlike the others, or source and target further apart than meant.

Nothing here is certain, so nothing here is an error: warnings are worth a look, notes tell what was found.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mapseg_components.boxes import is_thick
from mapseg_components.data.scan_statistics import BRIGHTEST, ScanStatistics
from mapseg_components.scans.facts import Facts
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.findings import Finding

__all__ = ["histogram_distance", "plausibility"]

SPACING_RATIO, EXTENT_RATIO = 1.25, 1.5  # of a scan to the median of its set
DOMAIN_SPACING_RATIO = 1.1  # of the target's median spacing to the source's
CT_AIR_HU, CT_SHIFT = -900.0, 1024
CT_SHARE = 0.1  # of the voxels are soft tissue, in a CT
MASKED_BACKGROUND, MASKED_BORDER = 0.2, 0.98  # shares of background in a skull-stripped or masked scan
FEWEST_SCANS = 3  # to compare one with the others
TURN_MARGIN = 0.02  # by which another orientation must fit better, as a correlation
MIRROR_SHARE = 0.25  # of the reference's usual preference for its side
FAR, FAR_RATIO = 0.1, 4.0  # a histogram that far from its set's median, and so many times the usual distance
HIGHEST_OF_8_BITS = 255
RESAMPLED = "`mapseg adapt` resamples to its working spacing, `python -m monai.bundle` only with `working_spacing` set"
AXES = ("left-right", "back-front", "bottom-top")
StatisticsByFile = Mapping[str, ScanStatistics]


def plausibility(
    groups: Mapping[str, Sequence[str]],
    statistics: StatisticsByFile,
    facts: Mapping[str, Facts],
    negative_values: str | None = None,
) -> list[Finding]:
    """Look at each set, then compare the target with the source.

    Args:
        groups: set, ``"source"`` and ``"target"`` or any other name, to its files.
        statistics: statistics of the images that could be read, by file.
        facts: facts of the same files.
        negative_values: what a run makes of them; they are unusual where it is not said.
    """
    known = {name: [file for file in files if file in statistics] for name, files in groups.items()}
    known = {name: files for name, files in known.items() if files}
    findings: list[Finding] = []
    for name, files in known.items():
        findings += grids(name, files, statistics)
        findings += intensities(name, files, statistics, facts, negative_values)
        findings += masking(name, files, statistics)
        findings += unusual_histograms(name, files, statistics)
        findings += copies(files, facts)
        findings += pictures(name, files, statistics, facts)
    reference = known.get("source") or next(iter(known.values()), [])
    for files in known.values():
        if not any(map(is_picture, files)):  # an image of tissue may lie any way
            findings += orientations(files, reference, statistics)
    if {"source", "target"} <= set(known):
        findings += domains(known["source"], known["target"], statistics)
    return findings


def warning(file: str, what: str, remedy: str) -> Finding:
    """A finding that is worth a look."""
    return Finding("warning", file, what, remedy)


def note(file: str, what: str, remedy: str = "") -> Finding:
    """A finding that tells."""
    return Finding("note", file, what, remedy)


def numbers(values: Sequence[float]) -> str:
    """``1 x 1 x 2.5``"""
    return " x ".join(f"{value:.3g}" for value in values)


def slices_last(spacing: Sequence[float], values: Sequence[float]) -> list[float]:
    """One value per axis, that of a stack's thick slices last: oblique stacks of one kind have it on any axis."""
    order = np.argsort(spacing) if is_thick(np.array(spacing)) else range(len(values))
    return [values[axis] for axis in order]


def grids(name: str, files: Sequence[str], statistics: StatisticsByFile) -> Iterator[Finding]:
    """Voxel sides, fields of view and orientations by the header."""
    for what, attribute, limit in (
        ("voxels", "spacing_mm", SPACING_RATIO),
        ("field of view", "extent_mm", EXTENT_RATIO),
    ):
        sides = {file: slices_last(statistics[file].spacing_mm, getattr(statistics[file], attribute)) for file in files}
        middle = np.median(list(sides.values()), axis=0)
        for file, found in sides.items():
            if attribute == "extent_mm" and is_picture(file):
                continue  # cut as it suits
            if max(np.maximum(np.array(found) / middle, middle / np.array(found))) > limit:
                text = (
                    f"{what} of {numbers(found)} mm, the median of {len(files)} scans of {name} is {numbers(middle)} mm"
                )
                yield warning(file, text, f"look at it; {RESAMPLED}")
    codes = Counter(statistics[file].axcodes for file in files)
    if len(codes) > 1:
        listed = ", ".join(f"{code} ({count})" for code, count in codes.most_common())
        yield note(name, f"orientations by the header: {listed}", "none needed: all are turned to RAS and back")


def kind_of_ct(statistics: ScanStatistics, facts: Facts) -> str | None:
    """``"HU"``, ``"shifted"`` or ``None`` for what does not look like a CT."""
    if facts.lowest <= CT_AIR_HU and statistics.soft_tissue_hu > CT_SHARE:
        return "HU"
    shifted = facts.lowest >= 0 and statistics.whole_numbers and facts.highest > 1500
    return "shifted" if shifted and statistics.soft_tissue_shifted > CT_SHARE else None


def intensities(
    name: str,
    files: Sequence[str],
    statistics: StatisticsByFile,
    facts: Mapping[str, Facts],
    negative_values: str | None = None,
) -> Iterator[Finding]:
    """CT in HU, CT with 1024 added, or other negative values."""
    kinds = {file: kind_of_ct(statistics[file], facts[file]) for file in files}
    counts = Counter(kinds.values())
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        names = {"HU": "a CT in HU", "shifted": "a CT with 1024 added", None: "no CT"}
        for file in files:
            if kinds[file] != usual:
                span = f"values from {facts[file].lowest:g} to {facts[file].highest:g}"
                text = f"{span}: looks like {names[kinds[file]]}, most of {name} like {names[usual]}"
                yield warning(file, text, "bring all to one convention")
    if counts["HU"]:
        text = f"{counts['HU']} of {len(files)} scans look like CT in HU"
        yield note(name, text, f"set negative_values to 'shift', which adds {CT_SHIFT}")
    if counts["shifted"]:
        text = f"{counts['shifted']} of {len(files)} scans look like CT with {CT_SHIFT} added"
        yield note(name, text, "leave negative_values null; do not shift again")
    for file in files:
        above = 1 - statistics[file].background_share
        if above < 1 - BRIGHTEST / 100 and not is_picture(file):
            text = f"{above:.2%} of its voxels lie above the lowest value: its percentile {BRIGHTEST:g} is background"
            yield warning(file, text, "crop it, or set percentile_foreground to true: runs refuse it otherwise")
        if facts[file].negative and kinds[file] != "HU" and negative_values is None:
            span = f"values from {facts[file].lowest:g} to {facts[file].highest:g}"
            text = f"{facts[file].negative} voxels are negative ({span})"
            yield warning(
                file, text, "set negative_values to 'clip' (MR), 'shift' (CT) or 'keep': runs refuse it otherwise"
            )


def is_masked(statistics: ScanStatistics) -> bool:
    """Whether a scan is surrounded by one constant value, as after skull stripping."""
    return statistics.background_share >= MASKED_BACKGROUND and statistics.border_share >= MASKED_BORDER


def masking(name: str, files: Sequence[str], statistics: StatisticsByFile) -> Iterator[Finding]:
    """Skull-stripped or masked scans among others."""
    masked = [file for file in files if is_masked(statistics[file])]
    yield note(name, f"{len(masked)} of {len(files)} scans are skull-stripped or masked (one value all around)")
    if masked and len(masked) < len(files):
        odd = masked if 2 * len(masked) < len(files) else [file for file in files if file not in masked]
        for file in odd:
            here = "is skull-stripped or masked" if file in masked else "is not skull-stripped or masked"
            share = f"{statistics[file].background_share:.0%} of its voxels have the lowest value"
            yield warning(file, f"{here} ({share}), unlike most of {name}", "prepare all scans in one way")


def copies(files: Sequence[str], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """The same voxels under two names of a set."""
    first: dict[str, str] = {}
    for file in files:
        other = first.setdefault(facts[file].digest, file)
        if other != file:
            yield warning(file, f"has the same voxels as {other}", "keep one of them")


def pictures(
    name: str, files: Sequence[str], statistics: StatisticsByFile, facts: Mapping[str, Facts]
) -> Iterator[Finding]:
    """PNG and TIFF images: without a pixel size, and of several bit depths."""
    found = [file for file in files if is_picture(file)]
    unsized = [file for file in found if not statistics[file].sized]
    if unsized:
        text = f"{len(unsized)} of {len(files)} images name no pixel size: lengths are in pixels"
        remedy = "none needed if all are of one size; else pixel_size.json beside them, see docs/how-to/data.md"
        yield note(name, text, remedy)
    small = [file for file in found if facts[file].highest <= HIGHEST_OF_8_BITS]
    odd = min(small, [file for file in found if file not in small], key=len)
    if odd:
        text = f"values {'up to' if odd == small else 'above'} {HIGHEST_OF_8_BITS} in {len(odd)} of {len(found)} images"
        yield note(name, f"{text}, such as {odd[0]}: of another bit depth", "none needed: each is scaled by itself")


def histogram_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Wasserstein distance (order 1) of two scaled intensity distributions by their quantiles (n,); 0 to 1."""
    return float(np.abs(one - two).mean())


def unusual_histograms(name: str, files: Sequence[str], statistics: StatisticsByFile) -> Iterator[Finding]:
    """Scans whose intensities are distributed unlike those of their set."""
    if len(files) < FEWEST_SCANS:
        return
    middle = np.median([statistics[file].quantiles for file in files], axis=0)
    distances = {file: histogram_distance(statistics[file].quantiles, middle) for file in files}
    usual = float(np.median(list(distances.values())))
    for file, distance in distances.items():
        if distance > FAR and distance > FAR_RATIO * usual:
            text = f"its intensities are {distance:.3f} away from the median of {name} (usual {usual:.3f}, of 0 to 1)"
            yield warning(file, text, "another sequence or contrast? look at it")


def domains(source: Sequence[str], target: Sequence[str], statistics: StatisticsByFile) -> Iterator[Finding]:
    """How far the target is from the source."""
    middle = [np.median([statistics[file].quantiles for file in files], axis=0) for files in (source, target)]
    far = histogram_distance(*middle)
    within = np.mean([histogram_distance(statistics[file].quantiles, middle[0]) for file in source])
    scale = f"Wasserstein distance, 0 to 1; within the source {within:.3f}"
    text = f"intensities are {far:.3f} away from the source's ({scale})"
    yield note("target", text)
    sides = ([statistics[file].spacing_mm for file in files] for files in (source, target))
    spacing = [np.median([slices_last(side, side) for side in one], axis=0) for one in sides]
    if max(np.maximum(spacing[0] / spacing[1], spacing[1] / spacing[0])) > DOMAIN_SPACING_RATIO:
        text = f"median voxels of {numbers(spacing[1])} mm, the source's are {numbers(spacing[0])} mm"
        yield warning("target", text, f"bring both to one spacing; {RESAMPLED}")
    masked = [sum(is_masked(statistics[file]) for file in files) / len(files) for files in (source, target)]
    if (masked[0] >= 0.5) != (masked[1] >= 0.5):
        text = f"{masked[1]:.0%} of its scans are skull-stripped or masked, of the source {masked[0]:.0%}"
        yield warning("target", text, "prepare both in one way")


def orientations(files: Sequence[str], reference: Sequence[str], statistics: StatisticsByFile) -> Iterator[Finding]:
    """Orientation by content: does a scan fit the reference's mean better in another orientation than its header's?"""
    if len(reference) < FEWEST_SCANS:
        return
    of_reference = set(reference)
    total = sum(edges_of(statistics[file].view) for file in reference)  # one scan's at a time: there may be thousands
    left_out = [preference(scan, total - scan) for scan in (edges_of(statistics[file].view) for file in reference)]
    usual = float(np.median(left_out)) if min(left_out) > 0 else None  # else the reference has no consistent side
    for file in files:
        scan = edges_of(statistics[file].view)
        mean = total - scan if file in of_reference else total
        fits = {turn: likeness(turned(scan, *turn), mean) for turn in every_turn()}
        by_header = max(fits[UPRIGHT], fits[MIRRORED])
        best = max(fits, key=lambda turn: fits[turn])
        if best not in (UPRIGHT, MIRRORED) and fits[best] > by_header + TURN_MARGIN:
            text = (
                f"its content fits the other scans better {said(*best)} (correlation {fits[best]:.2f}, "
                f"as its header says {by_header:.2f})"
            )
            yield warning(file, text, "look at it in a viewer; repair the header if that is wrong")
        elif usual is not None and preference(scan, mean) < -MIRROR_SHARE * usual:
            text = (
                "it fits the other scans slightly better mirrored left to right (correlation "
                f"{fits[MIRRORED]:.3f}, as it is {fits[UPRIGHT]:.3f}): left and right may be swapped, or the anatomy "
                "may be unusual; a scan alone cannot tell"
            )
            yield warning(file, text, "compare with the original data (DICOM)")


UPRIGHT, MIRRORED = ((0, 1, 2), (False, False, False)), ((0, 1, 2), (True, False, False))


def every_turn() -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """All 48 orientations: order of the axes, and which are then flipped."""
    return itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))


def turned(view: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> np.ndarray:
    """A volume in another orientation."""
    return np.flip(view.transpose(order), [axis for axis in range(3) if flips[axis]])


def said(order: tuple[int, ...], flips: tuple[bool, ...]) -> str:
    """An orientation in words."""
    flipped = " and ".join(name for name, flip in zip(AXES, flips) if flip)
    if order == (0, 1, 2):
        return f"flipped {flipped}"
    moved = ", ".join(f"{AXES[old]} as {AXES[new]}" for new, old in enumerate(order) if old != new)
    return f"with its axes exchanged ({moved}{f', then flipped {flipped}' if flipped else ''})"


def edges_of(view: np.ndarray) -> np.ndarray:
    """Size of the coarse view's intensity gradient, standardised; the same for bright and for dark structures."""
    size: Any = np.sqrt(sum(np.square(part) for part in np.gradient(view.astype(np.float64))))
    return (size - size.mean()) / max(float(size.std()), 1e-9)


def likeness(one: np.ndarray, two: np.ndarray) -> float:
    """Correlation."""
    return float(np.corrcoef(one.ravel(), two.ravel())[0, 1])


def preference(scan: np.ndarray, mean: np.ndarray) -> float:
    """How much better a scan fits as it is than mirrored left to right."""
    return likeness(scan, mean) - likeness(turned(scan, *MIRRORED), mean)
