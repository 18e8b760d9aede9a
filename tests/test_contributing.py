# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING name files that exist, and few of them."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KINDS = [
    "method", "network", "transform", "loss term", "task", "preset", "command", "metric", "file format",
    "teacher schedule", "federation rule",
]  # fmt: skip


def files_of(kind: str) -> list[str]:
    """Files in the table of a recipe."""
    recipe = re.split(r"^#+ ", TEXT.partition(f"### Add a {kind}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `([^`]+)`", recipe, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_touches_one_to_three_files_that_exist_or_are_new(kind):
    files = files_of(kind)
    assert 1 <= len(files) <= 3
    for name in files:
        path = ROOT / name
        assert path.is_file() or ("<name>" in path.name and path.parent.is_dir()), name


def test_every_recipe_is_of_a_known_kind():
    found = re.findall(r"^### Add a (.+)$", TEXT, re.MULTILINE)
    assert sorted(found) == sorted([*KINDS, "bundle"])
