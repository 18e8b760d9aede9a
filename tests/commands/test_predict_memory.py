# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What `mapseg predict` keeps of a scan beside its logits: pieces instead of copies in 64 bits, the same values."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
import torch

from benchmarks.predict_memory import measure
from mapseg_components.data import volumes
from mapseg_components.reports import draw_preview
from mapseg_components.reports.preview import middle
from mapseg_components.transforms import probabilities
from tests.conftest import make_scan

SHAPE = (120, 110, 100)
NAMES = ["first", "second"]


def peak_per_voxel(function, *arguments):
    """Largest memory that NumPy took during a call, in bytes per voxel of `SHAPE`."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1] / np.prod(SHAPE)
    finally:
        tracemalloc.stop()


def test_volumes_are_counted_piece_by_piece(monkeypatch):
    label_map = make_scan(SHAPE)[1].astype(np.float32)
    confidence = np.random.default_rng(0).random(SHAPE, np.float32)
    whole = volumes.structure_volumes(label_map, np.eye(4), NAMES, confidence)
    for number, row in enumerate(whole, start=1):
        inside = label_map == number
        assert row["voxels"] == inside.sum() > 0
        assert row["confidence"] == pytest.approx(confidence[inside].astype(np.float64).mean(), abs=1e-4)
    monkeypatch.setattr(volumes, "PIECE", 1013)  # not a divisor of the voxels
    assert volumes.structure_volumes(label_map, np.eye(4), NAMES, confidence) == whole
    assert peak_per_voxel(volumes.structure_volumes, label_map, np.eye(4), NAMES, confidence) < 2


def test_a_label_without_a_name_is_left_out_of_the_volumes():
    rows = volumes.structure_volumes(np.full((2, 3, 4), 3, np.uint8), np.eye(4), NAMES)
    assert [row["voxels"] for row in rows] == [0, 0]


def test_confidence_does_not_depend_on_the_pieces(monkeypatch):
    logits = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    whole = probabilities.largest_probability(logits)
    monkeypatch.setattr(probabilities, "PIECE", 11)
    torch.testing.assert_close(probabilities.largest_probability(logits), whole, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_middle_is_the_median_of_the_voxels(count):
    mask = np.zeros((5, 6, 7), bool)
    mask.ravel()[np.random.default_rng(count).choice(mask.size, count, replace=False)] = True
    assert middle(mask) == np.median(np.argwhere(mask), axis=0).astype(int).tolist()
    assert middle(mask & False) == [2, 3, 3]


def test_a_picture_takes_no_list_of_voxels(tmp_path):
    pytest.importorskip("matplotlib")
    scan, label = make_scan(SHAPE)
    scan, label = scan.astype(np.int16), (label + 1).astype(np.uint8)  # every voxel has a structure
    arguments = (scan, label, np.diag([1.0, 1.1, -1.2, 1.0]), ["all", *NAMES], "a scan", tmp_path / "picture.png")
    draw_preview(*arguments)  # fonts and the like
    assert peak_per_voxel(draw_preview, *arguments) < 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_whole_run_takes_little_more_than_its_logits(tmp_path):
    """Measured: 88 bytes a voxel. Logits take 36; a copy of them in 64 bits would not fit below the limit."""
    found = measure(tmp_path, [128, 120, 112], patch=32, width=8, options=["--no_preview"])
    assert found["classes"] == 9
    assert 40 < found["bytes_per_voxel"] < 115
