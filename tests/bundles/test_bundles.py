# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Every shipped config runs at tiny size, by the commands of the docs; bad input ends with one line and no debris."""

from __future__ import annotations

import json
import os
import subprocess

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.inferers import SimpleInferer

from mapseg_components.errors import ConfigError
from mapseg_components.inferers import AutocastInferer
from tests.conftest import ROOT, SAMPLE, make_scan, write_nifti
from tests.warm import python
from tools.check_bundles import findings

ADAPTATION, PRETRAINING = ROOT / "bundles" / "mapseg_adaptation", ROOT / "bundles" / "mapseg_pretraining"
TRANSLATION = ROOT / "bundles" / "cosmos_translation"
# they need a package, see test_test_time.py
SITES = {"source_stage.yaml", "handover.yaml", "handover_only.yaml", "test_time.yaml"}
# they need another network or a method, see test_guests.py, test_buda_seg.py, test_self_training.py, test_label_maps.py
PARTS = {"dynunet.yaml", "two_head_dynunet.yaml", "buda_seg.yaml", "cosmos.yaml", "self_training.yaml"}
PARTS |= {"pseudo_labels.yaml", "label_maps.yaml", "translated.yaml"}
PARTS |= {"nnunet.yaml", "nnunet_labels.yaml"}  # they need an extra, see tests/nnunet
STANDALONE = {
    "metadata.json",
    "train.json",
    "inference.json",
    "evaluate.json",
    "multi_gpu_train.json",
    "federated.json",
}
LABELS = {"first": 1, "second": 2}


def overlays(bundle):
    names = sorted(path.name for path in (bundle / "configs").glob("*.[jy]*"))
    return [name for name in names if name not in STANDALONE | SITES | PARTS | {"tiny.yaml"}]


def train(bundle, folder, dataset, *extra, cwd=None, **settings):
    """Train in this process, with tiny sizes on top of the named overlays."""
    files = [str(bundle / "configs" / name) for name in ("train.json", *extra, "tiny.yaml")]
    settings = {"bundle_root": str(bundle), "dataset_dir": str(dataset), **settings}
    if bundle != PRETRAINING:
        settings.setdefault("labels", LABELS)
    settings |= {"ckpt_dir": str(folder), "output_dir": str(folder), "amp": None, "device": "$torch.device('cpu')"}
    run(run_id="training", config_file=files, **settings)
    return folder


def command(bundle, *arguments, cwd=None, run_id="training"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    line = [python(), "-m", "monai.bundle", "run", run_id, *arguments]
    return subprocess.run(line, cwd=cwd or bundle, capture_output=True, text=True, env=environment)


def weights(path):
    return torch.load(path, weights_only=True)


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_bundles_agree():
    assert findings() == []


@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda b: b.name)
def test_tiny_run_from_its_own_folder(bundle, dataset, tmp_path):
    files = "['configs/train.json','configs/tiny.yaml']"
    arguments = ["--config_file", files, "--dataset_dir", str(dataset), "--ckpt_dir", str(tmp_path / "out")]
    arguments += ["--output_dir", str(tmp_path / "out")]
    if bundle == ADAPTATION:
        arguments += ["--labels", json.dumps(LABELS)]
    done = command(bundle, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"last.pt", "model.pt", "history.jsonl"} <= {path.name for path in (tmp_path / "out").iterdir()}
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2]
    assert all(np.isfinite(value) for line in history for value in line.values())


