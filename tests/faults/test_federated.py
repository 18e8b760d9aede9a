# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Faults of a federation: sites that are gone, late, broken or different; what remains on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapseg_components.errors import CheckpointError, ConfigError, DataError, FederationError, NonFiniteError
from mapseg_components.federated import Broadcast, Coordinator, Site, Update, simulate
from mapseg_components.federated.core import validate_update, validate_weights
from mapseg_components.federated.site import initial_weights
from tests.conftest import ROOT, make_scan, write_nifti
from tests.faults.common import tree
from tests.federation import make_federation, small_plan, small_settings, write_parties
from tests.warm import python

NAMES = ["first", "second"]


def weights(value=1.0):
    return {"a.weight": torch.full((3, 2), value), "a.bias": torch.full((3,), value)}


def update(site="site-1", number=0, value=1.1, scans=1, labels=NAMES, **changes):
    content = {**weights(value), **changes}
    content = {name: tensor for name, tensor in content.items() if tensor is not None}
    return Update(site, number, content, scans, 2, labels, {"target_loss": 0.5})


@pytest.fixture
def coordinator(tmp_path):
    return opened(Coordinator(small_plan(), weights(), NAMES, tmp_path / "models", tmp_path / "eval"))


def opened(coordinator):
    coordinator.start()
    coordinator.accept_source(update("server", coordinator.round, 1.0))
    return coordinator


def closed(coordinator):
    for site in ("site-1", "site-2"):
        coordinator.accept(update(site, coordinator.round))
    coordinator.close()
    return opened(coordinator)


def failing(monkeypatch, name, error, rounds=(0, 1)):
    """A site whose training fails in these rounds."""
    original = Site._train

    def train(self, broadcast):
        if self.name == name and broadcast.round in rounds:
            raise error
        return original(self, broadcast)

    monkeypatch.setattr(Site, "_train", train)


def run(folder, datalist, sites, plan=None, **changes):
    return simulate(
        plan or small_plan(), datalist, sites, folder / "m", folder / "o", settings=small_settings(**changes)
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "o" / "rounds.jsonl").read_text().splitlines()]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# L1, L2: sites that are gone


def test_a_round_closes_without_a_site_that_fails_and_takes_it_back(tmp_path, monkeypatch):
    datalist, sites = make_federation(tmp_path)
    failing(monkeypatch, "site-2", NonFiniteError("the loss is nan"), rounds=(0,))
    run(tmp_path, datalist, sites)
    first, second = lines(tmp_path)
    assert sorted(first["sites"]) == ["site-1", "site-3"]
    assert first["excluded"] == {"site-2": "site-2: the loss is nan"}
    assert [first["sites"][name]["weight"] for name in ("site-1", "site-3")] == [0.25, 0.75]
    assert sorted(second["sites"]) == ["site-1", "site-2", "site-3"]


def test_a_site_that_is_too_slow_is_left_out(tmp_path, monkeypatch):
    datalist, sites = make_federation(tmp_path)
    original = Site._train

    def slow(self, broadcast):
        if self.name == "site-3":
            time.sleep(4.0)
        return original(self, broadcast)

    monkeypatch.setattr(Site, "_train", slow)
    run(tmp_path, datalist, sites, small_plan(rounds=1, round_timeout_s=4.0, client_steps=1))
    (line,) = lines(tmp_path)
    assert "round_timeout_s is 4" in line["excluded"]["site-3"] and sorted(line["sites"]) == ["site-1", "site-2"]


def test_too_few_sites_end_with_the_last_closed_round_on_disk(tmp_path, monkeypatch):
    datalist, sites = make_federation(tmp_path, 2)
    failing(monkeypatch, "site-2", DataError("scan-0: unreadable"), rounds=(1,))
    with pytest.raises(FederationError, match=r"round 1 has 1 of min_sites 2 sites \(site-2.*unreadable") as caught:
        run(tmp_path, datalist, sites)
    assert caught.value.exit_code == 7 and "the same command goes on" in str(caught.value)
    state = torch.load(tmp_path / "m" / "federation.pt", weights_only=True)
    assert state["round"] == 1 and len(lines(tmp_path)) == 1
    monkeypatch.undo()
    resumed = run(tmp_path, datalist, sites)
    assert same(resumed, run(tmp_path / "again", datalist, sites))


