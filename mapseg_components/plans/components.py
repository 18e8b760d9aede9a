# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What follows after the network: as the source's label maps say, or as the user asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapseg_components.transforms.components import AFTER_NETWORK
from mapseg_components.transforms.shapes import HOLES, LARGEST, SEVERAL, plan_after, shapes_of

__all__ = ["TITLES", "describe_after", "find_after"]

TITLES = {LARGEST: "largest component only", SEVERAL: "largest components only", HOLES: "holes filled"}


def find_after(
    labelled: Sequence[Mapping[str, Any]], labels: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What is done after the network: as the label maps say, or as the user asks.

    Args:
        labelled: cases of the source.
        labels: structures and their values.
        settings: of the user; those of what follows after the network are taken as they are.

    Returns:
        see `plan_after`.

    Raises:
        ConfigError: a setting does not name structures as it should, or scikit-image is needed and not installed.
        DataError: a label map cannot be read.
    """
    asked = {key: settings[key] for key in TITLES if key in settings}
    for key, names in asked.items():
        AFTER_NETWORK[key](key, names, labels)
    plan = plan_after(shapes_of([case["label"] for case in labelled], labels), labels)
    kept = {key: {} if key in asked else reasons for key, reasons in plan["reasons"].items()}
    return plan | asked | {"reasons": kept}


def describe_after(plan: Mapping[str, Any]) -> str:
    """What is done after the network, in words."""
    sentences = []
    for key, title in TITLES.items():
        if key not in plan:  # of a run that an earlier version has planned
            continue
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan["reasons"][key].items())
        done = plan[key]
        done = [f"{name} {number}" for name, number in done.items()] if isinstance(done, Mapping) else done
        sentences.append(f"{title}: {', '.join(done) or 'none'}{f' (not {reasons})' if reasons else ''}")
    return f"After the network: {'. '.join(sentences)}."
