# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Two sites: one writes a hand-over package, the other adapts from it and never opens a source file."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run

from mapseg_components.errors import CheckpointError, ConfigError, MAPSegError
from mapseg_components.handover import HandoverPackage
from tests.bundles.test_bundles import ADAPTATION, LABELS, same, weights
from tests.conftest import make_dataset, make_scan, write_nifti
from tests.warm import python

SOURCE = ["train.json", "tiny.yaml", "source_stage.yaml"]
# the target site knows the widths of tiny.yaml from the package alone
TARGET = ["train.json", "handover.yaml", "test_time.yaml"]
SHORT = {"max_epochs": 2, "epoch_length": 2, "num_workers": 0}
CPU = "$torch.device('cpu')"


def train(files, out, data, **settings):
    """A command of the docs, in this process, from whatever folder this is."""
    paths = [str(ADAPTATION / "configs" / name) for name in files]
    places = {"bundle_root": str(ADAPTATION), "dataset_dir": str(data), "ckpt_dir": str(out), "output_dir": str(out)}
    run(run_id="run", config_file=paths, device=CPU, **places, **settings)
    return out


def cause(error):
    """The user's error that MONAI wrapped."""
    while error is not None and not isinstance(error, MAPSegError):
        error = error.__cause__ or error.__context__
    return error


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """A source site that has trained and written its package; a target site with scans alone."""
    root = tmp_path_factory.mktemp("sites")
    make_dataset(root / "secret_hospital")
    content = json.loads((root / "secret_hospital" / "datalist.json").read_text())
    (root / "target").mkdir()
    shutil.move(root / "secret_hospital" / "target_training", root / "target")
    (root / "target" / "datalist.json").write_text(json.dumps({"target_training": content.pop("target_training")}))
    (root / "secret_hospital" / "datalist.json").write_text(json.dumps(content))
    settings = {"labels": LABELS, "handover_dir": str(root / "package"), "handover_min_scans": 2}
    train(SOURCE, root / "source_run", root / "secret_hospital", **settings)
    return root


def adapt(sites, out, files=TARGET, **settings):
    return train(files, out, sites / "target", **{"handover_dir": str(sites / "package"), **SHORT, **settings})


def test_the_package_holds_the_weights_of_a_source_only_run(sites, tmp_path):
    files = ["train.json", "tiny.yaml", "source_only.yaml"]
    train(files, tmp_path, sites / "secret_hospital", labels=LABELS, warmup_epochs="@max_epochs")
    same(weights(tmp_path / "source_only.pt"), weights(sites / "package" / "weights.pt"))
    record = json.loads((tmp_path / "model_selection.json").read_text())["source_only.pt"]
    package = HandoverPackage(sites / "package")
    assert package.content["source_validation"]["mean"] == pytest.approx(record["source_dice"], abs=6e-4)
    assert package.labels == LABELS and package.content["network"]["width"] == 8


def test_nothing_of_the_source_site_is_in_the_package(sites):
    assert {path.name for path in (sites / "package").iterdir()} == {"handover.json", "weights.pt"}
    text = content = (sites / "package" / "handover.json").read_bytes()
    with zipfile.ZipFile(sites / "package" / "weights.pt") as archive:
        for member in archive.infolist():
            record = member.filename.encode() + archive.read(member)
            content += record
            text += b"" if "/data/" in member.filename else record
    cases = json.loads((sites / "secret_hospital" / "datalist.json").read_text())
    ids = [case["case_id"] for section in ("source_training", "source_validation") for case in cases[section]]
    for word in ("secret_hospital", str(sites), "source_run", ".nii", socket.gethostname(), getpass.getuser(), *ids):
        # two or three letters are among any weights by chance
        assert word.encode() not in (content if len(word) > 3 else text), word
    read = weights(sites / "package" / "weights.pt")
    largest = max(value.numel() for value in read.values())
    assert largest < 20 * 24 * 28 and all(isinstance(value, torch.Tensor) for value in read.values())


CHILD = """
import pathlib, sys
source, out, package, data, bundle = sys.argv[1:6]
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(source):
        raise SystemExit("opened " + str(arguments[0]))
sys.addaudithook(hook)
from monai.bundle import run
files = [bundle + "/configs/" + name for name in sys.argv[6:]]
run(run_id="run", config_file=files, bundle_root=bundle, dataset_dir=data, ckpt_dir=out, output_dir=out,
    handover_dir=package, max_epochs=1, epoch_length=2, num_workers=0)
try:
    open(source + "/datalist.json")
except SystemExit:
    pathlib.Path(out + ".hook_works").touch()
"""


