# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""BUDA-Seg as a method of the bundle: package, rounds without the source, resume, maps of uncertainty, one slice."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mapseg_components.commands.predict import predict
from mapseg_components.errors import ConfigError
from mapseg_components.handover import HandoverPackage
from mapseg_components.methods import BUDASeg
from mapseg_components.plans.recipes import read_recipe
from tests.bundles.test_guests import BUNDLE, FLAT, FLAT_UNET, UNET, segment, train, weights
from tests.conftest import make_dataset, make_scan, write_nifti

NETWORK = ["dynunet.yaml", "uncertainty.yaml", "two_head_dynunet.yaml"]
ROUNDS = {"label_rounds": 2, "max_epochs": 2, "epoch_length": 2, "labels": "$@handover.labels"}
LOGGED = {"target", "target_uncertainty", "target_uncertainty_agree", "score"}


def overlays_of(number):
    """Those of a stage of the recipe, with the tests' network."""
    recipe = read_recipe("buda_seg")
    return [*NETWORK, *recipe.overlays, *recipe.stages[number].overlays]


def source_stage(folder, dataset, **settings):
    """The settings that name the package it wrote."""
    package = {"handover_dir": str(folder / "package"), "handover_min_scans": 2}
    train(folder / "source", dataset, *overlays_of(0), **package, **{**UNET, "max_epochs": 1, **settings})
    return package


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data")).parent


@pytest.fixture(scope="module")
def package(dataset, tmp_path_factory):
    return source_stage(tmp_path_factory.mktemp("sites"), dataset)


def adapt(out, dataset, package, **settings):
    return train(out, dataset, *overlays_of(-1), **package, **{**ROUNDS, **settings})


def stop_in(monkeypatch, iteration):
    """Let the run be interrupted in this iteration of it."""
    passes, calls = BUDASeg.passes, []

    def stop(self, batch):
        calls.append(1)
        if len(calls) == iteration:
            raise KeyboardInterrupt
        return passes(self, batch)

    monkeypatch.setattr(BUDASeg, "passes", stop)


