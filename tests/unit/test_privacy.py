# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from mapseg_components.errors import ConfigError, FederationError, NonFiniteError, ResourceError
from mapseg_components.federated import Privacy, simulate
from mapseg_components.federated.core import movement
from mapseg_components.federated.privacy import PrivacyAccountant, delta_of, epsilon_of, protect
from tests.federation import make_federation, small_plan, small_settings


def model(seed, size=40):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(2, size, 5, generator=generator),
        "b": torch.randn(7, generator=generator),
        "steps": torch.tensor(seed),
    }


def moved(base, share, seed=9):
    other = model(seed)
    return {name: value + share * other[name] if value.is_floating_point() else value for name, value in base.items()}


def direction(base, weights):
    change = torch.cat([(weights[name] - base[name]).flatten().double() for name in ("a", "b")])
    return change / change.norm()


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-4, 10), st.floats(1e-4, 1))
def test_what_leaves_moved_no_further_than_the_clip_and_the_same_way(share, clip):
    base = model(0)
    weights = moved(base, share)
    before, sent = movement(base, weights), protect(weights, base, Privacy(clip=clip))
    assert movement(base, sent) == pytest.approx(min(before, clip), rel=1e-3)
    torch.testing.assert_close(direction(base, sent), direction(base, weights), rtol=0, atol=5e-3)
    assert sent["steps"] is weights["steps"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("privacy", [Privacy(clip=0.01, noise=1.0), Privacy(percentile=90)])
def test_a_change_without_a_length_does_not_leave(privacy, value):
    base = model(0)
    weights = moved(base, 3.0)
    weights["b"][0] = value
    with pytest.raises(NonFiniteError, match="nothing of them leaves"):
        protect(weights, base, privacy)


def test_noise_has_the_size_that_the_budget_counts_on():
    base = model(0, size=5000)
    norm = math.sqrt(sum(float(base[name].double().square().sum()) for name in ("a", "b")))
    sent = protect(base, base, Privacy(clip=0.02, noise=0.5), np.random.default_rng(3))
    change = sent["a"] - base["a"]
    assert float(change.std()) == pytest.approx(0.5 * 0.02 * norm, rel=0.02)
    assert abs(float(change.mean())) < 5 * 0.5 * 0.02 * norm / math.sqrt(change.numel())


def test_noise_follows_from_no_seed():
    base = model(0)
    sent = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        sent.append(protect(base, base, Privacy(clip=0.02, noise=0.5)))
    assert not torch.equal(sent[0]["a"], sent[1]["a"])


def test_small_changes_stay_and_large_ones_are_cut():
    base = {"a": torch.zeros(2, 4), "one": torch.tensor(0.0)}
    weights = {"a": torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]]), "one": torch.tensor(0.9)}
    sent = protect(weights, base, Privacy(percentile=50, limit=0.65))
    torch.testing.assert_close(sent["a"], torch.tensor([[0, 0, 0, 0], [0.5, -0.6, 0.65, -0.65]]))
    assert sent["one"] == weights["one"]
    assert torch.equal(weights["a"][0], torch.tensor([0.1, -0.2, 0.3, -0.4]))  # what came in is as it was


@pytest.mark.parametrize(("percentile", "limit"), [(0, 0.5), (37.5, 0.01), (90, 0.02), (100, 1.0)])
def test_percentile_is_that_of_nvflare(percentile, limit):
    filters = pytest.importorskip("nvflare.app_common.filters.percentile_privacy", reason="nvflare is not installed")
    dxo = pytest.importorskip("nvflare.apis.dxo")
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable

    base, weights = model(0), moved(model(0), 0.01)
    names = ["a", "b"]
    found = protect({n: weights[n] for n in names}, base, Privacy(percentile=percentile, limit=limit))
    data = dxo.DXO(dxo.DataKind.WEIGHT_DIFF, data={n: (weights[n] - base[n]).numpy() for n in names})
    filtered = filters.PercentilePrivacy(percentile, limit).process_dxo(data, Shareable(), FLContext())
    for name in names:
        assert torch.equal(found[name], base[name] + torch.from_numpy(filtered.data[name]))


def hockey_stick(epsilon, mu):
    """Delta by its definition, integrated: of N(mu, 1) against N(0, 1)."""
    x = np.linspace(-12, 12 + mu, 400_001)
    p, q = (np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (mu, 0))
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
def test_delta_is_what_its_definition_says(mu, epsilon):
    assert delta_of(epsilon, mu) == pytest.approx(hockey_stick(epsilon, mu), rel=1e-4, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-6, 1e9), st.floats(1e-12, 0.4))
def test_epsilon_is_the_least_one_of_its_delta(cost, delta):
    epsilon, mu = epsilon_of(cost, delta), math.sqrt(cost)
    assert 0 <= epsilon < math.inf
    assert delta_of(epsilon, mu) <= delta * (1 + 1e-5)
    if epsilon > 0 and mu < 100:
        assert delta_of(epsilon * 0.999, mu) > delta * (1 - 1e-5)


def test_epsilon_of_a_known_mechanism():
    assert epsilon_of(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-4)
    assert Privacy(clip=0.1, noise=2.0).cost == pytest.approx(1.0)  # two updates differ by twice the clip at most
    assert epsilon_of(0.0, 1e-5) == 0.0


