# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The catalogue of planted bugs fits the code; whether tests notice them is what ``make mutants`` says."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT
from tests.mutants.run import Mutant, mutants, verdict

ALL = mutants()


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code_and_names_tests_that_exist(mutant):
    before = (ROOT / mutant.file).read_text(encoding="utf-8")
    planted = mutant.plant(before)
    assert planted != before
    if mutant.file.endswith(".py"):
        ast.parse(planted)
    for test in mutant.tests:
        path, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert not name or name.partition("[")[0] in functions


def test_there_are_forty_mutants_over_all_rooms():
    rooms = {mutant.file.split("/")[1] for mutant in ALL if mutant.file.startswith("mapseg_components/")}
    folders = {p.name for p in (ROOT / "mapseg_components").iterdir() if (p / "__init__.py").is_file()}
    assert len(ALL) >= 40
    assert folders <= rooms
    assert {mutant.file.split("/")[1] for mutant in ALL if mutant.file.startswith("bundles/")} == {
        "cosmos_translation",
        "mapseg_adaptation",
        "mapseg_pretraining",
    }


def tree(folder, test):
    (folder / "planted_code.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "test_planted_code.py").write_text(
        f"from planted_code import double\n\n\ndef test_double():\n    assert {test}\n"
    )


def planted(**changes):
    fields = {"original": "2 * x", "mutated": "3 * x", "tests": ("test_planted_code.py",), **changes}
    return Mutant("name", "what", "planted_code.py", **fields)


def test_the_runner_tells_killed_from_survived_and_from_stale(tmp_path):
    for number, (test, mutant, expected) in enumerate(
        [
            ("double(1) == 2", planted(), "killed"),
            ("double(0) == 0", planted(), "SURVIVED"),
            (
                "double(1) == 2",
                planted(original="4 * x"),
                "STALE: planted_code.py holds its original 0 times, expected once",
            ),
            (
                "double(1) == 2",
                planted(original="x"),
                "STALE: planted_code.py holds its original 2 times, expected once",
            ),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tree(folder, test)
        assert verdict(folder, mutant) == expected
        assert "return 2 * x" in (folder / "planted_code.py").read_text()
    assert verdict(folder, planted(tests=("test_none.py",))).startswith("STALE")
