# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapseg_components.checkpoints import read_checked
from mapseg_components.errors import ConfigError
from mapseg_components.federated import Coordinator, Privacy, Site, simulate
from mapseg_components.federated.core import (
    Update,
    WeightedMean,
    cosine_rate,
    local_names,
    movement,
    participants,
    payload_bytes,
    site_seed,
)
from mapseg_components.federated.flare.party import sides_of
from mapseg_components.federated.site import initial_weights
from mapseg_components.methods import MAPSeg
from tests.conftest import ROOT
from tests.faults.common import bundle_run
from tests.federation import FILES, LABELS, make_federation, small_plan, small_settings, write_parties


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(2, 3, 5, generator=generator).to(dtype),
        "b": torch.randn(4, generator=generator).to(dtype),
    }


def mean(models, counts):
    result = WeightedMean()
    for weights, count in zip(models, counts):
        result.add(weights, count)
    return result.result()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.randoms())
def test_the_mean_is_weighted_by_scans_whatever_the_order(counts, order):
    models = [model(seed) for seed in range(len(counts))]
    result = mean(models, counts)
    for name in result:
        expected = sum(weights[name].double() * count for weights, count in zip(models, counts)) / sum(counts)
        torch.testing.assert_close(result[name], expected.float(), rtol=1e-6, atol=1e-7)
    pairs = list(zip(models, counts))
    order.shuffle(pairs)
    again = mean(*zip(*pairs))
    assert all(torch.equal(result[name], again[name]) for name in result)


def test_the_mean_of_one_is_that_one():
    assert all(torch.equal(value, model(1)[name]) for name, value in mean([model(1)], [7]).items())


def test_counters_are_not_averaged():
    result = mean([{"steps": torch.tensor(3)}, {"steps": torch.tensor(8)}], [1, 1])
    assert result["steps"].item() == 3 and result["steps"].dtype == torch.int64


def test_movement_is_a_share_of_the_norm():
    old = {"a": torch.tensor([3.0, 4.0]), "n": torch.tensor(3)}
    assert movement(old, old) == 0.0
    assert movement(old, {"a": torch.tensor([3.0, 4.5]), "n": torch.tensor(9)}) == pytest.approx(0.1)


def test_the_rate_falls_from_first_to_last():
    rates = [cosine_rate(number, 100, 1e-4, 1e-6) for number in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-6)
    assert all(a > b for a, b in zip(rates, rates[1:])) and cosine_rate(0, 1, 1e-4, 1e-6) == 1e-4


def test_participants_are_drawn_by_round_and_all_get_their_turn():
    names = [f"site-{k}" for k in range(5)]
    drawn = [participants(names, 0.4, 1, 0, number) for number in range(40)]
    assert all(len(each) == 2 and each == sorted(each) for each in drawn)
    assert {name for each in drawn for name in each} == set(names)
    assert drawn == [participants(reversed(names), 0.4, 1, 0, number) for number in range(40)]
    assert len(participants(names, 0.1, 3, 0, 0)) == 3 and participants(names, 1.0, 1, 0, 0) == names


def test_a_site_draws_by_its_own_name():
    assert site_seed(0, "a") == site_seed(0, "a") != site_seed(0, "b") and site_seed(1, "a") != site_seed(0, "a")


def test_bytes_are_those_of_the_tensors():
    weights = {"a": torch.zeros(10), "n": torch.zeros(2, dtype=torch.int64)}
    assert payload_bytes(weights) == 56 and payload_bytes(weights, torch.bfloat16) == 36


def test_the_paper_s_losses_are_the_settings_of_the_bundle():
    """Eq. 9 and Eq. 10: beta, gamma and delta for the clean and for the masked pass, on either side."""
    config = small_settings()
    method = MAPSeg(None, **{key: config[key] for key in ("beta", "gamma", "delta", "target_clean", "source_masked")})
    for side in ("source", "target"):
        for ending in ("", "_masked"):
            found = [method.weights[f"{side}_{kind}{ending}"] for kind in ("local", "global", "cosine")]
            assert found == pytest.approx([0.5, 0.05, 0.025])


class LargestSite:
    """A rule that somebody adds: the model of the site with most scans."""

    def __init__(self):
        self.total, self.largest, self.weights = 0, 0, {}

    def add(self, weights, count):
        self.total += count
        if count > self.largest:
            self.largest, self.weights = count, dict(weights)

    def result(self):
        return self.weights


