# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg check`: the shipped sample is sound, and each way to spoil a set is found in the scan that has it."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import check
from mapseg_components.commands.main import main
from mapseg_components.data.scan_statistics import coarse, scan_statistics
from mapseg_components.errors import ConfigError
from mapseg_components.reports import text_table
from mapseg_components.scans.nifti import read_nifti
from tests.conftest import SAMPLE, make_dataset, make_scan, write_nifti
from tests.faults import damage
from tests.pictures import write_picture


@pytest.fixture
def scans(tmp_path):
    """The five source scans of the sample in one folder."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for section in ("source", "validation"):
        for path in (SAMPLE / section / "images").iterdir():
            shutil.copyfile(path, folder / path.name)
    return folder


def change(path, function, affine=None):
    scan = nib.load(path)
    nib.save(nib.Nifti1Image(function(np.asarray(scan.dataobj)), scan.affine if affine is None else affine), path)


def warnings_of(report):
    return [
        (finding.file.rpartition("/")[2], finding.what) for finding in report.findings if finding.severity == "warning"
    ]


def test_the_shipped_sample_is_sound_and_the_report_is_self_contained(tmp_path, capsys):
    assert main(["check", str(SAMPLE / "datalist.json"), "--output", str(tmp_path)]) == 0
    assert "18 files read; 0 errors, 0 warnings" in capsys.readouterr().out
    content = json.loads((tmp_path / "check.json").read_text())
    assert len(content["files"]) == 18 and content["counts"]["error"] == 0
    page = (tmp_path / "check.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "http:" not in page and "prefers-color-scheme: dark" in page
    assert page.count("<tr>") == 2 + len(content["findings"]) + 18
    assert main(["check", str(SAMPLE / "datalist.json"), "--output", str(tmp_path)]) == 2


def test_a_damaged_file_blocks_and_every_other_is_still_read(scans, tmp_path, capsys):
    path = scans / "GA31_operated.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["check", str(scans), "--output", str(tmp_path / "out")]) == 3
    assert "GA31_operated.nii.gz" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    status = {row["file"].rpartition("/")[2]: row["status"] for row in content["files"]}
    assert status == {**{p.name: "ok" for p in scans.iterdir()}, "GA31_operated.nii.gz": "error"}


@pytest.mark.parametrize(
    "spoil, part",
    [
        (damage.unnamed_orientation, "no orientation"),
        (damage.nan_in_affine, "not finite"),
        (damage.forms_differ, "sform and qform differ"),
        (damage.sheared, "sheared"),
        (damage.image_as_label, None),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_rows_of_the_audit_arrive_as_findings(tmp_path, spoil, part):
    path = tmp_path / "one.nii.gz"
    write_nifti(path, damage.image())
    spoil(path)
    report = check(path, quiet=True)
    assert report.exit_code == (3 if part else 0)
    if part:
        assert part in str([f.what for f in report.findings if f.severity == "error"])


def test_label_faults_of_a_datalist_block(tmp_path):
    datalist = make_dataset(tmp_path)
    assert check(datalist, quiet=True).counts["error"] == 0
    path = tmp_path / "source_training" / "1_label.nii.gz"
    change(path, lambda voxels: np.where(voxels == 2, 9, voxels).astype(np.uint8))
    report = check(datalist, quiet=True)
    assert [f.file for f in report.findings if f.severity == "error"] == [str(path)]
    assert report.exit_code == 3 and "unknown values 9" in str(report)
    assert check(datalist, dropped_labels="9", quiet=True).exit_code == 0


def test_a_scan_flipped_front_to_back_is_found_by_its_content(scans):
    change(scans / "GA33_operated.nii.gz", lambda voxels: np.flip(voxels, 1))
    report = check(scans, quiet=True)
    found = warnings_of(report)
    assert [file for file, _ in found] == ["GA33_operated.nii.gz"] and "flipped back-front" in found[0][1]
    assert report.exit_code == 0  # a guess does not block


def test_a_target_scan_with_exchanged_axes_is_found_by_its_content(tmp_path):
    datalist = spoilt_target(tmp_path, lambda voxels: np.swapaxes(voxels, 1, 2))
    found = warnings_of(check(datalist, quiet=True))
    assert [file for file, _ in found] == ["spoilt.nii.gz"] and "axes exchanged" in found[0][1]


def test_a_target_scan_mirrored_left_to_right_is_suspected_and_no_more(tmp_path):
    datalist = spoilt_target(tmp_path, lambda voxels: np.flip(voxels, 0))
    found = warnings_of(check(datalist, quiet=True))
    assert [file for file, _ in found] == ["spoilt.nii.gz"] and "may be swapped" in found[0][1]
    assert warnings_of(check(spoilt_target(tmp_path, lambda voxels: voxels), quiet=True)) == []


def spoilt_target(folder, function):
    """The sample's datalist with one target scan changed."""
    content = json.loads((SAMPLE / "datalist.json").read_text())
    for section in ("source_training", "source_validation", "target_training", "target_test"):
        for entry in content[section]:
            entry |= {key: str(SAMPLE / path) for key, path in entry.items()}
    path = folder / "spoilt.nii.gz"
    shutil.copyfile(SAMPLE / "target" / "images" / "GA26_operated.nii.gz", path)
    change(path, function)
    content["target_training"][-1]["image"] = str(path)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


