# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Layouts of nnU-Net, the Medical Segmentation Decathlon and BIDS: a label map is never taken for a scan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import check
from mapseg_components.commands.main import main
from mapseg_components.commands.prepare import prepare
from mapseg_components.data import ScanAudit, load_datalist, load_scans
from mapseg_components.data.bids import bids_scans
from mapseg_components.data.layouts import misplaced
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.plans.cases import source_cases, structure_names, target_cases
from mapseg_components.scans.facts import looks_like_labels
from tests.conftest import write_nifti

AFFINE = np.diag([1.0, 1.25, 0.8, 1.0])
SHAPE = (16, 20, 24)
DATASETS = {
    "nnU-Net v2": {"channel_names": {"0": "T2"}, "labels": {"background": 0, "outer": 1, "inner": 2}, "numTraining": 3},
    "nnU-Net v1": {"modality": {"0": "T2"}, "labels": {"0": "background", "1": "outer", "2": "inner"}},
    "Decathlon": {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "outer", "2": "inner"}},
}


def scan_of(seed):
    """Noise that is no label map, and two boxes as labels."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:13, 4:16, 5:20], label[6:10, 8:12, 8 + seed : 14] = 1, 2
    image = np.random.default_rng(seed).uniform(50, 100, SHAPE) * (1 + label) * (label > 0)
    return image.astype(np.float32), label


def dataset(folder, kind, names=("c_1", "c_2", "c_3"), channels=1):
    """A dataset of three cases, as its makers lay it out, with what macOS adds."""
    suffixes = [""] if kind == "Decathlon" else [f"_{number:04d}" for number in range(channels)]
    for seed, name in enumerate(names):
        image, label = scan_of(seed)
        for number, suffix in enumerate(suffixes):
            write_nifti(folder / f"imagesTr/{name}{suffix}.nii.gz", image + number * (image > 0), AFFINE)
            write_nifti(folder / f"imagesTs/t{name}{suffix}.nii.gz", image[:, ::-1] + number, AFFINE)
        write_nifti(folder / f"labelsTr/{name}.nii.gz", label, AFFINE)
    content = dict(DATASETS[kind])
    if kind != "nnU-Net v2":
        names = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
        content |= {"training": names, "test": []}
    (folder / "dataset.json").write_text(json.dumps(content))
    for place in ("imagesTr", "labelsTr"):
        (folder / place / "._c_1.nii.gz").write_bytes(b"macOS")
    return folder


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("below", ["", "some/site"])
def test_prepare_keeps_the_values_of_label_maps(tmp_path, kind, below):
    dataset(tmp_path / "in" / below, kind)
    found = prepare(tmp_path / "in", tmp_path / "out", spacing=1.6, bias_correction=False, quiet=True)
    assert [o.status for o in found.outcomes] == ["done"] * 6 and found.exit_code == 0
    for name in ("c_1", "c_2", "c_3"):
        label = voxels(tmp_path / "out" / below / "labelsTr" / f"{name}.nii.gz")
        assert set(np.unique(label)) == {0, 1, 2} and label.dtype.kind in "iu"
        image = next((tmp_path / "out" / below / "imagesTr").glob(f"{name}*.nii.gz"))
        assert voxels(image).shape == label.shape != SHAPE
    (sidecar,) = (tmp_path / "out" / below / "imagesTr").glob("c_1*.json")
    assert json.loads(sidecar.read_text())["label_source"]["file"] == "c_1.nii.gz"


def test_prepare_refuses_several_channels_by_name_and_does_the_others(tmp_path):
    dataset(tmp_path / "in", "nnU-Net v2", channels=2)
    image, label = scan_of(5)
    write_nifti(tmp_path / "in/imagesTr/single_0000.nii.gz", image, AFFINE)
    write_nifti(tmp_path / "in/labelsTr/single.nii.gz", label, AFFINE)
    (tmp_path / "in/dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    found = prepare(tmp_path / "in", tmp_path / "out", bias_correction=False, quiet=True)
    assert [o.name for o in found.named("done")] == ["imagesTr/single_0000"] and found.exit_code == 3
    assert len(found.named("failed")) == 12
    assert "c_1_0001.nii.gz: one of 2 channels of a scan (c_1_0000.nii.gz, c_1_0001.nii.gz)" in str(found)


def test_scans_that_are_numbered_are_no_channels(tmp_path):
    dataset(tmp_path / "in", "Decathlon", names=("c_0000", "c_0001", "c_0002"))
    found = prepare(tmp_path / "in", tmp_path / "out", bias_correction=False, quiet=True)
    assert [o.status for o in found.outcomes] == ["done"] * 6
    assert [case["case_id"] for case in load_datalist(tmp_path / "in", "source_training")] == [
        "c_0000",
        "c_0001",
        "c_0002",
    ]
    for number in range(3):
        write_nifti(tmp_path / "plain" / f"case_{number:04d}.nii.gz", scan_of(number)[0], AFFINE)
        assert misplaced(tmp_path / "plain" / f"case_{number:04d}.nii.gz") is None


BESIDE = [
    ("sub-1_T1w", "sub-1_dseg"),
    ("sub-1_T1w", "sub-1_desc-manual_dseg"),
    ("sub-1_T2w", "sub-1_T2w_label-SC_mask"),
]
BESIDE += [("a", "a_seg"), ("a", "a-label"), ("a_t1", "a_gt"), ("volume-7", "segmentation-7"), ("a", "mask_a")]


@pytest.mark.parametrize("scan, label", BESIDE)
def test_a_label_map_beside_its_scan_is_one_everywhere(tmp_path, scan, label):
    image, truth = scan_of(1)
    write_nifti(tmp_path / f"in/anat/{scan}.nii.gz", image, AFFINE)
    write_nifti(tmp_path / f"in/anat/{label}.nii.gz", truth, AFFINE)
    place = tmp_path / "in/anat"
    found = prepare(tmp_path / "in", tmp_path / "out", spacing=1.6, bias_correction=False, quiet=True)
    assert [o.name for o in found.outcomes] == [f"anat/{scan}"] and found.exit_code == 0
    assert set(np.unique(voxels(tmp_path / f"out/anat/{label}.nii.gz"))) == {0, 1, 2}
    audit = ScanAudit(load_scans(place))
    assert [case["case_id"] for case in audit.usable] == [scan]
    with pytest.raises(DataError, match=f"{label}.*by its name a label map beside its scan {scan}.*or take them out"):
        audit.finish()
    with pytest.raises(DataError, match="by its name a label map"):
        target_cases(str(place))
    report = check(str(place), quiet=True)  # of scans to be segmented: left out, and said
    (found,) = (one for one in report.findings if f"{label}.nii.gz" in one.file)
    assert report.exit_code == 0 and found.severity == "warning" and "a label map by its name" in found.what


def test_a_label_map_of_one_of_several_scans_is_refused_by_name(tmp_path):
    image, label = scan_of(1)
    for name, content in (("b_t1", image), ("b_t2", image + 1), ("b_seg", label)):
        write_nifti(tmp_path / f"in/{name}.nii.gz", content, AFFINE)
    found = prepare(tmp_path / "in", tmp_path / "out", bias_correction=False, quiet=True)
    assert [o.name for o in found.named("done")] == ["b_t1", "b_t2"] and found.exit_code == 3
    assert "b_seg.nii.gz: by its name a label map" in str(found)


def test_names_of_scans_are_left_alone(tmp_path):
    for name in ("a_T1", "mask_off", "sub-1_T1w", "case_mask", "segment_1", "T1_roi", "b_label_2", "gtv"):
        path = write_nifti(tmp_path / f"{name}.nii.gz", scan_of(0)[0], AFFINE)
        assert misplaced(path) is None, name


def test_a_label_map_is_known_by_its_content(tmp_path):
    image, label = scan_of(2)
    atlas = np.kron(np.random.default_rng(0).integers(1, 400, (4, 5, 6)), np.ones((4, 4, 4), int)).astype(np.int16)
    assert looks_like_labels(label) and looks_like_labels(label * np.float64(np.float32(0.1)) * 10)
    assert looks_like_labels(atlas)
    assert not looks_like_labels(image) and not looks_like_labels(np.rint(image).astype(np.int16))
    assert not looks_like_labels(np.zeros(SHAPE)) and not looks_like_labels(label * 0.3)
    write_nifti(tmp_path / "in/one.nii.gz", atlas, AFFINE)
    found = prepare(tmp_path / "in", tmp_path / "out", spacing=1.6, bias_correction=False, quiet=True)
    assert found.exit_code == 3 and "looks like a label map: name the folder of label maps by labels" in str(found)
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_label_map_by_content_is_segmented_with_a_warning(tmp_path, caplog):
    write_nifti(tmp_path / "one.nii.gz", scan_of(2)[1], AFFINE)
    assert len(ScanAudit(load_scans(tmp_path)).usable) == 1
    assert "one.nii.gz: its voxels have few values, all whole" in caplog.text


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("given", ["", "dataset.json"])
def test_check_and_adapt_understand_a_dataset(tmp_path, kind, given):
    place = str(dataset(tmp_path, kind) / given)
    found = check(place, quiet=True)
    assert found.exit_code == 0 and found.counts["warning"] == 0 and len(found.files) == 6
    unused = [Path(one.file).name for one in found.findings if one.what.startswith("left out, no scan or label map")]
    assert len(unused) == (3 if given == "" else 0)
    training, validation = source_cases(place, 0.3, 0)
    cases = {case["case_id"]: case for case in [*training, *validation]}
    assert sorted(cases) == ["c_1", "c_2", "c_3"] and len(validation) == 1
    for name, case in cases.items():
        assert case["label"] == str(tmp_path / f"labelsTr/{name}.nii.gz")
        assert case["image"].startswith(str(tmp_path / f"imagesTr/{name}"))
    assert structure_names(None, place, []) == {"outer": 1, "inner": 2}
    named = json.loads((tmp_path / "dataset.json").read_text())
    assert structure_names(named, "elsewhere", []) == {"outer": 1, "inner": 2}


def test_a_list_of_the_decathlon_is_a_source_wherever_its_files_lie(tmp_path):
    for seed in range(2):
        image, label = scan_of(seed)
        write_nifti(tmp_path / f"mr/{seed}.nii.gz", image, AFFINE)
        write_nifti(tmp_path / f"truth/{seed}.nii.gz", label, AFFINE)
    listed = [{"image": f"./mr/{n}.nii.gz", "label": f"./truth/{n}.nii.gz"} for n in range(2)]
    labels = {"0": "background", "1": "outer", "2": "inner"}
    (tmp_path / "list.json").write_text(
        json.dumps({"labels": labels, "training": listed[:1], "validation": listed[1:]})
    )
    assert check(str(tmp_path / "list.json"), quiet=True).exit_code == 0
    assert [len(cases) for cases in source_cases(str(tmp_path / "list.json"), 0.5, 0)] == [1, 1]


@pytest.mark.parametrize("kind", ["nnU-Net v1", "Decathlon"])
def test_a_list_says_what_is_trained_on_and_what_chooses_weights_whatever_lies_beside_it(tmp_path, kind):
    dataset(tmp_path, kind)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["training"], content["validation"] = content["training"][:1], content["training"][1:2]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    training, validation = source_cases(str(tmp_path / "dataset.json"), 0.5, 0)
    assert [[case["case_id"] for case in cases] for cases in (training, validation)] == [["c_1"], ["c_2"]]


@pytest.mark.parametrize(
    "labels, message, of_check",
    [
        ({"background": 0, "all": [1, 2], "inner": [2]}, "is a region", "'inner' or its value 2 occurs twice"),
        ({"background": 0, "a": 1, "ignore": 2}, "'ignore' is 2", "'ignore' is 2"),
    ],
)
def test_regions_and_ignore_are_refused_by_name(tmp_path, capsys, labels, message, of_check):
    dataset(tmp_path, "nnU-Net v2")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert main(["check", str(tmp_path), "--quiet"]) == 2
    assert of_check in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"dataset.json, labels: .*{message}"):
        structure_names(None, str(tmp_path), [])


def test_more_structures_than_a_byte_has_indices_for_are_refused_before_training(tmp_path):
    many = {f"structure {value}": value for value in range(1, 256)}
    with pytest.raises(ConfigError, match="labels name 255 structures, expected 254 at most: merge some"):
        structure_names(many, "elsewhere", [])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": many}))
    with pytest.raises(ConfigError, match=r"dataset\.json: labels name 255 structures, expected 254"):
        structure_names(None, str(tmp_path), [])
    del many["structure 255"]
    assert structure_names(many, "elsewhere", []) == many


def test_a_label_map_without_a_scan_is_named(tmp_path):
    dataset(tmp_path, "nnU-Net v2")
    write_nifti(tmp_path / "labelsTr/lost.nii.gz", scan_of(0)[1], AFFINE)
    found = check(str(tmp_path), quiet=True)
    assert found.exit_code == 3 and "labelsTr/lost.nii.gz" in str(found)


def test_the_target_of_a_dataset_must_be_named(tmp_path):
    dataset(tmp_path, "nnU-Net v2")
    with pytest.raises(ConfigError, match="has imagesTr and imagesTs: name the folder of the target's scans"):
        target_cases(str(tmp_path))
    assert len(target_cases(str(tmp_path / "imagesTs"))) == 3
    with pytest.raises(DataError, match=r"lies in the folder of label maps of imagesTr: name .*imagesTr instead"):
        target_cases(str(tmp_path / "labelsTr"))


def test_channels_of_scans_without_label_maps_are_known_by_their_folder(tmp_path):
    dataset(tmp_path, "nnU-Net v2", channels=2)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"tc_1_0000\.nii\.gz: one of 2 channels"):
        target_cases(str(tmp_path / "imagesTs"))


def test_scans_of_a_bids_dataset_are_no_label_maps(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    for name in ("sub-1_T1w", "sub-1_dseg", "sub-1_T1w_desc-brain_mask", "sub-1_label-GM_probseg", "sub-1_label-L_roi"):
        write_nifti(tmp_path / f"sub-1/anat/{name}.nii.gz", scan_of(0)[0], AFFINE)
    assert [case["case_id"] for case in bids_scans(tmp_path)] == ["sub-1_T1w"]


def test_images_and_labels_pair_without_the_number_of_the_channel(tmp_path):
    for seed in range(2):
        image, label = scan_of(seed)
        for place in ("images", "data/source/images"):
            write_nifti(tmp_path / f"{place}/c{seed}_0000.nii.gz", image, AFFINE)
            write_nifti(tmp_path / f"{place.replace('images', 'labels')}/c{seed}.nii.gz", label, AFFINE)
    assert [len(cases) for cases in source_cases(str(tmp_path), 0.5, 0)] == [1, 1]
    assert len(load_datalist(tmp_path / "data", "source_training")) == 2
    for place in ("images", "data/source/images"):
        write_nifti(tmp_path / f"{place}/c1_0001.nii.gz", scan_of(1)[0], AFFINE)
    with pytest.raises(DataError, match=r"c1_0000\.nii\.gz: one of 2 channels"):
        source_cases(str(tmp_path), 0.5, 0)
    assert "one of 2 channels" in str(check(str(tmp_path / "data"), quiet=True))


def test_a_folder_is_listed_once_for_all_its_files_until_it_changes(tmp_path, monkeypatch):
    folder, listed = tmp_path / "imagesTr", []
    folder.mkdir()
    for number in range(40):
        (folder / f"c_{number:03d}_0000.nii.gz").write_bytes(b"")
    os.utime(folder, (1e9, 1e9))  # long ago
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listed.append(place) or names(place))
    assert [misplaced(folder / name) for name in names(folder)] == [None] * 40
    assert listed.count(folder) == 1
    (folder / "c_000_0001.nii.gz").write_bytes(b"")
    what, _ = misplaced(folder / "c_000_0000.nii.gz")
    assert what == "one of 2 channels of a scan (c_000_0000.nii.gz, c_000_0001.nii.gz)"
