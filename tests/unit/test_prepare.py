# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Preparing scans: what is done is written down, what is done is not done twice, and labels find the way back."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from pydicom.uid import PositronEmissionTomographyImageStorage

from mapseg_components.commands.prepare import prepare
from mapseg_components.commands.restore import restore
from mapseg_components.data.sources import find_sources
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.scans.sidecars import digest_of, read_sidecar
from mapseg_components.transforms.hounsfield import ct_scale
from mapseg_components.transforms.n4 import bias_field
from mapseg_components.transforms.resampling import canonical_grid, resample, spaced_grid, spacing_of, to_canonical
from tests import dicom
from tests.conftest import make_scan, write_nifti
from tests.faults.common import tree

PLAIN = {"bias_correction": False}  # ITK takes ten seconds to load N4
TURNS = [a + b + c for a in "RL" for b in "AP" for c in "SI"]
CODES = [code for t in TURNS for code in (t, t[1] + t[0] + t[2], t[2] + t[1] + t[0], t[1] + t[2] + t[0])]


def oblique(spacing, degrees=17.0, codes="RAS"):
    """Affine of axes that point to ``codes`` before they are rotated about the third axis of the world."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(codes))):
        affine[:3, axis] = turn[:, int(world)] * sign * spacing[axis]
    affine[:, 3] = 13.1, -7.7, 5.3, 1
    return affine


def ellipsoids(shape):
    """Three labels, each a body of some voxels' radius, on a grid of any three sides."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"))
    label = np.zeros(shape, np.uint8)
    for value, (centre, radius) in enumerate([((0, 0, 0), 0.9), ((0.2, -0.1, 0.1), 0.55), ((-0.4, 0.3, 0), 0.3)], 1):
        label[((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2] = value
    return label


def write_pair(folder, label, affine, name="one"):
    """Scan and label map in ``images`` and ``labels``."""
    image = (100 + 30 * label.astype(np.float32)) * (label > 0)
    write_nifti(folder / "images" / f"{name}.nii.gz", image, affine)
    return write_nifti(folder / "labels" / f"{name}.nii.gz", label, affine)


def dice(one, two, value):
    return 2 * ((one == value) & (two == value)).sum() / ((one == value).sum() + (two == value).sum())


# ---- grids


@pytest.mark.parametrize("codes", sorted(set(CODES)))
def test_canonical_orientation_moves_voxels_and_changes_none(codes):
    voxels = np.random.default_rng(0).integers(0, 9, (3, 4, 5)).astype(np.int16)
    affine = oblique((0.7, 1.1, 2.5), codes=codes)
    turned, grid = to_canonical(voxels, affine)
    assert "".join(nib.aff2axcodes(grid)) == "RAS"
    assert canonical_grid(voxels.shape, affine)[0] == turned.shape
    for index in np.ndindex(voxels.shape):  # a voxel stands where it stood
        place = np.linalg.solve(grid, affine @ [*index, 1])[:3]
        assert turned[tuple(np.rint(place).astype(int))] == voxels[index] and np.allclose(place, np.rint(place))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.3, 2.9, 7.0), (None, 2.0, None), (500.0, 1.0, 1.0)])
def test_another_spacing_keeps_centre_directions_and_field_of_view(spacing):
    shape, affine = (20, 31, 12), oblique((0.7, 1.3, 5.0), codes="PIR")
    sides, grid = spaced_grid(shape, affine, spacing)
    centre, new_centre = (a @ [*(np.array(s) - 1) / 2, 1] for a, s in ((affine, shape), (grid, sides)))
    np.testing.assert_allclose(new_centre, centre, atol=1e-9)
    np.testing.assert_allclose(grid[:3, :3] / spacing_of(grid), affine[:3, :3] / spacing_of(affine), atol=1e-12)
    for axis, wanted in enumerate(spacing):
        if wanted is None:
            assert sides[axis] == shape[axis] and spacing_of(grid)[axis] == pytest.approx(spacing_of(affine)[axis])
        else:
            assert spacing_of(grid)[axis] == pytest.approx(wanted)
            extent = shape[axis] * spacing_of(affine)[axis]
            assert sides[axis] == 1 or abs(sides[axis] * wanted - extent) <= wanted / 2 + 1e-9