@pytest.mark.parametrize(
    "option, what",
    [
        ({"labels": '{"nonsense'}, "is no datalist"),
        ({"dropped_labels": "9"}, "is no datalist"),
        ({"modality": "T2w"}, "is no BIDS dataset"),
    ],
)
def test_an_option_that_a_folder_of_scans_is_not_read_with_is_refused(tmp_path, option, what):
    write_nifti(tmp_path / "a.nii.gz", np.ones((4, 5, 6), np.float32))
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is .*{what}: leave it out"):
        check(tmp_path, quiet=True, **option)


def test_one_bad_entry_of_a_test_does_not_hide_the_others(tmp_path):
    datalist = make_dataset(tmp_path)
    content = json.loads(datalist.read_text())
    sound = content["target_test"][0]["label"]
    datalist.write_text(json.dumps({**content, "target_test": [*content["target_test"], {"image": "absent.nii.gz"}]}))
    change(tmp_path / sound, lambda voxels: np.where(voxels == 2, 7, voxels))
    found = [one.what for one in check(datalist, quiet=True).findings if one.severity == "error"]
    assert len(found) == 2 and any("unknown values 7" in what for what in found), found


def test_a_link_to_a_folder_that_is_read_is_not_left_out(tmp_path):
    for place, kind in (("elsewhere", 0), ("set/source/labels", 1), ("set/target/images", 0)):
        write_nifti(tmp_path / place / "a.nii.gz", make_scan()[kind])
    (tmp_path / "set/source/images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/source/more").symlink_to(tmp_path / "elsewhere")
    notes = [one for one in check(tmp_path / "set", quiet=True).findings if "not followed" in one.what]
    assert [one.file.rpartition("/")[2] for one in notes] == ["more"]


def test_spacing_masking_contrast_and_copies(scans):
    scan = nib.load(scans / "GA30_operated.nii.gz")
    wide = scan.affine @ np.diag([2.0, 1, 1, 1])
    change(scans / "GA30_operated.nii.gz", lambda voxels: voxels, wide)
    noise = np.random.default_rng(0)
    unmasked = lambda v: np.where(v == 0, noise.integers(1, 40, v.shape), v).astype(v.dtype)  # noqa: E731
    change(scans / "GA31_operated.nii.gz", unmasked)
    change(scans / "GA32_operated.nii.gz", lambda voxels: np.where(voxels > 0, voxels.max() - voxels + 1, 0))
    shutil.copyfile(scans / "GA34_operated.nii.gz", scans / "copy.nii.gz")
    report = check(scans, quiet=True)
    found = warnings_of(report)
    for file, part in (
        ("GA30_operated.nii.gz", "voxels of 3.2 x 1.6 x 1.6 mm"),
        ("GA31_operated.nii.gz", "is not skull-stripped"),
        ("GA32_operated.nii.gz", "intensities are"),
        ("copy.nii.gz", "same voxels"),
    ):
        assert any(name == file and part in what for name, what in found), (file, part, found)
    assert report.exit_code == 0


