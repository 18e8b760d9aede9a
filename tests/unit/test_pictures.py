# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""PNG and TIFF images as scans of one slice, and results in their format."""

from __future__ import annotations

import json
from pathlib import Path

import itk
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Spacing
from PIL import Image

from mapseg_components.commands import evaluate
from mapseg_components.data import NiftiReader, read_nifti, result_path
from mapseg_components.data.datalist import list_scans, load_scans
from mapseg_components.data.scan_statistics import scan_statistics
from mapseg_components.errors import ConfigError
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.scans.pictures import RGB_RULES, has_pixel_size, in_mm, read_picture
from mapseg_components.transforms import ArgmaxOnScand, SaveLabelMap, SaveVolume, WorkingFrame
from tests.pictures import write_deep_png, write_picture, write_png, write_tiff

GENERATOR = np.random.default_rng(0)
GREY8 = GENERATOR.integers(0, 256, (5, 7)).astype(np.uint8)
GREY16 = GENERATOR.integers(0, 1 << 16, (5, 7)).astype(np.uint16)
COLOURS = GENERATOR.integers(0, 256, (5, 7, 3)).astype(np.uint8)
DEEP = GENERATOR.integers(0, 1 << 16, (5, 7, 4)).astype(np.uint16)


@pytest.mark.parametrize("ending", ["png", "tif", "TIFF"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["8 bits", "16 bits"])
def test_columns_are_x_and_rows_are_y_as_itk_has_them(tmp_path, pixels, ending):
    path = write_picture(tmp_path / f"a.{ending}", pixels)
    scan = read_nifti(path)
    assert scan.voxels.dtype == pixels.dtype and scan.voxels.shape == (7, 5, 1) == read_geometry(path).shape
    np.testing.assert_array_equal(scan.voxels[..., 0].T, pixels)
    of_itk = itk.imread(path)
    np.testing.assert_array_equal(itk.array_from_image(of_itk), pixels)
    direction = np.diag([-1.0, -1.0, 1.0])[:2, :2] @ itk.array_from_matrix(of_itk.GetDirection())  # LPS to RAS
    np.testing.assert_allclose(scan.affine[:2, :2], direction)
    loaded = LoadImage(reader=NiftiReader, ensure_channel_first=True)(path)
    assert tuple(loaded.shape) == (1, 7, 5, 1) and loaded.affine.tolist() == scan.affine.tolist()


@pytest.mark.parametrize("rule", RGB_RULES)
def test_colours_become_one_channel_by_the_rule(tmp_path, rule):
    red, green, blue = np.moveaxis(COLOURS.astype(float), -1, 0)
    expected = {"luminance": 0.299 * red + 0.587 * green + 0.114 * blue, "mean": (red + green + blue) / 3}
    expected |= {"red": red, "green": green, "blue": blue}
    found = LoadImage(reader=NiftiReader, rgb=rule)(write_picture(tmp_path / "a.png", COLOURS))
    np.testing.assert_allclose(found[..., 0].T, expected[rule], rtol=1e-6)
    grey = read_picture(write_picture(tmp_path / "b.png", np.repeat(GREY8[..., None], 3, axis=2)), rule)
    assert grey.voxels.dtype == np.uint8 and np.array_equal(grey.voxels[..., 0].T, GREY8)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="rgb is 'gray', expected one of luminance, red"):
        NiftiReader(rgb="gray")


def test_colours_of_16_bits_lose_none(tmp_path):
    np.testing.assert_array_equal(
        read_picture(write_deep_png(tmp_path / "ü.png", DEEP), "green").voxels[..., 0].T, DEEP[..., 1]
    )
    opaque = DEEP.copy()
    opaque[1, 2, 3] = 0
    outside = read_picture(write_deep_png(tmp_path / "b.png", opaque)).outside
    assert outside is not None and np.argwhere(outside).tolist() == [[2, 1, 0]]
    two = read_picture(write_deep_png(tmp_path / "c.png", DEEP[..., :2]))
    np.testing.assert_array_equal(two.voxels[..., 0].T, DEEP[..., 0])


def test_transparent_pixels_are_outside_and_0(tmp_path):
    alpha = np.full((5, 7, 1), 255, np.uint8)
    alpha[0, 1], alpha[4, 6] = 0, 1
    scan = read_picture(write_picture(tmp_path / "a.png", np.concatenate([COLOURS, alpha], axis=2)))
    assert np.argwhere(scan.outside).tolist() == [[1, 0, 0]] and scan.voxels[1, 0, 0] == 0
    assert read_picture(write_picture(tmp_path / "b.png", COLOURS)).outside is None


