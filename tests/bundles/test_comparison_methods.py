# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Methods that papers compare with, as methods of the bundle: AdvEnt, Fourier mixing, source-only baselines."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.commands import methods
from mapseg_components.engines import AdversarialTrainer
from mapseg_components.plans.recipes import read_recipe, recipe_names
from mapseg_components.plans.sizes import PRESETS
from tests.bundles.test_guests import BUNDLE, FLAT, FLAT_UNET, PLAIN, UNET, train, weights
from tests.conftest import ROOT, make_flat_dataset

ADVENT = [*PLAIN, "from_source.yaml", "advent.yaml"]
SMALL = {**UNET, "method#discriminator#channels": 2}
GAME = {"source", "target_adversarial", "target_entropy", "discriminator_source", "discriminator_target"}


def same(first, second):
    """Whether two states hold the same numbers, in the same places."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_advent_resumes_both_networks_bit_for_bit_in_the_middle_of_an_epoch(dataset, tmp_path, monkeypatch):
    settings = {**SMALL, "max_epochs": 2, "epoch_length": 3}
    whole = train(tmp_path / "whole", dataset, *ADVENT, **settings)
    assert GAME <= set(whole[-1]) and "score" in whole[0]

    step = AdversarialTrainer._finish

    def stopped(trainer, terms, ends):
        if trainer.state.iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, terms, ends)

    with monkeypatch.context() as patched:
        patched.setattr(AdversarialTrainer, "_finish", stopped)
        with pytest.raises(SystemExit):
            train(tmp_path / "parts", dataset, *ADVENT, **settings)
    assert weights(tmp_path / "parts" / "last.pt")["run"]["iteration"] == 5
    parts = train(tmp_path / "parts", dataset, *ADVENT, **settings)
    first, second = (weights(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for part in ("network", "teacher", "optimizer", "discriminator", "discriminator_optimizer"):
        assert same(first[part], second[part]), part
    assert first["discriminator_optimizer"]["state"][0]["step"] == 6
    assert [line["discriminator_target"] for line in parts] == [line["discriminator_target"] for line in whole]


@pytest.mark.parametrize("method", ["advent", "fourier"])
def test_images_of_one_slice_are_adapted_to(method, tmp_path):
    make_flat_dataset(tmp_path)
    files = [*PLAIN, "from_source.yaml", f"{method}.yaml", "any_contrast.yaml"]
    settings = FLAT | FLAT_UNET | (SMALL if method == "advent" else {})
    history = train(tmp_path / "run", tmp_path, *files, **settings, max_epochs=1)
    assert (GAME if method == "advent" else {"source", "score"}) <= set(history[-1])
    if method == "advent":
        shapes = [tuple(value.shape) for value in weights(tmp_path / "run" / "last.pt")["discriminator"].values()]
        assert {len(shape) for shape in shapes} == {1, 4}  # convolutions of slices


def test_a_baseline_goes_on_without_a_target(dataset, tmp_path):
    recipe = read_recipe("source_only")
    first, second = recipe.stages
    assert first.contrasts is second.contrasts is None and not recipe.inverts
    content = json.loads((dataset / "datalist.json").read_text())
    content.pop("target_training")
    alone = tmp_path / "alone.json"
    for case in (case for cases in content.values() if isinstance(cases, list) for case in cases):
        case |= {key: str(dataset / case[key]) for key in ("image", "label")}
    alone.write_text(json.dumps({**content, "target_training": [{"image": str(dataset / "missing.nii.gz")}]}))
    files = ["dynunet.yaml", *recipe.overlays]
    settings = {**UNET, "max_epochs": 1, "datalist": str(alone), "audit": "skip"}
    train(tmp_path / "source", dataset, *files, *first.overlays, **settings)
    start = {"initial_weights": str(tmp_path / "source" / "source_only.pt")}
    history = train(tmp_path / "continued", dataset, *files, *second.overlays, **settings, **start)
    assert not any(name.startswith("target") for name in history[-1])
    before, after = (weights(tmp_path / name / "source_only.pt") for name in ("source", "continued"))
    assert before.keys() == after.keys() and not same(before, after)


METHODS = ("intensity_order", "fourier", "advent", "mean_teacher", "masked_consistency")


def test_the_baseline_is_as_long_as_an_adaptation():
    """So a method's gain is not that of more steps. And it begins where the methods do."""
    strong = read_recipe("intensity_order")
    for name in ("source_only", "source_only_contrasts", *METHODS):
        recipe = read_recipe(name)
        adaptation = recipe.stages[-1]
        assert "from_source.yaml" in adaptation.overlays and not adaptation.scale
        assert adaptation.paths == {"initial_weights": recipe.models["source_only"]}
        if name not in ("source_only", "source_only_contrasts"):
            assert recipe.stages[:-1] == strong.stages[:-1] and recipe.order == strong.order
            assert adaptation.contrasts == strong.stages[-1].contrasts


def test_each_recipe_says_what_it_needs_and_where_it_fails():
    for name in recipe_names():
        recipe = read_recipe(name)
        for text in (recipe.needs, recipe.fails):
            assert len(text) > 20 and not text.endswith("."), name
            assert text in " ".join(str(methods()).split()), name


def test_each_bundle_of_a_method_has_a_size_for_each_preset():
    folders = {stage.bundle for name in recipe_names() for stage in read_recipe(name).stages}
    for folder in folders:
        for preset, sizes in PRESETS.items():
            found = [name for name in sizes["overlays"] if (ROOT / "bundles" / folder / "configs" / name).is_file()]
            assert found, f"{folder} has none of {sizes['overlays']} for {preset}"


def test_entropy_is_minimized_in_equal_steps_and_watched_after_each_epoch():
    """Its own loss is least where one class is everywhere, so the Score cannot see a collapse."""
    overlay = ConfigParser.load_config_file(BUNDLE / "configs" / "entropy.yaml")
    assert overlay["diagnostics#interval"] == 1 and overlay["max_epochs"] * overlay["epoch_length"] <= 30
    assert read_recipe("entropy").stages[-1].overlays[-1] == "share_limits.yaml"
    parser = ConfigParser({"lr_scheduler": overlay["lr_scheduler"]})
    parser["optimizer"] = optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=overlay["learning_rate"])
    schedule = parser.get_parsed_content("lr_scheduler")
    for _ in range(overlay["max_epochs"]):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == overlay["learning_rate"] <= 0.0003


def test_weights_of_classes_keep_the_scale_of_dice():
    """MONAI multiplies the Dice of each structure by its weight, and divides cross-entropy by their sum."""
    parser = ConfigParser(ConfigParser.load_config_file(BUNDLE / "configs" / "dice_ce.yaml"))
    parser["imports"], parser["class_weights"], parser["device"] = ["$import torch"], [1.0, 4.0, 12.0], "cpu"
    loss = parser.get_parsed_content("loss")
    loss = loss.loss  # in the part that leaves voxels out
    assert loss.dice.class_weight.tolist() == [0.5, 1.5]
    assert loss.cross_entropy.weight.tolist() == [0.125, 0.5, 1.5]
    parser["class_weights"] = None
    assert parser.get_parsed_content("loss").loss.dice.class_weight is None
