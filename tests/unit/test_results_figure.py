# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The README's figures and picture are those of the page of results."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tools.results_figure import MODELS, PAGE, SECTION, draw, read_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_picture_is_read_whole():
    columns, rows = read_table(PAGE.read_text(encoding="utf-8"), SECTION)
    assert columns[:3] == ["seed 0", "seed 1", "mean"] and len(columns) == 10
    assert set(MODELS) <= set(rows)
    for row in rows.values():
        assert row[2] == pytest.approx((row[0] + row[1]) / 2, abs=0.0011)


def test_the_readme_has_the_figures_of_that_table():
    _, rows = read_table(PAGE.read_text(encoding="utf-8"), SECTION)
    lines = [line for line in README.splitlines() if line.startswith(("| newborns, T1w to T2w", "| the same"))]
    figures = [[float(number) for number in re.findall(r"\d\.\d{3}", line)] for line in lines]
    baseline, oracle = rows["continued"], rows["oracle"]
    expected = [[baseline[seed], rows["adapted"][seed], oracle[seed]] for seed in (0, 1)]
    expected += [[*baseline[:2], *rows[name][:2], *oracle[:2]] for name in ("test-time", "federated")]
    assert figures == expected


def test_a_table_ends_where_the_next_begins():
    first, second = "| one | 1.5 | **2** |", "| one | 3 | 4 |"
    text = "## A\n\n" + "\n\n".join(f"| x | a | b |\n|---|---|---|\n{row}" for row in (first, second))
    assert read_table(text, "## A") == (["a", "b"], {"one": [1.5, 2.0]})


def test_the_picture_is_drawn(tmp_path):
    draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
