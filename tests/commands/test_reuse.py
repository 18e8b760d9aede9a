# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages of another run: taken over where nothing that decides them differs, trained otherwise."""

from __future__ import annotations

import json

import pytest

from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.reuse import identity_of, runs_to_reuse, take_over
from mapseg_components.errors import ConfigError

CONFIG = {"max_epochs": 2, "loss": {"_target_": "DiceCELoss"}}
RECORD = {"request": {"num_threads": 1, "device": "cpu", "seed": 0}, "versions": {"torch": "2"}}


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"scan")
    return path


def identity(folder, scan, config=CONFIG, record=RECORD, files=None, stage="source"):
    config = config | {"datalist": f"{folder}/datalist.json"}
    return identity_of(stage, folder, record, config, files or {}, [{"image": str(scan), "case_id": "a"}])


def test_the_same_training_in_another_folder_is_the_same_and_any_change_is_seen(tmp_path, scan):
    here = identity(tmp_path / "one", scan)
    assert here == identity(tmp_path / "two", scan)
    others = [
        identity(tmp_path / "one", scan, CONFIG | {"max_epochs": 3}),
        identity(tmp_path / "one", scan, record=RECORD | {"versions": {"torch": "3"}}),
        identity(tmp_path / "one", scan, record=RECORD | {"request": {"num_threads": 2, "device": "cpu"}}),
        identity(tmp_path / "one", scan, files={"handover_dir": "source/package"}),
    ]
    scan.write_bytes(b"another scan")
    others.append(identity(tmp_path / "one", scan))
    assert len({here, *others}) == 6


def test_what_a_stage_builds_on_belongs_to_it(tmp_path, scan):
    files = {"initial_weights": "source/source_only.pt"}
    first, second = (
        identity(tmp_path, scan, record=RECORD | {"identities": {"source": known}}, files=files, stage="adaptation")
        for known in ("one", "two")
    )
    assert first and second and first != second
    # made by a stage that has no identity, such as pseudo labels
    assert identity(tmp_path, scan, files=files, stage="adaptation") is None


def test_a_finished_stage_is_copied_whole_and_only_once(tmp_path):
    run, output = tmp_path / "run", tmp_path / "out" / "stages" / "source"
    (run / "stages" / "source").mkdir(parents=True)
    (run / "stages" / "source" / "source_only.pt").write_text("weights")
    record = {"done": ["source"], "identities": {"source": "this", "contrasts": "that"}}
    (run / "run.json").write_text(json.dumps(record))
    for stage, known in (("source", "other"), ("source", None), ("contrasts", "that")):  # the last is not done
        assert take_over(stage, known, output, [run]) is None and not output.parent.exists()
    assert take_over("source", "this", output, [run]) == (run, record)
    assert (output / "source_only.pt").read_text() == "weights"
    assert [path.name for path in output.parent.iterdir()] == ["source"]
    (output / "source_only.pt").write_text("further")
    assert take_over("source", "this", output, [run]) is None  # what is begun here goes on
    assert (output / "source_only.pt").read_text() == "further"


def test_runs_are_named_by_commas_and_one_that_is_none_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text("{}")
    assert runs_to_reuse(None) == runs_to_reuse("") == []
    assert runs_to_reuse(f"{tmp_path / 'one'}, {tmp_path / 'one'}") == [tmp_path / "one"] * 2
    with pytest.raises(ConfigError, match=r"reuse names .*two, which holds no run of mapseg adapt \(run.json\)"):
        adapt(source=str(tmp_path), target=str(tmp_path), output=str(tmp_path / "out"), reuse=str(tmp_path / "two"))
    assert not (tmp_path / "out").exists()
