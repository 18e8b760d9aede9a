# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The shipped samples are complete, small, unchanged, licensed, and leak no target label."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.data import check_datalist, check_training_data, load_datalist
from mapseg_components.errors import ConfigError
from mapseg_components.shipped_files import SAMPLES, sample_folder
from tools.make_adult_sample import LABELS, without_rim

ROOT = Path(__file__).parents[2] / "sample"
COUNTS = {
    "fetal_age": {"source_training": 4, "source_validation": 1, "target_training": 4, "target_test": 2},
    "adult_t1_to_t2": {"source_training": 2, "source_validation": 1, "target_training": 2, "target_test": 2},
}
SPACING = {"fetal_age": 1.6, "adult_t1_to_t2": 2.0}
VALUES = {"fetal_age": 9, "adult_t1_to_t2": 4}
LICENCE = {"fetal_age": "CC0", "adult_t1_to_t2": "Attribution (CC-BY)"}
MIB = {"fetal_age": 4, "adult_t1_to_t2": 3}


@pytest.fixture(params=SAMPLES)
def sample(request):
    return ROOT / request.param


def test_every_sample_is_found_by_name_and_no_other():
    assert sorted(SAMPLES) == sorted(path.name for path in ROOT.iterdir() if path.is_dir())
    assert all(sample_folder(name).samefile(ROOT / name) for name in SAMPLES)
    with pytest.raises(ConfigError, match="sample 'heart' is unknown, expected one of"):
        sample_folder("heart")


def test_sample_is_complete_and_sound(sample):
    cases = check_datalist(sample / "datalist.json")
    assert {section: len(found) for section, found in cases.items()} == COUNTS[sample.name]
    labels = json.loads((sample / "datalist.json").read_text())["labels"]
    check_training_data(sample / "datalist.json", [int(value) for value in labels if value != "0"])


@pytest.mark.parametrize("section", COUNTS["fetal_age"])
def test_folder_convention_and_datalist_agree(sample, section):
    assert {c["image"] for c in load_datalist(sample, section)} == {
        c["image"] for c in load_datalist(sample / "datalist.json", section)
    }


def test_sample_is_what_the_script_made(sample):
    for line in (sample / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((sample / name).read_bytes()).hexdigest() == digest, name
    assert len(list(sample.rglob("*.nii.gz"))) == len((sample / "SHA256SUMS").read_text().splitlines())


def test_every_label_map_lies_on_its_scans_grid(sample):
    labelled = [case for section in COUNTS[sample.name] for case in load_datalist(sample, section) if "label" in case]
    assert len(labelled) == sum(COUNTS[sample.name].values()) - COUNTS[sample.name]["target_training"]
    for case in labelled:
        image, label = (nib.load(case[key]) for key in ("image", "label"))
        assert label.shape == image.shape, case["label"]
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-6, err_msg=case["label"])
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        # the fetal atlas says 0.799999 mm
        np.testing.assert_allclose(image.header.get_zooms(), SPACING[sample.name], atol=1e-4)
        assert image.get_data_dtype() == label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) == set(range(VALUES[sample.name])), case["label"]


def test_sample_is_small_and_licensed(sample):
    size = sum(path.stat().st_size for path in sample.rglob("*") if path.is_file())
    assert size <= MIB[sample.name] * 2**20
    assert LICENCE[sample.name] in " ".join((sample / "LICENSE.txt").read_text().split())


def test_the_adult_sample_says_whose_scans_these_are_and_that_its_labels_are_silver():
    text = (ROOT / "adult_t1_to_t2" / "README.md").read_text()
    assert "10.1007/s12021-017-9348-7" in text and "silver labels" in text and "## Changes" in text
    assert "10.1007/s12021-017-9348-7" in (ROOT.parent / "CITATION.cff").read_text()


def test_each_adult_comes_with_the_notice_of_the_set_it_is_from():
    folder = ROOT / "adult_t1_to_t2"
    files = (folder / "LICENSE.txt", folder / "README.md", ROOT.parent / "CITATION.cff")
    texts = [" ".join(path.read_text(encoding="utf-8").replace("\n>", "\n").split()) for path in files]
    for title in ("Segmentations Based on Multi-rater Consensus", "White-Matter Lesion Change Detection Methods"):
        assert all(title in text for text in texts), title
    assert all(path.name.split("_")[0] in texts[0] for path in folder.rglob("*.nii.gz"))


def test_no_label_of_a_target_training_scan_is_shipped(sample):
    entries = json.loads((sample / "datalist.json").read_text())["target_training"]
    assert all(set(entry) == {"image"} for entry in entries)
    names = {Path(case["image"]).name for case in load_datalist(sample, "target_training")}
    assert names == {path.name for path in (sample / "target").rglob("*.nii.gz")}
    assert not (sample / "target" / "labels").exists()
    assert not any(path.name in names for path in sample.rglob("labels/*"))


def test_no_adult_is_in_two_parts_of_the_sample():
    # the first four letters are the person, a fifth the session
    people = [{path.name[:4] for path in folder.rglob("*.nii.gz")} for folder in (ROOT / "adult_t1_to_t2").iterdir()]
    assert len(set().union(*people)) == sum(map(len, people)) == 6


def test_brain_fills_the_image_and_background_is_zero(sample):
    for case in load_datalist(sample, "target_test"):
        image, label = (np.asarray(nib.load(case[key]).dataobj) for key in ("image", "label"))
        assert (image[label > 0] > 0).mean() > 0.99
        assert image[0].max() == 0


def test_fluid_is_dark_in_the_adults_source_and_bright_in_their_target():
    fluid, white = LABELS.index("cerebrospinal fluid"), LABELS.index("white matter")
    for section, sign in (("source_training", -1), ("target_test", 1)):
        for case in load_datalist(ROOT / "adult_t1_to_t2", section):
            image, label = (np.asarray(nib.load(case[key]).dataobj) for key in ("image", "label"))
            assert sign * (image[label == fluid].mean() - image[label == white].mean()) > 20, case["image"]


def test_bone_and_what_hangs_on_it_are_removed_and_nothing_of_the_brain():
    grids = np.meshgrid(np.arange(44.0), np.arange(52.0), np.arange(48.0), indexing="ij")
    radius = np.sqrt(sum((g - c) ** 2 for g, c in zip(grids, (21, 25, 23)))) * 2
    brain = radius <= 30
    grey = np.where(brain, 100, 0)
    grey[(radius > 26) & brain] = 200  # fluid
    grey[radius < 8] = 20  # dark, but deep
    above = grids[2] > 30
    grey[above & (radius > 30) & (radius <= 34)] = 20  # bone
    grey[above & (radius > 34) & (radius <= 38)] = 150  # fat
    kept = without_rim(grey.astype(np.uint8), np.full(3, 2.0))
    assert not (kept & (radius > 34)).any(), "fat"
    assert (kept & (radius > 32)).sum() < 0.02 * ((radius > 32) & (grey > 0)).sum(), "bone"
    assert kept[brain].mean() > 0.99 and kept[radius < 8].all()