def test_palettes_and_few_bits_keep_the_values_that_are_stored(tmp_path):
    indices = (GREY8 % 4).astype(np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for ending in ("png", "tif"):
        image.save(tmp_path / f"p.{ending}")
        scan = read_nifti(tmp_path / f"p.{ending}")
        assert np.array_equal(scan.voxels[..., 0].T, indices) and "palette" in scan.remarks[0][1]
    Image.fromarray(indices > 1).save(tmp_path / "one.png")
    assert np.array_equal(read_nifti(tmp_path / "one.png").voxels[..., 0].T, indices > 1)
    write_png(tmp_path / "two.png", bytes([0b00011011, 0b11000000]), (5, 1), 2, 1)
    assert read_nifti(tmp_path / "two.png").voxels.flatten().tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
@pytest.mark.parametrize("bits, stored", [(1, [0, 1, 1, 0, 1]), (2, [0, 1, 2, 3, 3]), (4, [0, 15, 7, 8, 2])])
def test_few_bits_of_a_tiff_are_as_stored(tmp_path, photometric, bits, stored):
    packed = int("".join(f"{value:0{bits}b}" for value in stored).ljust(24, "0"), 2).to_bytes(3, "big")
    path = write_tiff(tmp_path / "a.tif", packed[: -(-5 * bits // 8)], (5, 1), bits, photometric)
    assert read_nifti(path).voxels.flatten().tolist() == stored


@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["8 bits", "16 bits"])
def test_greys_of_a_tiff_are_as_stored_whatever_is_white(tmp_path, photometric, pixels):
    path = write_tiff(tmp_path / "a.tif", pixels.tobytes(), (7, 5), 8 * pixels.itemsize, photometric)
    assert np.array_equal(read_nifti(path).voxels[..., 0].T, pixels)


@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_signed_greys_of_a_tiff_stay_signed(tmp_path, kind):
    pixels = np.array([[-100, -1, 0, 100]], kind)
    path = write_tiff(tmp_path / "a.tif", pixels.tobytes(), (4, 1), 8 * pixels.itemsize, kind=2)
    assert read_nifti(path).voxels.flatten().tolist() == [-100, -1, 0, 100]


CM, INCH, NO_UNIT = ({"resolution_unit": unit} for unit in (3, 2, 1))
IMAGEJ = "ImageJ=1.5\nunit=micron\n"
OME = '<OME PhysicalSizeX="4" PhysicalSizeXUnit="nm" PhysicalSizeY="5" PhysicalSizeYUnit="nm">'


@pytest.mark.parametrize(
    "ending, options, um",
    [
        ("tif", {**CM, "x_resolution": 100000.0, "y_resolution": 50000.0}, (0.1, 0.2)),
        ("tif", {**INCH, "x_resolution": 72.0, "y_resolution": 72.0}, (1.0, 1.0)),
        ("tif", {**NO_UNIT, "x_resolution": 5.0, "y_resolution": 5.0}, (1.0, 1.0)),
        ("tif", {**NO_UNIT, "x_resolution": 5.0, "y_resolution": 5.0, "description": IMAGEJ}, (0.2, 0.2)),
        ("tif", {"description": OME}, (4e-3, 5e-3)),
        ("png", {"dpi": (254000, 254000)}, (0.1, 0.1)),
        ("png", {"dpi": (96, 96)}, (1.0, 1.0)),
        ("png", {}, (1.0, 1.0)),
    ],
)
def test_a_pixel_size_is_in_um_where_the_header_means_one(tmp_path, ending, options, um):
    path = write_picture(tmp_path / f"a.{ending}", GREY8, **options)
    affine = read_geometry(path).affine
    np.testing.assert_allclose(-np.diag(affine)[:2], um, rtol=1e-6)
    assert affine[2, 2] == pytest.approx(np.sqrt(um[0] * um[1]))
    (tmp_path / "pixel_size.json").write_text(json.dumps({"PixelSize": [2, 3], "PixelSizeUnits": "um"}))
    np.testing.assert_allclose(-np.diag(read_nifti(path).affine)[:2], (2, 3))
    (tmp_path / "a.json").write_text(json.dumps({"PixelSize": [7, 7], "PixelSizeUnits": "nm", "Sample": "x"}))
    np.testing.assert_allclose(-np.diag(read_nifti(path).affine)[:2], (7e-3, 7e-3))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"PixelSize": [1, 1], "PixelSizeUnits": "furlong"}', '{"PixelSize": 0']
)
def test_a_file_of_a_pixel_size_that_names_none_is_refused(tmp_path, content):
    write_picture(tmp_path / "a.png", GREY8)
    (tmp_path / "pixel_size.json").write_text(content)
    with pytest.raises(ConfigError, match=r"pixel_size\.json: names no pixel size: write such as"):
        read_geometry(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("classes, kind", [(3, np.uint8), (400, np.uint16)])
def test_a_label_map_has_its_scans_format_pixels_and_resolution(tmp_path, ending, classes, kind):
    scan = write_picture(tmp_path / f"a b.x.{ending}", GREY8, dpi=(72, 72))
    label = GENERATOR.integers(0, classes, (1, 7, 5, 1))
    meta = {"filename_or_obj": scan, "affine": read_geometry(scan).affine}
    SaveLabelMap(tmp_path / "out", num_classes=classes)(MetaTensor(label, meta=meta))
    path = result_path(scan, tmp_path / "out", "seg")
    assert path.name == f"a b.x_seg.{ending}" and [path] == list((tmp_path / "out").iterdir())
    with Image.open(path) as image:
        assert np.asarray(image).dtype == kind and np.allclose(image.info["dpi"], 72, rtol=0.01)
        np.testing.assert_array_equal(np.asarray(image), label[0, ..., 0].T)


@pytest.mark.parametrize("sized", [True, False])
def test_a_pixel_of_1_um_has_a_size_and_a_pixel_without_one_has_none(tmp_path, sized):
    scan = write_picture(tmp_path / "a.png", GREY8)
    if sized:
        (tmp_path / "a.json").write_text('{"PixelSize": [1, 1], "PixelSizeUnits": "um"}')
    affine = read_geometry(scan).affine
    assert np.diag(affine).tolist() == [-1, -1, 1, 1]
    assert np.diag(in_mm(affine, scan))[0] == (-0.001 if sized else -1)
    assert scan_statistics(read_nifti(scan)).sized == sized
    (tmp_path / "out").mkdir()
    SaveLabelMap(tmp_path / "out", num_classes=2)(
        MetaTensor(torch.ones(1, 7, 5, 1), meta={"filename_or_obj": scan, "affine": affine})
    )
    result = result_path(scan, tmp_path / "out", "seg")
    assert has_pixel_size(result) == sized
    text = " ".join(f"{one.what}" for one in evaluate(result, result, quiet=True).notes)
    assert "distances are in um" in text and ("without a pixel size" in text) != sized


def test_fractions_of_an_image_are_saved_as_tiff(tmp_path):
    values = GENERATOR.random((1, 7, 5, 1)).astype(np.float32)
    meta = {"filename_or_obj": "a.png", "affine": np.diag([-0.2, -0.2, 0.2, 1.0])}
    SaveVolume(tmp_path, output_postfix="map")(MetaTensor(values, meta=meta))
    found = read_nifti(tmp_path / "a_map.tif")
    assert np.array_equal(found.voxels, values[0])
    np.testing.assert_allclose(np.diag(found.affine), [-0.2, -0.2, 0.2, 1.0], rtol=1e-5)


def test_images_beside_nifti_files_are_pictures_of_them_and_masks_are_no_scans(tmp_path):
    for name in ("a.png", "a_mask.png", "b.tif", "c_mask.png"):
        write_picture(tmp_path / name, GREY8)
    assert [path.name for path in list_scans(tmp_path)] == ["a.png", "b.tif", "c_mask.png"]
    cases = {case["case_id"]: case for case in load_scans(tmp_path)}
    assert Path(cases["a"]["mask"]).name == "a_mask.png" and "mask" not in cases["b"]
    (tmp_path / "d.nii.gz").touch()
    assert [path.name for path in list_scans(tmp_path)] == ["d.nii.gz"]


def test_a_working_grid_is_the_same_in_any_unit(tmp_path):
    image = np.kron(GENERATOR.integers(0, 256, (9, 12)), np.ones((2, 2)))[1:, 1:].astype(np.uint8)  # 17 x 23
    found = []
    for number, mm in enumerate((0.5, 5e-4, 4e-6)):
        path = write_picture(tmp_path / f"{number}.png", image)
        sidecar = {"PixelSize": [mm, mm], "PixelSizeUnits": "mm"}
        (tmp_path / f"{number}.json").write_text(json.dumps(sidecar))
        scan = LoadImage(reader=NiftiReader, ensure_channel_first=True)(path)
        work = Spacing((2000 * mm, 2000 * mm, 0.0), mode="bilinear", padding_mode="border")(WorkingFrame()(scan))
        logits = torch.cat([255 - work, work]).as_subclass(torch.Tensor)
        case = {"pred": MetaTensor(logits, affine=work.affine), "image": work}
        found.append((work.as_subclass(torch.Tensor), ArgmaxOnScand("pred")(case)["pred"].as_subclass(torch.Tensor)))
    assert found[0][0].shape == (1, 12, 9, 1) and found[0][1].shape == (1, 23, 17, 1)
    for work, label_map in found[1:]:
        torch.testing.assert_close(work, found[0][0], rtol=0, atol=0.01)
        assert (label_map != found[0][1]).float().mean() < 0.01
