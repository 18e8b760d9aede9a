# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Names and values of structures from JSON, a datalist, a ``dataset.json`` or a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.data.datalist import labels_file
from mapseg_components.data.layouts import DATASET, images_beside
from mapseg_components.errors import ConfigError
from mapseg_components.structures import parts_of

__all__ = ["label_mapping", "named_beside", "read_labels"]


def read_labels(labels: str | None) -> dict[str, int]:
    """Structure name to its value in label maps; of several values each by a name of its own; empty if none are named.

    Args:
        labels: see `label_mapping`.

    Raises:
        ConfigError: as `label_mapping` and `mapseg_components.structures.parts_of`.

    Examples:
        >>> from mapseg_components.data.labels import read_labels
        >>> read_labels('{"liver": 1, "kidneys": [2, 3]}')
        {'liver': 1, 'kidneys (2)': 2, 'kidneys (3)': 3}
    """
    if labels is None:
        return {}
    parts = parts_of(label_mapping(labels)[0], f"labels is {labels}")
    return {
        name if len(values) == 1 else f"{name} ({value})": value for name, values in parts.items() for value in values
    }


def label_mapping(labels: str | None) -> tuple[Mapping[str, Any], bool]:
    """A mapping of labels, and whether it is that of a bundle.

    Of a run of `mapseg adapt` that merged values it is the one from before: the values of the source's label maps.

    Args:
        labels: JSON, a JSON file with or without ``labels`` (such as a datalist), a folder of nnU-Net or the Medical
            Segmentation Decathlon, or the folder of a bundle; ``None`` gives an empty mapping.

    Raises:
        ConfigError: it is none of these.

    Examples:
        >>> from mapseg_components.data.labels import label_mapping
        >>> label_mapping('{"labels": {"0": "background", "1": "liver"}}')
        ({'0': 'background', '1': 'liver'}, False)
    """
    if labels is None:
        return {}, False
    path, is_text = Path(labels), str(labels).lstrip().startswith("{")  # which may be longer than a path can be
    if not is_text and path.is_dir():
        config, named = path / "configs" / "inference.json", labels_file(path)
        if config.is_file():
            parser = ConfigParser()
            parser.read_config(str(config))
            if "labels" not in parser:
                raise ConfigError(f"{config} names no labels, expected a bundle that segments: name another one")
            return merged_values(path / "run.json") or dict(parser.get_parsed_content("labels")), True
        if named is None:
            raise ConfigError(f"no config at {config}: set labels to the folder of a bundle, or to a JSON file")
        path = named
    try:
        content = json.loads(labels if is_text or not path.is_file() else path.read_text(encoding="utf-8-sig"))
        found = content.get("labels", content)  # a datalist or dataset.json
        return (found if isinstance(found, dict) else dict(content)), False
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = 'expected a bundle, or JSON such as {"hippocampus": 1}'
        raise ConfigError(f"labels is {labels!r}, {expected} ({error})") from error


def merged_values(run: Path) -> dict[str, Any] | None:
    """Structures of a run of `mapseg adapt` and their values in the source's label maps, as its ``run.json`` has it.

    Args:
        run: the file.

    Returns:
        ``None`` without such a file, or where no structure has several values.

    Raises:
        ConfigError: the file is damaged.
    """
    if not run.is_file():
        return None
    try:
        content = json.loads(run.read_text(encoding="utf-8"))
        values = content.get("plan", {}).get("label_values")
        values = values or content.get("request", {}).get("labels") or {}  # as a run of an earlier version has them
        return values if any(isinstance(own, list) and len(own) > 1 for own in values.values()) else None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{run} is no record of mapseg adapt ({error}): name the output folder of a run") from error


def named_beside(truth: Path) -> str | None:
    """The ``dataset.json`` that names the structures of a folder such as ``labelsTr``; ``None`` without.

    Args:
        truth: the folder of label maps, or one of its files.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from mapseg_components.data.labels import named_beside
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("imagesTr", "labelsTr"):
        ...         Path(folder, name).mkdir()
        ...     written = Path(folder, "dataset.json").write_text('{"labels": {"liver": 1}}')
        ...     Path(named_beside(Path(folder, "labelsTr"))).name
        'dataset.json'
    """
    folder = truth.absolute() if truth.is_dir() else truth.absolute().parent
    named = folder.parent / DATASET
    return str(named) if images_beside(folder) is not None and labels_file(named) is not None else None
