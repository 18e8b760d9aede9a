# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Students of pseudo labels and the segmentation that makes them, as the bundle runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.data import SeededDataset
from tests.bundles.test_guests import BUNDLE, LABELS, cause, segment, train, weights
from tests.conftest import make_scan, write_nifti

STRIDES = [1, 2, 2, 2]
SMALL_NNUNET = {
    "network_def#filters": [4, 4, 8, 8],
    "network_def#kernel_size": [3] * 4,
    "network_def#strides": STRIDES,
    "network_def#upsample_kernel_size": STRIDES[1:],
    "network_def#deep_supr_num": 1,
}
STUDENT = ["cosmos.yaml", "self_training.yaml"]
SHORT = {**SMALL_NNUNET, "epoch_length": 2, "val_interval": 1, "batch_size": 1}


@pytest.fixture
def labelled(dataset):
    """The dataset with pseudo labels of both target scans; the target's own labels, which are named, do not exist."""
    content = json.loads((dataset / "datalist.json").read_text())
    for number, case in enumerate(content["target_training"]):
        case["label"] = f"target_training/{number}_truth.nii.gz"
    content["target_labelled"] = []
    for number, case in enumerate(content["target_training"]):
        path = f"pseudo/{number}.nii.gz"
        write_nifti(dataset / path, make_scan(seed=number)[1])
        content["target_labelled"].append({"image": case["image"], "case_id": case["case_id"], "label": path})
    (dataset / "datalist.json").write_text(json.dumps(content))
    return dataset


def test_a_student_trains_on_both_sides_and_resumes_bit_for_bit(labelled, tmp_path):
    """With COSMOS's network: deep supervision and all; no label of the target is opened, there is none."""
    whole = train(tmp_path / "whole", labelled, *STUDENT, **SHORT, max_epochs=2)
    assert {"source", "target", "target_loss", "score"} <= set(whole[0])
    for epochs in (1, 2):
        train(tmp_path / "parts", labelled, *STUDENT, **SHORT, max_epochs=epochs, **{"lr_scheduler#total_iters": 2})
    first, second = (weights(tmp_path / name / "last.pt")["network"] for name in ("whole", "parts"))
    assert any("deep_supervision" in name for name in first) and (tmp_path / "whole" / "model.pt").is_file()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_without_pseudo_labels_is_told_what_is_missing(dataset, tmp_path):
    with pytest.raises(Exception) as caught:
        train(tmp_path, dataset, *STUDENT, **SHORT)
    assert "has no 'target_labelled': add this list" in str(cause(caught.value))


def test_target_samples_are_cropped_and_augmented_as_those_of_the_source_are(labelled):
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "tiny.yaml", "self_training.yaml")])
    parser.update({"dataset_dir": str(labelled), "labels": LABELS, "foreground_fraction": 1.0, "flip_axes": [0, 2]})
    parser.update({"intensity_prob": 1.0, "affine_prob": 0.0, "percentile_prob": 0.0})
    dataset = parser.get_parsed_content("train#target_dataset")
    assert len(dataset) == 2
    samples = [SeededDataset(dataset)[0, seed] for seed in range(6)]
    for sample in samples:
        assert sample["image"].shape == sample["label"].shape == (1, 16, 16, 16)
        assert (sample["label"] > 0).any() and set(sample["label"].unique().tolist()) <= {0, 1, 2}
    crop = parser.get_parsed_content("target_crop").transform
    assert crop.flip_prob == (0.5, 0.0, 0.5) == parser.get_parsed_content("source_crop").transform.flip_prob
    parser = ConfigParser(parser.get() | {"intensity_prob": 0.0})
    plain = SeededDataset(parser.get_parsed_content("train#target_dataset"))[0, 0]
    assert not torch.equal(plain["image"], samples[0]["image"]) and torch.equal(plain["label"], samples[0]["label"])


def test_labels_of_one_model_without_flips_are_those_of_inference(labelled, tmp_path):
    train(tmp_path / "run", labelled, *STUDENT, **SHORT, max_epochs=1)
    scans, model = labelled / "target_training", tmp_path / "run" / "model.pt"
    plain = segment(tmp_path / "plain", scans, model, "cosmos.yaml", **SMALL_NNUNET)
    again = ("cosmos.yaml", "pseudo_labels.yaml")
    alone = segment(tmp_path / "alone", scans, model, *again, **SMALL_NNUNET)
    assert plain.keys() == alone.keys() and all(np.array_equal(plain[name], alone[name]) for name in plain)
    more = {"evaluator#inferer#weights": [str(model)], "evaluator#inferer#flip_axes": [1]}
    together = segment(tmp_path / "together", scans, model, *again, **SMALL_NNUNET, **more)
    assert plain.keys() == together.keys()
    assert any(not np.array_equal(plain[name], together[name]) for name in plain)
