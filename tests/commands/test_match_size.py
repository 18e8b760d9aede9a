# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Source scans of larger bodies than the target's are trained on at the target's size."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands.adapt import adapt
from mapseg_components.data import load_datalist
from mapseg_components.errors import ConfigError
from mapseg_components.scans.nifti import read_nifti
from tests.scans import make_domains, write_nifti

FACTOR = 0.6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Domains of one size, whole bodies in an image of zeros."""
    folder = make_domains(tmp_path_factory.mktemp("scans"))
    for path in (*folder.glob("t1/images/*.nii*"), *folder.glob("t2/*.nii*"), *folder.glob("t1/labels/*.nii*")):
        scan = nib.load(path)
        voxels = np.pad(np.asarray(scan.dataobj), 3)
        small = FACTOR if path.parent.name == "t2" else 1.0
        nib.save(nib.Nifti1Image(voxels, scan.affine @ np.diag([small, small, small, 1.0])), path)
    return folder


@pytest.fixture
def call(folders, tmp_path, monkeypatch):
    """A call of `adapt` that trains nothing and so ends in an error; the record that it leaves."""
    monkeypatch.setattr("mapseg_components.commands.training.run_stage", lambda *a, **k: 1.0)
    module = sys.modules["mapseg_components.commands.adapt"]  # the package has the function of that name
    order = {"confidence_as_is": [0.5], "confidence_inverted": [0.4], "inverted": False}
    monkeypatch.setattr(module, "settle_order", lambda *a: order)

    def run(output=tmp_path / "run", **options):
        options = {"source": str(folders / "t1"), "target": str(folders / "t2"), **options}
        with pytest.raises(ConfigError, match="no epoch was validated"):
            adapt(output=str(output), quiet=True, **options)
        return json.loads((output / "run.json").read_text())

    return run


def test_the_source_is_copied_at_the_target_s_size_and_all_that_follows_knows_it_so(call, folders, tmp_path):
    record = call()
    size, plan = record["plan"]["size"], record["plan"]
    assert size["factor"] == pytest.approx(FACTOR, abs=0.01)
    datalist = tmp_path / "run" / "datalist.json"
    cases = [case for part in ("source_training", "source_validation") for case in load_datalist(datalist, part)]
    assert len(cases) == len(list((folders / "t1" / "images").iterdir()))
    for case in cases:
        assert all(Path(case[key]).is_relative_to(tmp_path / "run" / "sized") for key in ("image", "label"))
        (own,) = (folders / "t1" / "images").glob(f"{case['case_id']}.nii*")
        original, copy = read_nifti(own), read_nifti(case["image"])
        assert copy.digest == original.digest
        np.testing.assert_allclose(copy.affine[:3], original.affine[:3] * size["factor"], atol=1e-4)
    assert plan["median_spacing_mm"] == pytest.approx([0.6, 0.66, 0.72])  # both sides are alike now
    assert plan["settings"]["working_spacing"] is None
    assert "at 0.60 of their size" in (tmp_path / "run" / "docs" / "README.md").read_text()
    assert call()["plan"] == plan, "the same command goes on"


def test_a_run_goes_on_with_another_device(call, tmp_path):
    for device in ("auto", "cpu"):
        call(device=device)
        for name in ("train.json", "inference.json"):
            config = json.loads((tmp_path / "run" / "configs" / name).read_text())
            assert (config["device"] == "$torch.device('cpu')") == (device == "cpu")


def test_a_run_is_planned_again_after_the_copies_were_cut_short(call, tmp_path):
    plan = call()["plan"]
    again = tmp_path / "again"
    (again / "sized" / "training").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "datalist.json", again / "sized" / "training" / "left_over.json")
    assert call(again)["plan"] == plan


def test_it_can_be_turned_off_and_scans_of_one_size_stay_where_they_are(call, folders, tmp_path):
    assert "size" not in call(match_size=False)["plan"]
    assert not (tmp_path / "run" / "sized").exists()
    for path in (folders / "t1" / "images").iterdir():  # others of the same size
        scan = nib.load(path)
        write_nifti(tmp_path / "others" / path.name, 0.9 * scan.get_fdata(dtype=np.float32), scan.affine)
    alike = call(tmp_path / "alike", target=str(tmp_path / "others"))
    assert "size" not in alike["plan"] and not (tmp_path / "alike" / "sized").exists()


def test_a_run_of_an_earlier_version_goes_on_as_it_began(call, tmp_path):
    record = call(match_size=False)
    del record["request"]["match_size"]
    del (
        record["plan"]["after_network"]["kept_components"],
        record["plan"]["after_network"]["reasons"]["kept_components"],
    )
    del record["plan"]["foreground_mm"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert call(match_size=False)["plan"] == record["plan"]