def test_a_spacing_that_differs_by_rounding_only_is_kept():
    affine = oblique((0.9999, 1.0, 1.0))
    sides, grid = spaced_grid((5, 6, 7), affine, (1.0, 1.0, 1.0))
    assert sides == (5, 6, 7) and np.array_equal(grid, affine)


def test_linear_resampling_keeps_a_linear_ramp_and_the_border_beyond():
    shape, affine = (9, 10, 11), oblique((1.0, 1.5, 2.0), codes="LPS")
    index = np.stack(np.meshgrid(*map(np.arange, shape), [1], indexing="ij"))[..., 0]
    slope = np.array([0.3, -0.7, 1.1, 20.0])
    ramp = np.einsum("i,ixyz->xyz", slope @ affine, index)
    sides, grid = spaced_grid(shape, affine, (0.8, 2.0, 3.1))
    moved = resample(ramp, affine, sides, grid, "linear")
    new_index = np.stack(np.meshgrid(*map(np.arange, sides), [1], indexing="ij"))[..., 0]
    expected = np.einsum("i,ixyz->xyz", slope @ grid, new_index)
    inside = (slice(1, -1),) * 3
    np.testing.assert_allclose(moved[inside], expected[inside], atol=1e-4)
    assert moved.min() >= ramp.min() - 1e-4 and moved.max() <= ramp.max() + 1e-4


# ---- there and back


# Voxels larger than the native ones lose borders; the floors stand just below what the smallest body measures.
@pytest.mark.parametrize(
    ("shape", "affine", "spacing", "floor"),
    [
        ((24, 30, 36), oblique((1.0, 1.0, 1.0), 0.0, "LPS"), None, 1.0),
        ((24, 30, 36), oblique((1.0, 1.1, 0.9), 17.0, "SAL"), None, 1.0),
        ((24, 30, 36), oblique((1.0, 1.1, 0.9), 17.0, "PIR"), 0.8, 1.0),
        ((40, 44, 12), oblique((0.7, 0.7, 5.0), 17.0, "LAS"), 1.0, 0.92),
        ((40, 44, 12), oblique((0.7, 0.7, 5.0), 31.0, "RSA"), (0.7, 1.0, 0.7), 1.0),
        ((24, 30, 36), oblique((1.0, 1.1, 0.9), 40.0, "RAS"), 1.5, 0.83),
    ],
    ids=["flipped", "oblique", "oblique finer", "thick slices", "thick, oblique", "coarser"],
)
def test_a_restored_label_map_lies_where_it_lay(tmp_path, shape, affine, spacing, floor):
    truth = write_pair(tmp_path / "in", ellipsoids(shape), affine)
    result = prepare(tmp_path / "in", tmp_path / "out", spacing=spacing, **PLAIN)
    assert result.exit_code == 0
    label, sidecar = tmp_path / "out/labels/one.nii.gz", tmp_path / "out/images/one.json"
    image = nib.load(tmp_path / "out/images/one.nii.gz")
    assert "".join(nib.aff2axcodes(image.affine)) == "RAS"
    assert np.array_equal(image.affine, nib.load(label).affine) and image.shape == nib.load(label).shape
    before, after = nib.load(truth), nib.load(restore(label, sidecar, tmp_path / "back.nii.gz"))
    assert after.shape == before.shape and np.array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == np.uint8
    found = [dice(np.asarray(before.dataobj), np.asarray(after.dataobj), value) for value in (1, 2, 3)]
    assert min(found) >= floor, found


