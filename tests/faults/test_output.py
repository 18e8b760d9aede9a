# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Results are whole or absent: full disks, kills, two runs in one folder, earlier results, NaN, too large scans.

Each test looks at the error's type and exit code, at the file and the remedy in its message, and at the disk.
"""

from __future__ import annotations

import json
import os
import random
import resource
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
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from mapseg_components import files, memory
from mapseg_components.data import (
    check_labelled_scans,
    check_results,
    check_scans,
    load_scans,
    result_path,
    write_volumes_csv,
)
from mapseg_components.errors import ConfigError, DataError, MAPSegError, NonFiniteError, ResourceError
from mapseg_components.handlers import DiceReport, VolumesTable
from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.memory import memory_of, require_memory
from mapseg_components.networks import GlobalLocalDeepLabV3
from mapseg_components.transforms import SaveLabelMap, SaveLabelMapd, SaveVolume
from tests.conftest import ROOT, make_scan, write_nifti
from tests.warm import python

ADAPTATION = ROOT / "bundles" / "mapseg_adaptation"
AFFINE = np.array([[0.7, 0.1, 0, -3.3], [-0.1, 1.1, 0, 5.7], [0, 0, 3.1, 7.9], [0, 0, 0, 1.0]])
KINDS = {ConfigError: 2, DataError: 3, NonFiniteError: 5, ResourceError: 6}


def refusal(kind, action, *parts):
    """The error of ours that an action ends with, however deep; its message has the parts."""
    with pytest.raises(Exception) as caught:
        action()
    error = caught.value
    while error is not None and not isinstance(error, MAPSegError):
        error = error.__cause__ or error.__context__
    assert type(error) is kind and error.exit_code == KINDS[kind], caught.value
    for part in parts:
        assert part in str(error)
    return error


def in_child(action, largest_file=None):
    """Type, exit code and message of what an action raises in a process that may write files of some bytes only."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if largest_file is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            action()
            result = [None, 0, ""]
        except BaseException as error:
            result = [type(error).__name__, getattr(error, "exit_code", 1), str(error)]
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        result = json.loads(stream.read())
    os.waitpid(child, 0)
    return result


def label_map(shape=(9, 11, 13), classes=3, name="scan.nii.gz", seed=0):
    voxels = np.random.default_rng(seed).integers(0, classes, (1, *shape))
    meta = {"filename_or_obj": f"somewhere/{name}"}
    return MetaTensor(torch.from_numpy(voxels).float(), affine=torch.from_numpy(AFFINE), meta=meta)