@pytest.mark.parametrize("above, warned", [(8, True), (11, False)])
def test_a_scan_whose_percentile_is_background_is_warned_about(tmp_path, above, warned):
    voxels = np.zeros((20, 10, 10), np.float32)
    voxels[:above, 5, 5] = np.random.default_rng(0).uniform(1, 2, above)
    path = write_nifti(tmp_path / "a.nii.gz", voxels)
    report = check(path, quiet=True)
    assert any("its percentile 99.5 is background" in what for _, what in warnings_of(report)) == warned


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_voxels_that_are_smaller_or_larger_than_the_others_are_reported(scans, factor):
    path = scans / "GA30_operated.nii.gz"
    affine = nib.load(path).affine @ np.diag([factor, 1, 1, 1])
    change(path, lambda voxels: voxels, affine)
    assert any(name == path.name and "voxels of" in what for name, what in warnings_of(check(scans, quiet=True)))


def test_stacks_may_have_their_slices_along_any_axis(tmp_path):
    """Oblique stacks of one kind: the nearest axis of the slices differs, their voxels do not."""
    shape, sides = np.array([12, 40, 42]), np.array([8.0, 0.75, 0.75])
    for number in range(4):
        turn = np.roll(np.arange(3), number % 3)
        voxels = np.random.default_rng(number).integers(1, 100, shape[turn]).astype(np.int16)
        thickness = np.where(sides == 8, 8 if number < 3 else 13, sides)
        write_nifti(tmp_path / f"{number}.nii.gz", voxels, np.diag([*thickness[turn], 1]))
    found = [what for _, what in warnings_of(check(tmp_path, quiet=True)) if "voxels of" in what]
    assert len(found) == 1 and "voxels of 0.75 x 0.75 x 13 mm" in found[0] and "median" in found[0]


def ct(shift=0, seed=0):
    """Air, soft tissue and some bone in HU, or shifted."""
    generator = np.random.default_rng(seed)
    voxels = np.full((24, 26, 28), -1000, np.int16)
    voxels[3:-3, 3:-3, 3:-3] = generator.normal(40, 20, (18, 20, 22))
    voxels[10:13, 10:13, 3:-3] = 900
    return (voxels + shift).astype(np.int16)


def test_ct_in_two_conventions_is_told_apart(tmp_path):
    for number in range(4):
        write_nifti(tmp_path / f"{number}.nii.gz", ct(1024 if number == 3 else 0, number))
    report = check(tmp_path, quiet=True)
    assert [file for file, what in warnings_of(report) if "looks like a CT with 1024 added" in what] == ["3.nii.gz"]
    assert "3 of 4 scans look like CT in HU" in str(report) and report.exit_code == 0


def test_negative_values_that_are_no_ct_are_a_warning_until_a_policy_is_named(tmp_path):
    voxels = damage.image() - 20
    write_nifti(tmp_path / "mr.nii.gz", voxels)
    assert any("negative" in what for _, what in warnings_of(check(tmp_path, quiet=True)))