@pytest.mark.parametrize(
    "bundle, overlay",
    [(b, o) for b in (ADAPTATION, PRETRAINING, TRANSLATION) for o in overlays(b)],
    ids=lambda x: getattr(x, "name", x),
)
def test_every_overlay_runs_from_another_folder(bundle, overlay, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {}
    alone = overlay in ("source_only.yaml", "source_average.yaml")
    if overlay == "source_only.yaml":
        settings = {"warmup_epochs": "@max_epochs"}
    if "cardiac" in overlay:  # flat patches and per-axis strides, at tiny size
        settings = {"patch_size": [16, 16, 8], "stride": [4, 4, 1]}
        if bundle == ADAPTATION:
            settings |= {"dilations": [[1, 1, 1], [2, 2, 1]], "window_stride": [12, 12, 8]}
    train(bundle, tmp_path / "out", dataset, overlay, **settings)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("source_only.pt" if alone else "model.pt") in found
    if alone:
        assert "model.pt" not in found


def test_adaptation_writes_source_only_teacher_or_student_and_why(dataset, tmp_path):
    train(ADAPTATION, tmp_path, dataset)
    record = json.loads((tmp_path / "model_selection.json").read_text())
    assert set(record) == {"source_only.pt", "model.pt"}
    assert record["source_only.pt"]["epoch"] == 1 and record["model.pt"]["epoch"] == 2
    assert record["model.pt"]["weights"] in ("student", "teacher")


@pytest.mark.parametrize("damage", ["absent", "unreadable"])
def test_no_target_label_is_read(dataset, tmp_path, damage):
    """Labels that exist and are named, do not exist, or cannot be read: bit for bit the same weights."""
    content = json.loads((dataset / "datalist.json").read_text())
    for number, case in enumerate(content["target_training"]):
        case["label"] = f"target_training/{number}_label.nii.gz"
        write_nifti(dataset / case["label"], make_scan()[1])
    (dataset / "datalist.json").write_text(json.dumps(content))
    first = train(ADAPTATION, tmp_path / "a", dataset)
    for case in [*content["target_training"], *content["target_test"]]:
        if damage == "unreadable":
            (dataset / case["label"]).write_bytes(b"no label map")
        else:
            (dataset / case.pop("label")).unlink()
    (dataset / "datalist.json").write_text(json.dumps(content))
    second = train(ADAPTATION, tmp_path / "b", dataset)
    for name in ("model.pt", "source_only.pt"):
        same(weights(first / name), weights(second / name))


def test_resumed_run_equals_an_uninterrupted_one(dataset, tmp_path):
    settings = {"max_epochs": 3, "restart_epochs": 3}
    whole = train(ADAPTATION, tmp_path / "whole", dataset, **settings)
    parts = train(ADAPTATION, tmp_path / "parts", dataset, **{**settings, "max_epochs": 2})
    assert len((parts / "history.jsonl").read_text().splitlines()) == 2
    train(ADAPTATION, parts, dataset, **settings)
    assert len((parts / "history.jsonl").read_text().splitlines()) == 3
    same(weights(whole / "last.pt")["network"], weights(parts / "last.pt")["network"])
    same(weights(whole / "last.pt")["teacher"]["network"], weights(parts / "last.pt")["teacher"]["network"])


def test_pretrained_encoder_reaches_adaptation(dataset, tmp_path, capfd):
    train(PRETRAINING, tmp_path / "mae", dataset)
    train(ADAPTATION, tmp_path / "uda", dataset, encoder_weights=str(tmp_path / "mae" / "model.pt"), learning_rate=0.0)
    encoder = {n: v for n, v in weights(tmp_path / "mae" / "model.pt").items() if n.startswith("encoder.")}
    found = weights(tmp_path / "uda" / "model.pt")
    for name, value in encoder.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert "100 % coverage" in capfd.readouterr().out


def test_inference_and_evaluation_on_the_scans_own_grid(dataset, tmp_path):
    folder = train(ADAPTATION, tmp_path / "model", dataset)
    tiny = ConfigParser.load_config_file(ADAPTATION / "configs" / "tiny.yaml")
    keep = ("patch_size", "width", "depth", "dilations", "head_channels", "window_stride")
    settings = {key: tiny[key] for key in keep} | {"labels": LABELS, "weights": str(folder / "model.pt")}
    settings |= {"bundle_root": str(ADAPTATION), "output_dir": str(tmp_path / "out")}
    configs = ADAPTATION / "configs"
    run(
        run_id="run",
        config_file=str(configs / "inference.json"),
        dataset_dir=str(dataset / "target_training"),
        **settings,
    )
    scans = sorted((dataset / "target_training").glob("[0-9].nii.gz"))
    for scan in scans:
        found = nib.load(tmp_path / "out" / scan.name.replace(".nii.gz", "_seg.nii.gz"))
        assert found.shape == nib.load(scan).shape and found.get_data_dtype() == np.uint8
        np.testing.assert_allclose(found.affine, nib.load(scan).affine, atol=1e-5)
    table = (tmp_path / "out" / "volumes.csv").read_text().splitlines()
    assert table[0].startswith("case,structure,voxels,volume_mm3") and len(table) == 1 + 2 * len(scans)

    files = [str(configs / "inference.json"), str(configs / "evaluate.json")]
    run(run_id="run", config_file=files, dataset_dir=str(dataset), overwrite=True, **settings)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    case = json.loads((dataset / "datalist.json").read_text())["target_test"][0]
    truth = np.asarray(nib.load(dataset / case["label"]).dataobj)
    pred = np.asarray(nib.load(tmp_path / "out" / "0_seg.nii.gz").dataobj)
    for value, name in enumerate(LABELS, start=1):
        a, b = truth == value, pred == value
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert metrics["cases"]["target_test-0"][name] == pytest.approx(expected, abs=1e-5)


def test_shipped_weights_segment_the_sample(tmp_path):
    """The weights in the bundles are trained ones: the held-out fetal brains are segmented, not guessed."""
    files = [str(ADAPTATION / "configs" / name) for name in ("inference.json", "evaluate.json")]
    settings = {"bundle_root": str(ADAPTATION), "dataset_dir": str(SAMPLE), "output_dir": str(tmp_path)}
    run(run_id="run", config_file=files, device="$torch.device('cpu')", **settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["cases"]) == {"GA24_notoperated", "GA25_operated"}
    assert metrics["mean"] > 0.45
    for bundle in (ADAPTATION, PRETRAINING):
        norms = [v for n, v in weights(bundle / "models" / "model.pt").items() if "norm1.weight" in n and v.numel() > 1]
        assert norms and not any((norm == 1).all() for norm in norms)


@pytest.mark.parametrize(
    "arguments, last_line",
    [
        (["--ptach_size", "[16,16,16]"], "ConfigError: unknown setting 'ptach_size' (did you mean 'patch_size'?)"),
        (["--datalist", "nowhere.json"], "ConfigError: no datalist at nowhere.json"),
        (["--amp", "half"], "ConfigError: amp is 'half', expected one of"),
        (["--local_block_size", "5"], "ConfigError: mask block size (5, 5, 5) does not divide the image (16, 16, 16)"),
        (["--encoder_weights", "absent.pt"], "CheckpointError: no weights at absent.pt"),
        (["--labels", "{'first': 1}"], "unknown values 2 (80 voxels), known are [0, 1]: name them in labels"),
        (["--source_negative_values", "zero"], "ConfigError: negative_values is 'zero'"),
    ],
)
def test_bad_input_ends_with_one_line_and_leaves_nothing(dataset, tmp_path, arguments, last_line):
    files = "['configs/train.json','configs/tiny.yaml']"
    out = tmp_path / "out"
    base = ["--config_file", files, "--dataset_dir", str(dataset), "--ckpt_dir", str(out), "--output_dir", str(out)]
    base += [] if "--labels" in arguments else ["--labels", json.dumps(LABELS)]
    done = command(ADAPTATION, *base, *arguments)
    assert done.returncode != 0
    assert last_line in done.stderr.strip().splitlines()[-1]
    assert not list(out.rglob("*.pt"))


@pytest.mark.parametrize("name", ["train", "inference"])
@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING, TRANSLATION], ids=lambda b: b.name)
def test_required_properties_are_there(bundle, name, dataset):
    """In the style of the Model Zoo's unit tests."""
    workflow = ConfigWorkflow(
        workflow_type=name,
        config_file=str(bundle / "configs" / f"{name}.json"),
        logging_file=str(bundle / "configs" / "logging.conf"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        bundle_root=str(bundle),
        dataset_dir=str(dataset if name == "train" else dataset / "target_training"),
        **({"width": 8, **({} if bundle == TRANSLATION else {"depth": 1})} if name == "train" else {}),
    )
    workflow.initialize()
    assert not workflow.check_properties()


@pytest.mark.slow
@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda b: b.name)
def test_two_processes_train_one_network(bundle, dataset, tmp_path):
    files = "['configs/train.json','configs/tiny.yaml','configs/multi_gpu_train.json']"
    line = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle"]
    line += ["run", "training", "--config_file", files, "--dataset_dir", str(dataset)]
    line += ["--ckpt_dir", str(tmp_path / "out"), "--output_dir", str(tmp_path / "out")]
    if bundle == ADAPTATION:
        line += ["--labels", json.dumps(LABELS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": python()}
    done = subprocess.run(line, cwd=bundle, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == 2
    assert "model.pt" in {path.name for path in (tmp_path / "out").iterdir()}


def parts_of(content, target):
    """Entries of a config, at any depth, that make a component."""
    if isinstance(content, dict):
        if content.get("_target_", "").endswith(target):
            yield content
        content = list(content.values())
    for each in content if isinstance(content, list) else ():
        yield from parts_of(each, target)


@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda path: path.name)
def test_every_evaluator_takes_amp_from_its_inferer(bundle):
    found = 0
    for path in sorted((bundle / "configs").glob("*.[jy]*")):
        content = ConfigParser.load_config_file(path)
        for evaluator in parts_of(content, "Evaluator"):
            inferer = evaluator["inferer"]
            while isinstance(inferer, str):
                inferer = ConfigParser(content)[inferer.removeprefix("@")]
            assert inferer["_target_"].endswith("AutocastInferer") and inferer["amp"] == "@amp"
            assert not {"amp", "amp_kwargs"} & set(evaluator)  # MONAI's own amp does nothing on a CPU
            found += 1
    assert found


def test_unknown_amp_of_inference_is_refused():
    with pytest.raises(ConfigError, match="amp is 'half', expected one of"):
        AutocastInferer(SimpleInferer(), "half")


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), (None, torch.float32)])
@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda path: path.name)
def test_amp_of_inference_reaches_the_network_on_a_cpu(bundle, amp, dtype):
    parser = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
    settings = {"amp": amp, "device": "$torch.device('cpu')", "handlers": [], "cases": [], "dataset#data": [{}]}
    parser.update({"bundle_root": str(bundle), **settings})
    network, seen = parser.get_parsed_content("network").eval(), set()
    network.encoder.blocks[1].conv1.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    with torch.no_grad():
        parser.get_parsed_content("evaluator").inferer(torch.rand(1, 1, 32, 32, 32), network)
    assert seen == {dtype}
