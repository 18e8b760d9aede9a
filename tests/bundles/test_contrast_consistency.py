# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Views of the teacher and contrasts of the student in the bundle: alone, resumed, without a source, federated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mapseg_components.handover import HandoverPackage
from tests.bundles.test_guests import PLAIN, UNET, bundle_run, train, weights
from tests.federation import make_federation

OVERLAYS = ["from_source.yaml", "contrast_consistency.yaml"]


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(dataset, tmp_path):
    settings = {"warmup_epochs": 0, "epoch_length": 2}
    whole = train(tmp_path / "whole", dataset, *OVERLAYS, **settings, max_epochs=3)
    assert "target_local" in whole[-1] and "target_local_masked" not in whole[-1]
    for epochs in (2, 3):
        parts = train(tmp_path / "parts", dataset, *OVERLAYS, **settings, max_epochs=epochs)
    first, second = (weights(tmp_path / name / "last.pt")["network"] for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["target_loss"] for line in parts] == [line["target_loss"] for line in whole]


def test_the_overlay_is_four_knobs_of_the_default(dataset, tmp_path):
    """Views of the scan as it is alone, no change and masks: the run of train.json, bit for bit."""
    knobs = {"teacher_views": ["as_is"], "student_change": "$None", "target_masked": True}
    paper = {"ema_schedule": [[None, 0.99]], "learning_rate": 0.0003, "max_epochs": 1}
    train(tmp_path / "plain", dataset, "from_source.yaml", **paper)
    train(tmp_path / "off", dataset, *OVERLAYS, **knobs, **paper)
    train(tmp_path / "on", dataset, *OVERLAYS, **paper)
    plain, off, on = (weights(tmp_path / name / "last.pt")["network"] for name in ("plain", "off", "on"))
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert not all(torch.equal(plain[name], on[name]) for name in plain)


def test_a_package_is_adapted_with_views(dataset, tmp_path):
    package = {"handover_dir": str(tmp_path / "package"), "handover_min_scans": 2}
    train(tmp_path / "source", dataset, "source_stage.yaml", **package)
    files = ["from_source.yaml", "handover.yaml", "test_time.yaml", "contrast_consistency.yaml"]
    history = train(tmp_path / "target", dataset, *files, **package, labels="$@handover.labels", max_epochs=1)
    assert "target_local" in history[-1] and not any("masked" in name or "source" in name for name in history[-1])


def test_a_federation_runs_with_views(tmp_path):
    datalist, sites = make_federation(tmp_path, 1)
    files = ("train.json", "tiny.yaml", "contrast_consistency.yaml", "federated.json")
    settings = {"sites": sites, "rounds": 2, "server_steps": 1, "client_steps": 1}
    bundle_run(files, tmp_path / "out", Path(datalist).parent, datalist=datalist, **settings)
    assert (tmp_path / "out" / "model.pt").is_file()


@pytest.mark.parametrize("method", ["mean_teacher", "masked_consistency"])
def test_the_labels_of_guests_are_of_views_too(method, dataset, tmp_path):
    files = [*PLAIN, f"{method}.yaml"]
    for name, views in {"one": ["as_is"], "two": ["as_is", "inverted"]}.items():
        train(tmp_path / name, dataset, *files, **UNET, teacher_views=views)
    one, two = (weights(tmp_path / name / "last.pt")["network"] for name in ("one", "two"))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_a_prior_and_limits_of_shares_are_overlays(dataset, tmp_path):
    history = train(tmp_path, dataset, *OVERLAYS, "share_limits.yaml", max_epochs=2, prior_weight=0.1)
    assert history[-1]["target_prior"] > 0 and any(name.startswith("target_ml_") for name in history[-1])
    state = torch.load(tmp_path / "last.pt", weights_only=True)["diagnostics"]["limits"]
    assert state["epoch"] == 2


def test_a_package_has_the_limits_of_its_source(dataset, tmp_path):
    package = {"handover_dir": str(tmp_path / "package"), "handover_min_scans": 2}
    train(tmp_path / "source", dataset, "source_stage.yaml", **package)
    files = ["from_source.yaml", "handover.yaml", "test_time.yaml", "share_limits.yaml"]
    settings = {**package, "labels": "$@handover.labels", "max_epochs": 1, "val_interval": 1}
    train(tmp_path / "target", dataset, *files, **settings, diagnostics_scans=1)
    state = torch.load(tmp_path / "target" / "last.pt", weights_only=True)["diagnostics"]["limits"]
    found = HandoverPackage(tmp_path / "package").share_ranges
    assert state["epoch"] == 1 and set(found) == {"first", "second"}
    assert all(0 < low <= high <= 1 for low, high in found.values())