def test_the_target_site_opens_nothing_below_the_source_folder(sites, tmp_path):
    """The folder is away as well: whoever only looks for it finds nothing, whoever opens it is ended by the hook."""
    moved, out = sites / "moved", tmp_path / "out"
    places = [str(path) for path in (sites / "secret_hospital", out, sites / "package", sites / "target", ADAPTATION)]
    (sites / "secret_hospital").rename(moved)
    try:
        done = subprocess.run([python(), "-c", CHILD, *places, *TARGET], capture_output=True, text=True)
    finally:
        moved.rename(sites / "secret_hospital")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model.pt").is_file() and (tmp_path / "out.hook_works").is_file()


def test_adaptation_starts_from_the_package_and_keeps_it_beside(sites, tmp_path):
    out = adapt(sites, tmp_path, learning_rate=0.0, min_learning_rate=0.0)
    same(weights(out / "source_only.pt"), weights(sites / "package" / "weights.pt"))
    same(weights(out / "model.pt"), weights(sites / "package" / "weights.pt"))  # nothing was learnt at rate 0
    record = json.loads((out / "model_selection.json").read_text())
    assert record["model.pt"]["weights"] == "teacher" and "source_dice_teacher" not in record["model.pt"]
    assert record["model.pt"]["score"] == pytest.approx(-record["model.pt"]["target_loss"])
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and not [name for line in lines for name in line if name.startswith("source")]
    local = [lines[0][name] for name in ("target_local", "target_local_masked")]
    assert lines[0]["target_loss"] == pytest.approx(local[1], rel=1e-5) != local[0]
    total = 0.5 * sum(local) + 0.05 * (lines[0]["target_global"] + lines[0]["target_global_masked"])
    total += 0.025 * (lines[0]["target_cosine"] + lines[0]["target_cosine_masked"])  # Eq. 10
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-4)
    adapted = adapt(sites, tmp_path / "adapted")
    before, after = weights(sites / "package" / "weights.pt"), weights(adapted / "model.pt")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_target_labels_are_not_read(sites, tmp_path):
    first = adapt(sites, tmp_path / "first")
    shutil.copytree(sites / "target", tmp_path / "labelled")
    content = json.loads((tmp_path / "labelled" / "datalist.json").read_text())
    for number, case in enumerate(content["target_training"]):
        case["label"] = f"target_training/{number}_label.nii.gz"
        if number:
            write_nifti(tmp_path / "labelled" / case["label"], make_scan()[1])
        else:
            (tmp_path / "labelled" / case["label"]).write_bytes(b"no label map")
    (tmp_path / "labelled" / "datalist.json").write_text(json.dumps(content))
    settings = {"handover_dir": str(sites / "package"), **SHORT}
    second = train(TARGET, tmp_path / "second", tmp_path / "labelled", **settings)
    same(weights(first / "model.pt"), weights(second / "model.pt"))


def test_a_resumed_run_equals_an_uninterrupted_one(sites, tmp_path):
    settings = {"restart_epochs": 3, "learning_rate": 0.01}
    whole = adapt(sites, tmp_path / "whole", **{**settings, "max_epochs": 3})
    parts = adapt(sites, tmp_path / "parts", **{**settings, "max_epochs": 1})
    adapt(sites, parts, **{**settings, "max_epochs": 3})
    for name in ("model.pt", "source_only.pt"):
        same(weights(whole / name), weights(parts / name))
    same(weights(whole / "last.pt")["network"], weights(parts / "last.pt")["network"])
    same(weights(whole / "last.pt")["teacher"]["network"], weights(parts / "last.pt")["teacher"]["network"])
    lines = [json.loads(line) for line in (parts / "history.jsonl").read_text().splitlines()]
    assert len(lines) == 3


def test_starting_anew_keeps_the_baseline(sites, tmp_path):
    adapt(sites, tmp_path, max_epochs=1)
    adapt(sites, tmp_path, max_epochs=1, resume=False)
    assert {"source_only.pt", "source_only.pt.earlier", "model.pt"} <= {path.name for path in tmp_path.iterdir()}
    assert set(json.loads((tmp_path / "model_selection.json").read_text())) == {"source_only.pt", "model.pt"}


