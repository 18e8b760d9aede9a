# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML: one file, no network, light and dark, narrow and wide windows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from mapseg_components.files import readable
from mapseg_components.reports.tables import cell

__all__ = ["answer", "breakable", "page", "sortable_table"]

# Contrast of text and of lines in figures with the background is 4.5 at least in both schemes.
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --muted: #56565a; --back: #ffffff; --soft: #f2f2ef; --line: #d3d3cd;
  --error: #a4262c; --warning: #855600; --note: #3b5b7a; --good: #00694f;
  --series-1: #0b67a3; --series-2: #ab4408; --series-3: #006b52; --series-4: #87396f; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e6; --muted: #a9abb0; --back: #17181a; --soft: #222428;
  --line: #44474d; --error: #ff9a93; --warning: #f2c14e; --note: #9cc3e6; --good: #5fd3ab;
  --series-1: #71bdf2; --series-2: #ffa06b; --series-3: #58d1a9; --series-4: #e8a3cf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 84rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: break-word; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 60rem; } .quiet, caption, figcaption { color: var(--muted); font-size: .875rem; }
.answer { border-left: 6px solid var(--note); margin: 1.25rem 0; padding: 1rem 1.25rem; background: var(--soft); }
.answer.good { border-color: var(--good); } .answer.warning { border-color: var(--warning); }
.answer.error { border-color: var(--error); } .answer strong { display: block; font-size: 1.35rem; line-height: 1.3; }
.answer p { margin: .4rem 0 0; } .answer dl { display: grid; gap: .75rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 8.5rem), 1fr)); margin: 1rem 0; max-width: 60rem; }
.answer dt { color: var(--muted); font-size: .875rem; } .answer dd { margin: 0; font-size: .875rem; }
.answer dd b { display: block; font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .875rem; }
table.compact { width: auto; } caption { text-align: left; padding: 0 .6rem .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--muted); }
tbody th { font-weight: 500; } .name { white-space: nowrap; } .name wbr { display: none; }
.name.longest { white-space: normal; min-width: 18rem; } .name.longest wbr { display: inline; }
table.compact th.number { max-width: 7rem; }
.word { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
th button { font: inherit; font-weight: 600; line-height: 1.3; color: inherit; text-align: inherit; background: none;
  border: 0; padding: 0; cursor: pointer; }
th[aria-sort] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
th.number[aria-sort] button::after { content: none; }
th.number[aria-sort] button::before { content: "\\25B2 "; font-size: .7em; }
th.number[aria-sort=descending] button::before { content: "\\25BC "; }
td.error, .error b { color: var(--error); font-weight: 600; }
td.warning, .warning b { color: var(--warning); font-weight: 600; } td.note { color: var(--note); }
@media (max-width: 60rem) { .name.long { white-space: normal; min-width: 13rem; }
  .name.long wbr { display: inline; }
  th, td { padding: .35rem .5rem; } }
@media (max-width: 60rem) { .answer dl { grid-template-columns: repeat(2, 1fr); }
  table.stack tbody .name { position: sticky; left: 0; background: var(--back); } }
@media (max-width: 34rem) { table.stack tbody .name { position: static; }
  table.stack thead { position: absolute; left: -999rem; }
  table.stack, table.stack tbody, table.stack caption { display: block; }
  table.stack tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--muted); }
  table.stack th, table.stack td { display: flex; justify-content: space-between; gap: 1.5rem; border: 0;
    padding: .1rem 0; white-space: normal; }
  table.stack td > span { min-width: 0; overflow-wrap: break-word; }
  table.stack .number > span { white-space: nowrap; } table.stack td.empty { display: none; }
  table.stack td::before { font-weight: 400; content: attr(data-name); color: var(--muted); flex: none; max-width: 55%;
    text-align: left; white-space: normal; }
  table.stack th.name { display: block; font-weight: 600; min-width: 0; } caption { padding-left: 0; } }
@media (max-width: 30rem) { body { padding: 1rem .75rem 3rem; } .answer { padding: .75rem; }
  table.compact { width: 100%; font-size: .8125rem; }
  table.compact th, table.compact td { padding: .3rem; } table.compact .name { white-space: normal; min-width: 0; }
  table.compact th:first-child, table.compact td:first-child { padding-left: 0; } }
