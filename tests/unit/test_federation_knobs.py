# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What travels, what is kept, what labels, what is shipped and how updates are joined, each by a plain reference."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.commands.request import ADDED, resumed
from mapseg_components.errors import ConfigError, FederationError
from mapseg_components.federated import (
    Broadcast,
    CoordinateMedian,
    Coordinator,
    Site,
    TrimmedMean,
    Update,
    WeightedMean,
    simulate,
)
from mapseg_components.federated.kept import moments_of, restore_moments
from mapseg_components.federated.plan import Plan
from mapseg_components.federated.site import initial_weights
from mapseg_components.plans.federation import check_federation, federation_settings, sites_of
from mapseg_components.plans.recipes import read_recipe
from tests.federation import make_site, small_plan, small_settings

DECAY = 0.5  # of `small_settings`


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 8])
def test_robust_aggregations_are_those_of_sorted_numbers(sites):
    models = [{"w": torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(k))} for k in range(sites)]
    values = np.sort(np.stack([model["w"].numpy().astype(float) for model in models]), axis=0)
    for share in (0.1, 0.2, 0.3, None):
        rule = CoordinateMedian() if share is None else TrimmedMean(share)
        for model in random.Random(sites).sample(models, sites):
            rule.add(model, 7)
        cut = 0 if share is None else min(int(np.ceil(share * sites)), (sites - 1) // 2)
        expected = np.median(values, axis=0) if share is None else values[cut : sites - cut].mean(axis=0)
        np.testing.assert_allclose(rule.result()["w"].numpy(), expected, rtol=1e-6)
        assert rule.total == 7 * sites and rule.result()["w"].dtype == torch.float32


def test_a_site_far_away_moves_no_number_beyond_the_others():
    for rule in (CoordinateMedian(), TrimmedMean(0.25)):
        for value in (1.0, -1.0, 3.0, 1e9):
            rule.add({"w": torch.full((2, 3), value), "n": torch.tensor(4)}, 1000 if value > 10 else 1)
        found = rule.result()
        assert bool((found["w"] >= -1).all() and (found["w"] <= 3).all()) and found["n"].item() == 4


@pytest.mark.parametrize(
    ("rule", "weights"),
    [(WeightedMean, [0.1, 0.2, 0.7]), (CoordinateMedian, [1 / 3] * 3), (lambda: TrimmedMean(0.3), [1 / 3] * 3)],
)
def test_log_and_score_weight_sites_as_the_aggregation_does(tmp_path, rule, weights):
    plan = small_plan(rounds=1, aggregation=rule)
    coordinator = Coordinator(plan, {"w": torch.zeros(2, 3)}, ["a"], tmp_path, tmp_path / "o")
    coordinator.start()
    coordinator.accept_source(update("server", 0, 1.0))
    for site, scans, loss in (("a", 1, 0.3), ("b", 2, 0.5), ("c", 7, 0.9)):
        coordinator.accept(dataclasses.replace(update(site, 0, 2.0, loss), scans=scans))
    line = coordinator.close()
    assert [line["sites"][site]["weight"] for site in "abc"] == pytest.approx(weights)
    assert line["score"] == pytest.approx(-np.dot(weights, [0.3, 0.5, 0.9]))
    assert [line["sites"][site]["scans"] for site in "abc"] == [1, 2, 7]


def distance(found, expected):
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())


def mixed(kept, other):
    return {name: DECAY * value + (1 - DECAY) * other[name] for name, value in kept.items()}


@pytest.fixture(scope="module")
def party(tmp_path_factory):
    """A function from settings of the plan to a site with one scan, which takes one step in a round; its start."""
    root = tmp_path_factory.mktemp("federation")
    datalist = make_site(root / "scans", 1, 3)

    def make(name, **changes):
        plan = small_plan(min_sites=1, client_steps=1, rounds=9, last_learning_rate=0.01, **changes)
        return Site("site-1", "target", plan, small_settings(), datalist, root / name)

    return make, initial_weights(small_settings(), 0)


