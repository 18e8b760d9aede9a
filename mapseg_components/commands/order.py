# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Is the target bright where the source is dark? Found out by a model of the source, without labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mapseg_components.contrast import inverted
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import has_section
from mapseg_components.files import write_json
from mapseg_components.handover import HandoverPackage
from mapseg_components.inferers.trial import TARGET_INVERTED, Trial
from mapseg_components.keys import SOURCE
from mapseg_components.plans.judging import evenly
from mapseg_components.plans.recipes import INITIAL, Recipe, Stage
from mapseg_components.transforms.inputs import outside_tissue

__all__ = [
    "TARGET_INVERTED",
    "asks_for_order",
    "confidence_on_target",
    "describe_order",
    "find_order",
    "order_of_package",
    "recipe_of",
    "settle_order",
]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set

MOST_SCANS = 8
MOST_OF_THEM = 0.8  # share of the scans that must agree
LEAST_GAIN = 0.01  # of the mean confidence
MOST_OF_SOURCE = 4  # of its validation scans
FAR = 0.04  # below the confidence on them: the target has neither order, or differs in another way
CHOICE = "source_choice"  # in run.json: among several source models, see `mapseg_components.commands.source_choice`


def find_order(bundle: Path, weights: Path) -> dict[str, Any]:
    """Confidence of a model of the source on target scans as they are, and bright for dark.

    A model that saw the source in its own order of intensities is surer of its structures in a scan of that order: a
    T1w model in an inverted T2w scan. The target counts as inverted if the model is surer so in at least four of five
    scans, and by 0.01 in the mean. Where it is less sure in the better order than on the source's own validation scans,
    by more than 0.04 in the mean, the target is far from both orders.

    Args:
        bundle: folder that ``mapseg adapt`` makes: ``configs/inference.json``, ``datalist.json``.
        weights: of a model that was not trained on inverted scans.

    Returns:
        ``inverted``, ``far``; ``confidence_as_is``, ``confidence_inverted`` and ``confidence_source``, mean largest
        probability of the voxels of structures, a number for each scan; the last one is empty without a source.

    Raises:
        CheckpointError: the weights cannot be loaded.
        DataError: a scan cannot be read.
    """
    trial = opened(bundle, weights)
    sure = confidence_on_target(bundle, trial)
    as_is, opposite = sure["as_is"], sure["inverted"]
    gains = np.subtract(opposite, as_is)
    turned = bool((gains > 0).mean() >= MOST_OF_THEM and gains.mean() >= LEAST_GAIN)
    known = has_section(bundle / "datalist.json", "source_validation")
    own = load_datalist(bundle / "datalist.json", "source_validation") if known else []
    own = evenly(own, min(MOST_OF_SOURCE, len(own)))
    at_home = [confidence(trial, trial.scan(case, SOURCE)) for case in own]
    surest = np.mean(opposite if turned else as_is)
    return {
        "inverted": turned,
        "far": bool(at_home and np.mean(at_home) - surest > FAR),
        "confidence_as_is": as_is,
        "confidence_inverted": opposite,
        "confidence_source": at_home,
    }


def opened(bundle: Path, weights: Path) -> Trial:
    """A model that is shown scans as they are. Raises `CheckpointError` if the weights cannot be loaded."""
    trial = Trial(bundle, **{TARGET_INVERTED: False})
    trial.load(weights)
    return trial


def confidence(trial: Trial, scan: torch.Tensor, turned: bool = False) -> float:
    """Mean largest probability of the voxels of structures in a scan, or in its inverse; 0 where none is found."""
    image = scan.as_subclass(torch.Tensor)
    largest, classes = trial.probabilities(inverted(image) if turned else image, outside_tissue(scan)).max(dim=0)
    return round(float(largest[classes > 0].mean()), 4) if (classes > 0).any() else 0.0


