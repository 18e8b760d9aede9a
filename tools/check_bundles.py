#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Check what copies in the bundles must agree on: python tools/check_bundles.py. Exit code 1 with every finding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from monai.bundle import ConfigParser

from mapseg_components.configs import STANDALONE, check_settings
from mapseg_components.errors import ConfigError

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
NETWORK = "in_channels patch_size width depth stride percentile percentile_foreground"
# ids that must be the same text in both files
EQUAL = [
    # what a client makes a network of, whichever of the two it opens
    *(
        (f"{bundle}/configs/train.json", f"{bundle}/configs/inference.json", f"network_def {NETWORK} {names}".split())
        for bundle, names in (
            ("mapseg_adaptation", "labels dilations head_channels dropout window_size window_stride window_weighting"),
            ("mapseg_pretraining", "decoder_channels mask_ratio local_block_size"),
        )
    ),
    (
        "cosmos_translation/configs/train.json",
        "cosmos_translation/configs/inference.json",
        "in_channels slice_size width levels norm percentile percentile_foreground keep_background "
        "working_directions working_spacing".split(),
    ),
    (
        "mapseg_adaptation/configs/train.json",
        "cosmos_translation/configs/train.json",  # one reading of scans
        "loading source_policy target_policy cached datalist device assume_orientation audit audit_file "
        "working_directions working_spacing percentile".split(),
    ),
    (
        "mapseg_adaptation/configs/train.json",
        "mapseg_pretraining/configs/train.json",
        # one encoder, one reading of scans
        "in_channels patch_size width depth stride percentile percentile_range mask_ratio local_block_size "
        "global_block_size datalist device assume_orientation audit audit_file".split(),
    ),
]
# settings of the encoder that a preset or experiment must give alike in both bundles, where both have it
SHARED = ["patch_size", "width", "depth", "stride", "amp", "in_channels"]


def findings() -> list[str]:
    """One line per disagreement."""
    found = []
    configs = {path: ConfigParser.load_config_file(path) for path in sorted(BUNDLES.glob("*/configs/*.[jy]*"))}
    for first, second, keys in EQUAL:
        one, two = configs[BUNDLES / first], configs[BUNDLES / second]
        differing = [key for key in keys if one.get(key) != two.get(key)]
        found += [f"{second}: {key} is {two.get(key)!r}, {first} has {one.get(key)!r}" for key in differing]
    for path, config in configs.items():
        if path.name in (*STANDALONE, "metadata.json"):
            continue
        known = {key.lstrip("+").split("#")[0] for key in config}
        try:
            check_settings(dict.fromkeys(known), path.parent)
        except ConfigError as error:
            found.append(f"{path.relative_to(BUNDLES)}: {error}")
        encoder = path.parent.parent.name.startswith("mapseg_")  # cosmos_translation has networks of its own
        twin = configs.get(BUNDLES / "mapseg_pretraining" / "configs" / path.name) if encoder else None
        for key in SHARED if twin is not None and path.name != "tiny.yaml" else ():
            if key in config and key in twin and config[key] != twin[key]:
                found.append(f"{path.name}: {key} is {config[key]!r} in adaptation and {twin[key]!r} in pretraining")
    for bundle in sorted(path.parent.parent for path in BUNDLES.glob("*/configs/metadata.json")):
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
        inference = configs[bundle / "configs" / "inference.json"]
        channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        if "labels" in inference and list(channels.values()) != ["background", *inference["labels"]]:
            found.append(f"{bundle.name}: channel_def of metadata.json and labels of inference.json differ")
        if metadata["version"] not in metadata["changelog"]:
            found.append(f"{bundle.name}: version {metadata['version']} has no entry in the changelog")
    return found


if __name__ == "__main__":
    problems = findings()
    sys.stdout.write("\n".join(problems) + "\n" if problems else "bundles agree\n")
    sys.exit(bool(problems))