def test_an_empty_folder_is_a_usage_error(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "no NIfTI scan" in capsys.readouterr().err


def test_scans_in_a_sub_folder_are_pointed_at(tmp_path, capsys):
    shutil.copytree(SAMPLE / "test" / "images", tmp_path / "images")
    assert main(["check", str(tmp_path)]) == 2
    assert "itself, but its sub-folder images has 2: correct the path" in capsys.readouterr().err


def test_the_datalist_of_a_folder_names_its_structures(capsys):
    assert main(["check", str(SAMPLE)]) == 0
    assert "no structures are named" not in capsys.readouterr().out


def test_label_maps_in_the_place_of_scans_are_suspected(tmp_path):
    shutil.copytree(SAMPLE / "test" / "labels", tmp_path / "scans")
    texts = [text for _, text in warnings_of(check(str(tmp_path / "scans"), quiet=True))]
    assert texts.count("its voxels have few values, all whole and alike in neighbours: looks like a label map") == 2
    texts = [f.what for f in check(str(SAMPLE / "test" / "labels"), quiet=True).findings if f.severity == "error"]
    assert texts == ["lies in the folder of label maps of images"] * 2
    assert warnings_of(check(str(SAMPLE / "test" / "images"), quiet=True)) == []


def test_coarse_means_keep_the_mean_of_any_shape():
    for shape in ((5, 16, 37), (40, 33, 18)):
        volume = np.random.default_rng(0).random(shape)
        cells = coarse(volume)
        assert cells.shape == (16, 16, 16) and cells.mean() == pytest.approx(volume.mean())
    ramp = np.broadcast_to(np.arange(32.0)[:, None, None], (32, 20, 20))
    np.testing.assert_allclose(coarse(ramp)[:, 3, 3], np.arange(16) * 2 + 0.5)


def test_a_table_breaks_long_texts_and_stays_within_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    table = text_table(("where", "what"), [("a.nii.gz", "a word " * 30), ("b.nii.gz", "")], wrap_last=True)
    assert max(map(len, table.splitlines())) <= 60
    assert " ".join(table.split()).count("a word") == 30 and table.count("---  ---") == 1


def test_scans_that_an_adaptation_holds_out_are_read_as_well(tmp_path):
    (tmp_path / "heldout" / "images").mkdir(parents=True)
    for name in ("source", "target"):
        shutil.copytree(SAMPLE / name, tmp_path / name)
    scan = next((SAMPLE / "target" / "images").iterdir())
    shutil.copyfile(scan, tmp_path / "heldout" / "images" / "GA99.nii.gz")
    report = check(str(tmp_path), quiet=True)
    assert any("GA99" in finding.file and "same" in finding.what for finding in report.findings), "a scan twice"
    (tmp_path / "heldout" / "images" / "GA99.nii.gz").write_bytes(b"no scan")
    report = check(str(tmp_path), quiet=True)
    assert [f.file.rpartition("/")[2] for f in report.findings if f.severity == "error"] == ["GA99.nii.gz"]


def test_a_mask_of_an_image_without_labels_is_looked_at(tmp_path):
    chance = np.random.default_rng(0)
    write_picture(tmp_path / "a.png", chance.integers(1, 255, (40, 50)).astype(np.uint8))
    write_picture(tmp_path / "a_mask.png", np.ones((10, 10), np.uint8))
    report = check(str(tmp_path), quiet=True)
    assert any("mask of shape (10, 10, 1), its scan (50, 40, 1)" in finding.what for finding in report.findings)


@pytest.mark.parametrize("option", ["negative_values", "assume_orientation", "non_finite"])
def test_a_policy_that_no_run_has_is_refused(tmp_path, option):
    write_nifti(tmp_path / "a.nii.gz", make_scan()[0])
    with pytest.raises(ConfigError, match=f"{option} is 'XYZ'"):
        check(str(tmp_path), quiet=True, **{option: "XYZ"})


def test_negative_values_are_no_finding_where_it_is_said_what_they_are(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", make_scan()[0] - 0.25)
    assert any("voxels are negative" in f.what for f in check(str(tmp_path), quiet=True).findings)
    told = check(str(tmp_path), quiet=True, negative_values="clip").findings
    assert not any("voxels are negative" in f.what for f in told)


def test_an_image_with_nothing_around_is_masked_as_a_volume_is(tmp_path):
    voxels = np.zeros((60, 60, 1), np.float32)
    voxels[20:40, 20:40] = np.random.default_rng(0).uniform(1, 2, (20, 20, 1))
    for name, shown in (("image", voxels), ("volume", np.pad(voxels, ((0, 0), (0, 0), (2, 2))))):
        assert scan_statistics(read_nifti(write_nifti(tmp_path / f"{name}.nii.gz", shown))).border_share == 1


def test_an_empty_folder_of_a_datalist_lacks_scans_and_not_labels(tmp_path):
    report = check(str(tmp_path), datalist=True, quiet=True)
    (finding,) = report.findings
    assert report.exit_code == 3 and "put scans into" in str(finding) and "name no structure" not in str(finding)


@pytest.mark.parametrize("labels", ['{"a": [1, 2], "b": 3}', '{"1": "a", "2": "a", "3": "b"}'])
def test_values_that_adapt_merges_are_known(tmp_path, labels):
    label = np.zeros((20, 24, 28), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    label[5:15, 5:15, 15:20] = 3
    for number in range(2):
        chance = np.random.default_rng(number)
        for side in ("source", "target"):
            scan = chance.uniform(1, 2, label.shape).astype(np.float32)
            write_nifti(tmp_path / side / "images" / f"{side}{number}.nii.gz", scan)
        write_nifti(tmp_path / "source" / "labels" / f"source{number}.nii.gz", label)
    report = check(str(tmp_path), labels=labels, quiet=True)
    assert report.counts["error"] == 0
    assert "no label map has a (2)" in str(report)
