# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages of another run: taken over where nothing that decides them differs, trained otherwise."""

from __future__ import annotations

import json
import os

import pytest

from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.reuse import copy_stage, finished_in, identity_of, runs_to_reuse
from mapseg_components.commands.training import Run
from mapseg_components.errors import ConfigError

CONFIG = {"max_epochs": 2, "loss": {"_target_": "DiceCELoss"}}
RECORD = {"request": {"num_threads": 1, "device": "cpu", "seed": 0}, "versions": {"torch": "2"}}


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"scan")
    return path


def identity(folder, scan, config=CONFIG, record=RECORD, files=None, stage="source", section="source_training"):
    config = config | {"datalist": f"{folder}/datalist.json"}
    return identity_of(stage, folder, record, config, files or {}, {section: [{"image": str(scan), "case_id": "a"}]})


def test_the_same_training_in_another_folder_is_the_same_and_any_change_is_seen(tmp_path, scan):
    here = identity(tmp_path / "one", scan)
    assert here == identity(tmp_path / "two", scan)
    others = [
        identity(tmp_path / "one", scan, CONFIG | {"max_epochs": 3}),
        identity(tmp_path / "one", scan, record=RECORD | {"versions": {"torch": "3"}}),
        identity(tmp_path / "one", scan, record=RECORD | {"request": {"num_threads": 2, "device": "cpu"}}),
        identity(tmp_path / "one", scan, files={"handover_dir": "source/package"}),
        identity(tmp_path / "one", scan, section="source_validation"),
    ]
    scan.write_bytes(b"another scan")
    others.append(identity(tmp_path / "one", scan))
    assert len({here, *others}) == 7


def test_a_folder_of_a_like_name_is_another_one_and_own_files_count_by_their_content(tmp_path):
    scans = []
    for name in ("run", "other"):
        (tmp_path / name / "prepared").mkdir(parents=True)
        scans.append(tmp_path / name / "prepared" / "a.nii.gz")
        scans[-1].write_bytes(b"prepared alike")
    os.utime(scans[0], (1, 1))
    assert identity(tmp_path / "run", scans[0]) == identity(tmp_path / "other", scans[1])
    scans[0].write_bytes(b"prepared other")
    assert identity(tmp_path / "run", scans[0]) != identity(tmp_path / "other", scans[1])
    source = tmp_path / "run_source" / "a.nii.gz"  # of both
    source.parent.mkdir()
    source.write_bytes(b"scan")
    assert identity(tmp_path / "run", source) == identity(tmp_path / "other", source)


@pytest.mark.parametrize("letters", ["Köpfe", os.fsdecode(b"K\xf6pfe")])  # the second in another encoding
def test_folders_are_named_in_any_letters(tmp_path, scan, letters):
    runs = [tmp_path / letters / name for name in ("one", "two")]
    assert identity(runs[0], scan) == identity(runs[1], scan)


def test_what_a_stage_builds_on_belongs_to_it(tmp_path, scan):
    files = {"initial_weights": "source/source_only.pt"}
    first, second = (
        identity(tmp_path, scan, record=RECORD | {"identities": {"source": known}}, files=files, stage="adaptation")
        for known in ("one", "two")
    )
    assert first and second and first != second
    # made by a stage that has no identity, such as pseudo labels
    assert identity(tmp_path, scan, files=files, stage="adaptation") is None


def test_a_finished_stage_is_found_by_its_identity_and_copied_whole(tmp_path):
    run, output = tmp_path / "run", tmp_path / "out" / "stages" / "source"
    (run / "stages" / "source").mkdir(parents=True)
    (run / "stages" / "source" / "source_only.pt").write_text("weights")
    record = {"done": ["source"], "identities": {"source": "this", "contrasts": "that"}}
    (run / "run.json").write_text(json.dumps(record))
    for stage, known in (("source", "other"), ("source", None), ("contrasts", "that")):  # the last is not done
        assert finished_in(stage, known, [run]) is None
    assert finished_in("source", "this", [tmp_path / "gone", run]) == run
    (output.parent / ".source.unfinished").mkdir(parents=True)  # of a call that was killed
    (output.parent / ".source.unfinished" / "part.pt").write_text("half")
    copy_stage(run, output)
    assert [path.name for path in output.iterdir()] == ["source_only.pt"]
    assert (output / "source_only.pt").read_text() == "weights"
    assert [path.name for path in output.parent.iterdir()] == ["source"]


def test_a_copy_that_was_made_before_a_kill_is_known_again_and_a_stage_begun_here_goes_on(tmp_path):
    run = tmp_path / "run"
    (run / "stages" / "source").mkdir(parents=True)
    record = {"done": ["source"], "identities": {"source": "this"}, "seconds": {"source": 7.0}}
    (run / "run.json").write_text(json.dumps(record | {"processor_seconds": {"source": 5.0}}))
    request = {"method": "mapseg", "settings": None, "source": "x", "target": "y"}
    one = Run(tmp_path / "out", request, True, [run])
    assert one._take_over("source", "that") is None and not one.stages.exists()
    assert one._take_over("source", "this") == 7.0 and (one.stages / "source").is_dir()
    again = Run(tmp_path / "out", request, True)  # killed before the stage was noted as done
    again.record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert again._take_over("source", "this") == 7.0 and again.record["processor_seconds"] == {"source": 5.0}
    (one.stages / "contrasts").mkdir()
    assert again._take_over("contrasts", "this") is None


def test_a_stage_whose_copy_failed_and_that_is_then_begun_here_is_not_taken_for_finished(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "stages" / "source").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"done": ["source"], "identities": {"source": "this"}}))
    request = {"method": "mapseg", "settings": None, "source": "x", "target": "y"}

    def full(other, output):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mapseg_components.commands.training.copy_stage", full)
    with pytest.raises(OSError, match="No space left"):
        Run(tmp_path / "out", request, True, [run])._take_over("source", "this")
    for _ in range(2):  # the second call goes on with what the first one left
        again = Run(tmp_path / "out", request, True)
        again.record = json.loads((tmp_path / "out" / "run.json").read_text())
        assert again._take_over("source", "this") is None
        (again.stages / "source").mkdir(parents=True, exist_ok=True)


def test_runs_are_named_by_commas_and_one_that_is_none_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text("{}")
    assert runs_to_reuse(None) == runs_to_reuse("") == []
    assert runs_to_reuse(f"{tmp_path / 'one'}, {tmp_path / 'one'}") == [tmp_path / "one"] * 2
    with pytest.raises(ConfigError, match=r"reuse names .*two, which holds no run of mapseg adapt \(run.json\)"):
        adapt(source=str(tmp_path), target=str(tmp_path), output=str(tmp_path / "out"), reuse=str(tmp_path / "two"))
    assert not (tmp_path / "out").exists()
