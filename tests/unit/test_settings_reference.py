# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/settings_reference.py: the page of settings says what the configs say, and leaves none out."""

from __future__ import annotations

import json

import pytest
import yaml

from mapseg_components.errors import ConfigError
from tests.conftest import ROOT
from tools.make_bundles import made_bundles
from tools.settings_reference import PAGE, main, meanings_of, page, settings_of

BUNDLES = sorted(path.parents[1] for path in (ROOT / "bundles").glob("*/configs/train.json"))
BUNDLES = [path for path in BUNDLES if path.name not in made_bundles()]
TRAIN = {
    "imports": ["$import torch"],
    "ckpt_dir": "$@bundle_root + '/models'",
    "width": 32,
    "sizes": [4, 8],
    "amp": "bf16",
    "network": {"_target_": "Identity", "width": "@width"},
    "given": "$print(@width)",
    "lengths": "@width",
    "run": [],
}
MEANINGS = {
    "Part": {
        "settings": {
            "width": {"unit": "channels", "meaning": "channels | of a block."},
            "sizes": "sides.",
            "amp": {"paper": False, "meaning": "precision."},
            "lengths": "length.",
        }
    },
    "Files": {"paper": False, "settings": {"ckpt_dir": "folder."}},
}


@pytest.fixture
def made(tmp_path):
    """A folder with one bundle: a training, an inference and three overlays; returns its writer of meanings."""
    configs = tmp_path / "bundles" / "one" / "configs"
    for folder in (configs, configs.parent / "docs", tmp_path / "docs"):
        folder.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps(TRAIN))
    (configs / "inference.json").write_text(json.dumps({"width": 32, "amp": None, "ckpt_dir": TRAIN["ckpt_dir"]}))
    (configs / "metadata.json").write_text(json.dumps({"version": "1"}))
    (configs / "paper.yaml").write_text("width: 512\nnetwork#width: 8")
    (configs / "paper_v1.yaml").write_text("width: 512\nsizes: [8, 8]\n'+run': [1]")
    (configs / "small.yaml").write_text("width: 16\nlengths: 3\ngiven: '$5'")
    (tmp_path / "docs" / "start.md").write_text("python -m monai.bundle run --ckpt_dir RUN")

    def write(meanings):
        (configs.parent / "docs" / "settings.yaml").write_text(yaml.safe_dump(meanings, sort_keys=False))
        return tmp_path

    return write


def test_the_page_of_the_repository_is_what_the_script_makes():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(), "run python tools/settings_reference.py"


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_a_meaning_is_a_sentence_and_every_plain_value_has_one(bundle):
    meanings = {name: entry for entries in meanings_of(bundle).values() for name, entry in entries.items()}
    assert set(settings_of(bundle)) <= set(meanings)
    assert [name for name, entry in meanings.items() if not entry["meaning"].endswith(".")] == []
    train = json.loads((bundle / "configs" / "train.json").read_text())
    numbers = {key for key, value in train.items() if isinstance(value, (int, float, bool)) and key[0] != "_"}
    assert len(numbers) > 20 and numbers <= set(settings_of(bundle))


def test_a_row_has_meaning_unit_default_the_papers_value_and_what_changes_it(made):
    rows = [line for line in page(made(MEANINGS)).splitlines() if line.startswith("| `")]
    assert rows == [
        r"| `width` | channels \| of a block. | channels | train, inference | `32` | `512` | `16` small |",
        "| `sizes` | sides. |  | train | `[4, 8]` | `[4, 8]` | `[8, 8]` paper_v1 |",
        '| `amp` | precision. |  | train, inference | `"bf16"` train, `null` inference | - |  |',
        "| `lengths` | length. |  | train | `@width` | `@width` | `3` small |",
        "| `ckpt_dir` | folder. |  | train, inference | `$@bundle_root + '/models'` | - |  |",
    ]


@pytest.mark.parametrize("name", ["width", "lengths", "ckpt_dir"])
def test_a_setting_without_a_meaning_is_named(made, name):
    meanings = {
        section: {**content, "settings": {key: each for key, each in content["settings"].items() if key != name}}
        for section, content in MEANINGS.items()
    }
    with pytest.raises(ConfigError, match=rf"one/docs/settings.yaml: {name} has no meaning"):
        page(made(meanings))


@pytest.mark.parametrize("name", ["depth", "network", "run", "version"])
def test_a_meaning_without_a_setting_is_named(made, name):
    with pytest.raises(ConfigError, match=f"{name} is no setting of its configs"):
        page(made({**MEANINGS, "More": {"settings": {name: "nothing."}}}))


@pytest.mark.parametrize(
    "entry, part",
    [
        ({"meaning": "a.", "units": "mm"}, "unknown key 'units'"),
        ({"unit": "mm"}, "has no meaning"),
        (None, "no meaning"),
    ],
)
def test_a_damaged_description_is_named(made, entry, part):
    with pytest.raises(ConfigError, match=part):
        page(made({**MEANINGS, "More": {"settings": {"width": entry}}}))


def test_what_is_described_twice_is_named(made):
    with pytest.raises(ConfigError, match="width is described twice"):
        page(made({**MEANINGS, "More": {"settings": {"width": "again."}}}))


def test_check_fails_on_an_old_page_and_writes_nothing(made, capsys):
    root = made(MEANINGS)
    assert main(["--check"], root) == 1 and not (root / PAGE).exists()
    assert main([], root) == 0 and main(["--check"], root) == 0
    (root / PAGE).write_text("old")
    assert main(["--check"], root) == 1 and (root / PAGE).read_text() == "old"
    assert "is not up to date: run python tools/settings_reference.py" in capsys.readouterr().err
