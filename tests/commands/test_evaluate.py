# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg evaluate` on boxes whose overlap and distances are known."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from mapseg_components.colours import structure_colours
from mapseg_components.commands import evaluate
from mapseg_components.commands.main import main
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.metrics import agreement, bootstrap_interval, paired_comparison
from tests.conftest import write_nifti
from tests.pictures import write_picture

pytest.importorskip("scipy")
SPACING = np.diag([1.0, 1.5, 2.0, 1.0])


def boxes(shift=0, second=True, shape=(20, 18, 16)):
    """Structure 1, 6 x 6 x 6 voxels, moved along x; structure 2 in another corner."""
    voxels = np.zeros(shape, np.uint8)
    voxels[4 + shift : 10 + shift, 4:10, 4:10] = 1
    if second:
        voxels[14:18, 12:16, 10:14] = 2
    return voxels


@pytest.fixture
def folders(tmp_path):
    """Six cases; predictions moved by 1, others by 2 voxels (mm)."""
    for number in range(6):
        write_nifti(tmp_path / "truth" / f"case{number}.nii.gz", boxes(), SPACING)
        write_nifti(tmp_path / "pred" / f"case{number}_seg.nii.gz", boxes(1), SPACING)
        write_nifti(tmp_path / "other" / f"case{number}_pred.nii.gz", boxes(2), SPACING)
    return tmp_path


def test_a_box_moved_by_one_voxel_has_the_figures_that_geometry_gives(folders):
    result = evaluate(folders / "pred", folders / "truth", tolerance_mm=0.5, quiet=True)
    row = next(one for one in result.rows if one["structure"] == "1")
    assert row["dice"] == pytest.approx(5 / 6) and row["hd95_mm"] == pytest.approx(1.0)
    # of 152 surface voxels, 112 (of 4 faces along x, without one end) lie on the other surface, too; see below
    one, two = (surface(boxes(shift) == 1) for shift in (0, 1))
    assert row["surface_dice"] == pytest.approx((one & two).sum() * 2 / (one.sum() + two.sum()))
    assert 0 < row["assd_mm"] < 1
    whole = evaluate(folders / "pred", folders / "truth", tolerance_mm=1.0, quiet=True)
    assert next(one for one in whole.rows if one["structure"] == "1")["surface_dice"] == pytest.approx(1.0)
    assert result.summary["2"]["dice"]["mean"] == 1 and result.summary["2"]["hd95_mm"]["mean"] == 0
    mean = result.summary["mean of structures"]["dice"]
    assert mean["n"] == 6 and mean["mean"] == pytest.approx((5 / 6 + 1) / 2)


def surface(mask):
    """Voxels of a mask with a neighbour outside."""
    inner = mask.copy()
    for axis in range(3):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return mask & ~inner


def test_a_distance_is_in_mm_along_every_axis(tmp_path):
    voxels = boxes(second=False)
    write_nifti(tmp_path / "truth.nii.gz", voxels, SPACING)
    for axis, side in enumerate((1.0, 1.5, 2.0)):
        write_nifti(tmp_path / "pred.nii.gz", np.roll(voxels, 2, axis), SPACING)
        row = evaluate(tmp_path / "pred.nii.gz", tmp_path / "truth.nii.gz", quiet=True).rows[0]
        assert row["hd95_mm"] == pytest.approx(2 * side)


