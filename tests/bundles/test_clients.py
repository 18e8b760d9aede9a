# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Clients of the bundles, as they call them: `monai.bundle.load`, the Model Zoo, MONAI Label, `MonaiAlgo`."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile

import pytest
import torch
from monai.bundle import ConfigParser, load, onnx_export, run, verify_net_in_out
from monai.data import partition_dataset
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from mapseg_components.errors import MAPSegError
from tests.bundles.test_bundles import ADAPTATION, LABELS, PRETRAINING, TRANSLATION, command, same, weights
from tests.bundles.test_packing import SCAN, python_without_the_package
from tests.conftest import make_scan, write_nifti
from tools.pack_bundle import pack

BOTH = pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda b: b.name)
CPU = "$torch.device('cpu')"


def cause(error):
    """The user's error that MONAI wrapped."""
    while error is not None and not isinstance(error, MAPSegError):
        error = error.__cause__ or error.__context__
    return error


# ---- monai.bundle.load ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING, TRANSLATION], ids=lambda b: b.name)
@pytest.mark.parametrize("workflow_type", ["train", "inference"])
def test_load_with_defaults_returns_every_shipped_tensor(bundle, workflow_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {} if workflow_type == "train" else {"workflow_type": workflow_type}
    network = load(bundle.name, bundle_dir=bundle.parent, **more)
    same(network.cpu().state_dict(), weights(bundle / "models" / "model.pt"))


@BOTH
def test_load_of_a_release_without_the_package_returns_every_shipped_tensor(bundle, tmp_path):
    with zipfile.ZipFile(pack(bundle, tmp_path)) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / bundle.name)!r})
import torch; from monai.bundle import load
network = load({bundle.name!r}, bundle_dir={str(tmp_path)!r}, device="cpu")
shipped, found = torch.load({str(bundle / "models" / "model.pt")!r}, weights_only=True), network.state_dict()
assert found.keys() == shipped.keys() and all(torch.equal(found[name], shipped[name]) for name in shipped)
print(sys.modules["mapseg_components"].__file__)
"""
    done = python_without_the_package("-c", code, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith(str(tmp_path / bundle.name))


# ---- sizes are overlays ---------------------------------------------------------------------------------------------


def merged(bundle, *names):
    return ConfigParser.load_config_files([str(bundle / "configs" / name) for name in names])


@BOTH
def test_the_samples_experiment_is_what_train_json_holds(bundle):
    """So the weights that `make weights` trains fit train.json."""
    train = merged(bundle, "train.json")
    assert merged(bundle, "train.json", "small_data.yaml", "fetal_age.yaml") == train
    assert merged(bundle, "train.json", "paper.yaml", "small_data.yaml", "fetal_age.yaml") == train


@BOTH
def test_overlays_of_the_paper_and_of_one_gpu_are_complete(bundle):
    """Alone they give what they give after any other size; labels are the user's for one GPU."""
    names = [path.name for path in sorted((bundle / "configs").glob("paper*.yaml"))]
    assert {"paper.yaml", "paper_v1.yaml"} <= set(names)
    for name in [*names, "single_gpu.yaml"]:
        alone = merged(bundle, "train.json", name)
        assert alone["width"] == (128 if name == "single_gpu.yaml" else 512) and alone["patch_size"] == [96, 96, 96]
        for before in ("paper.yaml", "small_data.yaml"):
            after = merged(bundle, "train.json", before, name)
            if name == "single_gpu.yaml" and "labels" in alone:
                after["labels"] = alone["labels"]
            assert after == alone, (before, name)


def test_the_papers_network_has_its_210_million_parameters():
    with torch.device("meta"):
        network = ConfigParser(merged(ADAPTATION, "train.json", "paper.yaml")).get_parsed_content("network_def")
    assert sum(parameter.numel() for parameter in network.parameters()) == 209_889_098


# ---- the Model Zoo's checks, with default arguments -----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_verify_net_in_out_with_defaults(bundle, config):
    configs = bundle / "configs"
    verify_net_in_out("network_def", str(configs / "metadata.json"), str(configs / config))