def damaged(sites, folder, **changes):
    """A copy of the package with other content."""
    shutil.copytree(sites / "package", folder)
    path = folder / "handover.json"
    content = json.loads(path.read_text())
    content["network"].update(changes)
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        ("checksum", CheckpointError, "weights.pt has sha256"),
        ("missing", CheckpointError, "no hand-over package at"),
        ("architecture", CheckpointError, "its network has fingerprint"),
        ("another run's width", ConfigError, "width is 16, the package has a network of its own"),
        ("another label table", ConfigError, "labels is [('first', 1), ('third', 2)], the package has"),
        ("newer", ConfigError, "has schema 3, this version reads 2"),
        ("no target scans", ConfigError, "has no 'target_training'"),
    ],
)
def test_what_does_not_fit_is_one_error_and_no_weights(sites, tmp_path, fault, kind, words):
    package, settings = tmp_path / "package", {}
    damaged(sites, package, **({"width": 16} if fault == "architecture" else {}))
    if fault == "checksum":
        content = bytearray((package / "weights.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (package / "weights.pt").write_bytes(content)
    elif fault == "missing":
        (package / "handover.json").unlink()
    elif fault == "another run's width":
        settings["width"] = 16
    elif fault == "another label table":
        settings["labels"] = {"first": 1, "third": 2}
    elif fault == "newer":
        text = (package / "handover.json").read_text()
        (package / "handover.json").write_text(text.replace('"schema": 2', '"schema": 3'))
    elif fault == "no target scans":
        (tmp_path / "list.json").write_text('{"source_training": []}')
        settings["datalist"] = str(tmp_path / "list.json")
    with pytest.raises(Exception) as caught:
        adapt(sites, tmp_path / "out", handover_dir=str(package), **settings)
    error = cause(caught.value)
    assert type(error) is kind and words in str(error) and len(str(error).splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.pt"))


def test_another_package_does_not_resume_a_run(sites, tmp_path):
    adapt(sites, tmp_path / "out", max_epochs=1)
    other = tmp_path / "other"
    settings = {"labels": LABELS, "handover_dir": str(other), "seed": 1, "handover_min_scans": 2}
    train(SOURCE, tmp_path / "source_run", sites / "secret_hospital", **settings)
    with pytest.raises(Exception) as caught:
        adapt(sites, tmp_path / "out", handover_dir=str(other))
    assert "last.pt: its 'handover' does not fit this run (the run began with weights" in str(cause(caught.value))


def test_a_package_of_existing_weights_is_the_one_that_training_wrote(sites, tmp_path):
    files = ["train.json", "tiny.yaml", "handover_only.yaml"]
    settings = {"labels": LABELS, "handover_dir": str(tmp_path / "package"), "handover_min_scans": 2}
    settings["initial_weights"] = str(sites / "source_run" / "source_only.pt")
    train(files, tmp_path / "out", sites / "secret_hospital", **settings)
    for name in ("handover.json", "weights.pt"):
        assert (tmp_path / "package" / name).read_bytes() == (sites / "package" / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.pt"))


def test_the_adapted_model_segments_with_the_packages_settings(sites, tmp_path):
    model = adapt(sites, tmp_path / "model")
    files = [str(ADAPTATION / "configs" / name) for name in ("inference.json", "handover.yaml")]
    places = {"bundle_root": str(ADAPTATION), "output_dir": str(tmp_path / "out"), "device": CPU}
    places |= {"dataset_dir": str(sites / "target" / "target_training"), "handover_dir": str(sites / "package")}
    run(run_id="run", config_file=files, weights=str(model / "model.pt"), **places)
    found = nib.load(tmp_path / "out" / "0_seg.nii.gz")
    assert found.shape == (20, 24, 28) and set(np.unique(found.dataobj)) <= {0, 1, 2}


def test_both_stages_run_from_the_bundles_folder(sites, tmp_path, monkeypatch):
    """With paths as the docs write them; without enough scans no volumes travel."""
    monkeypatch.chdir(ADAPTATION)
    places = {"ckpt_dir": str(tmp_path / "source"), "output_dir": str(tmp_path / "source")}
    places["handover_dir"] = str(tmp_path / "package")
    files = [f"configs/{name}" for name in SOURCE]
    run(run_id="run", config_file=files, dataset_dir=str(sites / "secret_hospital"), labels=LABELS, **places)
    content = json.loads((tmp_path / "package" / "handover.json").read_text())
    assert content["volumes"] == {"min_scans": 5, "structures": {"first": None, "second": None}}
    places |= {"ckpt_dir": str(tmp_path / "target"), "output_dir": str(tmp_path / "target")}
    files = [f"configs/{name}" for name in TARGET]
    run(run_id="training", config_file=files, dataset_dir=str(sites / "target"), **places, **SHORT)
    assert {"model.pt", "source_only.pt"} <= {path.name for path in (tmp_path / "target").iterdir()}