def test_a_federation_goes_on_by_the_remedies_that_its_errors_name(tmp_path, monkeypatch):
    """Fewer sites a round, larger limits, and a site more or less; what a step computes stays as it was."""
    datalist, sites = make_federation(tmp_path, 2)
    begun = {"min_sites": 2, "max_movement": 1e-9, "round_timeout_s": 60.0, "spacing_range_mm": [0.9, 1.1]}
    run(tmp_path, datalist, sites, small_plan(rounds=1), **begun)
    failing(monkeypatch, "site-2", DataError("scan-0: unreadable"), rounds=(1,))
    with pytest.raises(FederationError, match=r"round 1 has 1 of min_sites 2 .*or with a lower min_sites"):
        run(tmp_path, datalist, sites, **begun)
    others = {"min_sites": 1, "max_movement": None, "round_timeout_s": 600.0, "spacing_range_mm": None}
    others |= {"participation": 0.5, "privacy_max_epsilon": 9.0, "share_statistics": True, "statistics_min_scans": 3}
    left = {"site-1": sites["site-1"]}
    changed = small_settings(**begun | others | {"sites": left})
    simulate(small_plan(min_sites=1), datalist, left, tmp_path / "m", tmp_path / "o", settings=changed)
    assert [sorted(line["sites"]) for line in lines(tmp_path)] == [["site-1", "site-2"], ["site-1"]]
    for name, value in {"rounds": 3, "client_steps": 1, "upload": "student", "privacy_noise": 1.0}.items():
        with pytest.raises(ConfigError, match=rf"written with other settings .*{name} was"):
            run(tmp_path, datalist, sites, **{**begun, name: value})


# L3, L4: late and second updates


def test_an_update_of_an_old_round_is_refused(coordinator):
    closed(coordinator)
    with pytest.raises(FederationError, match=r"site-1: its update is of round 0, expected 1.*round_timeout_s"):
        coordinator.accept(update("site-1", 0))


def test_the_first_update_of_a_site_counts(coordinator):
    coordinator.accept(update("site-1", value=1.1))
    with pytest.raises(FederationError, match="site-1: a second update for round 0"):
        coordinator.accept(update("site-1", value=9.0))
    coordinator.accept(update("site-2", value=1.1))
    coordinator.close()
    torch.testing.assert_close(coordinator.weights, weights(1.1))


# L5 to L8: updates that cannot be averaged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(coordinator, value):
    bad = torch.ones(3, 2)
    bad[1, 1] = value
    with pytest.raises(FederationError, match=r"site-1: 'a.weight' has 1 of 6 values that are NaN or infinite"):
        coordinator.accept(update(**{"a.weight": bad}))
    closed_without(coordinator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight": torch.ones(2, 3)}, r"'a.weight' is \(2, 3\) torch.float32, expected \(3, 2\) torch.float32"),
        ({"a.weight": torch.ones(3, 2).double()}, r"torch.float64, expected \(3, 2\) torch.float32"),
        ({"a.bias": None}, r"1 missing \(a.bias\).*local_layers"),
        ({"b": torch.ones(1)}, r"1 extra \(b\)"),
        ({"a.bias": "import os"}, "'a.bias' is a str, expected a tensor: only tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(coordinator, changes, message):
    with pytest.raises(FederationError, match="site-1: .*" + message):
        coordinator.accept(update(**changes))
    closed_without(coordinator)


def closed_without(coordinator):
    """The round closes without site-1, with the mean of the others."""
    coordinator.exclude("site-1", "refused")
    for site, value in (("site-2", 2.0), ("site-3", 4.0)):
        coordinator.accept(update(site, value=value))
    line = coordinator.close()
    assert line["excluded"] == {"site-1": "refused"}
    torch.testing.assert_close(coordinator.weights, weights(3.0))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["a.weight", "a.bias"]),
    st.sampled_from(["drop", "rename", "reshape", "retype", "spoil"]),
    st.integers(0, 2),
)
def test_no_edit_of_an_update_passes(name, edit, index):
    content = weights()
    tensor = content.pop(name)
    if edit == "rename":
        content[f"{name}x"] = tensor
    elif edit == "reshape":
        content[name] = tensor.reshape(1, -1)
    elif edit == "retype":
        content[name] = tensor.half()
    elif edit == "spoil":
        content[name] = tensor.clone()
        content[name].view(-1)[index] = float("nan")
    with pytest.raises(FederationError, match=name):
        validate_weights(content, weights(), "site-1")