def test_a_student_that_is_sent_is_what_the_teacher_follows_and_moments_and_teacher_are_kept(party, caplog):
    """Teacher = decay x before + (1 - decay) x student after one step; over rounds too, also where some are missed."""
    make, start = party
    kept = make("kept", upload="student", keep_moments=True)
    first = kept.train(Broadcast(0, 0, start)).weights
    teacher = make("teacher").train(Broadcast(0, 0, start)).weights
    assert distance(first, start) > 1e-3 and distance(teacher, mixed(start, first)) < 1e-6
    assert distance(make("student", upload="student").train(Broadcast(0, 0, start)).weights, first) == 0

    later = kept.train(Broadcast(4, 9, start)).weights  # rounds 1 to 3 were missed
    forgetful = make("student", upload="student").train(Broadcast(4, 9, start)).weights
    state = read_checked(kept.folder / "kept.pt")
    assert {entry["step"].item() for entry in state["after"]["moments"].values()} == {2}
    assert distance(later, forgetful) > 1e-4  # moments of the first round
    # the wrapper of a training pass names the network's tensors with a prefix
    tail = {name.rpartition("network.")[2]: value for name, value in state["after"]["teacher"].items()}
    assert distance(tail, mixed(teacher, later)) < 1e-6
    again = make("kept", upload="student", keep_moments=True).train(Broadcast(4, 9, start)).weights
    assert distance(again, later) == 0  # a round that is repeated, by a process that is started anew
    assert "another federation" not in caplog.text
    anew = make("kept", upload="student", keep_moments=True).train(Broadcast(5, 9, start, "of another")).weights
    assert distance(anew, make("student", upload="student").train(Broadcast(5, 9, start)).weights) == 0
    assert "kept.pt is of another federation: round 5 starts without it" in caplog.text


def test_labels_of_the_broadcast_stand_still_while_the_teacher_moves(party):
    make, start = party
    site = make("labels", labels_by="broadcast")
    sent = site.train(Broadcast(0, 0, start)).weights
    labeller = site.trainer.method.labels.teacher
    found = {name.rpartition("network.")[2]: value for name, value in labeller.network.state_dict().items()}
    assert labeller.active and distance(found, start) == 0 and distance(sent, start) > 1e-3
    assert make("own").plan.labels_by == "teacher"


def test_moments_of_another_network_are_refused():
    first, second = (torch.optim.AdamW([torch.nn.Parameter(torch.ones(*shape))], lr=0.1) for shape in ((2, 3), (3, 5)))
    first.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    first.step()
    with pytest.raises(FederationError, match=r"parameter 0 is \(2, 3\), expected \(3, 5\).*move the file away"):
        restore_moments(second, moments_of(first))


def update(site, number, value, loss=0.5, steps=1):
    return Update(site, number, {"w": torch.full((2, 3), value)}, 1, steps, ["a"], {"target_loss": loss})


def play(coordinator, losses):
    """Rounds in which the server sends 10, 20, ... and the site 1, 2, ... from where the coordinator stands."""
    for number in range(coordinator.round, len(losses)):
        coordinator.start()
        coordinator.accept_source(update("server", number, 10.0 * (number + 1)))
        coordinator.accept(update("site-1", number, number + 1.0, losses[number]))
        coordinator.close()


