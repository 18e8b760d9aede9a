# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands that hold more than a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError

__all__ = ["read_mapping"]


def read_mapping(name: str, given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A mapping, or one from JSON text or a JSON file. Raises `ConfigError`."""
    if not isinstance(given, str):
        return None if given is None else json.loads(json.dumps(dict(given)))
    try:
        # text may be longer than a name of a file can be
        is_file = not given.lstrip().startswith("{") and Path(given).is_file()
        content = json.loads(Path(given).read_text(encoding="utf-8") if is_file else given)
        if isinstance(content, dict):
            return content
        reason = f"it is a {type(content).__name__}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f'{name} {given!r} is no JSON object or file of one ({reason}): give a JSON such as {{"liver": 1}}'
    )
