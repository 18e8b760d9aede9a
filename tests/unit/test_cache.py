# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The cache on disk gives what the cache in memory gives, is shared, follows its origin, and survives damage."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, Lambdad, LoadImaged, Orientationd, RandLambdad

from mapseg_components.data import MappedCacheDataset, SeededDataset, load_datalist
from mapseg_components.data.cache import content, describe, narrowed
from mapseg_components.errors import ConfigError, DataError, ResourceError
from mapseg_components.transforms import (
    AxisExtremesd,
    ClassVoxelsd,
    NegativeValuesd,
    PercentileTabled,
    RandGlobalLocalCropd,
    RandPercentileClipd,
    SelectLabelsd,
)
from tests.conftest import make_dataset, make_scan, write_nifti
from tests.pictures import cells, write_picture

KEYS = ["image", "label"]


def steps(policy="clip", percentile=99.5):
    return Compose(
        [
            LoadImaged(KEYS, image_only=True, ensure_channel_first=True),
            Orientationd(KEYS, axcodes="RAS", labels=None),
            SelectLabelsd("label", [1, 2]),
            NegativeValuesd("image", policy),
            PercentileTabled("image"),
            AxisExtremesd("image", above_minimum=True),
            ClassVoxelsd("label"),
            RandPercentileClipd("image", default=percentile, deferred=True),
            RandGlobalLocalCropd(
                12, prob=0.5, scale_range=(0.8, 1.2), rotate_range_deg=20, flip_prob=0.3, foreground_fraction=0.5
            ),
        ]
    )


def cases(folder):
    if not (folder / "data").exists():
        make_dataset(folder / "data")
    return load_datalist(folder / "data" / "datalist.json", "source_training")


def mapped(folder, transform=None, **settings):
    cache = {"cache_dir": folder / "cache", **settings}
    return MappedCacheDataset(cases(folder), transform or steps(), progress=False, **cache)


def entries(folder):
    return sorted(path.parent.name for path in (folder / "cache").glob("*/entry.json"))


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert type(value) is type(other[key]) and value.dtype == other[key].dtype, key
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
        else:
            assert value == other[key], key
        if isinstance(value, MetaTensor):
            assert torch.equal(value.affine, other[key].affine) and value.meta.keys() == other[key].meta.keys()
            assert value.meta["filename_or_obj"] == other[key].meta["filename_or_obj"]


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_samples_equal_those_of_monais_cache(tmp_path, whole_numbers):
    if whole_numbers:  # else the scans are of fractions, and stay float32
        for case in cases(tmp_path):
            write_nifti(Path(case["image"]), (make_scan()[0] * 3).astype(np.int16), np.diag([-1.0, 1.1, 1.2, 1.0]))
    disk = SeededDataset(mapped(tmp_path))
    memory = SeededDataset(CacheDataset(cases(tmp_path), steps(), progress=False, copy_cache=False))
    assert disk.dataset._cache[0]["image"].dtype == (torch.int16 if whole_numbers else torch.float32)
    for seed in range(12):
        same(disk[seed % 2, seed], memory[seed % 2, seed])


def test_without_a_folder_it_is_monais_cache(tmp_path):
    ours, monai = SeededDataset(mapped(tmp_path, cache_dir=None)), SeededDataset(CacheDataset(cases(tmp_path), steps()))
    same(ours[1, 5], monai[1, 5])


def test_a_second_run_decodes_nothing(tmp_path, monkeypatch):
    used = steps()  # a bundle's datasets share the transforms that load
    first = SeededDataset(mapped(tmp_path, used))[0, 3]
    monkeypatch.setattr(LoadImaged, "__call__", lambda *args: pytest.fail("decoded again"))
    same(SeededDataset(mapped(tmp_path, used))[0, 3], first)
    same(SeededDataset(mapped(tmp_path))[0, 3], first)


def change_scan(folder):
    write_nifti(Path(cases(folder)[0]["image"]), make_scan(seed=77)[0])


@pytest.mark.parametrize("change, new", [(change_scan, 1), (lambda folder: None, 0)])
def test_a_changed_scan_is_a_new_entry(tmp_path, change, new):
    mapped(tmp_path)
    before = entries(tmp_path)
    change(tmp_path)
    data = mapped(tmp_path)
    assert len(set(entries(tmp_path)) - set(before)) == new
    assert torch.equal(data._cache[0]["image"].float(), LoadImaged("image")(cases(tmp_path)[0])["image"][None])


def test_a_corrected_pixel_size_is_a_new_entry(tmp_path):
    image = write_picture(tmp_path / "a.png", cells(0)[0])
    keys = []
    for side in (0.5, 2.0):
        (tmp_path / "pixel_size.json").write_text(json.dumps({"PixelSize": [side, side], "PixelSizeUnits": "um"}))
        keys.append(content(image))
    assert keys[0] != keys[1] and keys[0][0] == keys[1][0]


