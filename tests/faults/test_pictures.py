# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Damaged and unfit images, label maps that are pictures, masks of another grid: each a clear error or a note."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mapseg_components.commands import check, evaluate, prepare
from mapseg_components.data import check_training_data, read_nifti
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.plans.cases import source_cases, target_cases
from tests.faults.common import refused
from tests.pictures import cells, make_images, write_picture
from tests.scans import write_nifti

GREY = cells(0)[0]


def cut(path):
    write_picture(path, GREY)
    path.write_bytes(path.read_bytes()[:-200])


def flipped_bit(path):
    write_picture(path, GREY)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pages(path):
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY)] * 2)


def jpeg(path):
    Image.fromarray(GREY).save(path, format="JPEG")


def turned(path):
    Image.fromarray(GREY).save(path, tiffinfo={274: 6})


@pytest.mark.parametrize(
    "name, make, words",
    [
        ("a.png", cut, ("cannot be read as an image", "copy it again")),
        ("a.tif", cut, ("cannot be read as an image", "copy it again")),
        ("a.png", flipped_bit, ("cannot be read as an image", "copy it again")),
        ("a.png", lambda path: path.touch(), ("the file is empty",)),
        ("a.tif", lambda path: path.write_text("text"), ("cannot be read as an image",)),
        ("a.tif", pages, ("3 pages in one file, expected one", "save each page as a file")),
        ("a.png", jpeg, ("is a JPEG image by its content", "save it as PNG or TIFF")),
        ("a.jpg", jpeg, ("a JPEG image, expected", "a label map anew as it was annotated")),
        ("a.tif", turned, ("its orientation tag is 6", "save it upright")),
        (
            "a.tif",
            lambda p: Image.new("CMYK", (8, 9)).save(p),
            ("its colours are CMYK", "save it as grey values or RGB"),
        ),
        ("ä 1.tif", lambda p: Image.new("LAB", (8, 9)).save(p), ("ä 1.tif", "its colours are LAB")),
    ],
)
def test_what_is_no_sound_image_is_refused_by_name(tmp_path, name, make, words):
    make(tmp_path / name)
    with refused(tmp_path, name, *words):
        read_nifti(tmp_path / name)


def test_floats_are_read_and_the_smaller_copies_of_a_pyramid_passed_over(tmp_path):
    values = np.random.default_rng(0).random((4, 6)).astype(np.float32)
    assert np.array_equal(read_nifti(write_picture(tmp_path / "f.tif", values)).voxels[..., 0].T, values)
    small = Image.fromarray(GREY[::2, ::2])
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(GREY).save(tmp_path / "p.tif", save_all=True, append_images=[small])
    assert np.array_equal(read_nifti(tmp_path / "p.tif").voxels[..., 0].T, GREY)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "data")


def audited(folder):
    check_training_data(folder, {"ring": 1, "core": 2}, record=None)


def test_sound_images_pass_whatever_their_sizes_and_resolutions(images):
    label = cells(0)[1]
    write_picture(images / "source" / "labels" / "a.png", label, dpi=(254000, 254000))  # its image names none
    audited(images)


@pytest.mark.parametrize(
    "name, make, words",
    [
        (
            "source/labels/a.png",
            lambda p: write_picture(p, cells(0)[1][1:]),
            ("label map of shape (56, 39, 1), its scan",),
        ),
        (
            "source/labels/a.png",
            lambda p: write_picture(p, cells(0)[0]),
            ("more than 64 values", "as it was annotated"),
        ),
        (
            "target/images/u_mask.png",
            lambda p: write_picture(p, np.ones((9, 9), np.uint8)),
            ("mask of shape (9, 9, 1)",),
        ),
        ("target/images/u_mask.png", lambda p: write_picture(p, np.zeros((52, 60), np.uint8)), ("a mask of 0 alone",)),
    ],
)
def test_a_label_map_or_mask_that_does_not_fit_is_refused(images, name, make, words):
    make(images / name)
    with refused(images, images.joinpath(name).name, *words):
        audited(images)


def test_a_label_map_compressed_as_jpeg_is_refused(images):
    (images / "source/labels/a.png").unlink()
    write_picture(images / "source/labels/a.tif", cells(0)[1], compression="jpeg")
    with refused(images, "a.tif", "compressed as JPEG, which changes values", "as it was annotated"):
        audited(images)
    with pytest.raises(DataError, match="compressed as JPEG"):
        evaluate(str(images / "source/labels/a.tif"), str(images / "source/labels/a.tif"), quiet=True)


def test_images_and_volumes_together_bit_depths_and_unknown_sizes_are_told(images, caplog):
    write_picture(images / "target" / "images" / "v.png", cells(7)[0].astype(np.uint16) * 200)
    found = check(str(images), quiet=True)
    text = " ".join(f"{one.what} {one.remedy}" for one in found.findings)
    assert found.exit_code == 0
    assert "of another bit depth" in text and "name no pixel size: lengths are in pixels" in text
    write_nifti(images / "source" / "images" / "a.nii.gz", cells(0)[0].T[..., None])
    for path in (images / "source" / "images").glob("*.png"):
        path.unlink()
    (images / "source" / "labels" / "b.png").unlink()
    with pytest.raises(DataError, match=r"affine|orientation"):
        audited(images)  # pixels of the label map, voxels of its scan
    assert "are PNG or TIFF images, 1 are NIfTI volumes" in caplog.text


def test_label_maps_beside_their_images_make_a_source_and_are_left_out_of_a_target(tmp_path):
    for number in range(3):
        image, label = cells(number)
        write_picture(tmp_path / f"{number}.png", image)
        write_picture(tmp_path / f"{number}_label.png", label)
    write_picture(tmp_path / "2_mask.png", np.ones((40, 56), np.uint8))
    training, validation = source_cases(str(tmp_path), 0.2, 0)
    cases = {case["case_id"]: case for case in (*training, *validation)}
    assert sorted(cases) == ["0", "1", "2"] and cases["1"]["label"].endswith("1_label.png")
    assert cases["2"]["mask"].endswith("2_mask.png") and "mask" not in cases["0"]
    assert [case["case_id"] for case in target_cases(str(tmp_path))] == ["0", "1", "2"]
    (tmp_path / "1_label.png").unlink()
    with pytest.raises(DataError, match=r"no label map, or no scan, of one name with 1\.png"):
        source_cases(str(tmp_path), 0.2, 0)


def test_a_folder_of_images_alone_is_a_target_and_two_of_one_name_are_refused(tmp_path):
    for number in range(2):
        write_picture(tmp_path / "a" / f"{number}.png", cells(number)[0])
    assert [case["case_id"] for case in target_cases(str(tmp_path / "a"))] == ["0", "1"]
    write_picture(tmp_path / "b" / "0.png", cells(3)[0])
    listed = [{"image": f"{folder}/0.png", "case_id": folder} for folder in ("a", "b")]
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": {"1": "ring"}, "target_training": listed}))
    with pytest.raises(DataError, match=r"scans named \['0'\] occur twice"):
        target_cases(str(tmp_path / "datalist.json"))


def test_images_are_not_prepared(tmp_path):
    from_images = tmp_path / "in"
    write_picture(from_images / "a.png", GREY)
    for path in (from_images, from_images / "a.png"):
        with pytest.raises(ConfigError, match="2D image"):
            prepare(path, tmp_path / "out", quiet=True)
