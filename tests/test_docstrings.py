# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Docstrings read from the source: one argument or error per line, as Google style and the generated pages have it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted(
    path for room in ("mapseg_components", "examples", "tools", "benchmarks") for path in (ROOT / room).rglob("*.py")
)
SECTION = re.compile(r"^(?P<indent> *)(?P<name>Args|Raises|Attributes):$")


def documented(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """Functions and classes with their docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            yield node, ast.get_docstring(node) or ""


def argument_names(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Arguments of a function; of a class those of its methods, and its fields."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        optional = [item for item in (given.vararg, given.kwarg) if item]
        return {item.arg for item in [*given.posonlyargs, *given.args, *given.kwonlyargs, *optional]}
    names = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    return names.union(*(argument_names(item) for item in node.body if isinstance(item, ast.FunctionDef)))


def entries(document: str) -> Iterator[tuple[str, str]]:
    """Section and text of each entry of ``Args`` and the like."""
    section, indent, entry = "", 0, ""
    for line in [*document.splitlines(), ""]:
        found = SECTION.match(line)
        depth = len(line) - len(line.lstrip())
        if found or not line.strip() or depth <= indent:
            if section and entry:
                yield section, entry
            entry, section, indent = "", found["name"] if found else "", len(found["indent"]) if found else 0
        elif section and depth == indent + 4:
            if entry:
                yield section, entry
            entry = line.strip()
        elif section:
            entry += f" {line.strip()}"


def crowded(node: ast.FunctionDef | ast.ClassDef, document: str) -> list[str]:
    """Entries that hold several arguments or errors."""
    names = argument_names(node)
    wrong = []
    for section, entry in entries(document):
        known = names if section != "Raises" else set(re.findall(r"\w+(?:Error|Exit|Interrupt)\b", entry))
        more = re.findall(r"(?<=[.;] )(\w+(?:, \w+)*): ", entry)
        several = re.match(r"\w+(?:, \w+)+: ", entry) and section != "Raises"
        if several or any(word in known for item in more for word in item.split(", ")):
            wrong.append(f"{node.name}, {section}: {entry[:100]}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_argument_has_a_line(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [entry for node, document in documented(tree) for entry in crowded(node, document)] == []


@pytest.mark.parametrize(
    ("section", "count"),
    [
        ("Args:\n    first: of the one.\n    second: of the other.", 0),
        ("Args:\n    first: of the one. second: of the other.", 1),
        ("Args:\n    first: of the one; what it says\n        second: of the other.", 0),
        ("Args:\n    first: of the one, and then.\n        second: of the other.", 1),
        ("Args:\n    first, second: of both.", 1),
        ("Args:\n    first: one of three. A note: of no argument.", 0),
        ("Raises:\n    ValueError: it is wrong. TypeError: it is of another type.", 1),
        ("Raises:\n    ValueError: it is wrong.\n    TypeError: it is of another type.", 0),
    ],
)
def test_crowded_entries_are_found(section: str, count: int) -> None:
    node = ast.parse("def made(first, second): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    assert len(crowded(node, f"Summary.\n\n{section}\n")) == count