def confidence_on_target(
    bundle: Path, model: Trial | Path, orders: Sequence[str] = ("as_is", "inverted")
) -> dict[str, list[float]]:
    """Confidence of a model on up to eight target scans, in one order of intensities or both.

    Args:
        bundle: see `find_order`.
        model: the model, or its weights.
        orders: ``as_is`` and ``inverted``, bright for dark.

    Returns:
        of each order a number for each scan, see `find_order`. Errors as there.
    """
    trial = model if isinstance(model, Trial) else opened(bundle, model)
    found: dict[str, list[float]] = {order: [] for order in orders}
    scans = load_datalist(bundle / "datalist.json", "target_training")
    for case in evenly(scans, min(MOST_SCANS, len(scans))):
        scan = trial.scan(case)
        for order, values in found.items():
            values.append(confidence(trial, scan, turned=order == "inverted"))
    return found


def settle_order(bundle: Path, weights: Path) -> dict[str, Any]:
    """Find the order of intensities and write it into the bundle's configs of training, inference and translation.

    Args, returns and raises: see `find_order`.
    """
    found = find_order(bundle, weights)
    for name in ("train.json", "inference.json", "translation.json"):
        path = bundle / "configs" / name
        if path.is_file():
            write_json(json.loads(path.read_text(encoding="utf-8")) | {TARGET_INVERTED: found["inverted"]}, path)
    return found


def known_order(record: Mapping[str, Any], request: Mapping[str, Any]) -> bool | None:
    """Whether a run of ``mapseg adapt`` shows the target bright for dark; ``None`` while it is not known."""
    if TARGET_INVERTED in (request["settings"] or {}):
        return bool(request["settings"][TARGET_INVERTED])
    return record["order"]["inverted"] if "order" in record else None


def order_of_package(package: HandoverPackage, request: Mapping[str, Any]) -> dict[str, bool]:
    """The order in which the bundle that a package was made of shows its scans, as a setting of the target's.

    Args:
        package: see `mapseg_components.plans.package.open_package`.
        request: arguments of ``mapseg adapt``.

    Returns:
        empty where the package does not say it, or the order is asked for or found out by the confidence of its model.
    """
    told = package.content.get(TARGET_INVERTED)
    if told is None or request["random_contrasts"] or TARGET_INVERTED in (request["settings"] or {}):
        return {}
    does = "bright for dark" if told else "as they are"
    logger.info(f"Target scans are shown {does}, as the package's bundle does (else: the setting {TARGET_INVERTED}).")
    return {TARGET_INVERTED: told}


def asks_for_order(recipe: Recipe, stage: Stage, record: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether the order of intensities is to be found out after this stage of a run, before the next one.

    Args:
        recipe: of the run.
        stage: the one that is done.
        record: content of ``run.json``.
        request: arguments of ``mapseg adapt``.
    """
    sources = {stage.name, *record.get(CHOICE, {}).get("confidence", ())}
    after = (recipe.order or "").partition("/")[0] in sources and bool(sources.intersection(record["done"][-1:]))
    chosen = len(recipe.first) == 1
    return after and chosen and bool(request["random_contrasts"]) and known_order(record, request) is None


def recipe_of(recipe: Recipe, record: Mapping[str, Any], request: Mapping[str, Any]) -> Recipe:
    """The stages that a run needs as far as is known.

    Random contrasts of either order are for a target as it is, and those of any order for one that is far from both, or
    where the source is learnt from a model of any contrast.

    Args: see `asks_for_order`.
    """
    if INITIAL in record.get("plan", {}):
        return recipe.from_initial_model()
    if record.get("order", {}).get("far"):
        return recipe.in_any_order()
    needless = known_order(record, request) or not request["random_contrasts"]
    return recipe.without_contrasts() if needless else recipe


def describe_order(found: Mapping[str, Any]) -> str:
    """The answer in words, for the terminal and the report."""
    sure = ", ".join(
        f"{np.mean(found[f'confidence_{name}']):.3f} {title}"
        for name, title in (("as_is", "as they are"), ("inverted", "bright for dark"))
    )
    does = "are shown bright for dark" if found["inverted"] else "are shown as they are"
    own = found.get("confidence_source") or ()
    further = f", {np.mean(own):.3f} on the source's own" if own else ""
    further += "; the source is learnt on in contrasts of any order, as neither is near" if found.get("far") else ""
    return (
        f"Target scans {does}: the source-only model's mean confidence in {len(found['confidence_as_is'])} of them is "
        f"{sure}{further} (another choice: the setting {TARGET_INVERTED}, by which none of this is looked at)."
    )
