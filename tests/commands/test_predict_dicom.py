# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg predict` of DICOM: the voxels of a NIfTI file, nothing about a person, and segmentations that come back."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from mapseg_components.colours import structure_colours
from mapseg_components.commands import predict
from mapseg_components.commands.main import main
from mapseg_components.errors import ConfigError, DataError, ResourceError
from mapseg_components.prediction.series import without_path
from mapseg_components.scans import segmentation
from mapseg_components.scans.dicom import Series, list_series, read_series
from mapseg_components.scans.segmentation import Algorithm, write_segmentation
from tests import dicom
from tests.commands.test_predict import BUNDLE, NAMES, SCAN

PERSON = {"PatientName": "Quxley^Zöe", "PatientID": "PID-778899", "PatientBirthDate": "19470813"}
STUDY = {"StudyDate": "20010203", "SeriesDescription": "Quxley knee", "SpecificCharacterSet": "ISO_IR 100"}
TAGS = {**PERSON, **STUDY, "FrameOfReferenceUID": generate_uid(entropy_srcs=["frame"])}
SECRETS = ("quxley", "zöe", "778899", "1947", "20010203", "knee", "smith")
ALGORITHM = Algorithm("a bundle", "1.2.3", "0.1.0", "0123456789abcdef")
SPACING, STEP = (1.1, 1.2), 1.3
TURN = np.deg2rad(17)
AXES = ((np.cos(TURN), np.sin(TURN), 0.0), (0.0, 0.0, -1.0))  # coronal slices, turned about the body's axis


def scan_voxels():
    """Part of a real scan, three different sides."""
    return np.asarray(nib.load(SCAN).dataobj)[4:40, 5:45, 2:34].round().astype(np.int16)


def affine_of_series(count):
    """Affine in RAS+ of what `tests.dicom.write_series` writes with `AXES`, from its own parameters."""
    affine = np.eye(4)
    normal = np.cross(*AXES)
    affine[:3, 0], affine[:3, 1] = np.array(AXES[0]) * SPACING[0], np.array(AXES[1]) * SPACING[1]
    affine[:3, 2], affine[:3, 3] = normal * STEP, [10.0, 20.0, -30.0]
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A person's folder: a sound series, one with a gap, one cut off, a text file; a NIfTI file of the same voxels."""
    place = tmp_path_factory.mktemp("in")
    voxels = scan_voxels()
    write = {"axes": AXES, "spacing": SPACING, "step": STEP, "modality": "MR", **TAGS}
    uid = dicom.write_series(place / "SMITH" / "t2", voxels, number=3, **write)
    dicom.write_series(place / "SMITH" / "gap", voxels[:8, :9, :7], number=4, **write)
    next((place / "SMITH" / "gap").glob("*0004.dcm")).unlink()
    dicom.write_series(place / "SMITH" / "cut", voxels[:8, :9, :7], number=5, **write)
    for file in (place / "SMITH" / "cut").iterdir():
        file.write_bytes(file.read_bytes()[:150])
    (place / "SMITH" / "t2" / "notes.txt").write_text("no slice")
    nib.save(nib.Nifti1Image(voxels, affine_of_series(voxels.shape[2])), place / "same.nii.gz")
    return place, uid


@pytest.fixture(scope="module")
def results(tree, tmp_path_factory):
    """The command over all of it; exit code, printed text, output folder."""
    place = tree[0]
    output = tmp_path_factory.mktemp("out") / "new"
    patch = pytest.MonkeyPatch()
    words = ["predict", str(place), str(output), "--bundle", str(BUNDLE), "--probabilities", "--num_threads", "1"]
    patch.setattr(sys, "argv", ["mapseg", *words])
    printed = []
    patch.setattr(sys.stdout, "write", printed.append)
    code = main(words)
    patch.undo()
    return code, "".join(printed), output


def series_name(output):
    return next(p.name for p in output.glob("MR_3_*_seg.nii.gz")).removesuffix("_seg.nii.gz")