def test_it_adapts_a_package_without_the_source_and_resumes_bit_for_bit(dataset, package, tmp_path, monkeypatch):
    content = json.loads((dataset / "datalist.json").read_text())
    (dataset / "target.json").write_text(json.dumps({"target_training": content["target_training"]}))
    settings = {"datalist": str(dataset / "target.json"), "save_steps": 1, "max_epochs": 4, "reinitialise": True}
    history = adapt(tmp_path / "whole", dataset, package, **settings)
    assert all(LOGGED <= set(line) for line in history) and len(history) == 4
    with monkeypatch.context() as patch:
        stop_in(patch, iteration=6)  # in the first epoch of the second round
        with pytest.raises(BaseException):  # noqa: B017
            adapt(tmp_path / "parts", dataset, package, **settings)
    adapt(tmp_path / "parts", dataset, package, **settings)
    states = [weights(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    for first, second in zip(*((state["network"], state["teacher"]["network"]) for state in states)):
        assert all(torch.equal(first[name], second[name]) for name in first)
    kept, last = weights(tmp_path / "whole" / "model.pt"), states[0]["network"]
    assert all(torch.equal(kept[name], last[name]) for name in last)  # the student's of the end
    assert weights(tmp_path / "whole" / "source_only.pt").keys() == kept.keys()


def test_without_draws_the_uncertainty_is_not_learnt(dataset, package, tmp_path):
    for samples in (0, 2):
        history = adapt(tmp_path / str(samples), dataset, package, samples=samples, max_epochs=1)
        assert {"target", "target_loss"} <= set(history[-1])
    files = [Path(package["handover_dir"]) / "weights.pt", *(tmp_path / number / "model.pt" for number in "02")]
    start, plain, learnt = (weights(path)["output_block.conv.conv.weight"][3:] for path in files)
    assert torch.equal(start, torch.zeros_like(start)) and torch.equal(plain, start) and learnt.abs().max() > 0


def test_maps_of_uncertainty_lie_beside_label_maps_that_they_do_not_change(dataset, package, tmp_path):
    target = json.loads((dataset / "datalist.json").read_text())["target_training"][0]["image"]
    model, scans = Path(package["handover_dir"]) / "weights.pt", (dataset / target).parent
    bound = {"handover_dir": package["handover_dir"], "labels": "$@handover.labels"}  # the head is the package's
    found = segment(tmp_path / "maps", scans, model, "dynunet.yaml", "handover.yaml", **bound)
    after = HandoverPackage(package["handover_dir"]).after_network
    alone = segment(tmp_path / "alone", scans, model, *NETWORK, **UNET, **after, uncertainty_map=False)
    assert found and all(np.array_equal(found[name], alone[name]) for name in found)
    assert not list((tmp_path / "alone").glob("*_uncertainty.nii.gz"))
    for name in found:
        size = nib.load(tmp_path / "maps" / name.replace("_seg", "_uncertainty"))
        label_map = nib.load(tmp_path / "maps" / name)
        assert size.shape == label_map.shape and np.allclose(size.affine, label_map.affine)
        shown = np.asarray(nib.load(scans / name.replace("_seg", "")).dataobj) > 0
        assert size.get_data_dtype() == np.float32 and np.allclose(size.get_fdata()[shown], 1, atol=0.01)  # as it began
        assert set(np.unique(size.get_fdata().round(1))) <= {0, 1}  # 0 where no window of foreground lies
    sizes = {"patch_size": [16, 16, 16], "window_stride": [12, 12, 12], "labels": {"first": 1, "second": 2}, **UNET}
    options = {"bundle": str(BUNDLE), "weights": str(model), "overlays": ",".join(NETWORK), "settings": sizes}
    options |= {"quiet": True, "no_preview": True}
    scan, out = min(scans.glob("*.nii.gz")), tmp_path / "predicted"
    (one,) = predict(str(scan), str(out), **options).predictions
    expected = nib.load(tmp_path / "maps" / Path(one.uncertainty).name).get_fdata()
    assert np.array_equal(nib.load(one.uncertainty).get_fdata(), expected)
    assert not list(out.glob(".unfinished*"))
    options["settings"]["uncertainty_map"] = False
    (two,) = predict(str(scan), str(out), **options, overwrite=True).predictions
    assert two.uncertainty is None and not Path(one.uncertainty).exists()  # of a label map that is gone
    (three,) = predict(str(scan), str(out), **options, overwrite=True, uncertainty=True).predictions
    assert Path(three.uncertainty).is_file()
    with pytest.raises(ConfigError, match=r"\(DynUNet\) has no uncertainty head: leave out uncertainty"):
        predict(str(scan), str(tmp_path / "c"), **{**options, "overlays": "dynunet.yaml"}, uncertainty=True)


def test_mapseg_takes_the_uncertainty_as_a_setting(dataset, tmp_path):
    settings = {"uncertainty": True, "variance": "softplus", "warmup_epochs": 0, "max_epochs": 1}
    assert "target_global_masked" in train(tmp_path / "a", dataset, **settings)[-1]
    learnt = weights(tmp_path / "a" / "last.pt")["network"]["head.layers.4.weight"]
    assert learnt.shape[0] == 6 and learnt[3:].abs().max() > 0


def test_images_of_one_slice_have_rounds_and_maps(tmp_path):
    sections = {}
    for section, seeds in {"source_training": (0, 1), "source_validation": (2,), "target_training": (3, 4)}.items():
        sections[section] = []
        for seed in seeds:
            image, label = (volume[:, :, 12:13] for volume in make_scan((28, 32, 24), seed))
            case = {"image": str(write_nifti(tmp_path / section / f"{seed}.nii.gz", image))}
            if "source" in section:
                case["label"] = str(write_nifti(tmp_path / section / f"{seed}_label.nii.gz", label))
            sections[section].append(case)
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": {"1": "first", "2": "second"}, **sections}))
    package = source_stage(tmp_path, tmp_path, **FLAT, **FLAT_UNET)
    assert LOGGED <= set(adapt(tmp_path / "run", tmp_path, package)[-1])
    sizes = {**FLAT_UNET, "patch_size": [16, 16, 1], "window_stride": [12, 12, 1]}
    segment(tmp_path / "maps", tmp_path / "target_training", tmp_path / "run" / "model.pt", *NETWORK, **sizes)
    assert nib.load(tmp_path / "maps" / "3_uncertainty.nii.gz").shape == (28, 32, 1)
