# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg predict --continue_prediction`: what an earlier run finished is kept, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from mapseg_components.commands import predict
from mapseg_components.commands.main import main
from mapseg_components.errors import ConfigError, ResourceError
from mapseg_components.prediction.journal import Journal
from mapseg_components.prediction.run import Run
from tests.conftest import ROOT, SAMPLE
from tests.warm import python

BUNDLE = str(ROOT / "bundles" / "mapseg_adaptation")
CASES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def scan():
    image = nib.load(SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz")
    return np.asarray(image.dataobj)[4:40, 5:33, 2:31], image.affine


@pytest.fixture
def folder(tmp_path, scan):
    """Four different scans."""
    (tmp_path / "in").mkdir()
    for number, case in enumerate(CASES):
        nib.save(nib.Nifti1Image(np.roll(scan[0], 3 * number, axis=1), scan[1]), tmp_path / "in" / f"{case}.nii.gz")
    return tmp_path / "in"


def go_on(folder, output, **options):
    return predict(str(folder), str(output), bundle=BUNDLE, continue_prediction=True, quiet=True, **options)


def stop_before(monkeypatch, case):
    """Ctrl-C while one scan is segmented."""
    segment = Run.segment

    def interrupted(run, todo, batch):
        if todo[0].case == case:
            raise KeyboardInterrupt
        return segment(run, todo, batch)

    monkeypatch.setattr(Run, "segment", interrupted)


def results(output):
    """Content of all results, of the manifest its scans without seconds."""
    found = {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    scans = json.loads(found.pop("manifest.json"))["scans"]
    for one in scans:
        del one["seconds"]
        one.update({key: os.path.basename(one[key]) for key in ("label_map", "preview") if one[key]})
    return {name: data for name, data in found.items() if not name.startswith((".run", "audit"))}, scans


def written(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("*_seg.nii.gz")}


def test_a_run_goes_on_where_it_was_interrupted_and_ends_with_the_same_files(folder, tmp_path, monkeypatch):
    stop_before(monkeypatch, "c")
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, tmp_path / "out")  # also of a folder where nothing is yet
    monkeypatch.undo()
    before = written(tmp_path / "out")
    assert set(before) == {"a_seg.nii.gz", "b_seg.nii.gz"}
    done = go_on(folder, tmp_path / "out")
    assert done.exit_code == 0 and done.kept == 2 and "4 of 4 scans" in str(done) and "2 of them by an" in str(done)
    assert {name: written(tmp_path / "out")[name] for name in before} == before
    whole = predict(str(folder), str(tmp_path / "whole"), bundle=BUNDLE, quiet=True)
    assert results(tmp_path / "out") == results(tmp_path / "whole") and done.volumes == whole.volumes


def test_a_run_that_is_killed_can_be_gone_on_with(folder, tmp_path):
    output = tmp_path / "out"
    line = [sys.executable, "-m", "mapseg_components.commands", "predict", str(folder), str(output), "--no_preview"]
    line += ["--bundle", BUNDLE, "--continue_prediction", "--num_threads", "1", "--no_overlap"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not done_of(output):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished, before = done_of(output), written(output)
    assert finished and len(finished) < len(CASES)  # else the test shows nothing
    again = subprocess.run([python(), *line[1:]], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and f"{len(finished)} of them by an earlier run" in again.stdout, again.stderr
    assert all(written(output)[f"{case}_seg.nii.gz"] == before[f"{case}_seg.nii.gz"] for case in finished)
    assert done_of(output) == CASES and not list(output.glob(".unfinished*"))


def done_of(output):
    path = output / "manifest.json"
    scans = json.loads(path.read_text())["scans"] if path.is_file() else []
    return [one["case"] for one in scans if one["status"] == "done"]


def test_changed_and_failed_and_new_scans_are_done_and_those_gone_are_kept(folder, scan, tmp_path, monkeypatch):
    output = tmp_path / "out"
    (folder / "d.nii.gz").write_bytes((folder / "d.nii.gz").read_bytes()[:2000])
    assert go_on(folder, output, probabilities=True).exit_code == 3
    before = written(output)
    volumes = [row for row in (output / "volumes.csv").read_text().splitlines() if row.startswith("a,")]
    (folder / "a.nii.gz").unlink()  # still in table and manifest, for its label map is there
    nib.save(nib.Nifti1Image(scan[0][::-1], scan[1]), folder / "b.nii.gz")  # changed
    (output / "c_probabilities.nii.gz").unlink()  # one of its files was lost
    for name in ("d", "e"):  # mended, new
        nib.save(nib.Nifti1Image(scan[0], scan[1]), folder / f"{name}.nii.gz")
    done = go_on(folder, output, probabilities=True)
    assert done.exit_code == 0 and done.kept == 1 and [one.case for one in done.predictions] == [*"bcdea"]
    after = written(output)
    assert {name for name in before if after[name] == before[name]} == {"a_seg.nii.gz"} and len(after) == 5
    assert volumes == [row for row in (output / "volumes.csv").read_text().splitlines() if row.startswith("a,")]
    assert sorted({row["case"] for row in done.volumes}) == [*"abcde"]
    assert all((output / f"{name}_probabilities.nii.gz").is_file() for name in "abcde")
    again = go_on(folder, output, probabilities=True)  # nothing is left to do
    assert again.kept == 5 and again.exit_code == 0 and written(output) == after
    np.testing.assert_equal(again.volumes, done.volumes)


@pytest.mark.parametrize("first", ["continue_prediction", "overwrite"])
def test_what_is_done_again_can_be_interrupted_too(first, folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    go_on(folder, output, no_preview=True)
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))  # all have changed
    stop_before(monkeypatch, "c")
    with pytest.raises(KeyboardInterrupt):
        predict(str(folder), str(output), bundle=BUNDLE, no_preview=True, quiet=True, **{first: True})
    monkeypatch.undo()
    assert done_of(output) == ["a", "b"] and len(written(output)) == 4  # the label maps before are still there
    assert go_on(folder, output, no_preview=True).kept == 2 and done_of(output) == CASES


def test_scans_of_which_a_manifest_does_not_say_when_they_were_read_are_done_again(folder, tmp_path):
    output = tmp_path / "out"
    for case in "cd":
        (folder / f"{case}.nii.gz").unlink()
    whole = go_on(folder, output, no_preview=True)
    manifest = json.loads((output / "manifest.json").read_text())
    for scan in manifest["scans"]:  # as earlier versions wrote it
        del scan["stamp"], scan["claimed"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    done = go_on(folder, output, no_preview=True)
    assert (done.kept, done.exit_code) == (0, 0) and done.volumes == whole.volumes


def test_a_full_disk_fails_the_scan_before_its_files_are_written(folder, tmp_path, monkeypatch):
    output, finish = tmp_path / "out", Journal.write_manifest

    def full(journal):
        if any(one.case == "b" and one.claimed for one in journal.predictions):
            raise ResourceError("disk full")
        finish(journal)

    monkeypatch.setattr(Journal, "write_manifest", full)
    with pytest.raises(ResourceError, match="disk full"):
        go_on(folder, output, no_preview=True)
    assert set(written(output)) == {"a_seg.nii.gz"}
    monkeypatch.undo()
    assert go_on(folder, output, no_preview=True).kept == 1 and done_of(output) == CASES


def test_many_scans_are_noted_together_and_a_stop_loses_no_more_than_those(folder, tmp_path, monkeypatch):
    output, written_of = tmp_path / "out", []
    monkeypatch.setattr("mapseg_components.prediction.run.SAVES", 2)  # of four scans: two at a time
    finish = Journal.write_manifest
    monkeypatch.setattr(
        Journal,
        "write_manifest",
        lambda journal: finish(journal) or written_of.append([one.case for one in journal.predictions if one.claimed]),
    )
    (folder / "b.nii.gz").write_bytes(b"no scan")
    done = go_on(folder, output, no_preview=True)
    assert [one.status for one in done.predictions] == ["done", "failed", "done", "done"]
    assert written_of[0] == [] and ["a", "c", "d"] in (sorted(each) for each in written_of)
    assert len(written_of) <= 2 + 2 + 2  # begun, two claims, two of what is done, the end
    manifest = json.loads((output / "manifest.json").read_text())
    assert {scan["case"]: scan["claimed"] for scan in manifest["scans"]} == {
        "a": True,
        "b": False,
        "c": True,
        "d": True,
    }


def test_a_claim_that_was_not_written_is_made_again(folder, tmp_path, monkeypatch):
    output, finish, fails = tmp_path / "out", Journal.write_manifest, [True]
    monkeypatch.setattr("mapseg_components.prediction.run.SAVES", 1)  # all at once

    def full(journal):
        if fails and any(one.claimed for one in journal.predictions):
            fails.clear()
            raise ResourceError("disk full")
        finish(journal)

    monkeypatch.setattr(Journal, "write_manifest", full)
    done = go_on(folder, output, no_preview=True)
    assert [one.status for one in done.predictions] == ["failed", "done", "done", "done"]


def test_files_of_others_are_neither_replaced_nor_removed(folder, tmp_path):
    output = tmp_path / "out"
    (output / "previews").mkdir(parents=True)
    others = [output / "a_probabilities.nii.gz", output / "previews" / "a.png", output / "e_probabilities.nii.gz"]
    others += [output / ".unfinished-notes", output / ".unfinished-abcdefg1"]
    for path in others:
        path.write_text("of somebody else")
    go_on(folder, output, no_preview=True)
    (folder / "d.nii.gz").rename(folder / "e.nii.gz")
    with pytest.raises(ConfigError, match=r"e_probabilities\.nii\.gz would be replaced, and the earlier run did not"):
        go_on(folder, output, no_preview=True)
    assert {path.read_text() for path in others} == {"of somebody else"}


def test_a_picture_belongs_to_its_label_map(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    go_on(folder, output)
    before = {path.name: path.read_bytes() for path in (output / "previews").iterdir()}
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("b_seg.nii.gz") and ".unfinished" not in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    os.utime(folder / "b.nii.gz", ns=(1, 1))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, output)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (output / "previews").iterdir()} == before
    done = go_on(folder, output)
    assert done.kept == 3 and all(one.preview for one in done.predictions)


def test_a_bids_derivative_goes_on(folder, tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "derivative"
    for case in "ab":
        (raw / f"sub-{case}" / "anat").mkdir(parents=True)
        (folder / f"{case}.nii.gz").rename(raw / f"sub-{case}" / "anat" / f"sub-{case}_T2w.nii.gz")
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    go_on(raw, output, no_preview=True)
    sidecar = output / "sub-a" / "anat" / "sub-a_dseg.json"
    sidecar.unlink()
    left = output / "sub-b" / "anat" / ".sub-b_probseg.nii.gz.abcdefgh.tmp.nii.gz"
    left.write_text("of an interrupted write")
    assert go_on(raw, output, no_preview=True).kept == 1
    assert sidecar.is_file() and not left.exists()


def test_other_settings_weights_and_label_maps_of_others_are_refused(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    stop_before(monkeypatch, "b")
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, output, no_preview=True)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    weights = torch.load(f"{BUNDLE}/models/model.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in weights.items()}, other := str(tmp_path / "other.pt"))
    for options, what in (
        ({"negative_values": "clip"}, "negative_values"),
        ({"probabilities": True}, "postprocessing"),
        ({"weights": other}, "weights"),
    ):
        with pytest.raises(ConfigError, match=rf"results of other settings \({what}\).*overwrite"):
            go_on(folder, output, no_preview=True, **options)
    own = output / "c_seg.nii.gz"
    own.write_bytes(b"drawn by hand")
    with pytest.raises(ConfigError, match=r"c_seg\.nii\.gz would be replaced"):
        go_on(folder, output, no_preview=True)
    own.unlink()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    words = ["predict", str(folder), str(output), "--bundle", BUNDLE, "--continue_prediction"]
    assert main([*words, "--overwrite"]) == 2 and "exclude each other" in capsys.readouterr().err
    missing = [*words, "--no_preview", "--weights", str(tmp_path / "none.pt")]
    assert main(missing) == 4 and "no weights at" in capsys.readouterr().err
    for text in (
        '{"settings": null, "weights": [], "scans": []}',
        '{"settings": {}, "weights": [], "scans": [{"case": 1}]}',
    ):
        (output / "manifest.json").write_text(text)
        assert main(words) == 2 and "is not of an earlier run" in capsys.readouterr().err
    (output / "manifest.json").unlink()
    assert main(words) == 2 and "results of an earlier run" in capsys.readouterr().err