def test_every_update_is_counted_and_a_site_stops_at_its_limit(tmp_path):
    privacy = Privacy(clip=0.1, noise=2.0, max_epsilon=7.0)
    spent = [PrivacyAccountant(tmp_path / "privacy.json", privacy).spend() for _ in range(2)]  # started anew in between
    assert [line["updates"] for line in spent] == [1, 2]
    assert spent[0]["epsilon"] == spent[1]["epsilon"] == spent[0]["epsilon_total"] == pytest.approx(4.3772, abs=1e-4)
    assert spent[1]["epsilon_total"] == pytest.approx(epsilon_of(2.0, 1e-5))
    assert epsilon_of(2.0, 1e-5) < 7.0 < epsilon_of(3.0, 1e-5)
    with pytest.raises(FederationError, match=r"budget is spent: after 2 updates.*epsilon to 8\.\d+.*_epsilon is 7"):
        PrivacyAccountant(tmp_path / "privacy.json", privacy).require_budget()


def test_two_jobs_of_a_site_share_one_budget(tmp_path):
    privacy = Privacy(clip=0.1, noise=2.0, max_epsilon=epsilon_of(24.5, 1e-5))

    def updates_of_a_job(_: int) -> int:
        sent = 0
        with contextlib.suppress(FederationError):
            for _ in range(8):
                PrivacyAccountant(tmp_path / "privacy.json", privacy).spend()
                sent += 1
        return sent

    with ThreadPoolExecutor(4) as jobs:
        sent = sum(jobs.map(updates_of_a_job, range(4)))
    assert sent == 24 == json.loads((tmp_path / "privacy.json").read_text())["updates"]


def test_an_accountant_that_another_job_holds_lets_nothing_leave(tmp_path, monkeypatch):
    monkeypatch.setattr("mapseg_components.federated.privacy.LOCK_TIMEOUT_S", 0.1)
    accountant = PrivacyAccountant(tmp_path / "privacy.json", Privacy(clip=0.1, noise=2.0))
    with (
        FileLock(tmp_path / ".privacy.json.lock"),
        pytest.raises(ResourceError, match="another job of this site: end that one"),
    ):
        accountant.spend()
    assert not (tmp_path / "privacy.json").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"updates": 0, "cost": 0}', '{"updates": 2, "cost": NaN}', "[1]"])
def test_an_accountant_that_cannot_be_read_stops_the_site(tmp_path, content):
    (tmp_path / "privacy.json").write_text(content)
    accountant = PrivacyAccountant(tmp_path / "privacy.json", Privacy(clip=0.1, noise=2.0))
    for action in (accountant.require_budget, accountant.spend):
        with pytest.raises(FederationError, match=r"privacy.json does not say what was spent.*restore it"):
            action()
    assert (tmp_path / "privacy.json").read_text() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 1.0}, "privacy_noise is 1.0, expected 0 without privacy_clip"),
        ({"percentile": 101}, "privacy_percentile is 101, expected 0 to 100"),
        ({"percentile": -1}, "privacy_percentile is -1"),
        ({"limit": 0.0}, "privacy_limit is 0.0"),
        ({"clip": 0.0}, "privacy_clip is 0.0"),
        ({"clip": math.inf}, "privacy_clip is inf"),
        ({"clip": 0.1, "noise": -1.0}, "privacy_noise is -1.0, expected 0 or more"),
        ({"delta": 0.0}, "privacy_delta is 0.0"),
        ({"max_epsilon": 5.0}, "privacy_max_epsilon is 5.0, expected null without privacy_noise"),
        ({"clip": 0.1, "noise": 1.0, "max_epsilon": 0}, "privacy_max_epsilon is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Privacy(**changes)


def test_a_federation_reports_the_budget_of_each_site_and_goes_on_without_who_spent_it(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    plan = small_plan(privacy=Privacy(clip=0.01, noise=2.0, max_epsilon=5.0), client_steps=1)
    with pytest.raises(FederationError, match=r"round 1 has 0 of min_sites 2.*site-1: its privacy budget is spent"):
        simulate(plan, datalist, sites, tmp_path / "m", tmp_path / "o", settings=small_settings())
    (line,) = [json.loads(line) for line in (tmp_path / "o" / "rounds.jsonl").read_text().splitlines()]
    for name in sites:
        report = line["sites"][name]["privacy"]
        assert report["epsilon_total"] == report["epsilon"] == pytest.approx(4.3772, abs=1e-4)
        assert report["delta"] == 1e-5 and report["updates"] == 1
        assert json.loads((tmp_path / "o" / "sites" / name / "privacy.json").read_text())["updates"] == 1
    assert "privacy" not in line["source"] and not (tmp_path / "o" / "sites" / "server" / "privacy.json").exists()


def test_without_noise_the_same_again_and_only_sites_are_clipped(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    plan = small_plan(rounds=1, privacy=Privacy(clip=1e-4))
    first, second = (
        simulate(plan, datalist, sites, tmp_path / k / "m", tmp_path / k / "o", settings=small_settings()) for k in "12"
    )
    assert all(torch.equal(first[name], value) for name, value in second.items())
    (line,) = [json.loads(line) for line in (tmp_path / "1" / "o" / "rounds.jsonl").read_text().splitlines()]
    assert all(site["movement"] <= 1.001e-4 for site in line["sites"].values())
    assert line["source"]["movement"] > 1e-3
