# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Other methods and another network in the same bundle: mean teacher, MIC, entropy, one from outside the package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run

from mapseg_components.errors import ConfigError
from mapseg_components.plans.recipes import read_recipe, recipe_names
from mapseg_components.plans.sizes import plan_sizes, plan_unet
from tests.conftest import ROOT, make_scan, write_nifti
from tests.federation import make_federation

BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
PLAIN = ["dynunet.yaml", "dice_ce.yaml"]
LABELS = {"first": 1, "second": 2}
SMALL = {"amp": None, "device": "$torch.device('cpu')", "window_batch_size": 2}
UNET = {"network_def#filters": [4, 4, 8, 8]}
FLAT = {  # of images with one slice
    "patch_size": [16, 16, 1],
    "window_stride": [12, 12, 1],
    "local_block_size": [4, 4, 1],
    "global_block_size": [4, 4, 1],
    "stride": [4, 4, 1],
    "dilations": [[1, 1, 1], [2, 2, 1]],
}
FLAT_STRIDES = [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 1]]
FLAT_UNET = {
    **UNET,
    "network_def#kernel_size": [[3, 3, 1]] * 4,
    "network_def#strides": FLAT_STRIDES,
    "network_def#upsample_kernel_size": FLAT_STRIDES[1:],
}


def bundle_run(files, out, dataset, **settings):
    paths = [str(BUNDLE / "configs" / name) for name in files]
    places = {"bundle_root": str(BUNDLE), "dataset_dir": str(dataset), "ckpt_dir": str(out), "output_dir": str(out)}
    run(run_id="run", config_file=paths, **{**places, "labels": LABELS, **SMALL, **settings})


def train(out, dataset, *overlays, **settings):
    """Lines of the history."""
    bundle_run(("train.json", "tiny.yaml", *overlays), out, dataset, **settings)
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def segment(out, scans, model, *overlays, **settings):
    """Label maps by name."""
    sizes = {"patch_size": [16, 16, 16], "window_stride": [12, 12, 12], **settings}
    bundle_run(("inference.json", *overlays), out, scans, weights=str(model), **sizes)
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(out.glob("*_seg.nii.gz"))}