def test_the_sidecar_says_what_was_done_in_order(tmp_path):
    image, label = make_scan((20, 24, 28))
    affine = oblique((1.0, 1.1, 2.0), codes="LPS")
    write_nifti(tmp_path / "in/images/one.nii.gz", np.rint(image * 10).astype(np.int32), affine)
    write_nifti(tmp_path / "in/labels/one.nii.gz", label, affine)
    prepare(tmp_path / "in", tmp_path / "out", spacing=(1.0, None, 4.0), **PLAIN)
    sidecar = read_sidecar(tmp_path / "out/images/one.json")
    assert [step["step"] for step in sidecar.steps] == ["convert", "reorient", "resample"]
    convert, reorient, resampled = sidecar.steps
    assert (convert["from"], convert["largest_rounding"]) == ("int32", 0.0)
    assert (reorient["from"], reorient["to"]) == ("LPS", "RAS")
    np.testing.assert_allclose(resampled["to_spacing_mm"], [1.0, 1.1, 4.0], rtol=1e-5)
    assert (resampled["image"], resampled["label"]) == ("linear", "nearest")
    assert sidecar.native.shape == (20, 24, 28)
    assert np.array_equal(np.array(sidecar.native.affine, np.float32), affine.astype(np.float32))
    assert sidecar.source["file"] == "one.nii.gz" and len(sidecar.source["sha256"]) == 64
    assert {"mapseg", "monai", "torch", "itk"} <= set(sidecar.versions)
    assert sidecar.settings["spacing"] == [1.0, None, 4.0]


def test_rounding_to_float32_and_lost_structures_are_written_down(tmp_path):
    voxels = np.zeros((12, 13, 14), np.float64)
    voxels[2:9, 2:9, 2:9] = 16777217.0  # the first whole number that float32 has not
    label = np.zeros((12, 13, 14), np.uint8)
    label[2:9, 2:9, 2:9], label[0, 0, 0] = 1, 5
    write_nifti(tmp_path / "in/images/one.nii.gz", voxels)
    write_nifti(tmp_path / "in/labels/one.nii.gz", label)
    result = prepare(tmp_path / "in", tmp_path / "out", spacing=3.0, **PLAIN)
    steps = read_sidecar(tmp_path / "out/images/one.json").steps
    assert steps[0]["largest_rounding"] == 1.0
    assert steps[-1]["lost_label_values"] == [5]
    assert "label values [5]" in result.outcomes[0].notes[0]


def test_an_assumed_orientation_is_a_step(tmp_path):
    header = nib.Nifti1Image(make_scan()[0], None)
    header.header["pixdim"][1:4] = 1, 1.5, 2
    (tmp_path / "in").mkdir()
    nib.save(header, tmp_path / "in/one.nii.gz")
    prepare(tmp_path / "in", tmp_path / "out", assume_orientation="LPS", **PLAIN)
    sidecar = read_sidecar(tmp_path / "out/one.json")
    assert sidecar.steps[0] == {"step": "assume orientation", "orientation": "LPS"}
    assert "".join(nib.aff2axcodes(np.array(sidecar.native.affine))) == "LPS"


# ---- intensities


