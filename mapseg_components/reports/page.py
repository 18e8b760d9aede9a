# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML: one file, no network, light and dark, narrow and wide windows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mapseg_components.reports.tables import cell

__all__ = ["page", "sortable_table"]

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --soft: #f0f0ee; --line: #c9c9c4;
  --error: #a4262c; --warning: #8a5a00; --note: #3b5b7a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e6; --back: #17181a; --soft: #24262a; --line: #44474d;
  --error: #ff9a93; --warning: #f2c14e; --note: #9cc3e6; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: var(--soft); white-space: nowrap; } th button { font: inherit; font-weight: 600; color: inherit;
  background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.error { color: var(--error); font-weight: 600; } .warning { color: var(--warning); font-weight: 600; }
.note { color: var(--note); }
@media (max-width: 40rem) { body { padding: .75rem; } table.stack thead { position: absolute; left: -999rem; }
  table.stack tr { display: block; padding: .5rem 0; border-bottom: 2px solid var(--line); }
  table.stack td { display: block; border: 0; padding: .1rem 0; text-align: left; white-space: normal; }
  table.stack td::before { content: attr(data-name) ": "; font-weight: 600; } }
"""
SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    var column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
    var key = function (row) { return row.cells[column].dataset.key || row.cells[column].textContent; };
    Array.from(body.rows).sort(function (a, b) {
      var one = key(a), two = key(b), numbers = one !== "" && two !== "" && !isNaN(one) && !isNaN(two);
      var order = numbers ? one - two : one.localeCompare(two);
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
});
"""


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML document, which its own policy forbids to load anything.

    Args:
        title: plain text. body: HTML, of this module's functions for instance. style, script: added to this module's.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n<script>{SCRIPT}{script}</script>\n"
        "</body>\n</html>\n"
    )


def sortable_table(head: Sequence[str], rows: Sequence[Sequence[Any]], order: Sequence[str] = ()) -> str:
    """HTML table that sorts by a click on a column's name; below 40 rem of width each row becomes a block.

    Args:
        head: names of the columns. rows: values, escaped here. order: words that sort in this order, not by letters,
            and are the class of their cell, e.g. severities.
    """
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    lines = []
    for row in rows:
        cells = []
        for name, value in zip(head, row):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            key, kind = (f"{value}", "number") if number else ("", "")
            if value in order:
                key, kind = f"{list(order).index(value)}", str(value)
            attributes = f' class="{escape(kind)}"' if kind else ""
            attributes += f' data-key="{escape(key)}"' if key else ""
            cells.append(f'<td data-name="{escape(name)}"{attributes}>{escape(cell(value))}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    content = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="stack"><thead><tr>{names}</tr></thead>\n<tbody>\n{content}\n'
        "</tbody></table></div>"
    )
