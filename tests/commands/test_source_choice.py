# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Several source models: the surest on the target goes on, whatever follows it; a run goes on wherever it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mapseg_components.commands import source_choice
from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.source_choice import check_number, choose_source, chosen_of, describe_choice
from mapseg_components.errors import ConfigError
from mapseg_components.plans.recipes import read_recipe, recipe_names
from tests.scans import make_domains

# confidence as it is and bright for dark
SURE = {"source": (0.7, 0.6), "source_2": (0.5, 0.9), "source_3": (0.8, 0.6)}


@pytest.fixture
def sure(monkeypatch):
    """Confidences of `SURE` by the folder of the weights."""
    asked = []

    def confidence(bundle, weights, orders):
        as_is, inverted = SURE[Path(weights).parent.name]
        asked.append(Path(weights).parent.name)
        both = {"as_is": [as_is] * 2, "inverted": [inverted] * 2}
        return {order: both[order] for order in orders}

    monkeypatch.setattr(source_choice, "confidence_on_target", confidence)
    return asked


@pytest.mark.parametrize("name", recipe_names())
def test_one_of_them_takes_the_place_of_the_only_one(name):
    recipe = read_recipe(name)
    several = recipe.with_source_models(3)
    assert recipe.with_source_models(1) == recipe and len(several.stages) == len(recipe.stages) + 2
    names = [stage.name for stage in several.first]
    for stage in several.first:  # what it writes itself is in its own folder
        assert not {path.partition("/")[0] for path in stage.paths.values()} & ({*names} - {stage.name})
    assert several.with_source_model(names[0]) == recipe
    for number, chosen in enumerate(names):
        found = several.with_source_model(chosen)
        assert [stage.member for stage in found.first] == [number] and len(found.stages) == len(recipe.stages)
        text, other = repr((found.models, found.order, found.stages[1:])), {*names} - {chosen}
        assert not any(f"{one}/" in text for one in other)
        assert found.with_source_model(chosen) == found, "a second time changes nothing"
        assert several.without_contrasts().with_source_model(chosen) == found.without_contrasts()


@pytest.mark.parametrize(
    "method, changes, chosen",
    [
        ("mapseg", {}, "source_2"),  # by the order in which it is surest
        ("mapseg", {"settings": {"target_inverted": False}}, "source_3"),
        ("mapseg", {"settings": {"target_inverted": True}}, "source_2"),
        ("mapseg", {"random_contrasts": False}, "source_3"),
        ("source_only", {}, "source_3"),  # never bright for dark
    ],
)
def test_the_surest_is_chosen_in_the_order_that_it_will_see(sure, tmp_path, method, changes, chosen):
    recipe = read_recipe(method).with_source_models(3)
    found = choose_source(tmp_path, recipe, {}, {"settings": None, "random_contrasts": True, **changes})
    assert found["chosen"] == chosen and list(found["confidence"]) == list(SURE) == sure
    assert f"Of 3 source models {chosen} goes on" in describe_choice(found)
    assert chosen_of(recipe, {"source_choice": found}).first[0].name == chosen


@pytest.fixture
def folders(tmp_path):
    make_domains(tmp_path)
    return {"source": str(tmp_path / "t1"), "target": str(tmp_path / "t2"), "output": str(tmp_path / "run")}


@pytest.mark.parametrize("killed", [None, "source_2", "the choice", "the order", "adaptation"])
def test_a_run_trains_all_and_goes_on_with_one_wherever_it_was_ended(sure, folders, monkeypatch, killed):
    trained, left = [], [killed]

    def end(where):
        if left == [where]:
            left.clear()
            raise KeyboardInterrupt

    def stage(name, bundle, configs, folder, settings, on_epoch=None):
        end(name)
        trained.append((name, settings.get("seed"), str(settings.get("initial_weights", ""))))
        return 1.0

    def choose(*arguments):
        end("the choice")
        return choose_source(*arguments)

    def settle(bundle, weights):
        end("the order")
        trained.append(("order", None, str(weights)))
        return {"confidence_as_is": [0.5], "confidence_inverted": [0.4], "inverted": False}

    monkeypatch.setattr("mapseg_components.commands.training.run_stage", stage)
    command = sys.modules["mapseg_components.commands.adapt"]  # the package has the function of that name
    monkeypatch.setattr(command, "choose_source", choose)
    monkeypatch.setattr(command, "settle_order", settle)
    call = {**folders, "source_models": 3, "seed": 5, "quiet": True}
    if killed:
        with pytest.raises(KeyboardInterrupt):
            adapt(**call)
    with pytest.raises(ConfigError, match="no epoch was validated"):  # nothing is trained here
        adapt(**call)
    names = [name for name, _, _ in trained]
    assert names == ["source", "source_2", "source_3", "order", "contrasts", "adaptation"]
    assert [seed for _, seed, _ in trained][1:3] == [1005, 2005] and trained[0][1] in (None, 5)
    assert "/source_2/" in trained[3][2] and "/source_2/" in trained[4][2] and "/contrasts/" in trained[5][2]
    record = json.loads((Path(folders["output"]) / "run.json").read_text())
    assert record["source_choice"]["chosen"] == "source_2"


def test_what_is_no_number_of_models_is_refused():
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="expected a whole number from 1"):
            check_number(wrong)
    with pytest.raises(ConfigError, match="the package has one model of the source"):
        check_number(2, "package")
    check_number(1, "package")