def test_the_plan_names_the_rule_that_makes_one_model(tmp_path):
    def update(site, weights, scans):
        return Update(site, 0, weights, scans, 1, list(LABELS), {"target_loss": 0.5})

    for rule, expected in ((LargestSite, model(2)), (WeightedMean, mean([model(1), model(2)], [2, 5]))):
        folder = tmp_path / rule.__name__
        coordinator = Coordinator(small_plan(aggregation=rule), model(0), list(LABELS), folder / "m", folder / "o")
        coordinator.start()
        coordinator.accept_source(update("server", model(3), 4))
        for site, seed, scans in (("site-1", 1, 2), ("site-2", 2, 5)):
            coordinator.accept(update(site, model(seed), scans))
        coordinator.close()
        assert all(torch.equal(coordinator.weights[name], value) for name, value in expected.items())


def test_a_round_gives_the_same_again_and_reads_one_side_only(tmp_path):
    """Whatever the site did before; the other side's scans are not there at all."""
    datalist, sites = make_federation(tmp_path, 1)
    content = json.loads(Path(datalist).read_text())
    for section in ("source_validation", "target_training", "target_test"):
        content[section] = [{"image": "gone.nii.gz", "label": "gone.nii.gz"}]
    Path(datalist).write_text(json.dumps(content))
    start = initial_weights(small_settings(), 0)
    coordinator = Coordinator(small_plan(min_sites=1), start, list(LABELS), tmp_path / "m", tmp_path / "o")
    results = []
    for number in range(2):
        server = Site("server", "source", small_plan(), small_settings(), datalist, tmp_path / f"{number}" / "s")
        client = Site("site-1", "target", small_plan(), small_settings(), sites["site-1"], tmp_path / f"{number}" / "c")
        server.check()
        client.check()
        for _ in range(1 + number):  # the second pair has trained the round before
            task = coordinator.accept_source(server.train(coordinator.start()))
            results.append(client.train(task))
    assert results[0].ema_steps == 4 and results[0].scans == 1
    assert all(name.startswith("target") or name == "loss" for name in results[0].losses)
    for other in results[1:]:
        assert all(torch.equal(value, other.weights[name]) for name, value in results[0].weights.items())


@pytest.mark.parametrize(("decay", "shares"), [(0.9, ["19%"]), (0.5, [])])
def test_a_teacher_that_hardly_follows_in_a_round_is_reported_once(tmp_path, caplog, decay, shares):
    datalist, sites = make_federation(tmp_path, 1)
    settings = small_settings(ema_schedule=[[None, decay]])
    with caplog.at_level("WARNING"):
        simulate(small_plan(min_sites=1), datalist, sites, tmp_path / "m", tmp_path / "o", settings=settings)
    found = [record.message for record in caplog.records if "ema_schedule" in record.message]
    assert [re.search(r"in a round of 2 steps .* takes (\d+%)", line)[1] for line in found] == 2 * shares
    assert {line.split(":")[0] for line in found} == ({"server", "site-1"} if shares else set())


@pytest.mark.parametrize("method", ["EntropyMinimization", "BUDASeg"])
def test_a_method_of_the_target_alone_needs_a_federation_without_a_source(tmp_path, method):
    datalist, sites = make_federation(tmp_path, 1)
    own = {"labels": "@pseudo_labels"} if method == "BUDASeg" else {}
    network = {"global_view": False, "uncertainty": method == "BUDASeg"}
    settings = small_settings(method={"_target_": f"mapseg_components.methods.{method}", **own}, **network)
    server = Site("server", "source", small_plan(), settings, datalist, tmp_path / "s")
    with pytest.raises(ConfigError, match=f"server: {method} learns nothing from the source.*set it to 0"):
        server.check()
    plan = small_plan(server_steps=0, upload="student", select="last", min_sites=1)
    site = Site("site-1", "target", plan, settings, sites["site-1"], tmp_path / "t")
    site.check()
    coordinator = Coordinator(plan, initial_weights(settings, 0), list(LABELS), tmp_path / "m", tmp_path / "o")
    start = coordinator.start()
    found = site.train(start).weights
    assert any(not torch.equal(value, found[name]) for name, value in start.weights.items())