"""
SCRIPT = """
document.querySelectorAll("thead button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    var column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
    var key = function (row) { return row.cells[column].dataset.key || row.cells[column].textContent; };
    Array.from(body.rows).sort(function (a, b) {
      var one = key(a), two = key(b), numbers = one !== "" && two !== "" && !isNaN(one) && !isNaN(two);
      var order = numbers ? one - two : one.localeCompare(two);
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
    table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
});
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SEPARATORS = re.compile(r"(?<=[_/\\])")  # where a name may go on in the next line
SIZES = re.compile(r"[\d.]+(?: x [\d.]+)+")  # such as 1.5 x 1.5 x 2
UNKNOWN = "\u2013"  # in a column of numbers
LONG, LONGEST = 24, 56  # characters of a name that goes on in the next line of narrow windows, or of any


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML document, whose content security policy forbids to load anything.

    Args:
        title: plain text.
        body: HTML, of this module's functions for instance.
        style: CSS added to this module's.
        script: JavaScript added to this module's.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{breakable(title)}</h1>\n{body}\n"
        f"<script>{SCRIPT}{script}</script>\n</body>\n</html>\n"
    )


def answer(kind: str, headline: str, figures: Sequence[tuple[str, str, str]], sentences: Sequence[str]) -> str:
    """The answer of a page, at its top: a sentence, the figures behind it, and the reasons.

    Args:
        kind: class of the box: good, note, warning or error.
        headline: plain text.
        figures: name, value, and a remark or nothing.
        sentences: plain text.
    """
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>{escape(remark)}</dd></div>"
        for name, value, remark in figures
    )
    return (
        f'<section class="answer {escape(kind)}"><strong>{escape(headline)}</strong>'
        f"{f'<dl>{listed}</dl>' if listed else ''}{''.join(f'<p>{escape(text)}</p>' for text in sentences)}</section>"
    )


def breakable(name: str) -> str:
    """HTML of a name that may go on in the next line after an underscore or a slash, and nowhere within a word."""
    return "<wbr>".join(escape(part) for part in SEPARATORS.split(name))


def sortable_table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    order: Sequence[str] = (),
    *,
    name: int = 0,
    caption: str = "",
    compact: bool = False,
) -> str:
    """HTML table that sorts by a click on a column's name.

    Columns of numbers, and of sizes such as "1.5 x 1.5 x 2", stand right-aligned below their names. A column without
    any value is left out. In narrow windows each row becomes a block, unless the table is compact.

    Args:
        head: names of the columns.
        rows: values, escaped here.
        order: words that sort in this order, not by letters, and are the class of their cell, e.g. severities.
        name: the column that names the row.
        caption: plain text.
        compact: few short columns, which stay columns.
    """
    kept = [i for i in range(len(head)) if i == name or not rows or any(cell(row[i]) for row in rows)]
    numeric = {i for i in kept if i != name and is_numeric([row[i] for row in rows])}
    length = max((len(cell(row[name])) for row in rows), default=0)
    kinds = "name" + " long" * (length > LONG) + " longest" * (length > LONGEST)
    classes = {i: "number" if i in numeric else kinds for i in {*numeric, name}}
    titles = "".join(
        f'<th scope="col"{attribute("class", "number" if i in numeric else "")}>'
        f'<button type="button">{escape(head[i])}</button></th>'
        for i in kept
    )
    lines = []
    for row in rows:
        cells = []
        for i in kept:
            value, kind = row[i], classes.get(i, "")
            key = f"{value}" if is_number(value) else ""
            if i != name and value in order:
                key, kind = f"{list(order).index(value)}", f"word {value}"
            text = readable(cell(value))
            if not text:
                kind = f"{kind} empty".strip()
                text = UNKNOWN if i in numeric else ""
            shown = breakable(text) if i == name else escape(text)
            start = 'th scope="row"' if i == name else f'td data-name="{escape(head[i])}"'
            cells.append(
                f"<{start}{attribute('class', kind)}{attribute('data-key', key)}><span>{shown}</span></{start[:2]}>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    content = "\n".join(lines)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{"compact" if compact else "stack"}">{above}'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{content}\n</tbody></table></div>"
    )


def attribute(name: str, value: str) -> str:
    """An attribute of a tag, or nothing."""
    return f' {name}="{escape(value)}"' if value else ""


def is_number(value: Any) -> bool:
    """A number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_numeric(column: Sequence[Any]) -> bool:
    """Whether a column holds numbers or sizes, and at most blanks beside them."""
    values = [value for value in column if value is not None and value != ""]
    return bool(values) and all(is_number(v) or (isinstance(v, str) and SIZES.fullmatch(v)) for v in values)
