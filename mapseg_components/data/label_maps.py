# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Label maps of several folders that belong together, by the names of their cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mapseg_components.data.bids import is_bids
from mapseg_components.data.datalist import list_scans, scans_below, stem
from mapseg_components.data.layouts import case_name
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.scans.files import FORMATS, is_picture, is_scan
from mapseg_components.scans.findings import Finding, raise_findings
from mapseg_components.scans.masks import MASK

__all__ = ["label_maps", "matched", "without_channels"]

OF_PROBABILITIES = ("_probabilities", "_probseg", "_uncertainty")
ENDINGS_OF_RESULTS = re.compile(r"(_desc-[^_]+)?_(seg|dseg|pred|label|labels|mask|gt|segmentation)$")


def label_maps(place: str) -> dict[str, Path]:
    """Case name to file of a file, a folder or a BIDS derivative. Raises `ConfigError` if there is none."""
    path = Path(place)
    if path.is_file():
        if not is_scan(path.name):
            raise ConfigError(f"{path} is no label map, expected {FORMATS}: name a label map, or a folder of them")
        return {"": path}
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist: correct the path of the label maps")
    files = sorted(path.rglob("*_dseg.nii*")) if is_bids(path) else list_scans(path, OF_PROBABILITIES)
    files = [file for file in files if not stem(file).endswith(OF_PROBABILITIES)]
    named = {ENDINGS_OF_RESULTS.sub("", stem(file)) for file in files if not is_mask(file)}
    files = [file for file in files if not (is_mask(file) and stem(file).removesuffix(MASK) in named)]
    found: dict[str, Path] = {}
    for file in files:
        name = ENDINGS_OF_RESULTS.sub("", stem(file))
        if name in found:
            raise DataError(f"{found[name]} and {file} are both label maps of {name!r}: move one away")
        found[name] = file
    if not found:
        raise ConfigError(f"{path} has no label map ({FORMATS}){scans_below(path)}: correct the path")
    return found


def is_mask(file: Path) -> bool:
    """Whether an image's name is that of a mask, if there is a case of that name."""
    return is_picture(file) and stem(file).endswith(MASK)


def without_channels(sets: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, Path]]:
    """The same, but a name with nnU-Net's number of the channel as that of its case, where another set has that."""
    result: dict[str, dict[str, Path]] = {}
    for key, found in sets.items():
        others = set().union(*(other for name, other in sets.items() if name != key))
        counts = Counter(map(case_name, found))
        for name, path in found.items():
            case = case_name(name)
            alone = name not in others and case in others and counts[case] == 1
            result.setdefault(key, {})[case if alone else name] = path
    return result


def matched(sets: Mapping[str, Mapping[str, Path]], places: Mapping[str, str], common: bool) -> list[str]:
    """Names that all sets have.

    Raises:
        ConfigError: files stand against folders, or no name is common.
        DataError: a file has no partner.
    """
    single = {"" in found for found in sets.values()}
    if len(single) > 1:
        raise ConfigError(
            f"compare a file with a file, or a folder with a folder: {', '.join(map(str, places.values()))}"
        )
    every = set().union(*sets.values())
    shared = sorted(set.intersection(*map(set, sets.values())))
    if not shared:
        examples = "; ".join(f"{places[key]} has {', '.join(sorted(found)[:3])}" for key, found in sets.items())
        raise ConfigError(f"no name is common: {examples}: name folders of the same scans")
    findings = [
        Finding(
            "error", places[key], f"no label map for {', '.join(sorted(every - set(found)))}", "add it, or set common"
        )
        for key, found in sets.items()
        if every - set(found)
    ]
    if not common:
        raise_findings(findings)
    return shared
