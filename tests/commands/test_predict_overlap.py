# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg predict` reads, segments and writes at the same time: the same files, whatever the timing."""

from __future__ import annotations

import json
import shutil
import threading
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run as bundle_run
from monai.transforms import LoadImage, SpatialResample

from mapseg_components.commands import predict
from mapseg_components.prediction import run as running
from mapseg_components.prediction.run import Run
from mapseg_components.prediction.writing import Writer
from tests.conftest import ROOT, SAMPLE

BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
SCAN = SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"
LONG = 20  # seconds that no stage waits if all is well


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four parts of a scan, of different sizes and orientations; the second cannot be read."""
    place = tmp_path_factory.mktemp("scans")
    scan = nib.load(SCAN)
    for number, (x, y, z) in enumerate([(4, 5, 2), (0, 0, 0), (8, 3, 6), (12, 9, 4)]):
        voxels = np.asarray(scan.dataobj)[x : x + 36, y : y + 32 - number, z : z + 28]
        image = nib.Nifti1Image(voxels, scan.affine)
        turned = image.as_reoriented(np.array([[number % 3, -1], [(number + 1) % 3, 1], [(number + 2) % 3, 1]]))
        nib.save(turned, place / f"part {number}.nii.gz")
    (place / "part 1.nii.gz").write_bytes(SCAN.read_bytes()[:4000])
    return place


def contents(output):
    """All files of a run, without seconds, paths and times in the manifest."""
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if "manifest" not in name and "lock" not in name}
    manifest = json.loads((output / "manifest.json").read_text().replace(str(output), "OUT"))
    assert all(one.pop("seconds") > 0 for one in manifest["scans"] if one["status"] == "done")
    for name in ("seconds", "started", "command"):
        del manifest[name]
    for one in manifest["scans"]:
        one.pop("seconds", None)
    return {**found, "manifest.json": manifest}


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """Files of one scan after the other, and the random state that this leaves."""
    output = tmp_path_factory.mktemp("plain")
    predict(folder, output, bundle=BUNDLE, probabilities=True, no_overlap=True, quiet=True)
    return contents(output), torch.get_rng_state()


@pytest.mark.parametrize("slow", [None, "read", "segment", "write"])
def test_the_same_files_whatever_the_timing(folder, plain, tmp_path, monkeypatch, slow):
    threads = set()
    for name in ("read", "segment", "write"):
        stage = getattr(Run, name)

        def delayed(run, *arguments, stage=stage, name=name):
            threads.add((name, threading.current_thread() is threading.main_thread()))
            time.sleep(0.3 if name == slow else 0)
            return stage(run, *arguments)

        monkeypatch.setattr(Run, name, delayed)
    predict(folder, tmp_path, bundle=BUNDLE, probabilities=True, quiet=True)
    assert threads == {("read", False), ("segment", True), ("write", False)}
    expected, random_state = plain
    found = contents(tmp_path)
    assert found.keys() == expected.keys() and len([name for name in found if name.endswith("_seg.nii.gz")]) == 3
    assert [name for name in found if found[name] != expected[name] and not name.endswith(".png")] == []
    assert [name for name in found if name.endswith(".png") and found[name] != expected[name]] == []
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_scan_is_inverted_while_the_next_is_resampled(folder, tmp_path, monkeypatch):
    """MONAI's inverse turns off its transform's tracing, but for its own thread alone: no scan loses its trace."""
    (tmp_path / "in").mkdir()
    for number in (0, 2):
        shutil.copyfile(folder / f"part {number}.nii.gz", tmp_path / "in" / f"{number}.nii.gz")
    steps = json.loads((BUNDLE / "configs" / "inference.json").read_text())["preprocessing"]["transforms"]
    steps.insert(-2, {"_target_": "Spacingd", "keys": ["image"], "pixdim": [0.9, 1.1, 1.2]})
    (tmp_path / "spacing.json").write_text(json.dumps({"preprocessing#transforms": steps}))
    arguments = {"bundle": BUNDLE, "overlays": str(tmp_path / "spacing.json"), "no_preview": True, "quiet": True}
    assert predict(tmp_path / "in", tmp_path / "plain", no_overlap=True, **arguments).exit_code == 0

    inverting, resampled, met = threading.Event(), threading.Event(), []
    resample = SpatialResample.__call__

    def meeting(self, img, *more, **options):
        if threading.current_thread() is threading.main_thread():
            if not inverting.is_set():
                inverting.set()
                met.append(resampled.wait(LONG))
            return resample(self, img, *more, **options)
        if "2.nii.gz" in img.meta["filename_or_obj"]:
            met.append(inverting.wait(LONG))
            try:
                return resample(self, img, *more, **options)
            finally:
                resampled.set()
        return resample(self, img, *more, **options)

    monkeypatch.setattr(SpatialResample, "__call__", meeting)
    done = predict(tmp_path / "in", tmp_path / "overlap", **arguments)
    assert met == [True, True] and done.exit_code == 0, done
    for name in ("0_seg.nii.gz", "2_seg.nii.gz"):
        assert (tmp_path / "overlap" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_the_bundles_own_run_reads_ahead_in_a_worker_with_equal_label_maps(folder, plain, tmp_path):
    (tmp_path / "in").mkdir()
    for number in (0, 2, 3):
        shutil.copyfile(folder / f"part {number}.nii.gz", tmp_path / "in" / f"part {number}.nii.gz")
    config, device = str(BUNDLE / "configs" / "inference.json"), "$torch.device('cpu')"
    places = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "bundle_root": str(BUNDLE)}
    bundle_run(config_file=config, device=device, num_workers=1, **places)
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*_seg.nii.gz")}
    assert len(found) == 3 and found == {name: plain[0][name] for name in found}


@pytest.mark.parametrize("spare, threads", [(0, {"read", "write"}), (-1, set())])
def test_scans_for_which_memory_is_short_are_done_one_by_one(folder, tmp_path, monkeypatch, spare, threads):
    largest = max(np.prod(nib.load(path).shape) for path in folder.glob("*.nii.gz") if "1" not in path.name)
    needed = int(largest) * (running.BYTES_OVERLAPPED + running.BYTES_A_CLASS * 9)
    monkeypatch.setattr(running, "memory_of", lambda device: 2 * needed + spare)
    used = set()
    keep, read = Writer.keep, LoadImage.__call__
    monkeypatch.setattr(LoadImage, "__call__", lambda *arguments: used.add(thread()) or read(*arguments))
    monkeypatch.setattr(Writer, "keep", lambda *arguments: used.add(thread()) or keep(*arguments))
    predict(folder, tmp_path, bundle=BUNDLE, no_preview=True, quiet=True)
    assert used - {"MainThread"} == {f"{name}_0" for name in threads} and len(used) == (2 if threads else 1)


def thread():
    return threading.current_thread().name