def test_one_pass_over_the_scans_is_a_round_of_null_steps(tmp_path):
    datalist, sites = make_federation(tmp_path, 3)
    plan = small_plan(rounds=1, server_steps=None, client_steps=None, participation=0.5)
    simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
    (line,) = [json.loads(line) for line in (tmp_path / "o" / "rounds.jsonl").read_text().splitlines()]
    assert len(line["sites"]) == 2  # half of three sites, rounded up
    assert line["ema_steps"] == 2 + max(int(name[-1]) for name in line["sites"])  # the server has two scans
    assert line["bytes_from_sites"] == 2 * payload_bytes(initial_weights(small_settings(), 0))


@pytest.mark.parametrize("cause", [ConfigError("teacher_views is wrong"), ValueError("a bug")])
def test_a_simulated_round_goes_on_without_a_site_that_refuses_its_settings(tmp_path, monkeypatch, cause):
    """MONAI wraps what a component says in an error of its own."""
    train = Site.train

    def refusing(self, task):
        if self.name == "site-1":
            raise RuntimeError("Failed to instantiate a component") from cause
        return train(self, task)

    monkeypatch.setattr(Site, "train", refusing)
    datalist, sites = make_federation(tmp_path, 2)
    plan = small_plan(rounds=1, min_sites=1)
    if not isinstance(cause, ConfigError):
        with pytest.raises(RuntimeError, match="Failed to instantiate"):
            simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
        return
    simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
    (line,) = [json.loads(line) for line in (tmp_path / "o" / "rounds.jsonl").read_text().splitlines()]
    assert list(line["sites"]) == ["site-2"] and line["excluded"] == {"site-1": "teacher_views is wrong"}


def test_the_round_with_the_highest_score_becomes_the_model(tmp_path):
    coordinator = Coordinator(small_plan(rounds=3, min_sites=1), {"w": torch.zeros(2)}, ["a"], tmp_path, tmp_path / "o")
    for number, loss in enumerate([0.5, 0.2, 0.4]):
        common = {"round": number, "weights": {"w": torch.full((2,), number + 1.0)}, "scans": 1, "labels": ["a"]}
        coordinator.start()
        coordinator.accept_source(Update(site="server", ema_steps=1, **common))
        coordinator.accept(Update(site="site-1", ema_steps=2, losses={"target_loss": loss}, **common))
        coordinator.close()
    chosen = json.loads((tmp_path / "model_selection.json").read_text())["model.pt"]
    assert chosen == {"weights": "global", "round": 1, "score": pytest.approx(-0.2)}
    assert read_checked(tmp_path / "model.pt")["w"].tolist() == [2.0, 2.0]