@pytest.mark.parametrize(
    ("ship", "select", "expected", "chosen"),
    [("average", "last", 3.0, 2), ("average", "best", 2.0, 1), ("broadcast", "best", 30.0, 1)],
)
def test_the_weights_that_are_shipped_are_the_average_or_what_the_server_makes_of_it(
    tmp_path, ship, select, expected, chosen
):
    plan = small_plan(rounds=3, min_sites=1, ship=ship, select=select)
    coordinator = Coordinator(plan, {"w": torch.zeros(2, 3)}, ["a"], tmp_path, tmp_path / "o")
    play(coordinator, [0.5, 0.2, 0.4])
    assert not coordinator.unfinished
    assert read_checked(tmp_path / "model.pt")["w"].unique().tolist() == [expected]
    selection = json.loads((tmp_path / "model_selection.json").read_text())["model.pt"]
    assert selection["round"] == chosen and selection["weights"] == ("global" if ship == "average" else "broadcast")
    lines = [json.loads(line) for line in (tmp_path / "o" / "history.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["target_loss"]) for line in lines] == [(1, 0.5), (2, 0.2), (3, 0.4)]


def test_the_last_round_is_shipped_after_one_more_pass_of_the_server_also_if_it_was_stopped_before(tmp_path):
    plan = small_plan(rounds=2, min_sites=1, ship="broadcast", select="last")

    def opened():
        return Coordinator(plan, {"w": torch.zeros(2, 3)}, ["a"], tmp_path, tmp_path / "o")

    first = opened()
    play(first, [0.1, 0.9])
    again = opened()
    assert (
        first.start().federation
        == again.start().federation
        != Coordinator(plan, first.weights, ["a"], tmp_path / "anew", tmp_path / "o").start().federation
    )
    assert again.unfinished and again.start().weights["w"].unique().tolist() == [2.0]
    assert read_checked(tmp_path / "model.pt")["w"].unique().tolist() == [20.0]  # of the round before
    assert plan.learning_rate(2) == plan.learning_rate(1)
    again.finish(update("server", 2, 30.0))
    assert read_checked(tmp_path / "model.pt")["w"].unique().tolist() == [30.0]
    assert not opened().unfinished and opened().round == 2
    states = [read_checked(tmp_path / name) for name in ("federation.pt", "federation.previous.pt")]
    assert [state["round"] for state in states] == [2, 1]


def test_without_a_source_the_sites_get_the_average_itself_and_weights_must_be_given(tmp_path):
    plan = small_plan(rounds=2, min_sites=1, server_steps=0)
    coordinator = Coordinator(plan, {"w": torch.ones(2, 3)}, ["a"], tmp_path, tmp_path / "o")
    coordinator.start()
    assert coordinator.skip_source().weights["w"].unique().tolist() == [1.0]
    with pytest.raises(ConfigError, match=r"server_steps is 0, and initial_weights null.*name weights"):
        initial_weights(small_settings(), 0, trained=True)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"server_steps": 0, "select": "last"}, ["a0", "b0", "a1", "b1"]),
        ({"ship": "broadcast", "select": "last"}, ["server0", "a0", "b0", "server1", "a1", "b1", "server2"]),
    ],
)
def test_the_simulation_asks_the_server_as_often_as_the_plan_has_it(tmp_path, monkeypatch, changes, asked):
    called = []

    def train(self, broadcast):
        called.append(f"{self.name}{broadcast.round}")
        weights = {name: value + 1 for name, value in broadcast.weights.items()}
        return Update(self.name, broadcast.round, weights, 1, 1, self.labels, {"target_loss": 0.5})

    monkeypatch.setattr(Site, "check", lambda self: None)
    monkeypatch.setattr(Site, "train", train)
    start = initial_weights(small_settings(), 0)
    write_atomic(start, tmp_path / "start.pt")
    settings = small_settings(initial_weights=str(tmp_path / "start.pt"))
    for _ in range(2):  # the same call again has nothing to do
        sites, plan = {"a": "none", "b": "none"}, small_plan(**changes)
        found = simulate(plan, "none", sites, tmp_path / "m", tmp_path / "o", settings=settings)
        assert called == asked
    averaged = 2 if "server_steps" in changes else 4
    assert distance(found, {name: value + averaged for name, value in start.items()}) < 1e-5
    further = len(asked) % 2  # the last pass of the server
    shipped = read_checked(tmp_path / "m" / "model.pt")
    assert distance(shipped, {name: value + averaged + further for name, value in start.items()}) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upload": "both"}, "upload is 'both', expected student or teacher"),
        ({"keep_moments": "yes"}, "keep_moments is 'yes', expected true or false"),
        ({"keep_moments": True}, "keep_moments is True, expected false where upload is teacher"),
        ({"rounds": 2.5}, "rounds is 2.5, expected 1 or more, a whole number"),
        ({"labels_by": "server"}, "labels_by is 'server', expected teacher or broadcast"),
        ({"ship": "mean"}, "ship is 'mean', expected average or broadcast"),
        ({"ship": "broadcast", "server_steps": 0}, "ship is 'broadcast', expected average where server_steps is 0"),
        ({"select": "first"}, "select is 'first', expected best or last"),
        ({"aggregation": "median"}, "aggregation is 'median', expected a class"),
    ],
)
def test_wrong_values_are_refused_with_what_is_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_plan(**changes)
    with pytest.raises(ConfigError, match=r"share of a trimmed mean is 0\.6"):
        TrimmedMean(0.6)