def names(folder):
    """What is in a folder, hidden files included, but for the lock of a run."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith(".run.lock"))


# ---- a disk that fills up


def volumes_table(folder):
    table = VolumesTable(str(folder), ["first", "second"])
    case = SimpleNamespace(state=SimpleNamespace(batch=[{"case_id": "one"}], output=[{"pred": label_map()}]))
    table._collect(case)
    table._write(case)


def dice_report(folder):
    report = DiceReport(str(folder), ["first", "second"], settings={"weights": "model.pt"})
    output = [{"pred": label_map(), "label": label_map(seed=1)}]
    report._measure(SimpleNamespace(state=SimpleNamespace(batch=[{"case_id": "one"}], output=output)))
    report._write(None)


WRITERS = {
    "text.txt": lambda folder: files.write_text("new " * 100, folder / "text.txt"),
    "selection.json": lambda folder: files.write_json({"new": list(range(100))}, folder / "selection.json"),
    "volumes.csv": volumes_table,
    "metrics.json": dice_report,
    "scan_seg.nii.gz": lambda folder: SaveLabelMap(folder, overwrite=True)(label_map()),
    "scan_seg.nii": lambda folder: SaveLabelMap(folder, output_ext=".nii", overwrite=True)(label_map()),
    "scan_trans.nii.gz": lambda folder: SaveVolume(folder, overwrite=True)(label_map()),
}


@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier file", "new"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, name, earlier):
    if earlier:
        (tmp_path / name).write_text("old")
    kind, code, message = in_child(lambda: WRITERS[name](tmp_path), largest_file=100)
    assert (kind, code) == ("ResourceError", 6)
    assert str(tmp_path / name) in message and "free space" in message and "untouched" in message
    assert "install" not in message and len(message.splitlines()) == 1
    assert names(tmp_path) == ([name] if earlier else [])
    assert not earlier or (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_writers_write_on_a_disk_with_room(tmp_path, name):
    assert in_child(lambda: WRITERS[name](tmp_path), largest_file=100_000) == [None, 0, ""]
    assert names(tmp_path) == [name] and (tmp_path / name).stat().st_size > 100


def test_the_table_of_volumes_ends_its_lines_as_csv_does(tmp_path):
    row = {"case": "ä,1", "structure": "first", "voxels": 1, "volume_mm3": 1.5, "touches_edge": False}
    write_volumes_csv([row], tmp_path / "volumes.csv")
    lines = (tmp_path / "volumes.csv").read_bytes().decode().split("\r\n")
    assert lines == ["case,structure,voxels,volume_mm3,touches_edge", '"ä,1",first,1,1.5,False', ""]


# ---- what was written is read back


def damaged(how):
    """A stand-in of `nib.save` whose file differs from what it was asked to write, without an error."""
    save = nib.save

    def damaged_save(image, filename):
        voxels, affine = np.asarray(image.dataobj).copy(), image.affine
        if how == "affine":
            affine = affine + 1e-3
        if how == "type":
            voxels = voxels.astype(np.int32)
        if how == "voxel":
            voxels[4, 5, 6] += 1
        if how == "shape":
            voxels = voxels[:-1]
        save(nib.Nifti1Image(voxels, affine), filename)
        content = Path(filename).read_bytes()
        if how == "truncated":
            Path(filename).write_bytes(content[: len(content) // 2])
        if how == "checksum":
            Path(filename).write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
        if how == "empty":
            Path(filename).write_bytes(b"")

    return damaged_save


@pytest.mark.parametrize("how", ["affine", "type", "voxel", "shape", "truncated", "checksum", "empty"])
def test_a_file_that_differs_from_what_was_written_is_not_kept(tmp_path, monkeypatch, how):
    monkeypatch.setattr("mapseg_components.transforms.saving.nib.save", damaged(how))
    (tmp_path / "scan_seg.nii.gz").write_text("old")
    error = refusal(
        ResourceError,
        lambda: SaveLabelMap(tmp_path, overwrite=True)(label_map()),
        str(tmp_path / "scan_seg.nii.gz"),
        "check the disk",
    )
    assert how in str(error) or "cannot be read back" in str(error)
    assert names(tmp_path) == ["scan_seg.nii.gz"] and (tmp_path / "scan_seg.nii.gz").read_text() == "old"


@pytest.mark.parametrize(
    "classes, largest, dtype",
    [(3, 2, np.uint8), (256, 255, np.uint8), (257, 2, np.int16), (None, 255, np.uint8), (None, 300, np.int16)],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_label_map_has_integers_and_its_scans_affine(tmp_path, classes, largest, dtype, ending):
    pred = label_map((7, 8, 1))  # a single slice stays a volume
    pred[0, 0, 0, 0] = largest
    SaveLabelMapd("pred", tmp_path, output_ext=ending, num_classes=classes)({"pred": pred})
    found = nib.load(tmp_path / f"scan_seg{ending}")
    assert found.get_data_dtype() == dtype and found.shape == (7, 8, 1)
    np.testing.assert_array_equal(np.asarray(found.dataobj), pred[0].numpy())
    np.testing.assert_array_equal(found.affine, AFFINE.astype(np.float32))


@pytest.mark.parametrize("value", [0.5, -1, 3, float("nan"), float("inf")])
def test_what_is_no_class_is_not_saved(tmp_path, value):
    pred = label_map()
    pred[0, 1, 2, 3] = value
    refusal(
        ConfigError, lambda: SaveLabelMap(tmp_path, num_classes=3)(pred), str(tmp_path / "scan_seg.nii.gz"), "argmax"
    )
    assert names(tmp_path) == []


def test_a_volume_with_nan_is_not_saved(tmp_path):
    volume = label_map()
    volume[0, 1, 2, 3] = float("nan")
    refusal(NonFiniteError, lambda: SaveVolume(tmp_path)(volume), "scan_trans.nii.gz: 1 voxels", "check the weights")
    assert names(tmp_path) == []


def test_several_channels_are_not_one_label_map(tmp_path):
    refusal(
        ConfigError, lambda: SaveLabelMap(tmp_path)(torch.zeros(2, 3, 4, 5)), "_seg.nii.gz: shape (2, 3, 4, 5)", "one"
    )
    assert names(tmp_path) == []


def test_the_saver_is_monais_by_type():
    """MONAI Label leaves out a bundle's ``SaveImaged`` by its type."""
    assert isinstance(SaveLabelMapd("pred"), SaveImaged)


# ---- kills


