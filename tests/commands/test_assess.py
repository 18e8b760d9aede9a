# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The comparison of two models: which scans it looks at, and how many forward passes it takes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mapseg_components.commands.assess import assess, interval_of, reconcile
from mapseg_components.inferers import AutocastInferer
from mapseg_components.quality import Calibration
from tests.test_verdict import measured
from tools.verdict import weights_of


@pytest.fixture
def bundle(tmp_path, dataset):
    """A bundle with 12 held-out target scans, and two models of random weights."""
    measured(tmp_path, dataset, {"source-only": 0.5, "adapted": 0.6})
    path = tmp_path / "bundle" / "datalist.json"
    content = json.loads(path.read_text())
    scan = content["target_training"][0]["image"]
    content["target_heldout"] = []
    for number in range(12):
        copied = tmp_path / f"held-{number}.nii.gz"
        shutil.copyfile(scan, copied)
        content["target_heldout"].append({"image": str(copied)})
    path.write_text(json.dumps(content))
    names = {"source_only": "source-only", "adapted": "adapted"}
    return tmp_path / "bundle", {key: str(weights_of(tmp_path / "seed3", name)) for key, name in names.items()}


@pytest.mark.parametrize(
    "samples, options, views, versions, targets",
    [(None, {"inverts": True}, 3, 8, 10), (1, {}, 2, 4, 2)],
)
def test_forward_passes_are_bounded_and_only_scans_held_out_are_judged(
    bundle, monkeypatch, samples, options, views, versions, targets
):
    counted = []
    original = AutocastInferer.__call__

    def counting(self, *args, **kwargs):
        counted.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AutocastInferer, "__call__", counting)
    found = assess(str(bundle[0]), bundle[1], quiet=True, samples=samples, **options)
    assert len(counted) == found["passes"] == 2 * (versions + targets) * (1 + views)
    assert found["held_out"] and found["verdict"]["why"]
    for model in found["models"].values():
        assert len(model["cases"]) == targets and all(case["case"].startswith("held-") for case in model["cases"])
        assert all(case["interval"] is None for case in model["cases"]), "there is one validation scan alone"


def test_estimates_are_reconciled_and_intervals_follow_them():
    first = {"estimated_by_structure": {"a": 0.9, "b": None, "c": 0.5}, "estimated_dice": 0.7}
    second = {"estimated_by_structure": {"a": 0.1, "b": 0.4, "c": 0.5}, "estimated_dice": 0.3333}
    reconcile(first, second, np.array([1.0, 0.5, 0.9]))
    assert first["estimated_by_structure"]["a"] == second["estimated_by_structure"]["a"]
    assert first["estimated_by_structure"]["b"] is None and second["estimated_by_structure"]["b"] == 0.4
    level = first["estimated_by_structure"]["a"]
    assert first["estimated_dice"] == pytest.approx((level + 0.5) / 2, abs=1e-4)
    known = Calibration({"consistency": (1, 0)}, 9, 0.1, 0, 1, 0.25)
    assert interval_of(known, 0.9) == [0.65, 1.0]
    assert interval_of(None, 0.9) is None and interval_of(known, None) is None
