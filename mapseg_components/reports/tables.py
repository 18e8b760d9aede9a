# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from mapseg_components.files import readable

__all__ = ["cell", "text_table"]

WIDEST = 160


def cell(value: Any) -> str:
    """A value as text: three decimals, nothing for what is unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def text_table(head: Sequence[str], rows: Sequence[Sequence[Any]], wrap_last: bool = False) -> str:
    """Columns side by side, numbers to the right.

    Args:
        head: names of the columns.
        rows: values.
        wrap_last: break the last column's text at the terminal's width.
    """
    texts = [[readable(cell(value).replace("\n", " ")) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts)]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(head))
    ]
    lines = []
    for line in (head, ["-" * width for width in widths], *texts):
        shown = [t.rjust(w) if n else t.ljust(w) for t, w, n in zip(line, widths, numeric)]
        start = "  ".join(shown[:-1]) + "  " if len(shown) > 1 else ""
        room = min(shutil.get_terminal_size((120, 40)).columns, WIDEST) - len(start)
        if wrap_last and room >= 30:
            pieces = textwrap.wrap(line[-1], room) or [""]
            pieces = pieces[:1] if set(line[-1]) == {"-"} else pieces  # the rule below the head
            lines += [start + pieces[0], *(" " * len(start) + piece for piece in pieces[1:])]
        else:
            lines.append((start + shown[-1]).rstrip())
    return "\n".join(lines)