def replace_for_ever(path, keep_previous):
    number = 0
    while True:
        content = f"{number} " * 50_000
        with files.replacing(path, keep_previous) as temporary, temporary.open("w") as stream:
            for start in range(0, len(content), 1000):
                stream.write(content[start : start + 1000])
        number += 1


def test_a_killed_writer_leaves_whole_files(tmp_path):
    """Twelve kills at random moments; the file and the previous one each hold one run of one number."""
    path, previous = tmp_path / "last.txt", tmp_path / "previous.txt"
    moments, strays = random.Random(0), 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            replace_for_ever(path, previous)
        deadline = time.monotonic() + 10
        while not previous.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for file in (path, previous):
            words = file.read_text().split()
            assert len(words) == 50_000 and len(set(words)) == 1, file
        strays += len(files.sweep_temporaries(tmp_path))
        assert names(tmp_path) == ["last.txt", "previous.txt"]
    assert strays  # some kills did hit a write


def interrupted_at(moment, write):
    """Whether Ctrl-C came: at the ``moment``-th line of `replacing`'s work, before its own cleaning up."""
    count = 0

    def line(frame, event, _):
        nonlocal count
        if event == "line" and frame.f_code.co_name == "replacing":
            count += 1
            if count == moment:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    sys.settrace(line)
    try:
        write()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupted_writer_leaves_nothing_beside_the_file(tmp_path):
    """Ctrl-C at each line until the file has its new name."""
    path, came = tmp_path / "volumes.csv", 0
    path.write_text("old")
    for moment in range(1, 100):
        interrupted = interrupted_at(moment, lambda: files.write_text("new", path))
        if path.read_text() == "new":
            break
        came += interrupted
        assert names(tmp_path) == ["volumes.csv"], moment
    assert came > 8


def test_sweeping_takes_only_what_interrupted_writes_leave(tmp_path, caplog):
    stray = ".scan_seg.nii.gz.ab12_xyz.tmp.nii.gz"
    own = [".notes.tmp", ".settings.tmpl", "scan.tmp", ".scan.nii.gz", ".tmp"]
    for name in [stray, *own]:
        (tmp_path / name).write_text("x")
    assert [path.name for path in files.sweep_temporaries(tmp_path)] == [stray]
    assert stray in caplog.text and names(tmp_path) == sorted(own)


def test_previous_and_present_file_may_already_be_one(tmp_path):
    """As a kill between the two renames leaves them."""
    path, previous = tmp_path / "last.txt", tmp_path / "previous.txt"
    path.write_text("old")
    os.link(path, previous)
    with files.replacing(path, previous) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), previous.read_text()) == ("new", "old")
    assert names(tmp_path) == ["last.txt", "previous.txt"]


