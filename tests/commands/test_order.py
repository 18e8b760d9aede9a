# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the target is bright where the source is dark: found out by confidence, kept in the configs, shown so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.commands.assess import assess
from mapseg_components.commands.order import (
    TARGET_INVERTED,
    asks_for_order,
    confidence_on_target,
    describe_order,
    find_order,
    recipe_of,
    settle_order,
)
from mapseg_components.contrast import inverted
from mapseg_components.data import SeededDataset
from mapseg_components.inferers import AutocastInferer
from mapseg_components.plans.recipes import read_recipe, recipe_names
from tests.conftest import ROOT, make_scan, write_nifti
from tests.test_verdict import measured
from tools.verdict import weights_of

CONFIGS = ROOT / "bundles" / "mapseg_adaptation" / "configs"


@pytest.fixture
def bundle(tmp_path, dataset):
    """A bundle with two target scans, configs of training and inference, and weights."""
    measured(tmp_path, dataset, {"source-only": 0.5, "adapted": 0.5})
    folder = tmp_path / "bundle"
    shutil.copyfile(CONFIGS / "train.json", folder / "configs" / "train.json")
    content = json.loads((folder / "datalist.json").read_text())
    content["target_training"] = []
    for seed in (7, 8):
        path = tmp_path / f"{seed}.nii.gz"
        write_nifti(path, make_scan(seed=seed)[0])
        content["target_training"].append({"image": str(path)})
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder, weights_of(tmp_path / "seed3", "source-only")


def surer(sign: int):
    """Instead of a model: the first structure everywhere, surer in bright scans (1) or in dark ones (-1)."""

    def infer(self, image, network):
        logit = 1 + sign * image[image > 0].mean()
        return torch.stack([torch.zeros_like(image[:, 0]), logit.expand_as(image[:, 0])], dim=1)

    return infer


def test_the_model_is_surer_in_the_order_of_the_source(bundle, monkeypatch):
    monkeypatch.setattr(AutocastInferer, "__call__", surer(1))
    bright = find_order(*bundle)
    monkeypatch.setattr(AutocastInferer, "__call__", surer(-1))
    dark = find_order(*bundle)
    assert len(bright["confidence_as_is"]) == len(bright["confidence_inverted"]) == 2, "no scan is counted twice"
    assert bright["inverted"] is not dark["inverted"]
    for found in (bright, dark):
        gains = [b - a for a, b in zip(found["confidence_as_is"], found["confidence_inverted"])]
        assert all((gain > 0) is found["inverted"] for gain in gains)
    for order in ("as_is", "inverted"):
        assert confidence_on_target(*bundle, [order]) == {order: dark[f"confidence_{order}"]}
    text = describe_order(bright if bright["inverted"] else dark)
    assert "in 2 of them" in text and "are shown bright for dark" in text and TARGET_INVERTED in text


@pytest.mark.parametrize("gains, found", [((2.0, -0.1), False), ((2.0, 0.1), True), ((0.01, 0.01), False)])
def test_scans_must_agree_and_the_mean_be_clear(bundle, monkeypatch, gains, found):
    """Logits of the first structure: 1 as it is, and bright for dark, which comes next, so much more."""
    logits = iter([logit for gain in gains for logit in (1.0, 1.0 + gain)])

    def infer(self, image, network):
        return torch.stack([torch.zeros_like(image[:, 0]), torch.full_like(image[:, 0], next(logits, 1.0))], dim=1)

    monkeypatch.setattr(AutocastInferer, "__call__", infer)
    assert find_order(*bundle)["inverted"] is found


@pytest.mark.parametrize(
    "as_is, opposite, source, far", [(1.0, 0.5, 1.1, False), (1.0, 1.5, 3.0, True), (1, 2, 0, False)]
)
def test_a_target_is_far_where_the_model_is_less_sure_than_on_the_source_s_own_scans(
    bundle, monkeypatch, as_is, opposite, source, far
):
    """Logits of the first structure, by what is segmented: two target scans in either order, then the source's own."""
    logits = iter([as_is, opposite] * 2)

    def infer(self, image, network):
        return torch.stack([torch.zeros_like(image[:, 0]), torch.full_like(image[:, 0], next(logits, source))], dim=1)

    monkeypatch.setattr(AutocastInferer, "__call__", infer)
    found = find_order(*bundle)
    own = torch.tensor([0.0, source]).softmax(dim=0)[1].item() if source > 0 else 0.0
    assert found["confidence_source"] == pytest.approx([own] * len(found["confidence_source"]), abs=1e-4)
    assert len(found["confidence_source"]) == 1 and found["far"] is far
    text = describe_order(found)
    assert ("in contrasts of any order" in text) is far and f"{own:.3f} on the source's own" in text


def test_without_scans_of_the_source_no_target_is_far(bundle, monkeypatch):
    monkeypatch.setattr(AutocastInferer, "__call__", surer(1))
    path = bundle[0] / "datalist.json"
    content = json.loads(path.read_text())
    del content["source_validation"]
    path.write_text(json.dumps(content))
    found = find_order(*bundle)
    assert found["confidence_source"] == [] and found["far"] is False