@pytest.mark.parametrize("method", ["FourierMixing", "CopyPaste", "AdvEnt", "SelfTraining"])
def test_a_method_that_needs_both_sides_is_refused_before_any_scan(tmp_path, method):
    settings = small_settings(method={"_target_": f"mapseg_components.methods.{method}"})
    with pytest.raises(ConfigError, match=f"site-1: {method} needs patches of the source beside those of the target"):
        Site("site-1", "target", small_plan(), settings, tmp_path / "none", tmp_path).check()


@pytest.mark.parametrize("method", ["BUDASeg", "EntropyMinimization"])
def test_a_method_without_a_source_is_refused_steps_of_the_server(tmp_path, method):
    settings = small_settings(method={"_target_": f"mapseg_components.methods.{method}"})
    with pytest.raises(ConfigError, match=f"server: {method} learns nothing from the source.*server_steps is 2.*to 0"):
        Site("server", "source", small_plan(), settings, tmp_path / "none", tmp_path).check()
    with pytest.raises(ConfigError, match="labels_by is broadcast, and this method has no '@pseudo_labels'"):
        Site("a", "target", small_plan(labels_by="broadcast"), settings, tmp_path / "none", tmp_path).check()


CASES = [{"case_id": f"scan{number}", "image": f"{number}.nii.gz"} for number in range(7)]


@pytest.mark.parametrize("sites", range(1, 8))
def test_each_target_scan_is_at_one_site_and_the_seed_decides_which(sites):
    split = sites_of(CASES, sites, seed=4)
    named = sorted(case["case_id"] for part in split.values() for case in part)
    assert named == sorted(case["case_id"] for case in CASES) and len(split) == sites
    assert {len(part) for part in split.values()} <= {7 // sites, 7 // sites + 1}
    assert split == sites_of(CASES, sites, seed=4)
    assert sites in (1, 7) or any(split != sites_of(CASES, sites, seed=seed) for seed in range(4))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (8, "sites is 8, and there are 7 target scans"),
        (True, "sites is True, expected a number, or a mapping"),
        ({"a": "scan0"}, "expected a number, or a mapping"),
        ({"../a": ["scan0"]}, r"sites has \['../a'\], expected names"),
        ({"server": ["scan0"]}, r"sites has \['server'\]"),
        ({"a": ["scan9"]}, r"unknown: \['scan9'\]; at no site: \['scan0'"),
        ({"a": [f"scan{k}" for k in range(7)], "b": ["scan1"]}, r"at two sites: \['scan1'\]"),
        ({"a": [f"scan{k}" for k in range(7)], "b": ["apart"]}, r"sites \['b'\] have no scan to adapt on.*held_out"),
    ],
)
def test_sites_that_make_no_sense_are_refused_before_any_training(wanted, message):
    with pytest.raises(ConfigError, match=message):
        check_federation(read_recipe("federated"), {"sites": wanted}, CASES, [{"case_id": "apart"}], 0)


