# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandLambda

from mapseg_components.data import (
    DomainBalancedSampler,
    EpochLoader,
    SeededDataset,
    SourceTargetLoader,
    check_datalist,
    check_labelled_scans,
    check_pretraining_data,
    check_scan,
    check_scans,
    check_training_data,
    class_weights,
    load_datalist,
    load_images,
    load_scans,
    structure_volumes,
    write_volumes_csv,
)
from mapseg_components.errors import ConfigError, DataError, ResourceError
from tests.conftest import make_scan, write_nifti

LABELS = {"first": 1, "second": 2}


def edit(dataset, change):
    content = json.loads((dataset / "datalist.json").read_text())
    change(content)
    (dataset / "datalist.json").write_text(json.dumps(content))
    return dataset / "datalist.json"


def test_target_training_has_no_label_key_even_if_the_file_has_one(dataset, caplog):
    path = edit(dataset, lambda c: c["target_training"][0].update(label="secret.nii.gz"))
    assert all("label" not in case for case in load_datalist(path, "target_training"))
    assert "never read in training" in caplog.text


def test_sound_data_passes(dataset):
    check_training_data(dataset / "datalist.json", LABELS)
    check_pretraining_data(dataset / "datalist.json")
    cases = load_images(dataset / "datalist.json", ["source_training", "target_training"])
    assert {case["domain"] for case in cases} == {"source_training", "target_training"}
    assert not any("label" in case for case in cases)


def test_domains_of_a_folder(tmp_path):
    for domain, count in {"site a": 2, "site b": 1}.items():
        for number in range(count):
            for kind in ("images", "labels"):
                write_nifti(tmp_path / "source" / domain / kind / f"{domain[-1]}{number}.nii.gz", make_scan()[0])
    cases = load_datalist(tmp_path, "source_training")
    assert [(case["domain"], case["case_id"]) for case in cases] == [
        ("site a", "site a_a0"),
        ("site a", "site a_a1"),
        ("site b", "site b_b0"),
    ]
    assert all(case["label"].endswith(f"labels/{case['case_id'][-2:]}.nii.gz") for case in cases)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["source_training"][0].pop("label"), "entry 0: 'label' is missing for .*: name it"),
        (lambda c: c["source_training"].append(dict(c["source_training"][0])), "'source_training-0' occurs twice"),
        (lambda c: c["source_validation"].append({**c["source_training"][0]}), "is in source_training and in"),
        (
            lambda c: c["target_test"].append({**c["source_training"][0]}),
            "is in source_training and in target_test",
        ),
        (lambda c: c["source_training"][0].update(case_id="../x"), "case id '../x' cannot name a file"),
        (lambda c: c["source_training"][0].update(label="source_training/0.nii.gz"), "named as image and as label"),
        (lambda c: c["source_training"].append("scan.nii.gz"), "entry 2: expected an object with 'image'"),
    ],
)
def test_bad_datalist_is_named(dataset, change, message):
    with pytest.raises(DataError, match=message):
        check_datalist(edit(dataset, change))


def test_number_as_case_id_and_byte_order_mark_are_read(dataset):
    path = edit(dataset, lambda c: c["source_training"][0].update(case_id=0))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_datalist(path, "source_training")[0]["case_id"] == "0"


def test_scan_of_the_adaptation_may_be_tested_on(dataset):
    case = lambda c: {**c["target_training"][0], "label": c["target_test"][0]["label"]}  # noqa: E731
    assert len(check_datalist(edit(dataset, lambda c: c["target_test"].append(case(c))))["target_test"]) == 2


def test_missing_datalist_and_section(dataset, tmp_path):
    with pytest.raises(ConfigError, match="no datalist at"):
        load_datalist(tmp_path / "nowhere.json", "source_training")
    for nothing in (None, ""):
        with pytest.raises(ConfigError, match="no datalist given"):
            load_datalist(nothing, "source_training")
    path = edit(dataset, lambda c: c.pop("source_training"))
    with pytest.raises(ConfigError, match="has no 'source_training'"):
        check_datalist(path)
    with pytest.raises(ConfigError, match="section 'training' is unknown"):
        load_datalist(path, "training")
    path.write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        load_datalist(path, "target_training")


def image_of(dataset):
    return dataset / "source_training" / "0.nii.gz"


def break_nan(dataset):
    image, _ = make_scan()
    image[3, 4, 5] = np.nan
    write_nifti(image_of(dataset), image)


