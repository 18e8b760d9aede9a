# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a dataset on disk, a small network, Ctrl-C as on a terminal."""

from __future__ import annotations

import functools
import gc
import json
import signal
from pathlib import Path

import pytest
import torch
from monai.bundle import ComponentLocator

from mapseg_components.networks import GlobalLocalDeepLabV3
from tests.scans import ROOT, SAMPLE, make_dataset, make_scan, write_nifti
from tests.warm import warm_processes

__all__ = ["ROOT", "SAMPLE", "make_dataset", "make_scan", "write_nifti"]

torch.set_num_threads(1)

# files of few and long tests: begun first, so that no worker waits for them at the end (with --no-loadscope-reorder)
LONGEST = ["test_training", "test_benchmarks", "test_installation", "test_bundles", "test_names", "test_clients"]
LONGEST += ["test_adapt", "test_tutorials"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """What the imports have made stays: no garbage collection goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_table_of_components():
    """MONAI's table of its classes, which every parser makes for itself, is made once for the same modules."""
    find = functools.cache(functools.partial(ComponentLocator._find_classes_or_functions, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ComponentLocator, "_find_classes_or_functions", lambda _, names: find(tuple(names)))
        yield


@pytest.fixture(name="warm_processes")
def _warm_processes():
    """Commands and workers that the package starts are of `tests.warm.python`."""
    with warm_processes():
        yield


@pytest.fixture
def ctrl_c():
    """SIGINT is KeyboardInterrupt, as on a terminal; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Folder of `make_dataset`."""
    make_dataset(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def tiny_network():
    """A segmenter of three classes, stride 4, in evaluation mode."""
    torch.manual_seed(0)
    return GlobalLocalDeepLabV3(
        in_channels=1, num_classes=3, width=8, depth=1, stride=4, dilations=(1, 2), head_channels=8
    ).eval()


def make_flat_dataset(folder):
    """A dataset of images of one slice in a folder: two of the source, one for validation, two of the target."""
    sections = {}
    for section, seeds in {"source_training": (0, 1), "source_validation": (2,), "target_training": (3, 4)}.items():
        sections[section] = []
        for seed in seeds:
            image, label = (volume.max(axis=2, keepdims=True) for volume in make_scan((28, 32, 24), seed))
            case = {"image": str(write_nifti(folder / section / f"{seed}.nii.gz", image))}
            if "source" in section:
                case["label"] = str(write_nifti(folder / section / f"{seed}_label.nii.gz", label))
            sections[section].append(case)
    (folder / "datalist.json").write_text(json.dumps({"labels": {"1": "first", "2": "second"}, **sections}))