def test_a_new_file_is_as_private_as_the_user_wants(tmp_path):
    before = os.umask(0o077)
    try:
        files.write_text("x", tmp_path / "volumes.csv")
    finally:
        os.umask(before)
    assert (tmp_path / "volumes.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["x" * 240 + "_seg.nii.gz", "ä" * 60 + " 1_seg.nii.gz"])
def test_a_long_name_that_the_file_system_takes_is_written(tmp_path, name):
    files.write_text("x", tmp_path / name)
    assert names(tmp_path) == [name]


# ---- folders


@pytest.mark.parametrize("below", ["file.txt", "file.txt/deeper"])
def test_a_folder_below_a_file_is_refused(tmp_path, below):
    (tmp_path / "file.txt").write_text("old")
    folder = tmp_path / below
    refusal(ConfigError, lambda: files.require_writable(folder), f"{tmp_path / 'file.txt'} is a file: name a folder")
    for write in (lambda: files.write_text("x", folder / "a.txt"), lambda: SaveLabelMap(folder)(label_map())):
        refusal(ResourceError, write, str(folder), "choose a folder")
    assert names(tmp_path) == ["file.txt"] and (tmp_path / "file.txt").read_text() == "old"


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    files.require_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_one_run_a_folder(tmp_path):
    """A second process learns who has the folder; the system frees the lock of a killed one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        files.lock_folder(tmp_path)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        host = os.uname().nodename
        refusal(
            ResourceError,
            lambda: files.lock_folder(tmp_path, timeout=0.2),
            f"{tmp_path} is in use by process {child} on {host}",
            "wait for that run or choose another folder",
        )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    files.lock_folder(tmp_path, timeout=0.2)
    files.lock_folder(tmp_path, timeout=0.2)  # two runs in one process: both give it up
    assert in_child(lambda: other_claim(tmp_path))[0] == "ResourceError"
    files.unlock_folders([tmp_path])
    assert in_child(lambda: other_claim(tmp_path))[0] == "ResourceError"
    files.unlock_folders([tmp_path])
    assert in_child(lambda: other_claim(tmp_path))[0] is None
    assert names(tmp_path) == []


def other_claim(folder):
    """A claim by a process that inherited nothing."""
    files._locks.clear()
    files.lock_folder(folder, timeout=0.2)


# ---- earlier results, names that collide


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Settings of a tiny network with random weights."""
    tiny = ConfigParser.load_config_file(ADAPTATION / "configs" / "tiny.yaml")
    sizes = {key: tiny[key] for key in ("width", "depth", "dilations", "head_channels")}
    torch.manual_seed(0)
    network = GlobalLocalDeepLabV3(in_channels=1, num_classes=3, stride=4, **sizes)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(network.state_dict(), path)
    sizes |= {"patch_size": tiny["patch_size"], "window_stride": tiny["window_stride"], "stride": 4}
    return {"weights": str(path), "labels": {"first": 1, "second": 2}, "bundle_root": str(ADAPTATION), **sizes}


def infer(model, scans, out, *more, **settings):
    configs = [str(ADAPTATION / "configs" / name) for name in ("inference.json", *more)]
    settings = {**model, "dataset_dir": str(scans), "output_dir": str(out), **settings}
    run(run_id="run", config_file=configs, device="$torch.device('cpu')", **settings)


@pytest.mark.parametrize("existing", ["0_seg.nii.gz", "volumes.csv", "metrics.json"])
def test_earlier_results_are_refused_before_any_work(dataset, tmp_path, model, existing):
    out = tmp_path / "out"
    out.mkdir()
    (out / existing).write_text("old")
    more = ["evaluate.json"] if existing == "metrics.json" else []
    absent = {**model, "weights": "absent.pt"}  # nobody gets as far as looking for them
    folder = dataset if more else dataset / "target_training"
    refusal(
        ConfigError,
        lambda: infer(absent, folder, out, *more),
        str(out),
        existing,
        "set overwrite to true",
        "output_dir",
    )
    assert names(out) == [existing] and (out / existing).read_text() == "old"


def test_earlier_results_are_replaced_when_told_to(dataset, tmp_path, model):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("0_seg.nii.gz", "volumes.csv"):
        (out / name).write_text("old")
    infer(model, dataset / "target_training", out, overwrite=True, stitching_device="cpu")
    assert set(names(out)) >= {"0_seg.nii.gz", "1_seg.nii.gz", "volumes.csv"}
    assert nib.load(out / "0_seg.nii.gz").get_data_dtype() == np.uint8
    assert (out / "volumes.csv").read_text().startswith("case,")
    refusal(ConfigError, lambda: SaveLabelMap(out)(label_map(name="0.nii.gz")), "0_seg.nii.gz exists", "overwrite")


def test_the_first_results_of_many_are_named(tmp_path):
    cases = [{"image": f"in/{number}.nii.gz"} for number in range(9)]
    for case in cases:
        result_path(case["image"], tmp_path, "seg").write_text("old")
    refusal(
        ConfigError,
        lambda: check_results(cases, tmp_path, "seg", ["volumes.csv"]),
        "9 results of an earlier run (0_seg.nii.gz, 1_seg.nii.gz, 2_seg.nii.gz ...)",
    )
    check_results(cases, tmp_path, "seg", ["volumes.csv"], overwrite=True)
    check_results(cases, tmp_path / "other", "seg")
    assert len(names(tmp_path)) == 9


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "s.1.nii.gz", "ä b.nii.gz", "x" * 200 + ".nii.gz"])
def test_names_are_known_before_they_are_written(tmp_path, name):
    expected = result_path(f"somewhere/{name}", tmp_path, "seg")
    SaveLabelMap(tmp_path)(label_map(name=name))
    assert names(tmp_path) == [expected.name]


def test_two_scans_do_not_write_one_file(tmp_path):
    first = write_nifti(tmp_path / "a" / "scan.nii.gz", make_scan()[0])
    second = write_nifti(tmp_path / "b" / "scan.nii.gz", make_scan()[0])
    cases = [{"image": first, "case_id": "a"}, {"image": second, "case_id": "b"}]
    refusal(DataError, lambda: check_results(cases, tmp_path / "out", "seg", overwrite=True), first, second, "rename")
    write_nifti(tmp_path / "a" / "scan.nii", make_scan()[0])
    for check in (check_scans, lambda cases: check_labelled_scans(cases, [])):
        refusal(DataError, lambda: check(load_scans(tmp_path / "a")), "'scan'", "rename")  # noqa: B023
    assert not (tmp_path / "out").exists()


