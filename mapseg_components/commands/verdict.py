# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The verdict of ``mapseg adapt``: which of both models to use, from figures that need no label of the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mapseg_components.metrics import bootstrap_interval
from mapseg_components.plans.recipes import Recipe

__all__ = ["CONSISTENCY", "ESTIMATE", "least_gain_of", "rounded", "verdict_of"]

ESTIMATE, CONSISTENCY = "estimated_dice", "consistency"  # figures of a case by which models are compared
TITLES = {ESTIMATE: "Estimated Dice", CONSISTENCY: "Consistency"}
HELD_OUT = "target scans that were held out of adaptation"
ADAPTED_ON = "target scans, the ones adapted on (none was held out; gains may be less on others)"
LEAST_LOSS = 0.01
# least estimated gain, chosen by benchmarks/methods/verdicts.py; of the last none of the scans was held out
WITH_SOURCE, WITHOUT_SOURCE, ON_ADAPTED_ONES = -0.02, 0.01, 0.05
WITHOUT_LABELS = (
    "There is no labelled scan, so Dice is not estimated: consistency is how alike a model's label maps of one scan "
    "are when its intensities change. A model can be consistent and wrong."
)
OFF = {
    ESTIMATE: "Structures are missing, or lie where no labelled scan has them,",
    CONSISTENCY: "Structures have a share of all structures that no labelled scan had, by a factor of 3,",
}
FAILS_BELOW = 0.2  # of the Dice on the source's validation scans


def least_gain_of(recipe: Recipe, held_out: bool) -> float:
    """The estimated gain from which on an adapted model is shipped.

    A method that learns from the source's labels while it learns from the target seldom makes a model much worse, and
    a small difference of estimates is within their error: its model may be estimated a little lower. Without the source
    nothing holds a model, and its gain must be more than that error; on scans that it was adapted on, whose labels it
    has made itself and repeats, much more.

    Args:
        recipe: the method.
        held_out: whether adaptation did not see the scans that are judged.

    Returns:
        Dice.

    Examples:
        >>> from mapseg_components.commands.verdict import least_gain_of
        >>> from mapseg_components.plans.recipes import read_recipe
        >>> [least_gain_of(read_recipe(name), held_out=True) for name in ("mapseg", "test_time")]
        [-0.02, 0.01]
    """
    if recipe.source:
        return WITH_SOURCE
    return WITHOUT_SOURCE if held_out else ON_ADAPTED_ONES


def verdict_of(
    source: Mapping[str, Any],
    adapted: Mapping[str, Any],
    held_out: bool = False,
    by: str = ESTIMATE,
    least_gain: float = 0.0,
) -> dict[str, Any]:
    """The verdict: which model to use, with the reason, from the figures of both on the same target scans.

    The estimates of Dice are compared scan by scan. Better means: by their mean, and in more than half of the scans.
    Worse: the mean difference is 0.01 at least, and the bootstrap interval (95 %, over scans) does not hold 0. An
    adapted model that is not better is not shipped, unless its estimate is lower by no more than the least gain allows;
    nor is one that is better by less than that. A gain whose interval holds 0, or of one scan, is called uncertain.

    Args:
        source: figures of the source-only model, as `assess` makes them.
        adapted: those of the other one.
        held_out: whether adaptation did not see these scans; the sentences say so.
        by: which figure of a case is compared: ``estimated_dice``, or ``consistency`` where no scan is labelled.
        least_gain: Dice, see `least_gain_of`; of no effect on consistency.

    Returns:
        ``verdict`` ("adapted", "no gain", "worse than source"), ``ship`` (the model's name), ``gain`` (mean difference
        of the estimates), ``interval`` (``None`` of a single scan), ``why`` (sentences).
    """
    pairs = [
        (a[by], b[by]) for a, b in zip(source["cases"], adapted["cases"]) if a[by] is not None and b[by] is not None
    ]
    why = []
    if not pairs:
        why.append("No Dice could be estimated: the validation scans have too few structures.")
        return {"verdict": "no gain", "ship": "source_only", "gain": None, "interval": None, "why": why}
    differences = np.array([b - a for a, b in pairs])
    gain = float(differences.mean())
    interval = bootstrap_interval(differences)
    shown = "one scan: no interval" if interval is None else "95 % interval {:+.3f} to {:+.3f}".format(*interval)
    why.append(
        f"{TITLES[by]} on {len(pairs)} {HELD_OUT if held_out else ADAPTED_ON}: "
        f"source-only {np.mean([a for a, _ in pairs]):.3f}, adapted {np.mean([b for _, b in pairs]):.3f}; "
        f"difference {gain:+.3f} ({shown})."
    )
    before, after = source["validation_dice"]["mean"], adapted["validation_dice"]["mean"]
    if before is not None and after is not None:
        translated = ", translated for the adapted model" if adapted.get("translated_validation") else ""
        why.append(
            f"Dice on the labelled validation scans of the source{translated}: {before:.3f} before, {after:.3f} after."
        )
    off = [sum(bool(case.get("misplaced")) for case in model["cases"]) for model in (source, adapted)]
    if any(off):
        why.append(
            f"{OFF[by]} in {off[0]} of {len(source['cases'])} "
            f"target scans by the source-only model, in {off[1]} by the adapted one."
        )
    if by == CONSISTENCY:
        why.append(WITHOUT_LABELS)
    outside = sum(not case["within_calibration"] for case in adapted["cases"]) if by == ESTIMATE else 0
    if outside:
        of = f"{outside} of {len(adapted['cases'])}"
        why.append(f"{of} target scans lie outside the consistency of all labelled scans: guesses.")
    least = least_gain if by == ESTIMATE else 0.0
    better = gain > 0 and np.mean(differences > 0) > 0.5
    if better and gain > least:
        verdict = "adapted"
        if interval is not None and interval[0] <= 0:
            why.append("The interval holds 0: the gain is uncertain.")
    elif least < 0 and gain >= least:
        verdict = "adapted"
        what = (
            "a gain in few of the scans"
            if gain > 0
            else f"no gain, and within what estimates are off by ({-least:.2f})"
        )
        why.append(
            f"That is {what}: a model that learnt from the source's labels as well is seldom worse, so it is kept."
        )
    elif gain <= -LEAST_LOSS and interval is not None and interval[1] < 0:
        verdict = "worse than source"
    else:
        verdict = "no gain"
        if better:
            where = "" if held_out else " on scans adapted on"
            why.append(
                f"That is within what estimates are off by{where} ({least:.2f}): nothing of the source holds a model "
                "that was adapted without it, so the source-only model is kept."
            )
    why += [] if interval else ["One scan: no interval, the gain is uncertain."]
    ship = "adapted" if verdict == "adapted" else "source_only"
    best = float(np.mean([pair[ship == "adapted"] for pair in pairs]))
    reference = after if ship == "adapted" else before
    if reference is not None and best < reference - FAILS_BELOW:
        why.append(
            f"Even the better model is expected to do far worse on the target ({best:.2f}) than on the source "
            f"({reference:.2f}): look at its label maps before any use."
        )
    return {
        "verdict": verdict,
        "ship": ship,
        "gain": rounded(gain),
        "interval": [rounded(end) for end in interval] if interval else None,
        "why": why,
    }


def rounded(value: float) -> float | None:
    """Four digits; ``None`` for NaN, which JSON does not have."""
    return round(value, 4) if np.isfinite(value) else None
