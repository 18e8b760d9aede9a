# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""How large bodies are, by what scans show; copies of scans at another size."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.errors import DataError, ResourceError
from mapseg_components.plans.extents import describe_size, find_size, sized_cases, sized_source
from mapseg_components.scans import rewriting
from mapseg_components.scans.extents import extent_of, median_extent
from mapseg_components.scans.nifti import read_nifti
from mapseg_components.scans.rewriting import copy_scaled
from tests.headers import VARIANTS, orientation_affine, scan_with

SHAPE = (20, 24, 22)


def body(shape=SHAPE, sides=(10, 14, 12), background=0.0):
    """A box of tissue in the middle of an image."""
    voxels = np.full(shape, background, np.float32)
    voxels[tuple(slice((whole - side) // 2, (whole - side) // 2 + side) for whole, side in zip(shape, sides))] = 5.0
    return voxels


def written(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return {"image": str(path), "case_id": path.name.partition(".")[0]}


def side_of(folder, factors, voxels=None):
    """Cases of one body with voxels of these sides."""
    voxels = body() if voxels is None else voxels
    return [written(folder / f"{n}.nii.gz", voxels, np.diag([*(np.ones(3) * f), 1.0])) for n, f in enumerate(factors)]


def size_of(source, target):
    """The size that is found from cases of both sides."""
    return find_size(*(median_extent([case["image"] for case in cases]) for cases in (source, target)))


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "PIR", "SAL"])
def test_an_extent_lies_along_the_axes_of_the_body(tmp_path, axcodes):
    affine = orientation_affine(axcodes, spacing=(1.0, 2.0, 3.0))
    written(tmp_path / "scan.nii", body(background=-1000.0), affine)
    extent = extent_of(tmp_path / "scan.nii")
    places = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    expected = np.zeros(3)
    for axis, (voxels, mm) in enumerate(zip((10, 14, 12), (1.0, 2.0, 3.0))):
        expected[places[axcodes[axis]]] = voxels * mm
    np.testing.assert_allclose(extent.sides, expected)
    assert extent.whole


@pytest.mark.parametrize(
    "sides, whole",
    [
        ((10, 14, 12), True),
        ((20, 4, 4), True),  # a brain's stem that leaves the image
        ((20, 14, 12), False),
        (SHAPE, False),  # noise everywhere
    ],
)
def test_a_body_that_the_image_cuts_off_has_no_known_size(tmp_path, sides, whole):
    voxels = body(sides=sides)
    voxels[0, 0, 0] = 0.0
    written(tmp_path / "scan.nii", voxels)
    assert extent_of(tmp_path / "scan.nii").whole is whole


def test_negative_values_that_are_clipped_are_no_foreground_beside_them(tmp_path):
    voxels = body()
    voxels[0, 0, 0] = -0.5  # of an interpolation
    written(tmp_path / "scan.nii", voxels)
    assert not extent_of(tmp_path / "scan.nii").whole
    extent = extent_of(tmp_path / "scan.nii", "clip")
    assert extent.whole and [*extent.sides] == [10.0, 14.0, 12.0]


def test_the_target_s_extent_is_known_whatever_becomes_of_the_source(tmp_path, caplog):
    source = side_of(tmp_path / "s", [1.0] * 3)
    long, small = side_of(tmp_path / "t", [1.0] * 3, body(sides=(10, 20, 12))), side_of(tmp_path / "u", [0.5] * 3)
    caplog.set_level("INFO", logger="mapseg_components.commands.adapt")
    for target, match, foreground, own in (
        (long, True, [10.0, 14.0, 12.0], [10.0, 20.0, 12.0]),
        (small, False, [10.0, 14.0, 12.0], [5.0, 7.0, 6.0]),
        (small, True, [5.0, 7.0, 6.0], [5.0, 7.0, 6.0]),
    ):
        _, _, found = sized_source(source, [], target, tmp_path / "sized", match)
        assert (found["foreground_mm"], found["target_mm"]) == (foreground, own)
    dented = body()
    dented[0, 0, 0] = -0.5
    dented = side_of(tmp_path / "v", [0.5] * 3, dented)
    assert sized_source(source, [], dented, tmp_path / "sized", True)[2]["target_mm"] is None
    assert "the target's scans do not show a whole body" in caplog.text
    clipped = sized_source(source, [], dented, tmp_path / "sized", True, {"target_negative_values": "clip"})[2]
    assert clipped["target_mm"] == [5.0, 7.0, 6.0] and clipped["size"]["factor"] == 0.5


def test_a_scan_of_one_value_has_none(tmp_path):
    written(tmp_path / "scan.nii", np.ones(SHAPE, np.float32))
    assert not extent_of(tmp_path / "scan.nii").whole


def test_the_factor_is_the_ratio_of_medians(tmp_path):
    source, target = side_of(tmp_path / "s", [1.0, 1.1, 1.6]), side_of(tmp_path / "t", [0.7, 0.72, 0.74, 0.5])
    found = size_of(source, target)
    assert found["factor"] == pytest.approx(0.71 / 1.1, abs=1e-3)
    assert found["source_mm"] == [11.0, 15.4, 13.2]
    text = describe_size(found)
    assert "0.65 of their size" in text and "11 x 15 x 13" in text and "7 x 10 x 9 mm" in text


@pytest.mark.parametrize("factor", [1.0, 0.9, 1.1, 0.2, 5.0])
def test_no_factor_for_bodies_that_are_alike_or_another_part(tmp_path, factor):
    assert size_of(side_of(tmp_path / "s", [1.0] * 3), side_of(tmp_path / "t", [factor] * 3)) is None


def test_no_factor_where_the_form_differs_or_most_scans_of_a_side_show_a_part(tmp_path):
    source = side_of(tmp_path / "s", [1.0] * 5)
    long = side_of(tmp_path / "long", [0.5] * 5, body(sides=(10, 20, 12)))
    assert size_of(source, long) is None
    small, cut = (side_of(tmp_path / name, [0.5] * 5, body(sides=s)) for name, s in (("a", (10, 14, 12)), ("b", SHAPE)))
    assert size_of(source, small) is not None
    assert size_of(source, [*small[:4], cut[0]]) is not None  # four of five
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"\x1f\x8bno scan")
    unread = [*small[:4], {"image": str(damaged)}]
    assert size_of(source, unread)["factor"] == 0.5, "the check of all scans will name it"
    assert size_of(source, [*small[:3], *cut[:2]]) is None
    assert size_of(source, unread[4:]) is None
    assert size_of(cut, small) is None


def test_pictures_and_no_scans_have_no_size():
    assert median_extent(["a.png", "b.png"]) is None and median_extent([]) is None
    assert find_size(None, [1.0, 1.0, 1.0]) is None and find_size([1.0, 1.0, 1.0], None) is None


def test_of_many_scans_ten_are_read(tmp_path, monkeypatch):
    cases = side_of(tmp_path, np.linspace(1.0, 2.0, 31))
    read = []
    real = read_nifti
    monkeypatch.setattr("mapseg_components.scans.extents.read_nifti", lambda path: read.append(path) or real(path))
    assert median_extent([case["image"] for case in cases]) == [15.0, 21.0, 18.0]
    assert len(read) == 10 and read[0] == cases[0]["image"] and read[-1] == cases[-1]["image"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_copy_has_the_same_voxels_at_another_size_whatever_the_header_says(tmp_path, variant, ending):
    voxels = np.random.default_rng(0).integers(0, 900, (7, 9, 11)).astype(np.int16)
    path = scan_with(tmp_path / f"scan{ending}", voxels, orientation_affine("PIR"), variant)
    try:
        scan = read_nifti(path)
    except DataError:
        with pytest.raises(DataError):
            copy_scaled(path, tmp_path / "copy.nii.gz", 0.66)
        return
    copy_scaled(path, tmp_path / "copy.nii.gz", 0.66)
    found = read_nifti(tmp_path / "copy.nii.gz")
    assert found.digest == scan.digest and found.voxels.dtype == scan.voxels.dtype
    np.testing.assert_allclose(found.affine, np.diag([0.66, 0.66, 0.66, 1]) @ scan.affine, rtol=1e-5, atol=1e-4)
    content = path.read_bytes() if ending == ".nii" else gzip.decompress(path.read_bytes())
    assert len(gzip.decompress((tmp_path / "copy.nii.gz").read_bytes())) == len(content)


def test_big_endian_scans_are_copied_alike(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(body().astype(np.int16), np.diag([2.0, 3, 4, 1]), header), tmp_path / "scan.nii.gz")
    copy_scaled(tmp_path / "scan.nii.gz", tmp_path / "copy.nii.gz", 2.0)
    copy = nib.load(tmp_path / "copy.nii.gz")
    assert copy.header.endianness == ">" and copy.header.get_zooms() == (4.0, 6.0, 8.0)
    assert np.array_equal(np.asarray(copy.dataobj), body())


def test_a_copy_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch):
    written(tmp_path / "scan.nii.gz", body())
    written(tmp_path / "other.nii.gz", body() + 1)
    real = rewriting.read_nifti

    def other(path):
        return real(path if str(path).endswith("scan.nii.gz") else tmp_path / "other.nii.gz")

    monkeypatch.setattr(rewriting, "read_nifti", other)
    with pytest.raises(ResourceError, match="what was read back differs"):
        copy_scaled(tmp_path / "scan.nii.gz", tmp_path / "copy.nii.gz", 0.5)
    assert not (tmp_path / "copy.nii.gz").exists()


def test_cases_get_copies_of_all_their_files_and_keep_the_rest(tmp_path):
    cases = []
    for name in ("a/scan", "b/scan"):  # one name in two folders
        case = written(tmp_path / f"{name}.nii.gz", body())
        label = written(tmp_path / f"{name}_label.nii.gz", body().astype(np.uint8))
        cases.append({**case, "label": label["image"], "domain": name})
    found = sized_cases(cases, 0.5, tmp_path / "out")
    assert [case["domain"] for case in found] == ["a/scan", "b/scan"] and "mask" not in found[0]
    assert len({case[key] for case in found for key in ("image", "label")}) == 4
    for before, after in zip(cases, found):
        for key in ("image", "label"):
            original, copy = read_nifti(before[key]), read_nifti(after[key])
            assert original.digest == copy.digest and np.allclose(copy.affine[:3], original.affine[:3] * 0.5)