def test_local_layers_stay_at_their_site(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    plan = small_plan(local_layers=["*norm*"])
    result = simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
    local = local_names(result, plan.local_layers)
    assert local and all("norm" in name for name in local)
    own = [torch.load(tmp_path / "o" / "sites" / name / "local.pt", weights_only=True) for name in sites]
    assert all(set(state["after"]) == local and state["round"] == 1 for state in own)
    some = max(local, key=lambda name: result[name].numel())
    values = [state["after"][some] for state in own] + [result[some]]
    assert not any(torch.equal(a, b) for number, a in enumerate(values) for b in values[:number])


def test_the_patterns_of_the_docs_are_all_normalisation_layers(tiny_network):
    text = (ROOT / "docs" / "reference" / "federation.md").read_text()
    patterns = json.loads(next(line for line in text.splitlines() if line.startswith('    ["*norm*"')))
    layers = [name for name, module in tiny_network.named_modules() if isinstance(module, torch.nn.GroupNorm)]
    expected = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert local_names(tiny_network.state_dict(), patterns) == expected


def test_the_bundle_runs_a_federation_and_refuses_a_typo(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    places = {"datalist": datalist, "sites": sites, "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "o")}
    done = bundle_run(list(FILES), labels=LABELS, rounds=1, epoch_length=1, **places)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "m" / "model.pt", weights_only=True)
    assert set(state) == set(initial_weights(small_settings(), 0))
    done = bundle_run(list(FILES), labels=LABELS, min_site=1, **places)
    assert done.returncode == 1 and "'min_site' (did you mean 'min_sites'?)" in done.stderr


def nvflare_run(folder, datalist, sites, *options, **changes):
    """Write the job and run it in NVFlare's simulator; the server's state after the last round."""
    pytest.importorskip("nvflare", reason="nvflare is not installed: pip install -c constraints.txt -e '.[fl]'")
    write_parties(folder / "parties", folder / "own", datalist, sites, min_sites=2, round_timeout_s=300, **changes)
    environment = {
        **os.environ,
        "MAPSEG_PARTY_DIR": str(folder / "parties"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "mapseg_components.federated.flare.job", *options]
    command += ["--write", str(folder / "job"), "--simulate", str(folder / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    state = folder / "own" / "server" / "models" / "federation.pt"
    assert state.is_file(), done.stdout[-6000:] + done.stderr[-3000:]
    return torch.load(state, weights_only=True)


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_client_of_a_job_has_one_side():
    assert sides_of(["a", "b"], "c") == {"a": "target", "b": "target", "c": "source"} and sides_of(["a"]) == {
        "a": "target"
    }
    with pytest.raises(ConfigError, match="b is the source site and one of the sites with target scans"):
        sides_of(["a", "b"], "b")


@pytest.mark.slow
def test_nvflare_gives_the_weights_of_the_simulation(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    changes = {"upload": "student", "keep_moments": True, "ship": "broadcast", "select": "last"}
    found = nvflare_run(tmp_path, datalist, sites, "--sites", *sites, **changes)
    assert found["round"] == 2
    plan = small_plan(**changes)
    expected = simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings(**changes))
    assert_close(found["weights"], expected)
    shipped = [read_checked(folder / "model.pt") for folder in (tmp_path / "own" / "server" / "models", tmp_path / "m")]
    assert_close(*shipped)
    assert movement(expected, shipped[0]) > 1e-3  # one more pass of the server
    exported = "".join(path.read_text() for path in (tmp_path / "job").rglob("*.json"))
    assert "SiteExecutor" in exported and str(tmp_path) not in exported  # no path and no setting travels
    assert not list((tmp_path / "job").rglob("*.py"))  # and no code


@pytest.mark.slow
def test_nvflare_s_percentile_filter_and_a_source_site_give_the_weights_of_the_simulation(tmp_path):
    """The labelled scans are at a site of their own, and the server has none at all."""
    datalist, sites = make_federation(tmp_path, 2)
    options = ["--sites", *sites, "--source-site", "atlas", "--percentile", "80", "0.001"]
    found = nvflare_run(tmp_path, "nowhere", {**sites, "atlas": datalist}, *options)
    assert found["round"] == 2
    plans = [small_plan(privacy=privacy) for privacy in (Privacy(percentile=80, limit=0.001), Privacy())]
    with_filter, without = (
        simulate(plan, datalist, sites, tmp_path / k / "m", tmp_path / k / "o", settings=small_settings())
        for plan, k in zip(plans, "12")
    )
    assert_close(found["weights"], with_filter)
    assert movement(without, with_filter) > 1e-3  # what the filter does is more than the tolerance
    lines = (tmp_path / "own" / "server" / "eval" / "rounds.jsonl").read_text().splitlines()
    assert all(sorted(json.loads(line)["sites"]) == sorted(sites) for line in lines)  # the source is not averaged in
    filtered = [path for path in (tmp_path / "job").rglob("config_fed_client.json") if "Percentile" in path.read_text()]
    assert len(filtered) == len(sites)


@pytest.mark.slow
def test_nvflare_s_quantization_halves_what_travels_and_changes_little(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[wire]'")
    datalist, sites = make_federation(tmp_path, 2)
    found = nvflare_run(tmp_path, datalist, sites, "--sites", *sites, "--wire", "float16")
    plan, start = small_plan(), initial_weights(small_settings(), 0)
    expected = simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
    # a rounded weight turns the sign of some tiny gradient, and the first steps of AdamW are as long whatever its size
    assert 0 < movement(expected, found["weights"]) < 0.15 * movement(start, expected)
    logs = "".join(path.read_text() for path in (tmp_path / "work").rglob("log.txt"))
    sizes = re.findall(
        r"Quantized \d+/\d+ params. Before quantization: ([\d.]+) MB. After quantization: ([\d.]+)", logs
    )
    assert len(sizes) >= 2 * (1 + len(sites)) and all(before == "0.07" and after == "0.03" for before, after in sizes)