def test_files_and_table_are_written_and_not_replaced(folders, capsys):
    words = ["evaluate", str(folders / "pred"), str(folders / "truth"), "--output", str(folders / "out")]
    labels = json.dumps({"box": 1, "corner": 2, "nowhere": 3})
    assert main([*words, "--labels", labels]) == 0
    printed = capsys.readouterr().out
    assert "6 cases" in printed and "box" in printed and "0.833 [0.833, 0.833]" in printed
    with (folders / "out" / "evaluation.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 18 and {row["dice"] for row in rows if row["structure"] == "nowhere"} == {""}
    summary = json.loads((folders / "out" / "evaluation.json").read_text())
    assert summary["structures"]["nowhere"]["dice"]["n"] == 0 and summary["structures"]["box"]["dice"]["n"] == 6
    assert main(words) == 2 and "results of an earlier run" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_a_structure_that_the_prediction_lacks_counts_as_missed(folders):
    write_nifti(folders / "pred" / "case3_seg.nii.gz", boxes(1, second=False), SPACING)
    result = evaluate(folders / "pred", folders / "truth", quiet=True)
    assert result.summary["2"]["dice"]["mean"] == pytest.approx(5 / 6)
    assert result.summary["2"]["hd95_mm"]["n"] == 5  # no distance to nothing
    assert [row["case"] for row in result.rows if row["missed"]] == ["case3"]


def test_two_methods_are_compared_on_the_same_cases(folders):
    result = evaluate(folders / "pred", folders / "truth", versus=folders / "other", quiet=True)
    one = result.versus["1"]["dice"]
    assert one["n"] == 6 and one["mean_difference"] == pytest.approx(5 / 6 - 4 / 6)
    assert one["p"] == pytest.approx(2 / 2**6)  # all six in one direction
    assert result.versus["2"]["dice"]["p"] is None and result.versus["2"]["dice"]["note"] == "no case differs"
    (folders / "truth" / "case5.nii.gz").unlink()
    fewer = evaluate(folders / "pred", folders / "truth", versus=folders / "other", common=True, quiet=True)
    assert fewer.versus["1"]["dice"]["p"] is None and "too few cases" in str(fewer) and fewer.cases == 5


def test_files_without_a_partner_are_named(folders, capsys):
    (folders / "pred" / "case2_seg.nii.gz").unlink()
    write_nifti(folders / "pred" / "case9_seg.nii.gz", boxes(), SPACING)
    assert main(["evaluate", str(folders / "pred"), str(folders / "truth")]) == 3
    printed = capsys.readouterr().err
    assert "case2" in printed and "case9" in printed and "set common" in printed
    assert evaluate(folders / "pred", folders / "truth", common=True, quiet=True).cases == 5


def test_another_grid_is_refused_with_every_file(folders):
    moved = SPACING.copy()
    moved[0, 3] = 15.0
    write_nifti(folders / "pred" / "case1_seg.nii.gz", boxes(), moved)
    write_nifti(folders / "pred" / "case4_seg.nii.gz", boxes(shape=(20, 18, 17)), SPACING)
    with pytest.raises(DataError) as caught:
        evaluate(folders / "pred", folders / "truth", quiet=True)
    text = str(caught.value)
    assert "case1_seg" in text and "15.000 mm" in text and "case4_seg" in text and "(20, 18, 17)" in text


def test_an_image_is_no_label_map(folders):
    write_nifti(folders / "pred" / "case1_seg.nii.gz", boxes() * np.float32(0.7), SPACING)
    with pytest.raises(DataError, match=r"case1_seg.*fractions: 0\.7 \(216 voxels\)"):
        evaluate(folders / "pred", folders / "truth", quiet=True)
    scan = np.arange(boxes().size, dtype=np.int16).reshape(boxes().shape) % 1500
    write_nifti(folders / "pred" / "case1_seg.nii.gz", scan, SPACING)
    with pytest.raises(DataError, match=r"case1_seg.*: 1500 different values, expected a label map"):
        evaluate(folders / "pred", folders / "truth", quiet=True)


@pytest.mark.parametrize("labels", ["no file", '["a"]', '{"a": "x"}'])
def test_labels_that_make_no_sense_are_refused(folders, labels):
    with pytest.raises(ConfigError, match="labels is"):
        evaluate(folders / "pred", folders / "truth", labels=labels, quiet=True)


def test_labels_of_a_bundle_translate_the_truth_to_class_indices(folders):
    configs = folders / "bundle" / "configs"
    configs.mkdir(parents=True)
    (configs / "inference.json").write_text(json.dumps({"labels": {"corner": 2, "box": 1}}))
    swapped = np.array([0, 2, 1], np.uint8)[boxes()]  # as a bundle writes them: first structure 1, second 2
    for number in range(6):
        write_nifti(folders / "pred" / f"case{number}_seg.nii.gz", swapped, SPACING)
    result = evaluate(folders / "pred", folders / "truth", labels=folders / "bundle", quiet=True)
    assert {name: result.summary[name]["dice"]["mean"] for name in ("corner", "box")} == {"corner": 1.0, "box": 1.0}


PARTS = {"sides": [17, 53], "stem": [2, 16]}
RECORDS = [
    {"plan": {"label_values": PARTS}, "request": {"labels": None}},
    {"plan": {}, "request": {"labels": PARTS}},  # of a run before label_values were kept
]


def sides(values):
    """Two sides of a structure and two parts of another one, by their values."""
    voxels = np.zeros((20, 18, 16), np.int16)
    for number, value in enumerate(values):
        voxels[2 + 4 * number : 5 + 4 * number, 4:10, 4:10] = value
    return voxels


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    "true, notes", [([17, 53, 2, 16], []), ([1, 1, 2, 2], ["its values 1"]), ([1, 1, 0, 0], ["read as"])]
)
def test_a_truth_of_values_that_adapt_merged_is_compared_by_them(tmp_path, record, true, notes):
    """Value 2 is one of the truth, and in merged label maps the number of its structure."""
    configs = tmp_path / "run" / "configs"
    configs.mkdir(parents=True)
    (configs / "inference.json").write_text(json.dumps({"labels": {"sides": 1, "stem": 2}}))
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    pred = write_nifti(tmp_path / "pred.nii.gz", sides([1, 1, 2, 2]), SPACING)
    truth = write_nifti(tmp_path / "truth.nii.gz", sides(true), SPACING)
    result = evaluate(pred, truth, labels=str(tmp_path / "run"), quiet=True)
    dice = {name: result.summary[name]["dice"]["mean"] for name in ("sides", "stem")}
    assert dice == {"sides": 1 if true != [1, 1, 2, 2] else None, "stem": 1 if true != [1, 1, 0, 0] else None}
    assert len(result.notes) == len(notes) and all(part in note.what for part, note in zip(notes, result.notes))