@pytest.mark.parametrize("scans", [0, -3, 1.5, "many"])
def test_a_count_of_scans_that_is_no_count_is_refused(scans):
    with pytest.raises(FederationError, match="site-1: scans is"):
        validate_update(update(scans=scans), weights(), 0, NAMES)


def test_movement_is_reported_and_refused_only_if_asked(coordinator):
    assert validate_update(update(value=50.0), weights(), 0, NAMES) == pytest.approx(49.0)
    with pytest.raises(FederationError, match=r"site-1: its weights moved by 49 of their norm, max_movement is 2"):
        validate_update(update(value=50.0), weights(), 0, NAMES, max_movement=2.0)


# L9: the server


SCRIPT = """
import sys
from pathlib import Path
from mapseg_components.federated import Site, simulate
from tests.federation import small_plan, small_settings
folder, datalist, *sites = sys.argv[1:]
train = Site.train
def announce(self, broadcast):
    print(self.name, broadcast.round, flush=True)
    return train(self, broadcast)
Site.train = announce
plan = small_plan(rounds=3, local_layers=["*norm*"])
names = {Path(path).parent.name: path for path in sites}
simulate(plan, datalist, names, folder + "/m", folder + "/o", settings=small_settings())
"""


def test_a_server_that_is_killed_in_a_round_goes_on_from_the_last_closed_one(tmp_path):
    """Bit for bit, local layers included: a round that is repeated starts from what it started from before."""
    datalist, sites = make_federation(tmp_path, 2)
    whole = run(tmp_path / "whole", datalist, sites, small_plan(rounds=3, local_layers=["*norm*"]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), datalist, *sites.values()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.split() == ["site-2", "1"]:  # site-1 has trained in round 1, and kept its layers
                child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "m" / "federation.pt", weights_only=True)["round"] == 1
    resumed = run(tmp_path, datalist, sites, small_plan(rounds=3, local_layers=["*norm*"]))
    assert same(resumed, whole)
    for name in sites:
        states = [
            torch.load(f / "o" / "sites" / name / "local.pt", weights_only=True) for f in (tmp_path, tmp_path / "whole")
        ]
        assert same(states[0]["after"], states[1]["after"])
    assert [line["round"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_damaged_state_names_the_file(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    run(tmp_path, datalist, sites, small_plan(client_steps=1))
    path = tmp_path / "m" / "federation.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"federation.pt is damaged.*federation.previous.pt"):
        run(tmp_path, datalist, sites, small_plan(rounds=1))


def test_other_settings_or_another_network_are_refused(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    run(tmp_path, datalist, sites, small_plan(rounds=1))
    before = tree(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"mask_ratio was 0.7, now 0.5"):
        run(tmp_path, datalist, sites, small_plan(rounds=1), mask_ratio=0.5)
    with pytest.raises(CheckpointError, match=r"federation.pt is of another network"):
        run(tmp_path, datalist, sites, small_plan(rounds=1), width=16)
    assert tree(tmp_path / "m") == before


def test_a_federation_that_starts_anew_leaves_the_files_of_the_one_before_aside(tmp_path, caplog):
    datalist, sites = make_federation(tmp_path, 2)
    run(tmp_path, datalist, sites, small_plan(rounds=2))
    folders = {
        "m": ["federation.previous.pt", "federation.pt", "model.pt", "model_selection.json"],
        "o": ["history.jsonl", "rounds.jsonl"],
    }
    before = {name: (tmp_path / folder / name).read_bytes() for folder, names in folders.items() for name in names}
    Coordinator(small_plan(), weights(), NAMES, tmp_path / "m", tmp_path / "o", resume=False)
    for folder, names in folders.items():
        found = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.is_file()}
        assert found == {f"{name}.earlier": before[name] for name in names}
    assert "resume is false: renamed" in caplog.text and "to *.earlier" in caplog.text


FULL_DISK = """
import resource, signal, sys
from tests.faults.test_federated import opened, closed, update, weights, small_plan, NAMES, Coordinator
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
coordinator = opened(Coordinator(small_plan(), weights(), NAMES, folder, folder))
closed(coordinator)
for site in ("site-1", "site-2"):
    coordinator.accept(update(site, 1, 1.2))
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    coordinator.close()
except Exception as error:
    print(type(error).__name__, error, coordinator.round)
"""


def test_a_full_disk_at_the_server_leaves_the_last_closed_round(tmp_path):
    command = [python(), "-c", FULL_DISK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("ResourceError cannot write"), done.stdout + done.stderr
    assert "federation.pt" in done.stdout and "untouched" in done.stdout and done.stdout.strip().endswith(" 1")
    assert torch.load(tmp_path / "federation.pt", weights_only=True)["round"] == 1
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


# L10: what a site takes


def test_a_site_takes_no_weights_that_do_not_fit_or_are_not_finite(tmp_path):
    _, sites = make_federation(tmp_path, 1)
    site = Site("site-1", "target", small_plan(), small_settings(), sites["site-1"], tmp_path / "own")
    site._build()
    good = {name: value.clone() for name, value in site.network.state_dict().items()}
    name = next(iter(good))
    for change, message in [
        ({name: torch.full_like(good[name], float("nan"))}, "NaN or infinite"),
        ({"config": torch.zeros(1)}, "1 extra"),
        ({name: "$__import__('os').system('true')"}, "is a str, expected a tensor"),
    ]:
        with pytest.raises(FederationError, match=rf"site-1: what the server sent: .*{message}"):
            site.train(Broadcast(0, 0, {**good, **change}))
    assert same(good, site.network.state_dict())


def test_a_task_without_the_identity_of_its_federation_is_refused():
    messages = pytest.importorskip("mapseg_components.federated.flare.messages", reason="nvflare is not installed")
    task = messages.from_broadcast(Broadcast(1, 3, weights(), "0123456789abcdef"), 2, "target")
    assert messages.to_broadcast(task, "target", 2).federation == "0123456789abcdef"
    for wrong in (None, "", 7, "$import os", "0123456789abcdef\n"):
        task.meta[messages.FEDERATION] = wrong
        with pytest.raises(FederationError, match="as identity of the federation, expected 16 hexadecimal digits"):
            messages.to_broadcast(task, "target", 2)


def test_a_task_of_another_number_of_rounds_is_refused():
    messages = pytest.importorskip("mapseg_components.federated.flare.messages", reason="nvflare is not installed")
    for rounds in (100, None):
        task = messages.from_broadcast(Broadcast(1, 3, weights(), "0" * 16), rounds, "target")
        with pytest.raises(FederationError, match=f"has {rounds} rounds, and rounds is 2 here.*the same number in"):
            messages.to_broadcast(task, "target", 2)


# data of a site


def answers_of_a_site(folder, monkeypatch, **settings):
    """Kinds of errors that a site on NVFlare answers two rounds with, ``None`` for an update."""
    client = pytest.importorskip("mapseg_components.federated.flare.client", reason="nvflare is not installed")
    messages = pytest.importorskip("mapseg_components.federated.flare.messages")
    _, sites = make_federation(folder, 1)
    settings = {"round_timeout_s": 300, "min_sites": 1, **settings}
    write_parties(folder / "parties", folder / "own", "nowhere", sites, **settings)
    monkeypatch.setenv("MAPSEG_PARTY_DIR", str(folder / "parties"))
    monkeypatch.setattr("sys.argv", ["client"])
    start = initial_weights(small_settings(), 0)
    tasks = [messages.from_broadcast(Broadcast(number, 0, start, "0" * 16), 2, "target") for number in range(2)]
    answers = []
    flare = SimpleNamespace(
        init=lambda: None,
        is_running=lambda: bool(tasks),
        receive=lambda: tasks.pop(0),
        get_site_name=lambda: "site-1",
        send=answers.append,
    )
    monkeypatch.setattr(client, "flare", flare)
    client.main()
    return [answer.meta.get(messages.FAILED) for answer in answers]


def test_a_site_whose_scans_are_refused_is_refused_in_every_round(tmp_path, monkeypatch):
    """What is wrong with the scans of a site on NVFlare does not pass because it was said once."""
    assert answers_of_a_site(tmp_path, monkeypatch, spacing_range_mm=[2.0, 3.0]) == ["DataError", "DataError"]


def test_a_site_stays_whatever_its_error_is(tmp_path, monkeypatch, caplog):
    """MONAI wraps what a component refuses, and other errors have no class of ours."""
    wrapped = answers_of_a_site(tmp_path / "wrapped", monkeypatch, confidence_threshold=2.0)
    assert wrapped == ["ConfigError", "ConfigError"] and "ConfigError: confidence_threshold is 2.0" in caplog.text
    failing(monkeypatch, "site-1", ZeroDivisionError("a bug"), rounds=(0,))
    assert answers_of_a_site(tmp_path / "bug", monkeypatch) == ["ZeroDivisionError", None]
    assert "Traceback" in caplog.text


def test_a_site_with_other_rounds_than_the_server_is_refused(tmp_path, monkeypatch, caplog):
    assert answers_of_a_site(tmp_path, monkeypatch, rounds=3) == ["FederationError", "FederationError"]
    assert "the server's federation has 2 rounds, and rounds is 3 here" in caplog.text


def test_a_site_without_scans_is_named(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    Path(sites["site-2"]).write_text(json.dumps({"target_training": []}))
    with pytest.raises(ConfigError, match=r"site-2: .*'target_training' is empty: list at least one scan"):
        run(tmp_path, datalist, sites)
    assert not (tmp_path / "m").exists()


def test_labels_at_a_site_are_never_read(tmp_path, caplog):
    datalist, sites = make_federation(tmp_path, 2)
    expected = run(tmp_path / "without", datalist, sites)
    content = json.loads(Path(sites["site-1"]).read_text())
    content["target_training"][0]["label"] = "no_such_file.nii.gz"
    Path(sites["site-1"]).write_text(json.dumps(content))
    assert same(expected, run(tmp_path / "with", datalist, sites))
    assert "site-1" in caplog.text and "target labels are never read" in caplog.text


def test_another_label_table_is_named(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    content = json.loads(Path(sites["site-2"]).read_text()) | {
        "labels": {"0": "background", "1": "second", "2": "first"}
    }
    Path(sites["site-2"]).write_text(json.dumps(content))
    with pytest.raises(FederationError, match=r"site-2: the label table .*'1': 'second'.*expected .*'1': 'first'"):
        run(tmp_path, datalist, sites)
    with pytest.raises(FederationError, match=r"site-1: its labels are \['second', 'first'\], expected"):
        validate_update(update(labels=["second", "first"]), weights(), 0, NAMES)


def test_another_channel_count_is_named(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    scan = Path(sites["site-2"]).parent / "0.nii.gz"
    write_nifti(scan, np.stack([make_scan()[0]] * 2, axis=-1))
    with pytest.raises(DataError, match=r"site-2: .*0.nii.gz"):
        run(tmp_path, datalist, sites)


def test_another_spacing_is_named(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    plan = small_plan(rounds=1, spacing_range_mm=[0.9, 1.3])
    run(tmp_path, datalist, sites, plan)
    scan = Path(sites["site-2"]).parent / "1.nii.gz"
    write_nifti(scan, make_scan()[0], np.diag([3.0, 1.0, 1.0, 1.0]))
    with pytest.raises(
        DataError, match=r"site-2: .*1.nii.gz: voxels of 3 x 1 x 1 mm, spacing_range_mm is \[0.9, 1.3\]"
    ):
        run(tmp_path / "again", datalist, sites, plan)


def test_a_damaged_scan_is_named_with_its_site(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    scan = Path(sites["site-1"]).parent / "0.nii.gz"
    image = np.asarray(nib.load(scan).dataobj).copy()
    image[3, 3, 3] = np.nan
    write_nifti(scan, image)
    with pytest.raises(DataError, match=r"site-1: .*0.nii.gz.*1 voxels are NaN"):
        run(tmp_path, datalist, sites)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_sites": 0}, "min_sites is 0"),
        ({"participation": 0.0}, "participation is 0.0"),
        (
            {"rounds": 0, "round_timeout_s": -1},
            "rounds is 0, expected 1 or more, a whole number; round_timeout_s is -1",
        ),
        ({"spacing_range_mm": [2.0, 1.0]}, "spacing_range_mm"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_plan(**changes)


def test_a_pattern_of_local_layers_that_fits_nothing_is_refused(tmp_path):
    datalist, sites = make_federation(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"local_layers: '\*batchnorm\*' fits no tensor"):
        run(tmp_path, datalist, sites, small_plan(local_layers=["*batchnorm*"]))


def test_fewer_sites_than_min_sites_are_refused_before_any_scan(tmp_path):
    with pytest.raises(ConfigError, match=r"sites names \['site-1'\], expected 2 \(min_sites\)"):
        run(tmp_path, "nowhere", {"site-1": "nowhere"})