def test_a_result_never_replaces_a_scan(tmp_path):
    scan = write_nifti(tmp_path / "scan_seg.nii.gz", make_scan()[0])
    cases = [{"image": scan}, {"image": write_nifti(tmp_path / "scan.nii.gz", make_scan()[0])}]
    refusal(ConfigError, lambda: check_results(cases, tmp_path, "seg", overwrite=True), scan, "output_postfix")


def test_a_name_that_no_file_system_takes_is_refused_early(tmp_path):
    scan = "x" * 247 + ".nii.gz"
    refusal(DataError, lambda: check_results([{"image": scan}], tmp_path, "seg"), scan, "rename the scan")


# ---- numbers and memory


def test_nan_of_the_network_ends_inference_without_a_label_map(dataset, tmp_path, model):
    """By the command that a user types: the weights are finite, the logits are not."""
    weights = torch.load(model["weights"], weights_only=True)
    torch.save({name: torch.full_like(value, 3e38) for name, value in weights.items()}, tmp_path / "huge.pt")
    settings = {**model, "weights": tmp_path / "huge.pt", "dataset_dir": dataset / "target_training"}
    settings |= {"output_dir": tmp_path / "out", "device": "$torch.device('cpu')"}
    line = [python(), "-m", "monai.bundle", "run", "run", "--config_file", "configs/inference.json"]
    line += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(line, cwd=ADAPTATION, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("NonFiniteError: ") and str(dataset / "target_training" / "0.nii.gz") in last
    assert "check the weights" in last
    assert sorted(path.name for path in tmp_path.glob("out/**/*")) == [".run.lock", "audit.json"]


def two_corners(side):
    scan = torch.zeros(1, 1, side, side, side)
    scan[..., 0, 0, 0] = scan[..., -1, -1, -1] = 0.5
    return MetaTensor(scan, meta={"filename_or_obj": "large.nii.gz"})


def test_a_scan_whose_logits_do_not_fit_is_refused_before_they_are_allocated():
    """100000 classes on 200 voxels a side: 2.9 TiB."""
    inferer = GlobalLocalSlidingWindowInferer(8, stride=8, sw_batch_size=1)
    network = lambda windows: torch.zeros(1).expand(len(windows), 100_000, 8, 8, 8)  # noqa: E731
    error = refusal(ResourceError, lambda: inferer(two_corners(200), network), "large.nii.gz", "crop the scan")
    assert "needs 2980.3 GiB on cpu, which has" in str(error) and "stitching_device" not in str(error)


def test_a_device_that_is_too_small_has_a_larger_one_named(monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: 10 * 2**30 if torch.device(device).type == "cpu" else 2**10)
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("allocated"))
    inferer = GlobalLocalSlidingWindowInferer(8)
    region = torch.ones(1, 8, 8, 8)
    inferer._require_memory("large.nii.gz", 3, region, torch.device("cpu"))
    refusal(
        ResourceError,
        lambda: inferer._require_memory("large.nii.gz", 3, region, torch.device("cuda", 0)),
        "large.nii.gz: 3 classes of shape (8, 8, 8) needs 0.0 GiB on cuda:0, which has 0.0 GiB",
        "set stitching_device to cpu",
    )


def test_memory_that_ends_in_the_windows_is_named():
    def network(windows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    inferer = GlobalLocalSlidingWindowInferer(8, sw_batch_size=3)
    error = refusal(ResourceError, lambda: inferer(two_corners(12), network), "large.nii.gz", "window_batch_size")
    assert "windows of (8, 8, 8), 3 at a time, on cpu" in str(error) and "20.00 GiB" in str(error)


def test_memory_of_this_machine_is_known(tmp_path, monkeypatch):
    found = memory_of("cpu")
    assert 2**28 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("12345\n")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert memory_of("cpu") == 12345
    assert memory_of("meta") is None
    require_memory(12345, "cpu", "x", "y")
    refusal(ResourceError, lambda: require_memory(12346, "cpu", "scan.nii.gz", "crop it"), "scan.nii.gz", "crop it")


def test_the_old_file_is_there_until_the_new_one_takes_its_name(tmp_path, monkeypatch):
    path, original, seen = tmp_path / "a.txt", os.replace, []
    path.write_text("old")

    def replace(source, target):
        seen.append(path.read_text())
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert seen == ["old"] and path.read_text() == "new"
