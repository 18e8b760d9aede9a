# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A packed bundle runs where `mapseg_components` is not installed, and its bytes depend on its files alone."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run

from mapseg_components.errors import ConfigError
from tests.conftest import ROOT, SAMPLE
from tests.warm import Server
from tools.pack_bundle import contents, pack

ADAPTATION, PRETRAINING = ROOT / "bundles" / "mapseg_adaptation", ROOT / "bundles" / "mapseg_pretraining"
TRANSLATION = ROOT / "bundles" / "cosmos_translation"
SCAN = SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"


def installed():
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


@functools.cache
def without_links():
    return Server({**os.environ, "PYTHONPATH": os.pathsep.join(installed())}, "-S")


def python_without_the_package(*arguments, cwd):
    """A process that sees the installed packages, but no editable install: -S leaves every .pth file unread."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(installed()), "OMP_NUM_THREADS": "1"}
    line = [*without_links().command, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING, TRANSLATION], ids=lambda b: b.name)
def test_same_files_give_the_same_bytes(bundle, tmp_path):
    copy = tmp_path / "copy" / bundle.name
    shutil.copytree(bundle, copy, copy_function=shutil.copy)  # other times and another folder
    for litter in ("eval/volumes.csv", "models/last.pt", "configs/__pycache__/a.pyc", "docs/.secret"):
        (copy / litter).parent.mkdir(exist_ok=True)
        (copy / litter).write_text("not part of a release")
    first, second = pack(bundle, tmp_path / "first"), pack(copy, tmp_path / "second")
    assert first.name == f"{bundle.name}_v0.1.0.zip"
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert names == sorted(names) and {name.split("/")[0] for name in names} == {bundle.name}
    for part in ("LICENSE", "docs/data_license.txt", "models/model.pt", "mapseg_components/py.typed"):
        assert f"{bundle.name}/{part}" in names
    assert not [name for name in names if "__pycache__" in name or "/." in name or "eval/" in name]
    digest, name = first.with_name(first.name + ".sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(first.read_bytes()).hexdigest(), first.name)


@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING, TRANSLATION], ids=lambda b: b.name)
def test_configs_of_a_release_have_the_layout_of_the_model_zoo_and_the_same_content(bundle, tmp_path):
    archive = zipfile.ZipFile(pack(bundle, tmp_path))
    configs = sorted(bundle.glob("configs/*.json"))
    assert {"train.json", "inference.json", "metadata.json"} <= {path.name for path in configs}
    for path in configs:
        text = archive.read(f"{bundle.name}/configs/{path.name}").decode()
        assert json.loads(text) == json.loads(path.read_text(encoding="utf-8"))
        assert text == json.dumps(json.loads(text), indent=4) + "\n"


def test_bundle_without_licence_or_weights_is_refused(tmp_path):
    shutil.copytree(ADAPTATION / "configs", tmp_path / "configs")
    with pytest.raises(ConfigError, match=r"has no LICENSE, models/model.pt: a release needs"):
        contents(tmp_path)


def test_packed_bundle_gives_the_same_label_map_without_the_package(tmp_path):
    absent = python_without_the_package("-c", "import mapseg_components", cwd=tmp_path)
    if absent.returncode == 0:
        pytest.skip("mapseg_components is installed as a copy here, not as an editable install")
    assert "No module named 'mapseg_components'" in absent.stderr
    with zipfile.ZipFile(pack(ADAPTATION, tmp_path)) as archive:
        archive.extractall(tmp_path)
    packed, scans = tmp_path / ADAPTATION.name, tmp_path / "scans"
    scans.mkdir()
    shutil.copy(SCAN, scans)
    arguments = ["--config_file", "configs/inference.json", "--dataset_dir", scans]
    arguments += ["--output_dir", tmp_path / "packed", "--device", "$torch.device('cpu')"]
    done = python_without_the_package("-m", "monai.bundle", "run", "run", *arguments, cwd=packed)
    assert done.returncode == 0, done.stderr[-2000:]

    settings = {"bundle_root": str(ADAPTATION), "dataset_dir": str(scans), "output_dir": str(tmp_path / "here")}
    settings["device"] = "$torch.device('cpu')"
    run(run_id="run", config_file=str(ADAPTATION / "configs" / "inference.json"), **settings)
    first, second = (nib.load(tmp_path / folder / "GA24_notoperated_seg.nii.gz") for folder in ("packed", "here"))
    assert len(np.unique(first.dataobj)) == 9
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    np.testing.assert_array_equal(first.affine, second.affine)
