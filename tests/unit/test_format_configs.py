# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/format_configs.py: one layout for the bundles' JSON files, the same content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapseg_components.errors import ConfigError
from tests.conftest import ROOT
from tools.format_configs import WIDTH, formatted, main

CONFIGS = sorted((ROOT / "bundles").glob("*/configs/*.json"))
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=6))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "bundles").as_posix())
def test_a_config_of_a_bundle_has_the_common_layout(path):
    text = path.read_text(encoding="utf-8")
    assert text == formatted(text), "run python tools/format_configs.py"


@given(VALUES)
def test_the_content_stays_and_a_second_time_changes_nothing(value):
    once = formatted(json.dumps(value))
    found = json.loads(once)
    assert found == value and json.dumps(found) == json.dumps(value)  # the order of keys as well
    assert formatted(once) == once == formatted(json.dumps(value, indent=1))


def test_numbers_are_spelt_as_they_were():
    text = '{\n    "a": [1e-05, 1.50, 0.00001, 10, -0.0]\n}\n'
    assert formatted(text) == text


def test_lines_are_filled_and_end_at_120_columns():
    numbers = {f"setting_{number:02}": [number, number + 1] for number in range(60)}
    lines = formatted(
        json.dumps({"first": 1, "part": {"_target_": "Part", **numbers}, "small": {"b": [2, 3]}})
    ).splitlines()
    assert lines[:4] == ["{", '    "first": 1,', '    "part": {', '        "_target_": "Part",']
    assert lines[-3:] == ["    },", '    "small": {"b": [2, 3]}', "}"]
    filled = lines[4:-3]
    assert max(map(len, filled)) <= WIDTH and min(map(len, filled[:-1])) > WIDTH - 30


def test_a_list_too_long_for_a_line_has_a_line_for_each_item():
    steps = [f"$step({number})" + "x" * 40 for number in range(6)]
    lines = formatted(json.dumps({"run": steps})).splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines[2:-2]] == steps


def test_short_texts_of_a_list_share_lines():
    names = [f"@handler_{number}" for number in range(20)]
    lines = formatted(json.dumps({"handlers": names})).splitlines()
    assert len(lines) < 10 and all(len(line) <= 120 for line in lines)
    assert json.loads("\n".join(lines)) == {"handlers": names}


@pytest.mark.parametrize("text, part", [('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"), ('{"a": ', "no JSON")])
def test_what_would_lose_something_is_refused_and_the_file_stays(text, part, tmp_path, capsys):
    with pytest.raises(ConfigError, match=part):
        formatted(text)
    path = tmp_path / "train.json"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err and path.read_text() == text


def test_check_names_the_file_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "train.json"
    path.write_text('{"a": [\n1,\n2]}')
    assert main(["--check", str(path)]) == 1
    assert f"{path}: another layout" in capsys.readouterr().out and path.read_text() == '{"a": [\n1,\n2]}'
    assert main([str(path)]) == 0 and path.read_text() == '{\n    "a": [1, 2]\n}\n'
    assert main(["--check", str(path)]) == 0