def test_settings_of_the_federation_are_checked_before_any_training_of_the_source():
    recipe = read_recipe("federated")
    check_federation(recipe, {"rounds": 30, "sites": 2}, CASES, [], 0)
    with pytest.raises(ConfigError, match="ship is 'mean'"):
        check_federation(recipe, {"ship": "mean"}, CASES, [], 0)
    check_federation(recipe, {"aggregation": "$mapseg_components.federated.CoordinateMedian"}, CASES, [], 0)
    check_federation(recipe, {"aggregation": "$lambda: mapseg_components.federated.TrimmedMean(0.3)"}, CASES, [], 0)
    with pytest.raises(ConfigError, match=r"the federation's settings cannot be used .*Median"):
        check_federation(recipe, {"aggregation": "$mapseg_components.federated.Median"}, CASES, [], 0)
    check_federation(recipe, {"min_sites": 3}, CASES[:3], [], 0)
    with pytest.raises(ConfigError, match="min_sites is 3, and there are 2 sites: lower it"):
        check_federation(recipe, {"min_sites": 3}, CASES[:2], [], 0)
    check_federation(read_recipe("mapseg"), {"ship": "mean"}, CASES, [], 0)  # no setting of that method


def test_a_run_goes_on_with_other_limits_of_a_round_and_not_with_other_rounds(tmp_path):
    request = {"method": "federated", "settings": {"min_sites": 3, "round_timeout_s": 5}}
    (tmp_path / "run.json").write_text(json.dumps({"request": request, "done": ["source"]}))
    now = ADDED | {"method": "federated", "settings": {"min_sites": 2, "privacy_max_epsilon": 9.0}}
    assert resumed(tmp_path / "run.json", now) == {"request": now, "done": ["source"]}
    with pytest.raises(ConfigError, match=r"holds a run with other arguments .*'rounds': 3"):
        resumed(tmp_path / "run.json", now | {"settings": {"min_sites": 2, "rounds": 3}})


def test_a_federation_is_as_long_as_the_centralized_adaptation_and_starts_from_the_same_stages(tmp_path):
    recipe, central = read_recipe("federated"), read_recipe("mapseg")
    stage, adaptation = recipe.stages[-1], central.stages[-1]
    assert recipe.stages[:-1] == central.stages[:-1] and recipe.order == central.order
    assert stage.overlays == (*adaptation.overlays, "federated.json") and stage.contrasts == adaptation.contrasts
    assert recipe.overlays == central.overlays and stage.paths == adaptation.paths
    config = {"max_epochs": 16, "epoch_length": 50, **stage.settings}
    found = federation_settings({"target_training": CASES}, config, {}, 0, tmp_path)
    assert (found["max_epochs"], found["epoch_length"], found["client_steps"]) == (20, 40, 13)
    assert found["rounds"] == "@max_epochs" and found["server_steps"] == "@epoch_length"
    scans = [json.loads(Path(path).read_text())["target_training"] for path in found["sites"].values()]
    assert sum(map(len, scans)) == 7 and len(scans) == 3
    asked = {"rounds": 40, "sites": 2, "max_movement": None, "local_layers": ["*norm*"], "patch_size": [1, 2, 3]}
    found = federation_settings({"target_training": CASES}, config, asked, 0, tmp_path)
    assert (found["max_epochs"], found["epoch_length"], found["client_steps"]) == (40, 20, 10)
    assert found["max_movement"] == "$None" and found["local_layers"] == ["*norm*"] and "patch_size" not in found
    tiny = federation_settings(
        {"target_training": CASES[:2]}, {**config, "max_epochs": 1, "epoch_length": 3}, {}, 0, tmp_path
    )
    assert (tiny["max_epochs"], tiny["epoch_length"], len(tiny["sites"])) == (3, 1, 2)
    assert isinstance(small_plan(**{name: stage.settings[name] for name in ("upload", "ship", "select")}), Plan)
