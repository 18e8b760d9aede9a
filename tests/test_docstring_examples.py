# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Docstrings of public parts: an example that runs as it stands, and every argument on a line of its own."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mapseg_components"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# what these list in __all__ is for other people's pipelines
ROOMS = [
    "boxes",
    "data",
    "engines",
    "handlers",
    "inferers",
    "losses",
    "masking",
    "methods",
    "metrics",
    "networks",
    "precision",
    "structures",
    "transforms",
]
# of the room of files and their checks, these
OF_DATA = [
    "DomainBalancedSampler",
    "EpochLoader",
    "MappedCacheDataset",
    "NiftiReader",
    "SeededDataset",
    "SourceTargetLoader",
    "load_datalist",
    "load_images",
    "load_scans",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_parts() -> dict[str, object]:
    """Name to class or function. A protocol and a named tuple do nothing by themselves."""
    parts = {}
    for room in ROOMS:
        module = importlib.import_module(f"mapseg_components.{room}")
        for part in OF_DATA if room == "data" else module.__all__:
            thing = getattr(module, part)
            idle = isinstance(thing, type) and (issubclass(thing, tuple) or getattr(thing, "_is_protocol", False))
            if callable(thing) and not idle:
                parts[part] = thing
    return parts


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package with examples. They see no names but those they import."""
    finder, found = doctest.DocTestFinder(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            found += finder.find(importlib.import_module(module_of(path)), globs={"__name__": "__main__"})
    return [test for test in found if test.examples]


def documented(text: str) -> dict[str, str]:
    """Names of the section ``Args:`` of a docstring, each with its lines; names that share a line are one entry."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", inspect.cleandoc(text) + "\n\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:]
    return {entry.partition(":")[0].strip("* "): entry.partition(":")[2] for entry in entries}


def arguments(thing: object) -> list[str]:
    """Names of the arguments of a function, or of a class as it is called."""
    made = inspect.signature(thing.__init__ if isinstance(thing, type) else thing)
    names = [name for name in made.parameters if name != "self"]
    return [] if names == ["args", "kwargs"] else names  # of torch.nn.Module, which takes none


PARTS = public_parts()
METHODS = [
    f"{name}.{method}"
    for name in PARTS
    for method, function in vars(PARTS[name]).items()
    if isinstance(PARTS[name], type)
    and inspect.isfunction(function)
    and method != "__init__"
    and documented(function.__doc__ or "")
]


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name.removeprefix("mapseg_components."))
def test_the_example_gives_what_it_says(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert result.failed == 0, "".join(report)
    assert not list(tmp_path.iterdir()), "the example leaves files where it runs"


def test_examples_stand_below_their_heading():
    """Elsewhere the pages make nested quotations of ``>>>``."""
    found = {test.name: inspect.cleandoc(test.docstring) for test in examples()}
    assert [name for name, text in found.items() if not re.search(r"^Examples:\n    >>> ", text, re.MULTILINE)] == []


def test_every_public_part_has_an_example():
    assert [name for name, thing in PARTS.items() if ">>> " not in (thing.__doc__ or "")] == []


@pytest.mark.parametrize("name", sorted(PARTS))
def test_every_argument_of_a_public_part_has_a_line_of_its_own(name):
    thing = PARTS[name]
    found = documented(thing.__doc__ or "")
    one_line = inspect.isfunction(thing) and not found  # the summary of a small function may say it all
    assert one_line or list(found) == arguments(thing)


@pytest.mark.parametrize("name", METHODS)
def test_every_argument_of_a_documented_method_has_a_line_of_its_own(name):
    part, _, method = name.partition(".")
    function = vars(PARTS[part])[method]
    assert list(documented(function.__doc__)) == arguments(function)