def test_a_series_has_the_label_map_of_a_nifti_file_of_its_voxels(results):
    code, _, output = results
    assert code == 3
    found, expected = nib.load(output / f"{series_name(output)}_seg.nii.gz"), nib.load(output / "same_seg.nii.gz")
    assert len(np.unique(np.asarray(expected.dataobj))) > 4
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    with (output / "volumes.csv").open(encoding="utf-8", newline="") as stream:
        rows = [tuple(row.values()) for row in csv.DictReader(stream)]
    name = series_name(output)
    assert [row[1:3] for row in rows if row[0] == name] == [row[1:3] for row in rows if row[0] == "same"]
    assert (output / "previews" / f"{name}.png").stat().st_size > 5000


def test_what_cannot_be_used_is_listed_and_the_rest_done(results, tree):
    _, printed, output = results
    manifest = json.loads((output / "manifest.json").read_text())
    status = {one["case"]: one for one in manifest["scans"]}
    assert [one["status"] for one in status.values()] == ["done", "done", "failed", "failed"]
    gap = next(one for name, one in status.items() if name.startswith("MR_4_"))
    assert "slices are 1.30 mm apart, but not between" in gap["message"]
    assert "damaged" in status["unreadable_1"]["message"]
    assert "2 of 4 scans segmented" in printed
    # on the screen, not in a file: where each of them lies
    assert re.search(r"MR_3_\w+ +SMITH/t2 +done", printed) and "SMITH/cut" in printed
    assert not list(output.glob(".unfinished*")) and not (output / "audit.json").exists()


def test_no_file_and_no_file_name_tells_who_it_was(results, tree):
    output, uid = results[2], tree[1]
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        if path.name.endswith(".nii.gz"):
            content = nib.load(path).header.binaryblock
        content = re.sub(rb"\b[0-9a-f]{64}\b", b"", content)  # a checksum may hold any four digits
        for secret in (*SECRETS, uid):
            assert secret not in path.name.lower() and secret.encode() not in content.lower(), (path.name, secret)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["command"][:3] == ["mapseg", "predict", "INPUT"]
    [one] = [one["series"] for one in manifest["scans"] if one["series"] and one["status"] == "done"]
    assert (one["number"], one["modality"], one["files"]) == (3, "MR", 32) and len(one["uid_sha256"]) == 64


def test_a_run_goes_on_with_the_series_that_failed(results, tree, tmp_path):
    output = shutil.copytree(results[2], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    options = {"bundle": str(BUNDLE), "probabilities": True, "continue_prediction": True, "quiet": True}
    done = predict(str(tree[0]), str(output), **options)
    assert done.kept == 2 and [one.status for one in done.predictions] == ["done", "done", "failed", "failed"]
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")} == before
    assert "SMITH" in str(done) and "SMITH" not in (output / "manifest.json").read_text()


def test_ct_is_shifted_as_the_setting_says(tmp_path):
    """Hounsfield units reach the bundle as rescaled values: without a policy they are refused, with one they go in."""
    voxels = scan_voxels()[:20, :24, :22]
    dicom.write_series(tmp_path / "ct", voxels, spacing=SPACING, step=STEP, intercept=-1024, **TAGS)
    refused = predict(tmp_path / "ct", tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True)
    assert refused.exit_code == 2 and "voxels are negative (values from -1024" in refused.predictions[0].message
    shifted = predict(
        tmp_path / "ct", tmp_path / "shift", bundle=BUNDLE, negative_values="shift", no_preview=True, quiet=True
    )
    affine = nib.load(shifted.predictions[0].label_map).affine
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "plain.nii.gz")  # + 1024, by hand
    plain = predict(tmp_path / "plain.nii.gz", tmp_path / "plain", bundle=BUNDLE, no_preview=True, quiet=True)
    one, two = (np.asarray(nib.load(run.predictions[0].label_map).dataobj) for run in (shifted, plain))
    assert one.any()
    np.testing.assert_array_equal(one, two)