def cause(error):
    """The error of this package that MONAI wrapped."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["mean_teacher", "masked_consistency"])
def test_a_guest_trains_resumes_and_segments(method, dataset, tmp_path):
    files = [*PLAIN, f"{method}.yaml"]
    whole = train(tmp_path / "whole", dataset, *files, **UNET, max_epochs=3)
    assert {"source", "target", "target_loss", "score"} <= set(whole[-1]) and "target" not in whole[0]
    train(tmp_path / "parts", dataset, *files, **UNET, max_epochs=2)
    train(tmp_path / "parts", dataset, *files, **UNET, max_epochs=3)
    first, second = (weights(tmp_path / name / "last.pt")["network"] for name in ("whole", "parts"))
    assert any("upsamples" in name for name in first)  # DynUNet's
    assert all(torch.equal(first[name], second[name]) for name in first)
    target = json.loads((dataset / "datalist.json").read_text())["target_training"][0]["image"]
    scans = (dataset / target).parent
    found = segment(tmp_path / "maps", scans, tmp_path / "whole" / "model.pt", "dynunet.yaml", **UNET)
    assert found and all(set(np.unique(label_map)) <= {0, 1, 2} for label_map in found.values())


def test_a_network_and_a_method_that_do_not_fit_are_named(dataset, tmp_path):
    with pytest.raises(Exception) as caught:
        train(tmp_path / "a", dataset, "dynunet.yaml", **UNET, **{"method#global_view": True})
    assert "no 'global_image', which MAPSeg compares patches with" in str(cause(caught.value))
    with pytest.raises(Exception) as caught:
        train(tmp_path / "b", dataset, "dynunet.yaml", **UNET, global_view=True)
    expected = "PlainPass does not take ['box', 'global_image', 'image'], which the method shows it"
    assert expected in str(cause(caught.value))


def test_mapseg_trains_any_network_by_patches_alone(dataset, tmp_path):
    history = train(tmp_path / "a", dataset, "dynunet.yaml", **UNET, warmup_epochs=0)
    terms = {name for name in history[-1] if name.startswith(("source_", "target_")) and "dice" not in name}
    assert {"source_local", "target_local_masked"} <= terms and not any("global" in t or "cosine" in t for t in terms)


def test_entropy_adapts_a_package_and_moves_normalization_alone(dataset, tmp_path):
    package = {"handover_dir": str(tmp_path / "package"), "handover_min_scans": 2}
    train(tmp_path / "source", dataset, *PLAIN, "supervised.yaml", "source_stage.yaml", **package, **UNET)
    content = json.loads((tmp_path / "package" / "handover.json").read_text())
    assert content["network"]["_target_"] == "DynUNet" and content["network"]["filters"] == [4, 4, 8, 8]
    files = [*PLAIN, "handover.yaml", "test_time.yaml", "entropy.yaml"]
    history = train(tmp_path / "target", dataset, *files, **package, epoch_length=2, labels="$@handover.labels")
    assert "target_entropy" in history[-1]
    before, after = weights(tmp_path / "package" / "weights.pt"), weights(tmp_path / "target" / "last.pt")["network"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("norm" in name for name in moved)


def test_a_federation_runs_a_guest(tmp_path):
    datalist, sites = make_federation(tmp_path, 1)
    files = ("train.json", "tiny.yaml", *PLAIN, "mean_teacher.yaml", "federated.json")
    settings = {"sites": sites, "rounds": 2, "server_steps": 1, "client_steps": 1, **UNET}
    bundle_run(files, tmp_path / "out", Path(datalist).parent, datalist=datalist, **settings)
    assert any("upsamples" in name for name in weights(tmp_path / "out" / "model.pt"))


@pytest.mark.parametrize("method", [None, "mean_teacher", "masked_consistency", "entropy"])
def test_images_of_one_slice_train_and_are_segmented(method, tmp_path):
    """2D images are volumes with one slice."""
    sections = {}
    for section, seeds in {"source_training": (0, 1), "source_validation": (2,), "target_training": (3, 4)}.items():
        sections[section] = []
        for seed in seeds:
            image, label = (volume.max(axis=2, keepdims=True) for volume in make_scan((28, 32, 24), seed))
            case = {"image": write_nifti(tmp_path / section / f"{seed}.nii.gz", image)}
            if "source" in section:
                case["label"] = write_nifti(tmp_path / section / f"{seed}_label.nii.gz", label)
            sections[section].append({key: str(path) for key, path in case.items()})
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": {"1": "first", "2": "second"}, **sections}))
    overlays = [] if method is None else [*PLAIN, f"{method}.yaml"]
    sizes = FLAT if method is None else FLAT | FLAT_UNET
    history = train(tmp_path / "run", tmp_path, *overlays, **sizes)
    assert any(name.startswith("target") for name in history[-1])
    network = {"width": 8, "depth": 1, "head_channels": 8} if method is None else {}
    sizes = {name: value for name, value in sizes.items() if "block" not in name}
    scans, model = tmp_path / "target_training", tmp_path / "run" / "model.pt"
    maps = segment(tmp_path / "maps", scans, model, *overlays[:1], **sizes, **network)
    assert {label_map.shape for label_map in maps.values()} == {(28, 32, 1)}


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("new_method", ROOT / "examples" / "new_method.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "new_method", module)
    spec.loader.exec_module(module)
    return module


def test_a_strangers_method_runs_alone_and_in_the_bundle(example, dataset, tmp_path, capsys):
    shares, before, after = example.main()
    assert abs(after - shares) < abs(before - shares) and "share of the structure" in capsys.readouterr().out
    overlay = example.__doc__.split("::")[1].split("python -m")[0]
    (tmp_path / "share_prior.yaml").write_text("\n".join(line[4:] for line in overlay.splitlines()))
    history = train(tmp_path / "run", dataset, *PLAIN, tmp_path / "share_prior.yaml", **UNET)
    assert {"source", "target_shares", "target_loss"} <= set(history[-1])


def test_each_recipe_names_what_there_is():
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.stages and set(recipe.models) == {"source_only", "adapted"}
        for stage in recipe.stages:
            folder = ROOT / "bundles" / stage.bundle / "configs"
            assert all((folder / overlay).is_file() for overlay in stage.overlays), stage
        assert all((BUNDLE / "configs" / overlay).is_file() for overlay in recipe.overlays)
        stages = {stage.name for stage in recipe.stages}
        assert {path.split("/")[0] for path in recipe.models.values()} <= stages
    with pytest.raises(ConfigError, match=r"method 'mean_techer' is unknown \(did you mean 'mean_teacher'\?\)"):
        read_recipe("mean_techer")


@pytest.mark.parametrize(
    "patch, spacing, strides",
    [
        ([48, 48, 48], (1, 1, 1), [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]),
        ([96, 96, 8], (1.5, 1.5, 8), [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2], [2, 2, 1]]),
        ([64, 64, 1], (1, 1, 3), [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 1], [2, 2, 1]]),
    ],
)
def test_a_planned_unet_halves_near_axes_alone(patch, spacing, strides):
    found = plan_unet(patch, spacing)
    assert found["strides"] == strides and found["upsample_kernel_size"] == strides[1:]
    assert len(found["filters"]) == len(strides) == len(found["kernel_size"])
    if patch[2] == 1:
        assert all(kernel[2] == 1 for kernel in found["kernel_size"])


def test_one_slice_is_planned_as_one_slice():
    planned = plan_sizes([(90, 80, 1)] * 3, [(1, 1, 3)] * 3, "small-data-cpu")
    assert planned["patch_size"][2] == planned["window_stride"][2] == planned["stride"][2] == 1
    assert planned["local_block_size"][2] == planned["global_block_size"][2] == 1