@pytest.mark.parametrize("name", recipe_names())
def test_for_a_target_that_is_far_the_source_is_learnt_on_in_any_order(name):
    recipe = read_recipe(name)
    request = {"settings": None, "random_contrasts": True}
    near, far = ({"order": {"inverted": True, "far": answer}} for answer in (False, True))
    found = recipe_of(recipe, far, request)
    if not any(stage.only_as_is for stage in recipe.stages):
        assert found == recipe
        return
    assert [stage.name for stage in found.stages] == [stage.name for stage in recipe.stages]
    assert recipe_of(recipe, near, request) != found == recipe_of(found, far, request)
    place = next(number for number, stage in enumerate(recipe.stages) if stage.only_as_is)
    assert found.stages[:place] == recipe.stages[:place] and found.stages[place].contrasts == "any_order.yaml"
    assert found.stages[place].factors("small-data-cpu")["max_epochs"] == 1.5
    translated = False
    for before, after in zip(recipe.stages[place + 1 :], found.stages[place + 1 :]):
        translated |= before.name == "translation"
        fewer = {} if translated else {"max_epochs": 0.5 * before.scale.get("max_epochs", 1)}
        assert after.scale == before.scale | fewer
    for before, after in zip(recipe.stages[place:], found.stages[place:]):
        # a translation shows the source in the target's own contrast, which pseudo labels are learnt in as well
        translated = "translation" in [stage.name for stage in recipe.stages[: recipe.stages.index(before) + 1]]
        expected = "any_order.yaml" if before.contrasts and not translated else before.contrasts
        assert after.contrasts == expected and before.paths == after.paths


@pytest.mark.parametrize("sign", [1, -1])
def test_both_configs_have_it(bundle, monkeypatch, sign):
    monkeypatch.setattr(AutocastInferer, "__call__", surer(sign))
    before = {name: json.loads((bundle[0] / "configs" / name).read_text()) for name in ("train.json", "inference.json")}
    found = settle_order(*bundle)
    for name, content in before.items():
        assert json.loads((bundle[0] / "configs" / name).read_text()) == {**content, TARGET_INVERTED: found["inverted"]}


def parsed(name, dataset, settings, *identifiers):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name), str(CONFIGS / "tiny.yaml")])
    parser.update({"dataset_dir": str(dataset), "datalist": str(dataset / "datalist.json"), **settings})
    return [parser.get_parsed_content(identifier) for identifier in identifiers]


def test_the_target_alone_is_shown_bright_for_dark_in_patch_and_view(dataset):
    shown = {}
    for order in (False, True):
        settings = {TARGET_INVERTED: order, "labels": {"first": 1, "second": 2}, "diagnostics_scans": 1}
        names = ("train#dataset", "train#target_dataset", "train#diagnostic_dataset", "validate#dataset")
        shown[order] = [SeededDataset(one)[0, 3] for one in parsed("train.json", dataset, settings, *names)]
    source, target, diagnostic, validation = zip(shown[False], shown[True])
    for as_is, other in (source, validation):
        assert torch.equal(as_is["image"], other["image"])
    for as_is, other in (target, diagnostic):
        for key in {"image", "global_image"} & set(as_is):
            assert (as_is[key] > 0).any() and torch.equal(other[key], inverted(as_is[key])), key
    assert "global_image" in target[0]


def test_the_comparison_shows_the_source_as_it_is(bundle, monkeypatch):
    """Calibration and target scans, with one image for both: what differs is the order."""
    folder, weights = bundle
    path = folder / "datalist.json"
    content = json.loads(path.read_text())
    content["target_training"] = [{"image": content["source_validation"][0]["image"]}]
    path.write_text(json.dumps(content))
    config = folder / "configs" / "inference.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {TARGET_INVERTED: True}))
    seen = []
    original = AutocastInferer.__call__
    monkeypatch.setattr(AutocastInferer, "__call__", lambda self, x, n: seen.append(x[0]) or original(self, x, n))
    assess(str(folder), {"source_only": str(weights)}, quiet=True)
    assert torch.equal(seen[-3], inverted(seen[0])), "the last scan and its two views"


def test_stages_for_a_target_as_it_is_are_left_out_of_others():
    """What they would have made comes from the stage before, also where it is known without a look at the target."""
    recipe = read_recipe("mapseg")
    source, contrasts, adaptation = recipe.stages
    assert contrasts.only_as_is and adaptation.paths["initial_weights"].startswith(f"{contrasts.name}/")
    nothing = {"settings": None, "random_contrasts": True}
    found = {answer: {"order": {"inverted": answer}} for answer in (True, False)}
    whole = [recipe_of(recipe, {}, nothing), recipe_of(recipe, found[False], nothing)]
    whole.append(recipe_of(recipe, found[True], {**nothing, "settings": {TARGET_INVERTED: False}}))
    assert whole == [recipe] * 3
    short = [recipe_of(recipe, found[True], nothing), recipe_of(recipe, {}, {**nothing, "random_contrasts": False})]
    short.append(recipe_of(recipe, {}, {**nothing, "settings": {TARGET_INVERTED: True}}))
    for one in short:
        assert one.stages[0] == source and len(one.stages) == 2
        assert one.stages[1].paths["initial_weights"] == one.models["source_only"] == recipe.order
    assert recipe_of(short[0], found[True], nothing) == short[0], "a second time changes nothing"


@pytest.mark.parametrize(
    "stage, record, changes, asks",
    [
        (0, {}, {}, True),
        (1, {}, {}, False),
        (0, {"done": ["source", "contrasts", "adaptation"]}, {}, False),  # a run of an earlier version
        (0, {"done": []}, {}, False),
        (0, {"order": {"inverted": False}}, {}, False),
        (0, {}, {"random_contrasts": False}, False),
        (0, {}, {"settings": {TARGET_INVERTED: False}}, False),
        (0, {}, {"settings": {"max_epochs": 3}}, True),
    ],
)
def test_it_is_asked_once_and_only_where_it_is_not_known(stage, record, changes, asks):
    recipe = read_recipe("mapseg")
    request = {"settings": None, "random_contrasts": True, **changes}
    record = {"done": [recipe.stages[stage].name], **record}
    assert asks_for_order(recipe, recipe.stages[stage], record, request) is asks
    assert not asks_for_order(read_recipe("mapseg_masked"), recipe.stages[stage], record, request)
