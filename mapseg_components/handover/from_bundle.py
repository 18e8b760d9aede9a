# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A package made of a bundle with weights: adaptation goes on from there, and needs nothing else of the source."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from mapseg_components import __version__
from mapseg_components.checkpoints import fingerprint, load_weights, weights_of, write_atomic
from mapseg_components.configs import parser_of
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.handover.fragments import faults_of_fragment, network_of, plain
from mapseg_components.handover.package import MANIFEST, PARTS, SCHEMA, WEIGHTS, HandoverPackage, check_content
from mapseg_components.handover.writing import rounded
from mapseg_components.inferers.trial import TARGET_INVERTED
from mapseg_components.shipped_files import bundles_folder
from mapseg_components.structures import structures_of
from mapseg_components.transforms.components import AFTER_NETWORK

__all__ = ["package_of_bundle"]

SETTINGS = "handover_settings"  # of train.json: names of what a package holds
TARGET_POLICY = "target_negative_values"  # of training; inference has it as negative_values
EXTENT = "foreground_mm"  # of inference.json; bundles of earlier versions have none
Figures = dict[str, Any]


def package_of_bundle(
    bundle: Path,
    folder: Path,
    inference: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> HandoverPackage:
    """Write a hand-over package of a bundle's network, settings and weights.

    What the bundle's inference says is what the weights were trained with; sizes of training are those of its
    ``train.json``, or this version's. Validation Dice and volumes are taken from the run of ``mapseg adapt`` that wrote
    the bundle, where its folder still has them: no figure is worked out anew, for there is no source. Without them the
    package has no mean Dice (of 0 scans), and no structure has a range of shares. Whether the bundle shows its scans
    bright for dark goes along as ``target_inverted``.

    Args:
        bundle: its folder.
        folder: of the package, which is made; an earlier one there is replaced.
        inference: content of its ``inference.json``, changed by a user, by default as it is.
        weights: file, by default the one that its inference uses.

    Raises:
        ConfigError: it has no config of training or inference, or its network cannot be handed over.
        CheckpointError: the weights are missing, damaged or of another network.
        ResourceError: the folder cannot be written.
    """
    configs = {name: bundle / "configs" / f"{name}.json" for name in ("train", "inference")}
    for name, path in configs.items():
        if not path.is_file():
            raise ConfigError(
                f"bundle {bundle} has no configs/{path.name}, and what it says of its {name} is needed to adapt its "
                "weights: name a bundle that mapseg adapt wrote, or a hand-over package"
            )
    base = ConfigParser.load_config_file(bundles_folder() / "mapseg_adaptation" / "configs" / "train.json")
    training = parser_of({**base, **ConfigParser.load_config_file(configs["train"])})
    used = parser_of({"bundle_root": str(bundle), **(inference or ConfigParser.load_config_file(configs["inference"]))})
    if inference is None:
        used["bundle_root"] = str(bundle)
    fragment = fragment_of(used, bundle)
    labels = structures_of(used.get_parsed_content("labels"))

    def value_of(name: str) -> Any:
        if name == TARGET_POLICY:
            return used.get_parsed_content("negative_values") if "negative_values" in used else None
        return plain((used if name in used else training).get_parsed_content(name))

    network = network_of(fragment)
    load_weights(network, weights if weights is not None else used.get_parsed_content("weights"))
    write_atomic(weights_of(network), folder / WEIGHTS)
    digest = sha256_of(folder / WEIGHTS)
    content = {
        "schema": SCHEMA,
        "weights": {"fingerprint": fingerprint(network), "sha256": digest},
        "network": fragment,
        "settings": {part: {name: value_of(name) for name in base[SETTINGS][part]} for part in PARTS},
        "labels": labels,
        "foreground_mm": plain(used.get_parsed_content(EXTENT)) if EXTENT in used else None,
        "after_network": {name: plain(used.get_parsed_content(name)) for name in AFTER_NETWORK if name in used},
        **({TARGET_INVERTED: used.get_parsed_content(TARGET_INVERTED)} if TARGET_INVERTED in used else {}),
        **figures_of(bundle, labels, digest),
        "versions": {"mapseg_components": __version__},
    }
    if content["spacing_mm"] is None:
        known = content["settings"]["preprocessing"]
        spacing = known["working_spacing"]  # along the working axes, which are those of RAS unless it names others
        content["spacing_mm"] = spacing if spacing and all(spacing) and not known["working_directions"] else None
    check_content(content, folder / MANIFEST)
    write_json(content, folder / MANIFEST)
    return HandoverPackage(folder)


def fragment_of(inference: ConfigParser, bundle: Path) -> dict[str, Any]:
    """The config of a bundle's network as plain values. Raises `ConfigError` if it cannot be handed over."""
    given = inference.config.get("network_def")
    wrong = [f"network_def is {given!r}"[:120]]
    if isinstance(given, dict):
        fragment = plain(inference.get_parsed_content("network_def", instantiate=False).get_config())
        wrong = [*faults_of_fragment(fragment, "network_def")]
        if not wrong:
            return fragment
        wrong[0] += f" of {fragment.get('_target_')!r}"
    raise ConfigError(
        f"the network of bundle {bundle} cannot be handed over ({'; '.join(wrong[:3])}): name a bundle of a segmenter, "
        "such as mapseg adapt writes"
    )


def figures_of(bundle: Path, labels: Mapping[str, int], digest: str) -> Figures:
    """Spacing, validation Dice and volumes that the run which made a bundle has left in its folder, as far as it has.

    Args:
        bundle: its folder.
        labels: of the bundle.
        digest: sha256 of its weights.
    """
    found: Figures = {"spacing_mm": None, "source_validation": {"metric": "Dice", "scans": 0, "mean": None}}
    found["volumes"] = {"min_scans": 2, "structures": {}}
    for path in sorted((bundle / "stages").glob(f"**/package/{MANIFEST}")):
        with contextlib.suppress(MAPSegError):  # of an earlier version
            package = HandoverPackage(path.parent)
            if package.labels == dict(labels):
                found |= {name: package.content[name] for name in ("spacing_mm", "volumes")}
                if package.content["weights"]["sha256"] == digest:
                    found["source_validation"] = package.content["source_validation"]
    record = bundle / "run.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    assessment = run.get("assessment", {})
    dice = assessment.get("models", {}).get(assessment.get("verdict", {}).get("ship"), {}).get("validation_dice", {})
    if dice.get("mean") is not None and dice.get("scans") and set(dice["structures"]) == set(labels):
        found["source_validation"] = {"metric": "Dice", **dice}
    if not found["volumes"]["structures"] and set(assessment.get("prior_ml", {})) == set(labels):
        found["volumes"]["structures"] = {
            name: volumes_of([ml for ml in ml_of_scans if ml > 0])
            for name, ml_of_scans in assessment["prior_ml"].items()
        }
    return found


def volumes_of(ml: list[float]) -> Figures | None:
    """Figures of a structure's volumes in ml as a package has them, in mm3; ``None`` of a single scan."""
    return {"scans": len(ml), "volume_mm3": rounded(1000 * np.array(ml))} if len(ml) > 1 else None
