# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The plan of an adaptation: what its bundle is made from, as kept in ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapseg_components.plans.components import find_after
from mapseg_components.plans.flips import find_flips
from mapseg_components.plans.frame import find_frame
from mapseg_components.plans.recipes import INITIAL
from mapseg_components.plans.sizes import plan_sizes, plan_slices, preset_for

__all__ = ["make_plan"]

Cases = Sequence[Mapping[str, Any]]


def make_plan(
    training: Cases,
    validation: Cases,
    target: Cases,
    held_out: Cases,
    structures: Mapping[str, int],
    request: Mapping[str, Any],
    initial: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Preset, frame, sizes and what follows after the network.

    Args:
        training: of the source.
        validation: of the source.
        target: all scans.
        held_out: those of the target that are judged apart.
        structures: and their values.
        request: arguments of ``mapseg adapt``.
        initial: the model that the source is learnt from, see `mapseg_components.plans.initial_model`, whose settings
            are as if the user had set them.

    Returns:
        plain values, of which ``settings`` are settings of the bundles; ``flip_axes`` is for methods that mirror scans,
        ``slice_size`` for those that translate them.

    Raises:
        ConfigError: a setting of the user is out of bounds, or the preset is unknown.
        DataError: a scan or label map cannot be read.
    """
    labelled = [*training, *validation]
    of_initial = {} if initial is None else initial["settings"]
    asked = {**of_initial, **(request["settings"] or {})}
    preset, reason = preset_for(request)
    frame = find_frame(labelled, target, structures, preset, asked)
    planned = frame.settings | plan_sizes(frame.shapes, frame.spacings, preset, frame.fine, asked)
    if not frame.needs_view(planned["patch_size"]):
        planned["global_view"] = False
    planned |= of_initial
    return {
        "preset": preset,
        "reason": reason,
        "source_training": len(training),
        "source_validation": len(validation),
        "target": len(target),
        "target_heldout": [case["case_id"] for case in held_out],
        **frame.figures,
        "fine": frame.fine,
        "labels": dict(structures),
        "settings": planned,
        "slice_size": plan_slices(frame.shapes, preset),
        "flip_axes": find_flips(structures, planned, preset, asked),
        "after_network": find_after(labelled, structures, asked),
        **({} if initial is None else {INITIAL: dict(initial)}),
    }