@BOTH
def test_onnx_export_without_a_shape(bundle, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs the extra [export]")
    import onnxruntime

    configs = bundle / "configs"
    onnx_export(
        "network_def",
        str(tmp_path / "model.onnx"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    image = torch.rand([side if isinstance(side, int) else 1 for side in wanted.shape])
    network = load(bundle.name, bundle_dir=bundle.parent, device="cpu").eval()
    with torch.no_grad():
        expected = network(image)
    found = torch.from_numpy(session.run(None, {wanted.name: image.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


# ---- MONAI Label ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """The bundle as MONAI Label's app holds it, at tiny size, with weights; beside it a folder of studies."""
    bundle = tmp_path / "model" / ADAPTATION.name
    shutil.copytree(ADAPTATION / "configs", bundle / "configs")
    content = merged(ADAPTATION, "train.json", "tiny.yaml") | {"labels": LABELS, "amp": None}
    (bundle / "configs" / "train.json").write_text(json.dumps(content))
    (bundle / "models").mkdir()
    torch.manual_seed(7)
    network = ConfigParser(content).get_parsed_content("network_def")
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    for number in range(4):
        image, label = make_scan(seed=number)
        write_nifti(tmp_path / "studies" / f"scan{number}.nii.gz", image)
        write_nifti(tmp_path / "studies" / "labels" / "final" / f"scan{number}.nii.gz", label)
    return bundle


def pairs_of(bundle, count):
    studies = bundle.parents[1] / "studies"
    return [
        {"image": f"{studies}/scan{n}.nii.gz", "label": f"{studies}/labels/final/scan{n}.nii.gz"} for n in range(count)
    ]


def train_as_monai_label(bundle, pairs, val_split=0.25, max_epochs=2, **more):
    """What MONAI Label 0.8.5 does for POST /train: a loader put first, lists of pairs, its own epochs and device."""
    config, models = bundle / "configs" / "train.json", bundle / "models"
    handlers = ConfigParser.load_config_file(config)["train"]["handlers"]
    assert not [handler for handler in handlers if handler.get("_target_") == "CheckpointLoader"]
    loader = {"_target_": "CheckpointLoader", "load_path": str(models / "model.pt"), "strict": False}
    handlers.insert(0, {**loader, "load_dict": {"model": "$@network"}})
    training, validation = pairs, None if val_split < 0 else []
    if val_split > 0:
        training, validation = partition_dataset(pairs, ratios=[1 - val_split, val_split], shuffle=False)
    overrides = {
        "bundle_root": str(bundle),
        "train#trainer#max_epochs": max_epochs,
        "train#dataset#data": training,
        "device": "cpu",
        "train#handlers": handlers,
        **({} if validation is None else {"validate#dataset#data": validation}),
    }
    metadata = str(bundle / "configs" / "metadata.json")
    run(run_id="run", init_id=None, final_id=None, meta_file=metadata, config_file=str(config), **overrides, **more)


def test_monai_label_trains_on_its_pairs_from_the_weights_that_are_served(served):
    before = weights(served / "models" / "model.pt")
    train_as_monai_label(served, pairs_of(served, 4), learning_rate=0.0, min_learning_rate=0.0)
    after = weights(served / "models" / "model.pt")
    same(before, after)  # without a step the weights that were loaded come back: they were loaded, all of them
    train_as_monai_label(served, pairs_of(served, 4))
    after = weights(served / "models" / "model.pt")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    same(before, weights(served / "models" / "previous_model.pt"))
    lines = [json.loads(line) for line in (served / "eval" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and all("source_dice_student" in line for line in lines)
    assert not any(name.startswith("target") for line in lines for name in line)


def test_each_training_of_monai_label_starts_anew(served):
    """Other scans have been labelled meanwhile; nothing is resumed, and what inference reads is always there."""
    for count in (2, 3, 4):
        before = weights(served / "models" / "model.pt")
        train_as_monai_label(served, pairs_of(served, count), val_split=0.5, max_epochs=1)
        same(before, weights(served / "models" / "previous_model.pt"))
        assert len((served / "eval" / "history.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("settings", [{"val_split": 0}, {"val_interval": 5}], ids=["no validation", "never validated"])
def test_monai_label_without_validation_gets_the_last_weights(served, settings):
    before = weights(served / "models" / "model.pt")
    train_as_monai_label(served, pairs_of(served, 3), **settings)
    after = weights(served / "models" / "model.pt")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("val_split", [0, 0.25])
def test_monai_label_adapts_to_the_unlabelled_scans_of_target_dir(served, val_split):
    """Labelled scans that lie in the same folder are no target."""
    studies = served.parents[1] / "studies"
    train_as_monai_label(served, pairs_of(served, 2 if val_split == 0 else 3), val_split, target_dir=str(studies))
    lines = [json.loads(line) for line in (served / "eval" / "history.jsonl").read_text().splitlines()]
    assert "target_local_masked" in lines[1] and "source_local" in lines[1]
    cases = torch.load(served / "models" / "client" / "last.pt", weights_only=True)["loader"]["cases"]
    assert cases["target"] == (["scan2", "scan3"] if val_split == 0 else ["scan3"])


@pytest.mark.parametrize(
    "count, settings, words",
    [
        (0, {"val_split": 0}, "no labelled scan is left for training: label two scans or more"),
        (4, {"target_dir": "nowhere"}, "target_dir nowhere has no NIfTI file that is not labelled"),
        (4, {"labels": {"first": 1}}, "unknown values 2"),
    ],
)
def test_what_monai_label_cannot_train_on_is_one_error_and_the_weights_stay(served, count, settings, words):
    before = weights(served / "models" / "model.pt")
    with pytest.raises(Exception) as caught:
        train_as_monai_label(served, pairs_of(served, count), **settings)
    assert words in str(cause(caught.value))
    same(before, weights(served / "models" / "model.pt"))
    train_as_monai_label(served, pairs_of(served, 4), max_epochs=1)  # the process that serves goes on


def test_target_dir_beside_a_datalist_is_refused(dataset, tmp_path):
    files = [str(ADAPTATION / "configs" / name) for name in ("train.json", "tiny.yaml")]
    settings = {"bundle_root": str(tmp_path), "dataset_dir": str(dataset), "labels": LABELS, "device": CPU}
    with pytest.raises(Exception) as caught:
        run(run_id="run", config_file=files, target_dir=str(tmp_path), **settings)
    assert "name the unlabelled ones there, as target_training" in str(cause(caught.value))


# ---- MonaiAlgo ------------------------------------------------------------------------------------------------------


def algo_of(folder, data, **more):
    """A site of plain federated averaging, supervised, at tiny size, on a separate folder of the bundle."""
    settings = merged(ADAPTATION, "tiny.yaml") | {"labels": LABELS, "amp": None, "dataset_dir": str(data)}
    settings |= {"device": CPU, "resume": False, "val_interval": 1}
    shutil.copytree(ADAPTATION / "configs", folder / "configs")
    algo = MonaiAlgo(
        bundle_root=str(folder),
        config_train_filename=["configs/train.json", "configs/source_only.yaml"],
        train_kwargs=dict(settings),
        eval_kwargs=dict(settings),
        send_weight_diff=False,
        **more,
    )
    algo.initialize(extra={ExtraItems.CLIENT_NAME: "site"})
    return algo


def test_monai_algo_trains_evaluates_and_takes_each_rounds_weights(dataset, tmp_path):
    algo = algo_of(tmp_path / "bundle", dataset)
    content = merged(ADAPTATION, "train.json", "tiny.yaml") | {"labels": LABELS}
    shared = ConfigParser(content).get_parsed_content("network_def").state_dict()
    metrics = algo.evaluate(ExchangeObject(weights=shared)).metrics
    assert 0 <= metrics["source_dice"] <= 1
    algo.train(ExchangeObject(weights=shared))
    first = algo.get_weights()
    assert first.weight_type == WeightType.WEIGHTS and first.weights.keys() == shared.keys()  # names of model.pt
    assert any(not torch.equal(first.weights[name], shared[name]) for name in shared)
    # a round without a step gives back what the server sent, not what the site had or its files hold
    for group in algo.trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    algo.trainer.optimization.optimizer.step = lambda *_, **__: None
    algo.train(ExchangeObject(weights=shared))
    same(algo.get_weights().weights, shared)
    assert algo.trainer.state.epoch == 2


# ---- several configs, another folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [["train.json", "evaluate.json"], ["evaluate.json", "train.json"]])
def test_evaluate_json_on_train_json_says_which_config_it_goes_on(order, dataset, tmp_path):
    files = str([f"configs/{name}" for name in order])
    out = ["--ckpt_dir", str(tmp_path / "out"), "--output_dir", str(tmp_path / "out")]
    done = command(ADAPTATION, "--config_file", files, "--dataset_dir", str(dataset), *out)
    assert done.returncode != 0
    expected = "ConfigError: evaluate.json goes on inference.json: "
    assert done.stderr.strip().splitlines()[-1].startswith(expected), done.stderr[-1500:]
    assert "['configs/inference.json','configs/evaluate.json']" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def inference_elsewhere(folder, bundle, *more, without_package=False):
    """The bundle's inference, started in a folder that is not the bundle's."""
    (folder / "scans").mkdir()
    shutil.copy(SCAN, folder / "scans")
    line = ["--config_file", str(bundle / "configs" / "inference.json"), "--dataset_dir", str(folder / "scans")]
    line += ["--output_dir", str(folder / "out"), "--device", CPU, *more]
    if without_package:
        return python_without_the_package("-m", "monai.bundle", "run", "run", *line, cwd=folder)
    return command(bundle, *line, cwd=folder, run_id="run")


@BOTH
def test_inference_from_another_folder_with_bundle_root(bundle, tmp_path):
    done = inference_elsewhere(tmp_path, bundle, "--bundle_root", str(bundle))
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def test_inference_from_another_folder_without_bundle_root_says_what_is_missing(tmp_path):
    done = inference_elsewhere(tmp_path, ADAPTATION)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("CheckpointError: no weights at ") and "a bundle's own need --bundle_root" in last


@pytest.mark.parametrize("path", [False, True], ids=["bundle_root alone", "PYTHONPATH"])
def test_a_release_from_another_folder_needs_its_folder_on_the_path_and_says_so(path, tmp_path, monkeypatch):
    with zipfile.ZipFile(pack(ADAPTATION, tmp_path)) as archive:
        archive.extractall(tmp_path)
    bundle = tmp_path / ADAPTATION.name
    if path:
        monkeypatch.setattr("sys.path", [*sys.path, str(bundle / "site-packages")])
        (bundle / "site-packages").symlink_to(bundle)  # a name that `python_without_the_package` passes on
    done = inference_elsewhere(tmp_path, bundle, "--bundle_root", str(bundle), without_package=True)
    if path:
        assert done.returncode == 0 and len(list((tmp_path / "out").glob("*.nii.gz"))) == 1, done.stderr[-1500:]
    else:
        assert done.returncode != 0 and "or set PYTHONPATH to it" in done.stderr.strip().splitlines()[-1]


def test_monai_label_is_told_that_pretraining_does_not_learn_from_labels(tmp_path, dataset):
    pairs = [{"image": str(dataset / "source_training" / "0.nii.gz"), "label": "unread"}]
    lists = {"train#dataset#data": pairs, "validate#dataset#data": pairs, "bundle_root": str(tmp_path)}
    with pytest.raises(Exception) as caught:
        run(run_id="run", config_file=str(PRETRAINING / "configs" / "train.json"), device="cpu", **lists)
    assert "MONAI Label offers its training and cannot run it" in str(cause(caught.value))
