# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The shipped sample is complete, small, unchanged, and leaks no target label."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.data import check_datalist, check_training_data, load_datalist

SAMPLE = Path(__file__).parents[2] / "sample" / "fetal_age"
COUNTS = {"source_training": 4, "source_validation": 1, "target_training": 4, "target_test": 2}


def test_sample_is_complete_and_sound():
    cases = check_datalist(SAMPLE / "datalist.json")
    assert {section: len(found) for section, found in cases.items()} == COUNTS
    labels = json.loads((SAMPLE / "datalist.json").read_text())["labels"]
    check_training_data(SAMPLE / "datalist.json", [int(value) for value in labels if value != "0"])


@pytest.mark.parametrize("section", COUNTS)
def test_folder_convention_and_datalist_agree(section):
    assert {c["image"] for c in load_datalist(SAMPLE, section)} == {
        c["image"] for c in load_datalist(SAMPLE / "datalist.json", section)
    }


def test_sample_is_what_the_script_made():
    for line in (SAMPLE / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((SAMPLE / name).read_bytes()).hexdigest() == digest, name
    assert len(list(SAMPLE.rglob("*.nii.gz"))) == len((SAMPLE / "SHA256SUMS").read_text().splitlines())


def test_every_label_map_lies_on_its_scans_grid():
    labelled = [case for section in COUNTS for case in load_datalist(SAMPLE, section) if "label" in case]
    assert len(labelled) == 7
    for case in labelled:
        image, label = (nib.load(case[key]) for key in ("image", "label"))
        assert label.shape == image.shape, case["label"]
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-6, err_msg=case["label"])
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_allclose(image.header.get_zooms(), 1.6, atol=1e-4)  # the atlas says 0.799999 mm
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) == set(range(9)), case["label"]


def test_sample_is_small_and_licensed():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 4 * 2**20
    assert "CC0" in (SAMPLE / "LICENSE.txt").read_text()


def test_no_label_of_a_target_training_scan_is_shipped():
    entries = json.loads((SAMPLE / "datalist.json").read_text())["target_training"]
    assert all(set(entry) == {"image"} for entry in entries)
    names = {Path(case["image"]).name for case in load_datalist(SAMPLE, "target_training")}
    assert names == {path.name for path in (SAMPLE / "target").rglob("*.nii.gz")}
    assert not (SAMPLE / "target" / "labels").exists()
    assert not any(path.name in names for path in SAMPLE.rglob("labels/*"))


def test_brain_fills_the_image_and_background_is_zero():
    for case in load_datalist(SAMPLE, "target_test"):
        image, label = (np.asarray(nib.load(case[key]).dataobj) for key in ("image", "label"))
        assert (image[label > 0] > 0).mean() > 0.99
        assert image[0].max() == 0