def break_truncate(dataset):
    content = image_of(dataset).read_bytes()
    image_of(dataset).write_bytes(content[: len(content) // 2])


def break_crc(dataset):
    content = bytearray(image_of(dataset).read_bytes())
    content[len(content) // 2] ^= 1
    image_of(dataset).write_bytes(bytes(content))


def break_affine(dataset):
    write_nifti(dataset / "source_training" / "0_label.nii.gz", make_scan()[1], np.diag([1.0, 1.1, 1.4, 1.0]))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (break_nan, r"0\.nii\.gz: 1 voxels are NaN or infinite, the first at \(3, 4, 5\): repair"),
        (lambda d: write_nifti(image_of(d), np.ones((20, 24, 28))), "all voxels are 1, no contrast"),
        (
            lambda d: write_nifti(image_of(d), np.random.rand(20, 24, 28, 3)),
            r"\(20, 24, 28, 3\), expected 3D: split a series [^:]*$",
        ),
        (
            lambda d: write_nifti(image_of(d), make_scan((20, 24, 27))[0]),
            r"label map of shape \(20, 24, 28\), its scan \(20",
        ),
        (break_affine, r"0_label\.nii\.gz: its affine puts a corner \d+\.\d+ mm away"),
        (
            lambda d: write_nifti(d / "source_training/0_label.nii.gz", make_scan()[1] * 4),
            r"unknown values 4 .*8 .*known are \[0, 1, 2\]",
        ),
        (lambda d: image_of(d).unlink(), "0.nii.gz: no such file: correct the datalist"),
        (lambda d: image_of(d).write_text("hello"), "cannot be read as NIfTI"),
        (break_truncate, "cannot be read as NIfTI"),
        (break_crc, r"0\.nii\.gz"),
    ],
)
def test_bad_scan_is_named(dataset, break_it, message):
    break_it(dataset)
    with pytest.raises(DataError, match=message) as caught:
        check_training_data(dataset / "datalist.json", LABELS)
    assert "\n" not in str(caught.value)


def test_evaluation_checks_labels_too(dataset):
    cases = load_datalist(dataset / "datalist.json", "target_test")
    check_labelled_scans(cases, LABELS)
    write_nifti(dataset / "target_test" / "0_label.nii.gz", make_scan((20, 24, 27))[1])
    with pytest.raises(DataError, match=r"0_label.*shape \(20, 24, 27\), its scan \(20, 24, 28\)"):
        check_labelled_scans(cases, LABELS)


def test_every_finding_is_listed(dataset):
    image_of(dataset).unlink()
    write_nifti(dataset / "target_training" / "1.nii.gz", np.zeros((8, 9, 10)))
    with pytest.raises(DataError) as caught:
        check_training_data(dataset / "datalist.json", LABELS)
    assert len(str(caught.value).splitlines()) == 2


def test_fourth_axis_of_one_is_squeezed(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", make_scan()[0][..., None])
    assert check_scan(path)[0] == (20, 24, 28)


def test_scans_of_a_folder(tmp_path):
    write_nifti(tmp_path / "b.nii", make_scan()[0])
    write_nifti(tmp_path / "a.x.nii.gz", make_scan()[0])
    (tmp_path / "notes.txt").write_text("")
    assert [case["case_id"] for case in load_scans(tmp_path)] == ["a.x", "b"]
    assert load_scans(tmp_path / "b.nii")[0]["case_id"] == "b"
    check_scans(load_scans(tmp_path))
    with pytest.raises(ConfigError, match="no NIfTI scan"):
        check_scans(load_scans(tmp_path / "empty"))
    write_nifti(tmp_path / "b.nii.gz", make_scan()[0])
    with pytest.raises(DataError, match=r"\['b'\] occur twice"):
        check_scans(load_scans(tmp_path))


def test_domains_are_drawn_evenly_whatever_their_size():
    sampler = DomainBalancedSampler(["a"] * 9 + ["b"], num_samples=2000, seed=1)
    share = np.mean([index == 9 for index, _ in sampler])
    assert 0.45 < share < 0.55
    again = DomainBalancedSampler(["a"] * 9 + ["b"], 2000, 1)
    assert list(again) == list(sampler)
    again.set_epoch(1)
    assert list(again) != list(sampler)


class Cases:
    """What a MONAI dataset has: data, and a transform with a random state of its own."""

    def __init__(self, cases=6, broken=None):
        self.data = [{"case_id": f"case {number}"} for number in range(cases)]
        self.transform = Compose([RandLambda(lambda x: x, prob=0.5)])
        self.broken = broken

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.broken:
            raise self.error
        return index + self.transform.transforms[0].R.uniform()


def loader(workers=0, cases=6, batches=4, dataset=None, seed=3, **options):
    dataset = dataset or Cases(cases)
    sampler = DomainBalancedSampler(["a"] * len(dataset), batches * 2, seed)
    options = {"batch_size": 2, "num_workers": workers, **options}
    return DataLoader(SeededDataset(dataset), sampler=sampler, **options)


def batches_of(pairs):
    return [{side: batch.tolist() for side, batch in both.items()} for both in pairs]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_epoch_alone_and_go_on_within_it(workers):
    torch.manual_seed(torch.seed() % 2**31)
    plain = SourceTargetLoader(loader(), loader())
    epochs = [batches_of(plain) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(len(epoch) == 4 and batch["source"] != batch["target"] for epoch in epochs for batch in epoch)
    resumed = SourceTargetLoader(loader(workers), loader(workers))
    resumed.load_state_dict({**plain.state_dict(), "epoch": 1})
    before = torch.get_rng_state()
    assert batches_of(resumed) == epochs[1]
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the state that training draws from

    interrupted = SourceTargetLoader(loader(workers), loader(workers))
    iterator = iter(interrupted)
    first = batches_of([next(iterator)])
    state = interrupted.state_dict()
    del iterator
    again = SourceTargetLoader(loader(workers), loader(workers))
    again.load_state_dict(state)
    assert first + batches_of(again) == epochs[0]
    assert batches_of(again) == epochs[1]


def test_loaders_that_could_not_resume_are_refused():
    kept = loader(1, persistent_workers=True)
    for make in (EpochLoader, lambda one: SourceTargetLoader(None, one)):
        with pytest.raises(ConfigError, match="persistent_workers is true"):
            make(kept)
        with pytest.raises(ConfigError, match="expected SeededDataset and DomainBalancedSampler"):
            make(DataLoader(list(range(4))))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("bad\nvoxels"), DataError("a.nii.gz: bad: repair it")])
def test_a_broken_sample_is_named_in_the_first_line(workers, error):
    dataset = Cases(broken=4)
    dataset.error = error
    with pytest.raises(DataError) as caught:
        list(EpochLoader(loader(workers, dataset=dataset, batches=50)))
    name = "ValueError: " if isinstance(error, ValueError) and not isinstance(error, DataError) else ""
    assert str(caught.value) == f"case case 4: {name}{str(error).splitlines()[0]}"
    assert multiprocessing.active_children() == []  # or they would be waited for at the end of the process


def test_exhausted_memory_in_a_sample_is_no_fault_of_the_data():
    dataset = Cases(broken=4)
    dataset.error = MemoryError()
    with pytest.raises(ResourceError, match="case case 4: MemoryError"):
        list(EpochLoader(loader(1, dataset=dataset, batches=50)))


def test_other_cases_are_not_resumed_with():
    state = EpochLoader(loader()).state_dict()
    with pytest.raises(ValueError, match=r" scans were \['case 0', .*now \['case 0', 'case 1'\]"):
        EpochLoader(loader(cases=2)).load_state_dict(state)


class Suicidal(Cases):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_points_to_memory():
    with pytest.raises(ResourceError, match=r"DataLoader worker.*the memory is full.*lower num_workers or cache_rate"):
        list(EpochLoader(loader(1, dataset=Suicidal())))


class PretendsToBeInterrupted(Cases):
    def __getitem__(self, index):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_workers_leave_signals_to_the_main_process():
    assert len(list(EpochLoader(loader(1, dataset=PretendsToBeInterrupted())))) == 4


def test_sides_are_named_and_one_may_be_absent():
    both = SourceTargetLoader(loader(batches=5), loader(batches=3))
    assert len(both) == 3 and [set(batch) for batch in both] == [{"source", "target"}] * 3
    assert [set(batch) for batch in SourceTargetLoader(None, loader(batches=5))] == [{"target"}] * 5
    assert len(list(EpochLoader(loader(batches=5)))) == 5
    with pytest.raises(ConfigError, match="neither source nor target"):
        SourceTargetLoader(None, None)


def test_volumes_in_mm3_and_edges(tmp_path):
    label = np.zeros((4, 5, 6), np.uint8)
    label[1:3, 1:3, 1:3] = 1
    label[:, 0, 0] = 2
    rows = structure_volumes(label, np.diag([2.0, -1.5, 0.5, 1.0]), ["inside", "edge", "absent"])
    assert [(r["voxels"], r["volume_mm3"], r["touches_edge"]) for r in rows] == [
        (8, 12.0, False),
        (4, 6.0, True),
        (0, 0.0, False),
    ]
    write_volumes_csv([{"case": "a", **row} for row in rows], tmp_path / "new" / "volumes.csv")
    with (tmp_path / "new" / "volumes.csv").open() as stream:
        assert list(csv.DictReader(stream))[1]["structure"] == "edge"


def test_class_weights_follow_rarity(dataset):
    cases = load_datalist(dataset / "datalist.json", "source_training")
    counts = sum(np.bincount(np.asarray(nib.load(case["label"]).dataobj).ravel(), minlength=3) for case in cases)
    assert class_weights(cases, LABELS, 0.5) == pytest.approx(np.sqrt(counts[0] / counts).tolist())
    assert class_weights(cases, LABELS, 0) is None


@pytest.mark.parametrize("axis", range(3))
def test_a_structure_within_an_image_touches_no_edge(axis):
    label = np.zeros((6, 7), np.uint8)
    label[2:4, 2:4], label[0, 5] = 1, 2
    rows = structure_volumes(np.expand_dims(label, axis), np.eye(4), ["inside", "edge"])
    assert [row["touches_edge"] for row in rows] == [False, True]
