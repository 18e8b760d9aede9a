#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Write the bundles' JSON files in one layout: python tools/format_configs.py [--check] [FILES].

A list or mapping that fits on one line of 120 columns stands on one line. Of any other, each item of a list and each
setting at the top level has a line of its own; below, the plain values of a mapping share lines, as the arguments of a
call do, after the line with its ``_target_``. Order and spelling of keys and numbers stay as they are. Without
FILES it takes those of all bundles; with --check it writes nothing, and its exit code is 1 if a file has another
layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import write_text

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
WIDTH = 120
INDENT = 4
ALONE = ("_target_",)


class Number(str):
    """A number as it is spelt."""


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose keys differ; of equal ones JSON would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"the key {twice!r} stands twice in one mapping: remove one")
    return content


def formatted(text: str) -> str:
    """A JSON text in the layout of the bundles.

    Raises:
        ConfigError: the text is no JSON, or a mapping has a key twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=unique, parse_int=Number, parse_float=Number)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON ({error}): correct it") from error
    return on_lines(content, 0) + "\n"


def on_lines(value: Any, used: int, level: int = 0) -> str:
    """A value, on one line if it fits.

    Args:
        value: of JSON.
        used: columns of its first line that come before and after it.
        level: its depth, for the indentation of further lines.
    """
    line = on_one_line(value)
    if not isinstance(value, (dict, list)) or not value or (used + len(line) <= WIDTH and level > 0):
        return line
    margin = " " * INDENT * (level + 1)
    rows: list[str] = []
    open_row = False
    pairs = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    for key, each in pairs:
        head = "" if key is None else f"{on_one_line(key)}: "
        item = head + on_lines(each, len(margin) + len(head) + 1, level + 1)
        shares = level > 0 and key not in (None, *ALONE) and not isinstance(each, dict) and "\n" not in item
        if shares and open_row and len(rows[-1]) + len(item) + 3 <= WIDTH:
            rows[-1] += f", {item}"
        else:
            rows.append(margin + item)
        open_row = shares
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return begin + "\n" + ",\n".join(rows) + "\n" + " " * INDENT * level + end


def on_one_line(value: Any) -> str:
    """A value as JSON, numbers as they are spelt."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{on_one_line(key)}: {on_one_line(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(on_one_line, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def main(line: Sequence[str] | None = None) -> int:
    """Format or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files (default: those of all bundles)")
    parser.add_argument("--check", action="store_true", help="write nothing, name the files with another layout")
    arguments = parser.parse_args(line)
    changed = []
    for path in arguments.files or sorted(BUNDLES.glob("*/configs/*.json")):
        try:
            text = path.read_text(encoding="utf-8")
            wanted = formatted(text)
        except (OSError, MAPSegError) as error:
            sys.stderr.write(f"{path}: {error}\n")
            return ConfigError.exit_code
        if text != wanted:
            changed.append(path)
            if not arguments.check:
                write_text(wanted, path)
    for path in changed:
        sys.stdout.write(f"{path}: {'another layout' if arguments.check else 'formatted'}\n")
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
