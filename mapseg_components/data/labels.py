# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Names and values of structures as a command is given them: JSON, a datalist, a ``dataset.json`` or a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.data.datalist import labels_file
from mapseg_components.data.layouts import DATASET, images_beside
from mapseg_components.errors import ConfigError
from mapseg_components.structures import structures_of

__all__ = ["label_mapping", "named_beside", "numbered", "read_labels"]


def read_labels(labels: str | None) -> dict[str, tuple[int, int]]:
    """Structure name to its value in predictions and in the truth; empty if none are named. Raises `ConfigError`."""
    mapping, named_by_bundle = label_mapping(labels)
    return {} if labels is None else numbered(structures_of(mapping, f"labels is {labels}"), named_by_bundle)


def numbered(structures: Mapping[str, int], by_index: bool) -> dict[str, tuple[int, int]]:
    """Structure name to its value in predictions, which may be its class index, and in the truth."""
    indices = enumerate(structures.items(), start=1)
    return {name: (index if by_index else value, value) for index, (name, value) in indices}


def label_mapping(labels: str | None) -> tuple[Mapping[str, Any], bool]:
    """A mapping of labels in any spelling, and whether it is a bundle's; empty without. Raises `ConfigError`."""
    if labels is None:
        return {}, False
    path = Path(labels)
    if path.is_dir():
        config, named = path / "configs" / "inference.json", labels_file(path)
        if config.is_file():
            parser = ConfigParser()
            parser.read_config(str(config))
            return dict(parser.get_parsed_content("labels")), True
        if named is None:
            raise ConfigError(f"no config at {config}: set labels to the folder of a bundle, or to a JSON file")
        path = named
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig") if path.is_file() else labels)
        found = content.get("labels", content)  # a datalist or dataset.json
        return (found if isinstance(found, dict) else dict(content)), False
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = 'expected a bundle, or JSON such as {"hippocampus": 1}'
        raise ConfigError(f"labels is {labels!r}, {expected} ({error})") from error


def named_beside(truth: Path) -> str | None:
    """The ``dataset.json`` of a folder ``labelsTr`` and the like, which names its structures; ``None`` without."""
    folder = truth.absolute() if truth.is_dir() else truth.absolute().parent
    named = folder.parent / DATASET
    return str(named) if images_beside(folder) is not None and labels_file(named) is not None else None