def test_changed_settings_are_new_entries_and_random_ones_are_not(tmp_path):
    mapped(tmp_path)
    mapped(tmp_path, steps(percentile=99.1))
    assert len(entries(tmp_path)) == 2
    mapped(tmp_path, steps("keep"))
    assert len(entries(tmp_path)) == 4


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "image_extremes.npy", "entry.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "other content"])
def test_a_damaged_entry_is_made_again(tmp_path, name, damage, caplog):
    first = SeededDataset(mapped(tmp_path))[0, 3]
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-9], "emptied": b"", "other content": b"[7]" * 1000}[damage])
    again = SeededDataset(mapped(tmp_path))
    same(again[0, 3], first)
    assert path.read_bytes() == whole
    assert ("is damaged" in caplog.text) == (damage != "removed" or name != "entry.json")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    mapped(tmp_path)
    path = next((tmp_path / "cache").glob("*/image.npy"))
    size = path.stat().st_size
    np.save(path, np.array([functools.partial(os.mkdir, tmp_path / "owned")], dtype=object), allow_pickle=True)
    with path.open("ab") as stream:
        stream.truncate(size)
    mapped(tmp_path)
    assert not (tmp_path / "owned").exists()
    assert path.stat().st_size == size and np.load(path, allow_pickle=False).shape[0] == 1


def build(folder, barrier, queue):
    barrier.wait()
    loads = []
    original = LoadImaged.__call__

    def counting(self, data, reader=None):
        loads.append(1)
        return original(self, data, reader)

    LoadImaged.__call__ = counting
    data = SeededDataset(mapped(folder))
    queue.put((len(loads), float(data[0, 1]["image"].sum())))


def test_two_processes_make_one_cache(tmp_path):
    cases(tmp_path)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(loads for loads, _ in results) == 2  # each scan was decoded once
    assert results[0][1] == results[1][1] and len(entries(tmp_path)) == 2


def test_a_full_disk_leaves_no_entry_and_no_partial_file(tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).startswith(".label"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"label.npy .*No space left.*free space"):
        mapped(tmp_path, cache_rate=0.5)  # the loader's thread does not go on with another scan while we look
    assert entries(tmp_path) == [] and not list(tmp_path.glob("cache/*/.*"))
    monkeypatch.undo()
    assert len(mapped(tmp_path)._cache) == 2


def test_the_files_are_mapped_and_not_changed_by_a_careless_transform(tmp_path):
    data = mapped(tmp_path)
    path = next((tmp_path / "cache").glob("*/image.npy"))
    before = path.read_bytes()
    assert str(tmp_path / "cache") in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path / "cache") in os.path.realpath(link)]
    for item in data._cache:
        item["image"].as_subclass(torch.Tensor).fill_(7)
    assert path.read_bytes() == before


def test_workers_give_the_same_samples(tmp_path):
    data = SeededDataset(mapped(tmp_path))
    draws = [(0, 11), (1, 12)]
    loader = DataLoader(data, batch_size=1, sampler=draws, num_workers=2)
    for batch, draw in zip(loader, draws):
        alone = data[draw]
        assert torch.equal(torch.as_tensor(batch["image"])[0], torch.as_tensor(alone["image"]))
        assert batch["case_id"] == [alone["case_id"]]


def test_a_started_worker_gets_no_copy_of_the_cache(tmp_path):
    data = mapped(tmp_path)
    arrived = pickle.loads(pickle.dumps(data))
    assert arrived._cache == [None, None]
    same(SeededDataset(arrived)[0, 4], SeededDataset(data)[0, 4])


def test_whole_numbers_are_kept_narrow_and_nothing_else():
    volume = torch.arange(-6, 6).view(1, 2, 3, 2).float()
    assert narrowed(volume).dtype == torch.int16 and narrowed(volume + 6).dtype == torch.uint8
    for kept in (volume + 0.5, volume * 1e5, volume / 0, volume[0], volume.int()):
        assert narrowed(kept).dtype == kept.dtype
    assert torch.equal(narrowed(volume).float(), volume)


def test_unnamed_code_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"lambda.*named function"):
        mapped(tmp_path, Compose([LoadImaged("image"), Lambdad("image", func=lambda image: image)]))
    assert len(mapped(tmp_path, Compose([LoadImaged("image"), RandLambdad("image", func=lambda x: x)]))) == 2


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(DataError, match="'case_id' is a int"):
        mapped(tmp_path, Compose([LoadImaged("image"), Lambdad("case_id", func=len)]))


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="cache is a file: name a folder"):
        mapped(tmp_path)


@pytest.mark.parametrize(
    "one, other",
    [
        (1, 2),
        (1.0, "1.0"),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        (torch.zeros(3), torch.zeros(4)),
        (np.float32, np.float64),
        (torch.uint8, torch.int16),
        (NegativeValuesd("image", "clip"), NegativeValuesd("image")),
        (functools.partial(round, ndigits=1), functools.partial(round, ndigits=2)),
    ],
)
def test_descriptions_tell_settings_apart(one, other):
    assert describe(one) == describe(one) != describe(other)