def shaded(shape=(32, 40, 24)):
    """Two tissues in a ball, background 0, and a smooth field."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    tissue = np.where((grid[0] * 4).astype(int) % 2 == 0, 100, 160) * inside
    field = np.exp(0.4 * grid[0] + 0.3 * grid[1] ** 2 - 0.2 * grid[2])
    noise = 2 * np.random.default_rng(0).standard_normal(shape) * inside
    return (tissue * field + noise).clip(0).astype(np.float32), field, inside


def test_n4_takes_a_known_field_away_and_twice_the_same(tmp_path):
    scan, field, inside = shaded()
    affine = np.diag([1.0, 1.25, 3.0, 1.0])  # as float32 the same numbers
    settings = {"mask": "foreground", "shrink": 2, "iterations": (30, 30, 30), "convergence": 0.001}
    found = bias_field(scan, affine, **settings)
    assert found.dtype == np.float32 and found.shape == scan.shape
    before, after = (np.log(ratio[inside]).std() for ratio in (field, found / field))
    assert before > 0.18 and after < 0.02, (before, after)

    write_nifti(tmp_path / "in/one.nii.gz", scan, affine)
    names = {"bias_mask": "foreground", "bias_shrink": 2, "bias_iterations": (30, 30, 30)}
    assert prepare(tmp_path / "in", tmp_path / "out", **names).exit_code == 0
    result = np.asarray(nib.load(tmp_path / "out/one.nii.gz").dataobj)
    assert np.array_equal(result, scan / found)  # a second time the same; RAS as it came, so voxel by voxel
    assert not result[scan == 0].any()
    step = read_sidecar(tmp_path / "out/one.json").steps[-1]
    assert step["divided_by"] == [float(found.min()), float(found.max())] and step["shrink"] == 2


def body(offset=0.0, seed=0):
    """A CT of a body in air: fat, muscle, lung, bone."""
    generator = np.random.default_rng(seed)
    voxels = np.full((16, 20, 24), -1000.0)
    voxels[2:14, 2:18, 2:22] = -100
    voxels[4:12, 4:16, 4:20] = 50
    voxels[5:8, 5:9, 5:12] = -800
    voxels[9:11, 9:12, 5:19] = 700
    return (voxels + 15 * generator.standard_normal(voxels.shape) + offset).astype(np.float32)


def test_ct_scales_are_recognised_and_others_are_not():
    assert ct_scale(body()) == "hu"
    assert ct_scale(body(1024.0).clip(min=0)) == "shifted"
    assert ct_scale(body()[4:12, 9:16, 12:20]) is None  # cropped within an organ
    assert ct_scale(body(1024.0) * 0.1) is None
    assert ct_scale(shaded()[0]) is None


@pytest.mark.parametrize(
    ("offset", "ct", "added", "word"),
    [
        (0.0, "keep", 0.0, "Hounsfield units"),
        (0.0, "hu", 0.0, "Hounsfield units"),
        (1024.0, "keep", 0.0, "Hounsfield units + 1024"),
        (1024.0, "hu", -1024.0, "Hounsfield units + 1024"),
    ],
)
def test_ct_values_are_kept_or_brought_to_hu_and_never_silently(tmp_path, offset, ct, added, word):
    scan = body(offset)
    write_nifti(tmp_path / "in/one.nii.gz", scan, np.eye(4))
    result = prepare(tmp_path / "in", tmp_path / "out", ct=ct)  # no N4 for CT
    step = read_sidecar(tmp_path / "out/one.json").steps[-1]
    assert (step["policy"], step["found"], step["added"]) == (ct, word, added)
    found = np.asarray(nib.load(tmp_path / "out/one.nii.gz").dataobj)
    assert np.array_equal(found, scan + np.float32(added))
    assert bool(result.outcomes[0].notes) == (offset > 0)


def test_what_looks_like_ct_and_is_not_declared_is_named(tmp_path):
    write_nifti(tmp_path / "in/one.nii.gz", body(1024.0), np.eye(4))
    notes = prepare(tmp_path / "in", tmp_path / "out", **PLAIN).outcomes[0].notes
    assert len(notes) == 1 and "looks like CT in Hounsfield units + 1024" in notes[0]


# ---- DICOM

OBLIQUE_AXES = ((0.8, 0.6, 0.0), (-0.48, 0.64, -0.6))


def stored(shape=(6, 7, 5), seed=0):
    return np.random.default_rng(seed).integers(-1000, 2000, shape)


def test_the_checksum_of_several_files_is_that_of_their_contents_whatever_their_order_and_names(tmp_path):
    files = [tmp_path / name for name in ("b", "a", "c")]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    found = {digest_of(order) for order in itertools.permutations(files)}
    files[0].rename(tmp_path / "z")
    assert {digest_of([tmp_path / "z", *files[1:]])} == found and len(found) == 1
    assert digest_of(files[1:]) not in found and digest_of(files[1:2]) == hashlib.sha256(b"\1").hexdigest()


@pytest.mark.parametrize("axes", [dicom.AXES, OBLIQUE_AXES, ((0, 1, 0), (0, 0, -1))], ids=["axial", "oblique", "side"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_dicom_series_keeps_each_voxel_at_its_place(tmp_path, axes, modality):
    values, spacing, step = stored(), (0.7, 0.9), 2.5
    dicom.write_series(tmp_path / "in/head", values, axes=axes, modality=modality, slope=2, intercept=-1024)
    result = prepare(tmp_path / "in", tmp_path / "out", **PLAIN)
    assert [outcome.name for outcome in result.outcomes] == ["head_3"] and result.exit_code == 0
    found = nib.load(tmp_path / "out/head_3.nii.gz")
    voxels = np.asarray(found.dataobj)
    normal = np.cross(*axes)
    for x, y, z in np.ndindex(values.shape):  # position by the standard, PS3.3 C.7.6.2.1.1
        place = np.array([10.0, 20.0, -30.0]) + x * spacing[0] * np.array(axes[0]) + y * spacing[1] * np.array(axes[1])
        place = (place + z * step * normal) * [-1, -1, 1]  # LPS to RAS
        index = np.linalg.solve(found.affine, [*place, 1])[:3]
        assert np.allclose(index, np.rint(index), atol=1e-3)
        assert voxels[tuple(np.rint(index).astype(int))] == values[x, y, z] * 2 - 1024
    sidecar = read_sidecar(tmp_path / "out/head_3.json")
    assert sidecar.source["kind"] == "dicom" and sidecar.source["slices"] == 5
    assert [step["step"] for step in sidecar.steps] == ["reorient", *(["ct intensities"] if modality == "CT" else [])]


def test_each_slice_has_its_own_rescaling(tmp_path, monkeypatch):
    monkeypatch.setitem(dicom.STORAGE, "PT", PositronEmissionTomographyImageStorage)
    slopes = [1, 2, 0.5, 0.25, 3]
    dicom.write_series(tmp_path / "in/pet", stored(), modality="PT", slope=slopes)
    prepare(tmp_path / "in", tmp_path / "out", **PLAIN)
    found = np.asarray(nib.load(tmp_path / "out/pet_3.nii.gz").dataobj)
    assert np.array_equal(found, (stored() * np.array(slopes))[::-1, ::-1])


def test_series_of_one_folder_become_scans_and_one_can_be_chosen(tmp_path):
    folder = tmp_path / "in" / "a b^c"
    first = dicom.write_series(folder, stored(), number=2, uid="1.2.3.4")
    dicom.write_series(folder, stored()[..., :4], number=7, uid="1.2.3.5", first_file=50)
    dicom.write_series(folder, stored()[..., :3], number=7, uid="1.2.3.6", first_file=90)
    names = [source.name for source in find_sources(tmp_path / "in")[0]]
    assert names == ["a_b_c_2", "a_b_c_7", "a_b_c_7_2"]
    assert [source.name for source in find_sources(tmp_path / "in", series=first)[0]] == ["a_b_c_2"]
    with pytest.raises(ConfigError, match=r"1\.2\.3\.4 \(a_b_c_2, CT, 5 files\); 1\.2\.3\.5"):
        find_sources(tmp_path / "in", series="9.9")
    assert [source.name for source in find_sources(folder)[0]] == names


def test_a_series_in_two_folders_is_no_scan(tmp_path):
    path = tmp_path / "in" / "one"
    dicom.write_series(path, stored(), modality="MR")
    dicom.write_series(tmp_path / "in" / "other", stored(), modality="MR", number=9, uid="1.2.9")
    files = sorted(path.iterdir())
    (tmp_path / "in" / "two").mkdir()
    for file in files[: len(files) // 2]:
        file.rename(tmp_path / "in" / "two" / file.name)
    found = prepare(tmp_path / "in", tmp_path / "out", bias_correction=False, quiet=True)
    assert found.exit_code == 3 and "files of one series, number 3, lie in 2 folders" in str(found)
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["other_9.nii.gz"]


def test_nothing_about_the_person_leaves_the_dicom_header(tmp_path, caplog):
    uid = dicom.write_series(tmp_path / "in/head", stored(), step=3.0)
    dicom.write_series(tmp_path / "in/gap", stored(), positions=[(0, 0, z) for z in (0, 1, 2, 4, 5)])
    with caplog.at_level("DEBUG"):
        result = prepare(tmp_path / "in", tmp_path / "out", **PLAIN)
    assert sorted(outcome.status for outcome in result.outcomes) == ["done", "failed"]
    said = [caplog.text, str(result), *map(str, result.outcomes)]
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        said += [path.name, (gzip.decompress(content) if path.name.endswith(".gz") else content).decode("latin-1")]
    for private in ("Quxley", "Zeb", "778899", "1947", uid):
        assert not any(private in text for text in said), private


def test_nifti_header_texts_do_not_travel(tmp_path):
    path = write_nifti(tmp_path / "in/one.nii.gz", make_scan()[0], np.eye(4))
    image = nib.load(path)
    image.header["descrip"], image.header["aux_file"] = b"Quxley", b"Zeb"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
    assert b"Quxley" in gzip.decompress((tmp_path / "in/one.nii.gz").read_bytes())
    prepare(tmp_path / "in", tmp_path / "out", **PLAIN)
    assert b"Quxley" not in gzip.decompress((tmp_path / "out/one.nii.gz").read_bytes())


# ---- which scans, and where results go


def test_folders_below_the_input_keep_their_places(tmp_path):
    image, label = make_scan()
    for name in ("source/images/a", "source/labels/a", "target/images/b", "c", "sub-01/anat/d_T1w"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", label if "labels" in name else image)
    write_nifti(tmp_path / "in/.hidden/e.nii.gz", image)
    out = tmp_path / "in/prepared"  # within the input, and not taken for a part of it
    names = ["c", "source/images/a", "sub-01/anat/d_T1w", "target/images/b"]
    for status in ("done", "skipped"):
        result = prepare(tmp_path / "in", out, **PLAIN)
        assert [(o.name, o.status) for o in result.outcomes] == [(name, status) for name in names]
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.is_file() and path.name[0] != "."}
    assert written == {f"{n}{e}" for n in names for e in (".nii.gz", ".json")} | {"source/labels/a.nii.gz"}
    assert "label" in json.loads((out / "source/images/a.json").read_text())["results"]


def test_labels_of_another_folder_make_images_and_labels(tmp_path):
    image, label = make_scan()
    for folder, name, voxels in (("tr", "a", image), ("tr", "b", image), ("lab", "a", label)):
        write_nifti(tmp_path / folder / f"{name}.nii.gz", voxels)
    prepare(tmp_path / "tr", tmp_path / "out", labels=tmp_path / "lab", **PLAIN)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.gz")}
    assert written == {"images/a.nii.gz", "images/b.nii.gz", "labels/a.nii.gz"}


def test_one_file_is_an_input(tmp_path):
    path = write_nifti(tmp_path / "in/Größe 1.nii", make_scan()[0])
    assert prepare(path, tmp_path / "out", **PLAIN).outcomes[0].image == tmp_path / "out/Größe 1.nii.gz"


# ---- again


@pytest.fixture
def done(tmp_path):
    """Two prepared scans; returns the call that prepared them."""
    for number, name in enumerate("ab"):
        image, label = make_scan(seed=number)
        write_nifti(tmp_path / f"in/images/{name}.nii.gz", image)
        write_nifti(tmp_path / f"in/labels/{name}.nii.gz", label)

    def again(**changes):
        return prepare(tmp_path / "in", tmp_path / "out", **{**PLAIN, "spacing": 2.0, **changes})

    assert again().exit_code == 0
    return again


def statuses(result):
    return [outcome.status for outcome in result.outcomes]


def test_what_is_done_is_skipped_untouched(tmp_path, done):
    before = tree(tmp_path / "out")
    assert statuses(done()) == ["skipped", "skipped"] and tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spacing": 3}, "spacing [2.0, 2.0, 2.0], not [3.0, 3.0, 3.0]"),
        ({"ct": "keep", "bias_correction": None}, "bias_correction False, not None, ct None, not 'keep'"),
    ],
)
def test_other_settings_are_refused_by_name_or_overwrite(tmp_path, done, changes, words):
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        done(**changes)
    assert words in str(caught.value) and "set overwrite to true" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2 and tree(tmp_path / "out") == before
    assert statuses(done(**changes, overwrite=True)) == ["done", "done"]
    assert statuses(done(**changes)) == ["skipped", "skipped"]


@pytest.mark.parametrize("which", ["images", "labels"])
def test_a_changed_source_is_refused_or_done_again_alone(tmp_path, done, which):
    write_nifti(tmp_path / "in" / which / "b.nii.gz", make_scan(seed=5)[which == "labels"] // 2)
    with pytest.raises(ConfigError, match=r"b\.nii\.gz: was prepared from a file with other content"):
        done()
    assert statuses(done(overwrite=True)) == ["skipped", "done"]


def test_a_changed_result_is_named_and_a_missing_one_is_made(tmp_path, done):
    (tmp_path / "out/labels/a.nii.gz").unlink()
    assert statuses(done()) == ["done", "skipped"]
    shutil.copy(tmp_path / "out/images/a.nii.gz", tmp_path / "out/images/b.nii.gz")
    with pytest.raises(ConfigError, match=r"was changed since: b\.nii\.gz"):
        done()


def test_a_run_killed_before_results_got_their_names_goes_on(tmp_path, done, monkeypatch):
    shutil.rmtree(tmp_path / "out")

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replace = os.replace
        patch.setattr(
            "mapseg_components.files.os.replace",
            lambda source, target: (
                killed(source, target) if str(target).endswith("a.nii.gz") else replace(source, target)
            ),
        )
        done()
    assert (tmp_path / "out/images/a.json").is_file() and not list((tmp_path / "out").rglob("*.gz"))
    assert statuses(done()) == ["done", "done"]


def test_several_processes_write_the_same_bytes(tmp_path, done, warm_processes):
    result = prepare(tmp_path / "in", tmp_path / "two", spacing=2.0, workers=2, **PLAIN)
    assert statuses(result) == ["done", "done"]
    for path in (tmp_path / "out").rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "out")).read_bytes()


def test_a_label_map_goes_back_by_its_own_sidecar_only(tmp_path, done):
    write_nifti(tmp_path / "in/images/c.nii.gz", make_scan((22, 24, 28))[0])
    write_nifti(
        tmp_path / "in/images/d.nii.gz",
        make_scan()[0],
        np.array([[1.0, 0, 0, 3], [0, 1.1, 0, 0], [0, 0, 1.2, 0], [0, 0, 0, 1]]),
    )
    done()
    label = tmp_path / "out/labels/a.nii.gz"
    for other, words in (("c", "shape"), ("d", "a corner")):
        with pytest.raises(DataError, match=f"{words}.*name the sidecar of its scan"):
            restore(label, tmp_path / f"out/images/{other}.json", tmp_path / "back.nii.gz")
    assert not (tmp_path / "back.nii.gz").exists()
    restore(label, tmp_path / "out/images/a.json", tmp_path / "back.nii.gz")
    with pytest.raises(ConfigError, match="exists: set overwrite"):
        restore(label, tmp_path / "out/images/a.json", tmp_path / "back.nii.gz")
    with pytest.raises(ConfigError, match=r"ends with \.nii\.gz or \.nii"):
        restore(label, tmp_path / "out/images/a.json", tmp_path / "back.mgz")
