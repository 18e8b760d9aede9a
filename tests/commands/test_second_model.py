# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A shipped model of any contrast beside the adapted one, for targets that are far from the source."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.predict import predict
from mapseg_components.errors import ConfigError
from mapseg_components.plans.second_model import add_second_model, describe_second, second_model_for
from mapseg_components.shipped_files import bundle_of
from mapseg_components.structures import structures_of
from tests.conftest import make_scan, write_nifti
from tests.scans import make_domains
from tests.test_verdict import measured
from tools.verdict import weights_of

NEWBORN, ADULT = [92.0, 118.0, 94.0], [137.0, 165.0, 134.0]


@pytest.mark.parametrize(
    "structures, extent, spacing",
    [
        (["caudate", "thalamus"], NEWBORN, 1.378),
        (["caudate"], ADULT, 2.0),
        (["caudate", "cochlea"], ADULT, None),
        (["Left-Caudate"], ADULT, None),
        (["caudate"], None, None),
        (["caudate"], [150.0, 200.0, 230.0], None),  # a head with its neck
    ],
)
def test_a_model_that_knows_all_structures_at_the_target_s_size(structures, extent, spacing):
    found = second_model_for(structures, extent)
    if spacing is None:
        assert found is None
        return
    assert found["bundle"] == "brain_any_contrast" and found["working_spacing"] == pytest.approx(
        [spacing] * 3, abs=2e-3
    )
    assert "brain_any_contrast" in describe_second(found) and "second_model" in describe_second(found)


def test_an_installation_without_that_model_goes_on_without_it(monkeypatch):
    monkeypatch.setattr("mapseg_components.plans.initial_model.shipped_bundles", lambda: ["mapseg_adaptation"])
    assert second_model_for(["caudate", "thalamus"], NEWBORN) is None


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A call of `adapt` that trains nothing and so ends in an error; the record that it leaves."""
    folder = make_domains(tmp_path)
    for path in (*folder.glob("t1/images/*.nii*"), *folder.glob("t2/*.nii*"), *folder.glob("t1/labels/*.nii*")):
        scan = nib.load(path)
        voxels = np.pad(np.asarray(scan.dataobj), 3)
        sides = np.diag([6.1, 5.6, 3.4, 1.0])  # of a newborn's brain
        nib.save(nib.Nifti1Image(voxels, scan.affine @ sides), path)
    monkeypatch.setattr("mapseg_components.commands.training.run_stage", lambda *a, **k: 1.0)
    module = sys.modules["mapseg_components.commands.adapt"]  # the package has the function of that name
    order = {"confidence_as_is": [0.5], "confidence_inverted": [0.4], "confidence_source": [0.9], "inverted": False}

    def run(far=True, output=tmp_path / "run", **options):
        monkeypatch.setattr(module, "settle_order", lambda *a: order | {"far": far})
        options = {"labels": {"caudate": 1, "putamen": 2}, "initial_model": False, **options}
        with pytest.raises(ConfigError, match="no epoch was validated"):
            adapt(source=str(folder / "t1"), target=str(folder / "t2"), output=str(output), quiet=True, **options)
        return json.loads((output / "run.json").read_text())

    return run


def test_a_run_whose_target_is_far_takes_it_and_goes_on_with_it(call, tmp_path):
    record, folder = call(), tmp_path / "run"
    assert record["second_model"]["bundle"] == "brain_any_contrast"
    inference = json.loads((folder / "configs" / "inference.json").read_text())
    inferer = inference["evaluator"]["inferer"]
    assert inferer["settings"]["working_spacing"] == "@second_model_spacing"
    assert inference["second_model_spacing"] == record["second_model"]["working_spacing"] == [1.37, 1.37, 1.37]
    assert (folder / "second_model" / "models" / "model.pt").is_file() and (
        folder / "second_model" / "LICENSE"
    ).is_file()
    readme = (folder / "docs" / "README.md").read_text()
    assert readme.count("brain_any_contrast") == 1
    again = call()
    assert again["second_model"] == record["second_model"]
    assert json.loads((folder / "configs" / "inference.json").read_text()) == inference
    add_second_model(folder, record["second_model"])  # as after a call that was killed before the record was written
    assert json.loads((folder / "configs" / "inference.json").read_text()) == inference
    assert (folder / "docs" / "README.md").read_text() == readme


@pytest.mark.parametrize(
    "options", [{"far": False}, {"second_model": False}, {"labels": {"cochlea": 1, "putamen": 2}}], ids=str
)
def test_others_have_one_model(call, tmp_path, options):
    assert "second_model" not in call(**options)
    inference = json.loads((tmp_path / "run" / "configs" / "inference.json").read_text())
    assert inference["evaluator"]["inferer"] == "@inferer" and not (tmp_path / "run" / "second_model").exists()


def test_a_run_of_an_earlier_version_goes_on_with_one(call, tmp_path):
    record = call(second_model=False)
    del record["request"]["second_model"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert "second_model" not in call(second_model=False)


def test_predict_averages_both(tmp_path, dataset):
    measured(tmp_path, dataset, {"source-only": 0.5, "adapted": 0.5})
    folder, weights = tmp_path / "bundle", weights_of(tmp_path / "seed3", "source-only")
    path = folder / "configs" / "inference.json"
    known = structures_of(
        json.loads((bundle_of("brain_any_contrast") / "configs" / "inference.json").read_text())["labels"]
    )
    labels = {name: number for number, name in enumerate([*known][4:], start=1)}  # eight, as the weights have
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "README.md").write_text("A model.\n")
    image = make_scan(seed=7)[0]
    image[:2] = -0.1  # both models have to be told what negative values are
    write_nifti(tmp_path / "scan.nii.gz", image)

    def probabilities(name, bundle, **options):
        options = {"bundle": str(bundle), "probabilities": True, "no_preview": True, "quiet": True, **options}
        options["negative_values"] = "clip"
        predict(str(tmp_path / "scan.nii.gz"), str(tmp_path / name), **options)
        return nib.load(tmp_path / name / "scan_probabilities.nii.gz").get_fdata()

    own = probabilities("own", folder, weights=str(weights))
    other = probabilities("other", "brain_any_contrast")
    add_second_model(folder, {"bundle": "brain_any_contrast", "working_spacing": [2.0, 2.0, 2.0]})
    both = probabilities("both", folder, weights=str(weights))
    expected = (own[..., 1:] + other[..., 5:]) / 2
    # on another grid first: the other model's way back is not the same at borders
    assert np.abs(both[..., 1:] - expected).mean() < 0.01 < np.abs(both[..., 1:] - own[..., 1:]).mean()
