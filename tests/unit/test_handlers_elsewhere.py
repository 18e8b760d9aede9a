# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Handlers on MONAI's own trainer and evaluator, and on plain engines: they work, or say what they need."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import AsDiscreted
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.handlers import DiceReport, EpochHistory, LossProgressBar, VolumesTable

AFFINE = torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.0]))


def batches(count=2, batch=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, 4, 6, 5)
    return [
        {"image": MetaTensor(torch.rand(shape, generator=generator)), "label": torch.ones(shape)} for _ in range(count)
    ]


def trainer(handlers, **options):
    network = nn.Conv3d(1, 1, 1)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=batches(),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        **options,
    )


@pytest.mark.parametrize("decollate", [True, False])
def test_history_of_an_ordinary_trainer_is_its_loss(tmp_path, decollate, capsys):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    losses = []
    run = trainer([EpochHistory(str(tmp_path), optimizer), LossProgressBar(disable=False)], decollate=decollate)
    run.loss_function = lambda pred, label: losses.append(nn.functional.mse_loss(pred, label)) or losses[-1]
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and not {"image", "label", "pred"} & set(lines[0])
    for line, own in zip(lines, (losses[:2], losses[2:])):
        assert line["loss"] == pytest.approx(float(sum(own)) / 2, rel=1e-5)
    assert "loss" in capsys.readouterr().err


@pytest.mark.parametrize("output", [0.5, {"error": torch.zeros(1)}, [{"loss": torch.zeros(2)}], []])
def test_a_trainer_without_a_loss_is_named(tmp_path, output):
    engine = Engine(lambda engine, batch: output)
    EpochHistory(str(tmp_path), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)).attach(engine)
    engine.logger.disabled = True
    with pytest.raises(ConfigError, match=r"output is .* expected a mapping with the scalar 'loss'"):
        engine.run([0])


def threshold(image):
    return torch.cat([0.5 - image, image - 0.5], dim=1)


def evaluator(folder, names=("one",), postprocessing=None, **options):
    data = []
    for one in batches():
        images = [MetaTensor(image.as_tensor(), affine=AFFINE) for image in one["image"]]
        data.append(list_data_collate([{"image": image, "label": (image > 0.5).float()} for image in images]))
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=data,
        network=nn.Identity(),
        inferer=lambda image, network: threshold(image),
        postprocessing=postprocessing,
        val_handlers=[DiceReport(str(folder), list(names)), VolumesTable(str(folder), list(names))],
        **options,
    )


ARGMAX = AsDiscreted("pred", argmax=True)


def test_an_ordinary_evaluator_with_batches_gives_a_row_for_each_case(tmp_path):
    run = evaluator(tmp_path, postprocessing=ARGMAX)
    for _ in range(2):  # a second run, as in validation, starts anew
        run.run()
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert len(metrics["cases"]) == 4 and metrics["mean"] == 1.0
        rows = list(csv.DictReader((tmp_path / "volumes.csv").open()))
        expected = [float((image > 0.5).sum()) for one in batches() for image in one["image"]]
        assert [float(row["voxels"]) for row in rows] == expected
        assert [float(row["volume_mm3"]) for row in rows] == expected  # voxels of 2 x 1 x 0.5 mm


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"pred has shape \(2, 4, 6, 5\), expected a label map.*AsDiscreted"),
        ({"postprocessing": ARGMAX, "names": ()}, "pred has values from 0 to 1, expected whole numbers from 0 to 0"),
        ({"postprocessing": ARGMAX, "decollate": False}, "leave decollate of MONAI's evaluator at True"),
    ],
)
def test_what_is_no_label_map_is_named(tmp_path, options, message):
    run = evaluator(tmp_path, **options)
    run.logger.disabled = True
    with pytest.raises(ConfigError, match=message):
        run.run()
    assert list(tmp_path.iterdir()) == []


def test_a_volume_needs_a_voxel_size(tmp_path):
    engine = Engine(lambda engine, batch: [{"pred": torch.ones(1, 2, 3, 4)}])
    VolumesTable(str(tmp_path), ["one"]).attach(engine)
    engine.logger.disabled = True
    with pytest.raises(ConfigError, match="without voxel size, expected a MetaTensor"):
        engine.run([[{}]])
