# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle cosmos_translation at tiny size: what a run writes, that it resumes exactly, and what stops it."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run

from mapseg_components.checkpoints import read_checked
from mapseg_components.data import check_training_data
from mapseg_components.errors import user_error
from mapseg_components.files import sha256_of
from tests.bundles.test_bundles import LABELS, TRANSLATION, train
from tests.conftest import ROOT, make_dataset
from tests.unit.test_translation import leaves

FRAME = {"working_spacing": [1.6, 0, 1.2], "working_directions": [[0, 1, 0], [0, 0, 1], [1, 0, 0]]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data whose target labels cannot be read, and a run on them in a working frame."""
    folder = tmp_path_factory.mktemp("translation")
    make_dataset(folder / "data")
    for label in (folder / "data").glob("target_*/*_label.nii.gz"):
        label.write_bytes(b"no label map")
    train(TRANSLATION, folder / "run", folder / "data", **FRAME)
    return folder


def test_a_run_writes_weights_history_pictures_and_whole_translated_scans(made):
    data, out = made / "data", made / "run"
    content = json.loads((data / "datalist.json").read_text())
    found = json.loads((out / "translated" / "datalist.json").read_text())
    assert list(found) == ["labels", "source_training", "source_validation", "target_training"]
    assert found["labels"] == content["labels"]
    for section in ("source_training", "source_validation"):
        for entry, origin in zip(found[section], content[section], strict=True):
            scan, translated = nib.load(data / origin["image"]), nib.load(entry["image"])
            assert np.array_equal(scan.affine, translated.affine) and scan.shape == translated.shape
            assert sha256_of(entry["label"]) == sha256_of(data / origin["label"])
            voxels = np.asarray(translated.dataobj)
            assert voxels.min() == 0 and voxels.max() <= 1 and voxels.std() > 0
            outside = np.asarray(scan.dataobj) == 0
            assert not voxels[outside].any()
    assert [case["image"] for case in found["target_training"]] == [
        str(data / case["image"]) for case in content["target_training"]
    ]
    check_training_data(out / "translated" / "datalist.json", LABELS)
    assert {"last.pt", "model.pt", "translation_0001.png", "translation_0002.png"} <= {p.name for p in out.iterdir()}
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    names = {"cycle", "adversarial", "identity", "segmentation", "discriminator", "intensity_distance"}
    assert [line["epoch"] for line in lines] == [1, 2] and names <= set(lines[0])
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_inference_translates_as_the_run_did(made, tmp_path):
    tiny = ConfigParser.load_config_file(TRANSLATION / "configs" / "tiny.yaml")
    settings = {key: tiny[key] for key in ("slice_size", "width")} | FRAME
    settings |= {
        "bundle_root": str(TRANSLATION),
        "weights": str(made / "run" / "model.pt"),
        "output_dir": str(tmp_path),
    }
    (tmp_path / "scans").mkdir()
    for number in (0, 1):
        shutil.copy(made / "data" / "source_training" / f"{number}.nii.gz", tmp_path / "scans")
    files = str(TRANSLATION / "configs" / "inference.json")
    run(run_id="run", config_file=files, dataset_dir=str(tmp_path / "scans"), device="$torch.device('cpu')", **settings)
    for number in (0, 1):
        found = nib.load(tmp_path / f"{number}_translated.nii.gz")
        written = nib.load(made / "run" / "translated" / "images" / f"source_training-{number}.nii.gz")
        np.testing.assert_allclose(found.get_fdata(), written.get_fdata(), atol=1e-6)


def test_a_run_that_goes_on_equals_one_that_was_not_interrupted(made, tmp_path):
    data = made / "data"
    shutil.copytree(made / "run", tmp_path / "parts")
    for name in ("parts", "whole"):
        train(TRANSLATION, tmp_path / name, data, max_epochs=3, **FRAME)
    states = {name: dict(leaves(read_checked(tmp_path / name / "last.pt"))) for name in ("parts", "whole")}
    assert states["parts"].keys() == states["whole"].keys()
    for name, value in states["whole"].items():
        if not name.startswith("#run#") and "#seconds" not in name and "#sums" not in name:
            other = states["parts"][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    for path in (tmp_path / "whole" / "translated" / "images").iterdir():
        assert sha256_of(path) == sha256_of(tmp_path / "parts" / "translated" / "images" / path.name)


def test_a_target_shown_bright_for_dark_is_turned_back_in_what_is_written(made, tmp_path):
    """With a decoder that gives the slice back, a translated scan is the scan bright for dark, surroundings empty."""
    files = [str(TRANSLATION / "configs" / name) for name in ("train.json", "tiny.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update({"bundle_root": str(TRANSLATION), "datalist": str(made / "data" / "datalist.json"), "labels": LABELS})
    parser.update({"target_inverted": True, "device": "cpu", "output_dir": str(tmp_path)})
    network = parser.get_parsed_content("network_def")
    network.decode = lambda features, image: image
    parser.get_parsed_content("translate#volumes")()
    scan = nib.load(made / "data" / "source_training" / "0.nii.gz").get_fdata()
    found = nib.load(tmp_path / "translated" / "images" / "source_training-0.nii.gz").get_fdata()
    shown = (scan / np.percentile(scan, 99.5)).clip(0, 1)
    np.testing.assert_allclose(found, np.where(shown > 0, 1 - shown, 0), atol=1e-5)
    assert network.state_dict()["inverted"].item() is True
    plain = ConfigParser(parser.config)
    plain.update({"target_inverted": False})
    first, second = (one.get_parsed_content("train#target_dataset")[0]["image"] for one in (parser, plain))
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def test_the_shipped_weights_make_t2w_of_t1w(tmp_path):
    """In a scan nobody trained on: fluid brighter than grey matter, which is brighter than white matter."""
    sample, scans = ROOT / "sample" / "adult_t1_to_t2" / "validation", tmp_path / "scans"
    scans.mkdir()
    shutil.copy(sample / "images" / "cs26_T1.nii.gz", scans)
    settings = {"bundle_root": str(TRANSLATION), "dataset_dir": str(scans), "output_dir": str(tmp_path)}
    files = str(TRANSLATION / "configs" / "inference.json")
    run(run_id="run", config_file=files, device="$torch.device('cpu')", **settings)
    label = np.asarray(nib.load(sample / "labels" / "cs26_T1.nii.gz").dataobj)
    found = np.asarray(nib.load(tmp_path / "cs26_T1_translated.nii.gz").dataobj)
    fluid, grey, white = (found[label == value].mean() for value in (1, 2, 3))
    assert fluid > grey + 0.2 and grey > white + 0.05
    assert found[label == 0].mean() < 0.05


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slice_size": [22, 32]}, "slice_size is [22, 32], expected multiples of 4"),
        ({"discriminator_layers": 3}, "too small for 3 discriminator_layers"),
        ({"criterion": "hinge"}, "criterion is 'hinge'"),
        ({"replay_size": -1}, "replay_size is -1"),
        ({"labels": {"first": 1}}, "name them in labels"),
    ],
)
def test_settings_that_cannot_work_end_the_run_and_leave_no_weights(made, tmp_path, settings, message):
    with pytest.raises(Exception) as raised:
        train(TRANSLATION, tmp_path, made / "data", **settings)
    assert message in str(user_error(raised.value))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("epochs, after", [(2, 0), (5, 1), (16, 5), (50, 5)])
def test_short_trainings_segment_translated_slices_as_well_and_keep_nothing_of_random_weights(epochs, after):
    parser = ConfigParser(ConfigParser.load_config_file(TRANSLATION / "configs" / "train.json"))
    parser["max_epochs"] = epochs
    assert parser.get_parsed_content("translated_segmentation_after") == after
    parser["translators"] = torch.nn.Linear(1, 1)
    average = parser.get_parsed_content("average")
    average.start()
    assert average.followed(epochs * parser["epoch_length"]) > 0.999
