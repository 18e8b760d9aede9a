# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipes of CONTRIBUTING that one overlay makes, without a line of the package: each is seen to take effect."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from monai.bundle import run

from tests.bundles.test_guests import BUNDLE, LABELS, SMALL


def train(folder, dataset, overlay, *before):
    """One short training with an overlay of its own; the history's last line and the student's weights."""
    (folder / "own.yaml").write_text(yaml.safe_dump(overlay))
    files = [str(BUNDLE / "configs" / name) for name in ("train.json", "tiny.yaml", *before)]
    places = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(dataset),
        "ckpt_dir": str(folder),
        "output_dir": str(folder),
    }
    run(run_id="run", config_file=[*files, str(folder / "own.yaml")], **{**places, "labels": LABELS, **SMALL})
    history = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    return history, torch.load(folder / "last.pt", weights_only=True)["network"]


def test_a_network_of_monai(dataset, tmp_path):
    unet = {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": "@in_channels",
        "out_channels": "$len(mapseg_components.data.structures_of(@labels)) + 1",
        "channels": [4, 8],
        "strides": [2],
    }
    history, weights = train(tmp_path, dataset, {"network_def": unet}, "dice_ce.yaml", "mean_teacher.yaml")
    assert "target" in history and any(name.startswith("model.") for name in weights)


def test_an_augmentation_of_monai(dataset, tmp_path):
    black = {"_target_": "RandLambdad", "keys": "@views", "func": "$lambda image: image * 0", "prob": 1.0}
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    plain, _ = train(tmp_path / "without", dataset, {"seed": 0})
    seen, _ = train(tmp_path / "with", dataset, {"+source_intensity": [black]})
    assert seen["source_local"] != plain["source_local"]  # nothing of the source is seen


def test_a_metric_of_monai(dataset, tmp_path):
    metric = {
        "source_iou": {
            "_target_": "MeanIoUHandler",
            "include_background": False,
            "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
        }
    }
    history, _ = train(tmp_path, dataset, {"validate#key_metric": metric})
    selected = json.loads((tmp_path / "model_selection.json").read_text())["model.pt"]
    assert 0 <= history["source_dice_student"] <= 1 and "score" in selected


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_teacher_schedule(dataset, tmp_path, decay):
    """Of a teacher that keeps nothing the weights are the student's, of one that keeps all they are the first ones."""
    _, student = train(tmp_path, dataset, {"ema_schedule": [[None, decay]]})
    teacher = torch.load(tmp_path / "last.pt", weights_only=True)["teacher"]["network"]
    same = [torch.allclose(teacher[name], value) for name, value in student.items()]
    assert all(same) if decay == 0.0 else not all(same)