@pytest.mark.parametrize("found", [[17, 53, 4, 16], [1, 1, 2, 2], [16, 4, 17, 53]])
def test_lists_of_values_are_those_of_the_truth_and_of_predictions_that_have_them(tmp_path, found):
    pred = write_nifti(tmp_path / "pred.nii.gz", sides(found), SPACING)
    truth = write_nifti(tmp_path / "truth.nii.gz", sides([17, 53, 4, 16]), SPACING)
    result = evaluate(pred, truth, labels='{"sides": [17, 53], "stem": [4, 16]}', quiet=True)
    assert result.summary["mean of structures"]["dice"]["mean"] == (0 if found[0] == 16 else 1)


def test_a_truth_without_any_of_the_structures_is_refused(folders, capsys):
    assert main(["evaluate", str(folders / "pred"), str(folders / "truth"), "--labels", '{"a": 9}']) == 3
    assert "no label map has a structure, their values are [0, 1, 2] and those of labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, part",
    [
        (["--tolerance_mm", "inf"], "tolerance_mm is inf, expected a finite number"),
        (["--labels", "cosmos_translation"], "names no labels, expected a bundle that segments"),
        (["--output", "file.txt"], "file.txt is a file: name a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(folders, words, part, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "file.txt").write_text("")
    assert main(["evaluate", "pred", "truth", *words]) == 2
    assert part in capsys.readouterr().err
    assert main(["evaluate", "file.txt", "truth"]) == 2
    assert "file.txt is no label map, expected *.nii" in capsys.readouterr().err
    assert main(["evaluate", "pred/case0_seg.nii.gz", "truth"]) == 2
    assert "folder: pred/case0_seg.nii.gz, truth\n" in capsys.readouterr().err


def test_an_interval_holds_the_mean_and_is_the_same_again():
    values = [0.5, 0.6, 0.9, 0.7]
    low, high = bootstrap_interval(values)
    assert 0.5 <= low < np.mean(values) < high <= 0.9 and (low, high) == bootstrap_interval(values)
    assert bootstrap_interval([0.5]) is None


def test_pairs_without_a_value_are_left_out():
    result = paired_comparison({"a": 0.5, "b": None, "c": 0.7}, {"a": 0.4, "b": 0.1, "d": 0.2})
    assert result["n"] == 1 and result["mean_difference"] == pytest.approx(0.1) and "too few" in result["note"]


def test_structure_colours_differ_up_to_twenty_four():
    assert len(set(structure_colours(24))) == 24 and structure_colours(25)[24] == structure_colours(1)[0]


@pytest.mark.parametrize(
    "spelling", ["{}_0000_seg", "{}_seg", "{}", "{}_0000", "{}_mask", "{}_gt", "{}_desc-manual_dseg"]
)
def test_spellings_of_one_case_belong_together(tmp_path, spelling):
    for name in ("a", "b_1"):
        write_nifti(tmp_path / "pred" / f"{spelling.format(name)}.nii.gz", boxes(1), SPACING)
        write_nifti(tmp_path / "labelsTs" / f"{name}.nii.gz", boxes(), SPACING)
    rows = evaluate(tmp_path / "pred", tmp_path / "labelsTs", quiet=True).rows
    assert sorted({row["case"] for row in rows}) == ["a", "b_1"]


def test_numbers_of_cases_are_no_channels(tmp_path):
    for number in range(3):
        write_nifti(tmp_path / "pred" / f"case_{number:04d}_seg.nii.gz", boxes(1), SPACING)
        write_nifti(tmp_path / "truth" / f"case_{number:04d}.nii.gz", boxes(), SPACING)
    rows = evaluate(tmp_path / "pred", tmp_path / "truth", quiet=True).rows
    assert sorted({row["case"] for row in rows}) == ["case_0000", "case_0001", "case_0002"]


LABELS = {"box": 1, "corner": 2}
SPELLINGS = [
    LABELS,
    {"background": 0, **LABELS},
    {"0": "background", "1": "box", "2": "corner"},
    {"labels": {"background": 0, **LABELS}, "channel_names": {"0": "CT"}},
    {"labels": {"0": "background", "1": "box", "2": "corner"}, "training": []},
]


@pytest.mark.parametrize("labels", SPELLINGS)
@pytest.mark.parametrize("place", ["argument", "labels.json", "dataset.json"])
def test_background_is_no_structure_in_any_spelling(folders, labels, place):
    (folders / "truth").rename(folders / "labelsTr")
    (folders / "imagesTr").mkdir()
    given = json.dumps(labels)
    if place != "argument":
        (folders / place).write_text(
            json.dumps(labels if "labels" in labels or place == "labels.json" else {"labels": labels})
        )
        given = str(folders / place) if place == "labels.json" else None
    result = evaluate(folders / "pred", folders / "labelsTr", labels=given, quiet=True)
    assert list(result.summary) == ["box", "corner", "mean of structures"]
    assert result.summary["box"]["dice"]["mean"] == pytest.approx(5 / 6) and result.notes == []


def test_regions_are_refused_and_voxels_to_ignore_are_left_out(folders, capsys):
    words = ["evaluate", str(folders / "pred"), str(folders / "truth"), "--labels"]
    assert main([*words, json.dumps({"background": 0, "both": [1, 2], "core": 2})]) == 2
    assert "'core' or its value 2 occurs twice" in capsys.readouterr().err
    truth = boxes()
    truth[10:12] = 3  # where the moved box of the prediction goes beyond the true one
    write_nifti(folders / "annotated" / "case0.nii.gz", truth, SPACING)
    labels = json.dumps({"background": 0, "box": 1, "corner": 2, "ignore": 3})
    pred = folders / "pred" / "case0_seg.nii.gz"
    result = evaluate(pred, folders / "annotated" / "case0.nii.gz", labels=labels, quiet=True)
    assert list(result.summary) == ["box", "corner", "mean of structures"]
    assert result.rows[0]["dice"] == pytest.approx(2 * 5 / (5 + 6)) and result.rows[0]["predicted_voxels"] == 5 * 36


def test_values_that_are_not_compared_are_reported(folders):
    result = evaluate(folders / "pred", folders / "truth", labels='{"box": 1}', quiet=True)
    assert len(result.notes) == 12 and "its values 2 (64 voxels) belong to no structure that is compared" in str(result)
    assert {note.file for note in result.notes} >= {str(folders / "truth" / f"case{n}.nii.gz") for n in range(6)}
    for number in range(6):  # a structure that the truth lacks, without labels
        write_nifti(folders / "truth" / f"case{number}.nii.gz", boxes(second=False), SPACING)
    result = evaluate(folders / "pred", folders / "truth", output=str(folders / "out"), quiet=True)
    assert list(result.summary) == ["1", "mean of structures"]
    assert "its values 2 (64 voxels)" in json.loads((folders / "out" / "evaluation.json").read_text())["notes"][0]


def test_a_truth_of_background_alone_is_told_or_refused(folders):
    write_nifti(folders / "truth" / "case0.nii.gz", np.zeros_like(boxes()), SPACING)
    result = evaluate(folders / "pred", folders / "truth", quiet=True)
    assert "case0.nii.gz: the truth has background alone" in str(result)
    labelled = evaluate(folders / "pred", folders / "truth", labels=json.dumps(LABELS), quiet=True)
    assert labelled.summary["box"]["dice"]["n"] == 5
    for number in range(6):
        write_nifti(folders / "truth" / f"case{number}.nii.gz", np.zeros_like(boxes()), SPACING)
    with pytest.raises(DataError, match="no label map has a structure"):
        evaluate(folders / "pred", folders / "truth", quiet=True)


def test_a_label_map_with_a_slope_is_compared_as_the_plain_one(folders):
    for number in range(6):
        image = nib.Nifti1Image(boxes().astype(np.int16) * 10, SPACING)
        image.header.set_slope_inter(0.1, 0)
        nib.save(image, folders / "truth" / f"case{number}.nii.gz")
    result = evaluate(folders / "pred", folders / "truth", quiet=True)
    assert result.summary["1"]["dice"]["mean"] == pytest.approx(5 / 6) and result.notes == []
    write_nifti(folders / "truth" / "case1.nii.gz", boxes().astype(np.float64) * (1 << 24) + 2, SPACING)
    write_nifti(folders / "truth" / "case2.nii.gz", -boxes().astype(np.int16), SPACING)
    with pytest.raises(DataError) as caught:
        evaluate(folders / "pred", folders / "truth", quiet=True)
    assert "values above 16777216: 16777218" in str(caught.value) and "negative values: -2" in str(caught.value)


@pytest.mark.parametrize("shape", [(13, 17, 11), (13, 17)])
def test_distances_that_are_searched_once_give_the_metrics_of_monai(shape):
    generator, sides = np.random.default_rng(0), [1.0, 0.7, 2.1][: len(shape)]
    for share in (0.002, 0.1, 0.5, 0.9):
        masks = [(generator.random(shape) < share).astype(np.uint8) for _ in range(2)]
        for mask in masks:
            mask[(3,) * len(shape)] = 1
        pair = [torch.from_numpy(mask)[None, None].float() for mask in masks]
        volumes, spacing = (masks, sides) if len(shape) == 3 else ([mask[..., None] for mask in masks], [*sides, 9.0])
        (row,) = agreement(*volumes, [1], spacing, 1.3)
        assert row["surface_dice"] == compute_surface_dice(*pair, [1.3], True, spacing=sides).item()
        assert row["hd95_mm"] == compute_hausdorff_distance(*pair, True, percentile=95, spacing=sides).item()
        assert row["assd_mm"] == compute_average_surface_distance(*pair, True, symmetric=True, spacing=sides).item()


def test_surfaces_of_an_image_are_outlines(tmp_path):
    """Discs of 12 and 16 pixels around one centre: 4 pixels lie between their outlines everywhere."""
    across, down = np.mgrid[:48, :48] - 24
    discs = [(across**2 + down**2 <= radius**2).astype(np.uint8)[:, :, None] for radius in (12, 16)]
    sides = np.diag([0.5, 0.5, 9.0, 1.0])
    for name, disc in zip(("pred", "truth"), discs):
        write_nifti(tmp_path / f"{name}.nii.gz", disc, sides)
    found = evaluate(tmp_path / "pred.nii.gz", tmp_path / "truth.nii.gz", tolerance_mm=1.5, quiet=True).rows[0]
    assert found["surface_dice"] == 0
    assert found["assd_mm"] == pytest.approx(2, abs=0.1) and found["hd95_mm"] == pytest.approx(2, abs=0.25)


def test_the_mask_beside_a_truth_is_one_whatever_the_ending_of_its_name(tmp_path):
    truth = boxes()[:, :, 5]
    mask = np.ones_like(truth)
    mask[:7] = 0
    for name in ("truth/a_seg.png", "wrong/a_seg.png", "wrong/a_label.png"):
        write_picture(tmp_path / name, truth)
    write_picture(tmp_path / "truth" / "a_mask.png", mask)
    write_picture(tmp_path / "pred" / "a.png", np.where(mask, truth, 2))
    row = evaluate(tmp_path / "pred", tmp_path / "truth", quiet=True).rows[0]
    assert row["dice"] == 1 and row["truth_voxels"] == truth[7:].sum()
    with pytest.raises(DataError, match="are both label maps of 'a'"):
        evaluate(tmp_path / "pred", tmp_path / "wrong", quiet=True)
    single = evaluate(tmp_path / "pred" / "a.png", tmp_path / "truth" / "a_seg.png", quiet=True).rows[0]
    assert single["dice"] == 1
    for names in (("a_0000.png", "a_0000_mask.png"), ("a_seg.png", "a_seg_mask.png")):
        for name, voxels in zip(names, (truth, mask)):
            write_picture(tmp_path / names[0][:-4] / name, voxels)
        assert evaluate(tmp_path / "pred", tmp_path / names[0][:-4], quiet=True).rows[0]["dice"] == 1
    write_picture(tmp_path / "alone" / "a_mask.png", truth)  # a label map, as nothing else is one of its case
    assert evaluate(tmp_path / "pred", tmp_path / "alone", quiet=True).rows[-1]["dice"] < 1
