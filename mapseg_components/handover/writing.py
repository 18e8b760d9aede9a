# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The source site's half: validated weights, and what a target site needs to know about them."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.engines import Evaluator
from torch import nn

from mapseg_components import __version__
from mapseg_components.checkpoints import fingerprint, load_weights, weights_of, write_atomic
from mapseg_components.data import median_spacing, structure_sizes
from mapseg_components.errors import ConfigError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.handover.fragments import plain
from mapseg_components.handover.package import MANIFEST, SCHEMA, WEIGHTS, check_content
from mapseg_components.keys import IMAGE, LABEL, TISSUES
from mapseg_components.scans.extents import median_extent
from mapseg_components.structures import structures_of
from mapseg_components.transforms.components import AFTER_NETWORK
from mapseg_components.transforms.shapes import plan_after, shapes_of

__all__ = ["rounded", "volume_priors", "write_handover"]

logger = logging.getLogger(__name__)


def write_handover(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    network: nn.Module,
    network_config: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, int],
    evaluator: Evaluator,
    cases: Sequence[Mapping[str, Any]],
    min_scans: int,
    validation: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Validate weights on the source's validation scans and write them as a package.

    ``handover.json`` is written last: a package that was interrupted half way is refused by its checksum.

    Args:
        folder: the package; an earlier one there is replaced.
        weights: file of the segmenter's weights, e.g. ``source_only.pt``. They are loaded into ``network``.
        network: the segmenter that ``evaluator`` runs.
        network_config: the config that ``network`` was made from, without references; see
            `mapseg_components.configs.resolved`.
        settings: ``preprocessing``, what the weights were trained with and a target site must not change, and
            ``training``, what it may; each name to value.
        labels: structure name to label value.
        evaluator: of the source's validation scans; its key metric is MONAI's ``MeanDice`` with details.
        cases: labelled source scans, for `volume_priors` and the voxel size; of label maps alone these are the images.
        min_scans: see `volume_priors`; of fewer scans no extent is written either.
        validation: further labelled scans, for what follows after the network alone.

    Raises:
        ConfigError: the network or a setting cannot travel (see `fragments`), or a scan count below 2 is asked for.
        CheckpointError: the weights are missing, damaged or of another network.
        ResourceError: the folder cannot be written.
    """
    folder = Path(folder)
    if min_scans < 2:
        raise ConfigError(f"handover_min_scans is {min_scans}: figures of one scan must not leave, set 2 or more")
    load_weights(network, weights)
    labels = structures_of(labels)
    # the box of a label map of all tissues has values that are left out at times
    without = len(cases) < min_scans or any(TISSUES in case for case in cases)
    policy = settings["training"].get("source_negative_values")
    volumes = volume_priors(cases, labels, min_scans)
    told = [name for name, one in volumes["structures"].items() if one]
    content = {
        "schema": SCHEMA,
        "weights": {"fingerprint": fingerprint(network)},
        "network": plain(network_config),
        "settings": plain(settings),
        "labels": dict(labels),
        "spacing_mm": median_spacing([case[IMAGE] for case in cases]),  # the label map of a picture may name no size
        "foreground_mm": None if without else median_extent([case[IMAGE] for case in cases], policy),
        "source_validation": validation_dice(evaluator, list(labels)),
        "volumes": volumes,
        "after_network": after_network([*cases, *validation], labels, told),
        "versions": {
            "mapseg_components": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "monai": monai.__version__,
        },
    }
    write_atomic(weights_of(network), folder / WEIGHTS)
    content["weights"]["sha256"] = sha256_of(folder / WEIGHTS)
    check_content(content, folder / MANIFEST)
    write_json(content, folder / MANIFEST)
    logger.info(
        f"Wrote the hand-over package {folder}: source validation Dice {content['source_validation']['mean']}, "
        f"sha256 of {MANIFEST} {sha256_of(folder / MANIFEST)}."
    )


def validation_dice(evaluator: Evaluator, names: Sequence[str]) -> dict[str, Any]:
    """Run an evaluator; mean Dice per structure over the scans that have it, three decimals, ``None`` without any."""
    evaluator.run()
    key = evaluator.state.key_metric_name
    per_scan = evaluator.state.metric_details[key].double().cpu()  # (scans, structures), NaN where absent
    means = [None if bool(column.isnan().all()) else float(column.nanmean()) for column in per_scan.T]
    known = [value for value in means if value is not None]
    return {
        "metric": "Dice",
        "scans": len(per_scan),
        "mean": round(sum(known) / len(known), 3) if known else None,
        "structures": {name: None if mean is None else round(mean, 3) for name, mean in zip(names, means, strict=True)},
    }


def volume_priors(cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int], min_scans: int) -> dict[str, Any]:
    """Volumes of the structures over labelled scans, rounded so that no single scan can be read off.

    Args:
        cases: with ``label``, a file.
        labels: structure name to label value.
        min_scans: a structure that fewer scans have is ``None``.

    Returns:
        ``min_scans`` and ``structures``: for each the number of scans that have it, and of ``volume_mm3`` and ``share``
        (of the voxels of all structures in its scan) mean, standard deviation and range; two significant digits, the
        range rounded outward.
    """
    sizes = structure_sizes(cases, labels)
    structures: dict[str, Any] = {}
    for name in labels:
        present = [scan for scan in sizes if scan[name][0] > 0]
        if len(present) < min_scans:
            structures[name] = None
            continue
        volumes = np.array([scan[name][1] for scan in present])
        shares = np.array([scan[name][0] / sum(voxels for voxels, _ in scan.values()) for scan in present])
        structures[name] = {"scans": len(present), "volume_mm3": rounded(volumes), "share": rounded(shares)}
    return {"min_scans": min_scans, "structures": structures}


def after_network(
    cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int], told: Sequence[str]
) -> dict[str, list[str] | dict[str, int]]:
    """What follows after the network, see `mapseg_components.transforms.shapes.plan_after`, for ``told`` structures."""
    plan = plan_after(shapes_of([case[LABEL] for case in cases], labels), labels)
    after: dict[str, list[str] | dict[str, int]] = {}
    for setting in AFTER_NETWORK:
        names = [name for name in told if name in plan[setting]]
        after[setting] = {name: plan[setting][name] for name in names} if isinstance(plan[setting], dict) else names
    return after


def rounded(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and range of positive numbers to two significant digits, the range outward."""
    low, high = float(values.min()), float(values.max())
    ends = [
        step(end / 10.0 ** (exponent := math.floor(math.log10(end)) - 1)) * 10.0**exponent
        for step, end in ((math.floor, low), (math.ceil, high))
    ]
    figures = [float(f"{value:.2g}") for value in (values.mean(), values.std(ddof=1), *ends)]
    return {"mean": figures[0], "sd": figures[1], "range": figures[2:]}