def test_one_series_in_two_folders_is_an_error_of_its_own(tree, tmp_path):
    shutil.copytree(tree[0] / "SMITH" / "t2", tmp_path / "in" / "SMITH a")
    shutil.copytree(tree[0] / "SMITH" / "t2", tmp_path / "in" / "b")
    voxels = scan_voxels()[:20, :24, :22]
    dicom.write_series(tmp_path / "in" / "c", voxels, spacing=SPACING, step=STEP, modality="MR", number=8, **TAGS)
    done = predict(tmp_path / "in", tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True)
    assert done.exit_code == 3 and [one.status for one in done.predictions] == ["done", "failed"]
    assert re.search(r"series, number 3, lie in 2 folders: .* take copies out", done.predictions[1].message)
    assert "SMITH a" in str(done) and "SMITH" not in (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(ConfigError, match="one DICOM file: name the folder"):
        predict(next((tmp_path / "in" / "b").glob("*.dcm")), tmp_path / "out", bundle=BUNDLE)


def test_nothing_but_damaged_slices_ends_with_3_and_a_manifest(tree, tmp_path, capsys, caplog):
    place = tree[0] / "SMITH" / "cut"
    assert main(["predict", f"{place}/", str(tmp_path / "out"), "--bundle", str(BUNDLE), "--no_preview"]) == 3
    assert "0 of 1 scans segmented" in capsys.readouterr().out and str(place) in caplog.text
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert json.loads(manifest)["scans"][0]["status"] == "failed" and "SMITH" not in manifest


@pytest.mark.parametrize("damaged", [False, True])
def test_a_person_s_folder_with_nifti_beside_dicom_is_named_in_no_file(tree, tmp_path, damaged):
    place = tmp_path / "SMITH"
    shutil.copytree(tree[0] / "SMITH" / ("cut" if damaged else "gap"), place / "dicom")
    nib.save(nib.Nifti1Image(scan_voxels()[:20, :24, :22], np.eye(4)), place / "sound.nii.gz")
    (place / "bad.nii.gz").write_bytes(b"no scan")
    done = predict(place, tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True)
    assert [one.status for one in done.predictions] == ["failed", "done", "failed"]
    assert not (tmp_path / "out" / "audit.json").exists()
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert "SMITH" not in manifest
    assert [one["scan"] for one in json.loads(manifest)["scans"]][:2] == ["bad.nii.gz", "sound.nii.gz"]


def test_a_series_too_large_for_the_machine_is_not_named_either(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("mapseg_components.memory.memory_of", lambda device: 1000)
    done = predict(tree[0] / "SMITH" / "t2", tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True)
    assert re.match(r"series 3: shape \(36, 40, 32\) needs .* GiB", done.predictions[0].message)
    assert "SMITH" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_command_is_kept_without_the_place_of_its_input():
    line = ["mapseg", "predict", "/data/SMITH/", "out", "--input=/data/SMITH", "--bundle", "/data/SMITHS"]
    kept = without_path(line, Path("/data/SMITH"))
    assert kept == ["mapseg", "predict", "INPUT", "out", "--input=INPUT", "--bundle", "/data/SMITHS"]


def test_a_series_name_is_a_file_name():
    series = Series(Path("a"), "1.2.3", 7, "M/R ..", ())
    assert (
        re.fullmatch(r"MR_7_[0-9a-f]{8}", series.name) and Series(Path("b"), "1.2.3", 7, "MR", ()).name == series.name
    )
    assert Series(Path("a"), "1.2.4", 7, "MR", ()).name != series.name
    assert Series(Path("a"), "1.2.4", 7, "", ()).name.startswith("series_7_")


def test_dicom_seg_needs_dicom_and_highdicom(tree, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"dicom_seg needs DICOM series.*same\.nii\.gz is none"):
        predict(tree[0], tmp_path / "out", bundle=BUNDLE, dicom_seg=True)
    real = segmentation.optional_import
    monkeypatch.setattr(
        segmentation, "optional_import", lambda name, **kw: (None, False) if name == "highdicom" else real(name, **kw)
    )
    with pytest.raises(ConfigError, match=r"needs highdicom.*mapseg-monai\[dicom\]"):
        predict(tree[0] / "SMITH" / "t2", tmp_path / "out", bundle=BUNDLE, dicom_seg=True)
    assert not (tmp_path / "out").exists()


def read_as_another_program(path, series_affine, shape):
    """Voxels (X, Y, Z) of a segmentation by pydicom alone: each frame goes where its position says."""
    content = pydicom.dcmread(path)
    frames = content.pixel_array.reshape(-1, content.Rows, content.Columns)
    to_voxels = np.linalg.inv(series_affine) @ np.diag([-1, -1, 1, 1])  # positions are in LPS
    found = np.zeros(shape, np.uint8)
    for frame, group in zip(frames, content.PerFrameFunctionalGroupsSequence):
        position = [float(value) for value in group.PlanePositionSequence[0].ImagePositionPatient]
        x, y, z = (to_voxels @ [*position, 1])[:3]
        assert abs(x) < 1e-3 and abs(y) < 1e-3 and abs(z - round(z)) < 1e-3
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[..., round(z)][frame.T > 0] = number
    return content, found


def test_a_segmentation_lies_where_its_series_does(tree, tmp_path):
    pytest.importorskip("highdicom")
    place = tree[0] / "SMITH" / "t2"
    done = predict(place, tmp_path / "out", bundle=BUNDLE, dicom_seg=True, no_preview=True, quiet=True)
    assert done.exit_code == 0
    one = done.predictions[0]
    label_map = np.asarray(nib.load(one.label_map).dataobj)
    assert Path(one.segmentation).name == Path(one.label_map).name.replace(".nii.gz", ".dcm")
    content, found = read_as_another_program(one.segmentation, affine_of_series(32), label_map.shape)
    assert len(np.unique(found)) > 4
    np.testing.assert_array_equal(found, label_map)
    assert content.Modality == "SEG" and content.SegmentationType == "BINARY" and content.SeriesNumber == 1003
    assert content.PatientName == PERSON["PatientName"] and content.FrameOfReferenceUID == TAGS["FrameOfReferenceUID"]
    assert [segment.SegmentLabel for segment in content.SegmentSequence] == NAMES
    for segment in content.SegmentSequence:
        made_by = segment.SegmentationAlgorithmIdentificationSequence[0]
        bundle = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
        assert made_by.AlgorithmVersion == bundle["version"] and segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MAPSEG"
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == segment.SegmentLabel
    highdicom = pytest.importorskip("highdicom")
    for segment, colour in zip(content.SegmentSequence, structure_colours(len(NAMES))):
        shown = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb(clip=True)
        assert max(abs(a - int(colour[n : n + 2], 16)) for a, n in zip(shown, (1, 3, 5))) <= 2
    # a series of segmentations is no scan: the same folder can be predicted again
    shutil.copy(one.segmentation, tmp_path / "out" / "copy.dcm")
    assert [series.number for series in list_series(place)] == [3] and list_series(tmp_path / "out") == []
    # it was made of that label map, and goes with it
    predict(place, tmp_path / "out", bundle=BUNDLE, overwrite=True, no_preview=True, quiet=True)
    assert Path(one.label_map).is_file() and not Path(one.segmentation).exists()


@pytest.fixture
def small(tmp_path):
    """A series of 5 slices and a label map of it."""
    voxels = scan_voxels()[:6, :7, :5]
    dicom.write_series(tmp_path / "s", voxels, axes=AXES, spacing=SPACING, step=STEP, modality="MR", **TAGS)
    label_map = np.zeros(voxels.shape, np.uint8)
    label_map[1, 2, 3], label_map[4:, :3, 1:] = 1, 2
    return list_series(tmp_path / "s")[0], label_map


def test_a_segmentation_of_any_names_and_of_nothing(small, tmp_path):
    pytest.importorskip("highdicom")
    series, label_map = small
    names = ["Großhirn\\left \n" + "x" * 80, "b"]
    write_segmentation(series, label_map, names, ALGORITHM, tmp_path / "a.dcm")
    content, found = read_as_another_program(tmp_path / "a.dcm", read_series(series).affine, label_map.shape)
    np.testing.assert_array_equal(found, label_map)
    assert content.SegmentSequence[0].SegmentLabel.startswith("Großhirn/left xxx")
    write_segmentation(series, label_map * 0, names, ALGORITHM, tmp_path / "blank.dcm")
    assert not pydicom.dcmread(tmp_path / "blank.dcm").pixel_array.any()


def test_a_segmentation_that_does_not_come_back_is_not_kept(small, tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    series, label_map = small
    (tmp_path / "a.dcm").write_bytes(b"before")
    other = label_map.copy()
    other[0, 0, 0] = 1
    verify = segmentation.verify
    monkeypatch.setattr(
        segmentation, "verify", lambda temporary, headers, slices, path: verify(temporary, headers, other.T, path)
    )
    with pytest.raises(ResourceError, match=r"a\.dcm: voxels read back differ"):
        write_segmentation(series, label_map, ["a", "b"], ALGORITHM, tmp_path / "a.dcm")
    assert (tmp_path / "a.dcm").read_bytes() == b"before" and not list(tmp_path.glob(".*.tmp*"))


def test_numbers_that_are_none_stop_their_own_series_at_most(tmp_path):
    """A count of frames that says nothing is one slice; a thickness that is no number makes no DICOM-SEG."""
    pytest.importorskip("highdicom")
    voxels = scan_voxels()[:20, :24, :22]
    edits = {
        "frames": ({"NumberOfFrames": 1}, b"\x28\0\x08\0IS\x02\x001 ", b"\x28\0\x08\0IS\x02\0x "),
        "thick": ({"SliceThickness": 1.25}, b"\x18\0\x50\0DS\x04\x001.25", b"\x18\0\x50\0DS\x04\0abcd"),
    }
    for name, (tags, old, new) in edits.items():
        dicom.write_series(tmp_path / "in" / name, voxels, modality="MR", **TAGS, **tags)
        for file in (tmp_path / "in" / name).iterdir():
            assert file.read_bytes().count(old) == 1
            file.write_bytes(file.read_bytes().replace(old, new))
    done = predict(
        tmp_path / "in", tmp_path / "out", bundle=BUNDLE, dicom_seg=True, no_preview=True, quiet=True
    ).predictions
    assert {one.place: one.status for one in done} == {"frames": "done", "thick": "failed"}
    assert "make no DICOM-SEG (ValueError)" in next(one.message for one in done if one.status == "failed")


def test_headers_without_a_person_will_do_and_without_a_frame_will_not(tmp_path):
    pytest.importorskip("highdicom")
    voxels = scan_voxels()[:6, :7, :5]
    bare = {**dict.fromkeys((*PERSON, *STUDY)), "modality": "MR"}
    dicom.write_series(tmp_path / "bare", voxels, **bare, FrameOfReferenceUID=TAGS["FrameOfReferenceUID"])
    write_segmentation(list_series(tmp_path / "bare")[0], voxels > 300, ["a"], ALGORITHM, tmp_path / "a.dcm")
    assert str(pydicom.dcmread(tmp_path / "a.dcm").PatientName) == ""
    dicom.write_series(tmp_path / "lost", voxels, **bare, number=4)
    with pytest.raises(DataError, match="no Frame of Reference UID"):
        write_segmentation(list_series(tmp_path / "lost")[0], voxels > 300, ["a"], ALGORITHM, tmp_path / "b.dcm")
