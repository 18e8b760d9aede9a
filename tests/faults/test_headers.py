# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Headers that are wrong in part: a sound part is used and the rest named, or the scan is refused with a remedy."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImaged

from mapseg_components.commands.check import check
from mapseg_components.commands.evaluate import evaluate
from mapseg_components.commands.prepare import prepare
from mapseg_components.data import (
    Audit,
    AuditRecord,
    NiftiReader,
    check_training_data,
    class_weights,
    median_spacing,
    read_nifti,
    structure_sizes,
)
from mapseg_components.errors import DataError
from tests.conftest import make_scan, write_nifti
from tests.faults import damage
from tests.faults.common import LABELS, refused
from tests.headers import orientation_affine, scan_with, write_raw

AFFINE = orientation_affine("LPS")
EXTENSIONS = {
    "zeros": bytes(32),
    "text": b"x" * 32,
    "longer than the room": (4000).to_bytes(4, "little") + b"\6\0\0\0" + b"x" * 24,
    "of negative length": (-16 & 0xFFFFFFFF).to_bytes(4, "little") + bytes(28),
    "of length 3": (3).to_bytes(4, "little") + bytes(28),
    "sound": (32).to_bytes(4, "little") + b"\6\0\0\0" + b"a comment".ljust(24, b"\0"),
}


def image() -> nib.Nifti1Image:
    found = nib.Nifti1Image(damage.image(), AFFINE)
    found.set_sform(AFFINE, 2)
    found.set_qform(AFFINE, 1)
    return found


def load(path):
    return LoadImaged("image", NiftiReader, ensure_channel_first=True)({"image": str(path)})["image"]


def findings(path):
    audit = Audit()
    audit.scan(str(path), "keep", "negative_values")
    return [f"{finding.severity}: {finding.what}: {finding.remedy}" for finding in audit.findings]


# forms


def test_check_names_pixdim_and_sform(tmp_path):
    scan_with(tmp_path / "a.nii.gz", damage.image(), AFFINE, "sform only, pixdim 1")
    result = check(str(tmp_path), quiet=True)
    assert result.exit_code == 0
    text = "pixdim gives voxel sides of 1 x 1 x 1 mm, the sform 1.1 x 1.6 x 2.3 mm"
    assert [finding.what for finding in result.findings if finding.severity == "warning"] == [text]
    assert result.files[0]["spacing_mm"] == [1.1, 1.6, 2.3]


@pytest.mark.parametrize(
    "variant, words",
    [
        ("both, quaternion far from 1", "its affine (qform) has a quaternion of length 2.44949, expected 1: the sform"),
        ("both, quaternion far from 1, NaN", "its affine (qform) is not finite: the sform is used"),
        ("both, pixdim 0", "its qform has voxel sides of 0 x 0 x 0 mm (pixdim): the sform is used"),
        ("both, sform of zeros", "its sform is all zero: the qform is used; set sform_code to 0"),
    ],
)
def test_a_broken_form_beside_a_sound_one_is_a_warning(tmp_path, variant, words):
    path = scan_with(tmp_path / "a.nii.gz", damage.image(), AFFINE, variant)
    assert any(line.startswith(f"warning: {words}") for line in findings(path)), findings(path)
    np.testing.assert_allclose(load(path).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    "fields, words, remedy",
    [
        ({"sform_code": 0, "quatern_b": 0.9, "quatern_d": 0.9}, "quaternion of length 1.27", "repair the header"),
        ({"sform_code": 0, "quatern_b": np.nan}, "its affine (qform) is not finite", "repair the header"),
        ({"sform_code": 0, "pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, "voxel sides of 1 x 0 x 1 mm (pixdim)", "repair the"),
        ({"sform_code": 0, "pixdim": [1, 1, -2, 1, 1, 1, 1, 1]}, "voxel sides of 1 x -2 x 1 mm (pixdim)", "repair"),
        ({"qform_code": 0, "srow_x": 0, "srow_y": 0, "srow_z": 0}, "(sform) is not invertible", "repair the header"),
        ({"srow_x": 0}, "its affine (sform) is not invertible", "repair the header"),
        ({"srow_x": [np.inf, 0, 0, 0]}, "its affine (sform) is not finite", "repair the header"),
    ],
)
def test_without_a_sound_form_a_scan_is_refused_and_monai_does_not_read_it_instead(tmp_path, fields, words, remedy):
    path = write_raw(tmp_path / "a.nii.gz", image(), **fields)
    with refused(tmp_path, "a.nii.gz: ", words, remedy):
        read_nifti(path)
    with pytest.raises(DataError, match=r"a\.nii\.gz: "):
        LoadImaged("image", NiftiReader)({"image": str(path)})


def test_forms_far_apart_stay_refused_and_a_stale_spacing_is_named(tmp_path):
    sides = [1, 1.0, 1.6, 2.3, 1, 1, 1, 1]
    path = write_raw(tmp_path / "a.nii.gz", image(), pixdim=sides)
    warning, error = findings(path)
    assert warning.startswith("warning: pixdim gives voxel sides of 1 x 1.6 x 2.3 mm, the sform 1.1 x 1.6 x 2.3 mm")
    assert error.startswith("error: sform and qform differ by ") and "(tolerance 1 mm): remove the wrong one" in error


def test_a_form_without_a_code_is_not_used_but_named(tmp_path):
    path = write_raw(tmp_path / "a.nii.gz", image(), sform_code=0, qform_code=0)
    lines = findings(path)
    assert "warning: its sform is filled, but not in use (sform_code is 0): set sform_code to 1" in lines[0]
    assert lines[1].startswith("error: its header names no orientation")
    other = AFFINE.copy()
    other[:3, 3] += 50
    rows = dict(zip(("srow_x", "srow_y", "srow_z"), other))
    path = write_raw(tmp_path / "b.nii.gz", image(), sform_code=0, **rows)
    assert not findings(path)
    np.testing.assert_allclose(read_nifti(path).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("qfac, sign", [(0, 1), (1, 1), (-1, -1), (-3, -1), (7, 1)])
def test_qfac_is_read_by_its_sign(tmp_path, qfac, sign):
    affine = np.diag([1.0, 1.1, 1.2 * sign, 1.0])
    path = write_raw(
        tmp_path / "a.nii.gz", nib.Nifti1Image(damage.image(), affine), pixdim=[qfac, 1, 1.1, 1.2, 1, 1, 1, 1],
        sform_code=0, qform_code=1, quatern_b=0, quatern_c=0, quatern_d=0,
    )  # fmt: skip
    np.testing.assert_allclose(read_nifti(path).affine, affine, atol=1e-6)
    assert len(findings(path)) == (qfac not in (-1, 0, 1))


def test_a_record_keeps_what_a_header_says(tmp_path, caplog):
    scan = scan_with(tmp_path / "a.nii.gz", damage.image(), AFFINE, "sform only, pixdim 1")
    for number in range(2):
        audit = Audit(tmp_path / "audit.json")
        audit.scan(str(scan), "keep", "negative_values")
        audit.close()
        assert audit.record.reused == number and "pixdim gives voxel sides of 1 x 1 x 1 mm" in caplog.text
        caplog.clear()
    assert AuditRecord(tmp_path / "audit.json").facts(scan, False).remarks


# units


def in_unit(path, voxels, code, mm, affine=AFFINE):
    """A scan whose lengths are in a unit."""
    scaled = affine.copy()
    scaled[:3] /= mm
    found = nib.Nifti1Image(voxels, scaled)
    found.set_sform(scaled, 2)
    found.set_qform(scaled, 1)
    return write_raw(path, found, xyzt_units=code)


@pytest.mark.parametrize("code, mm", [(0, 1), (2, 1), (10, 1), (1, 1000), (9, 1000), (3, 0.001), (27, 0.001)])
def test_every_length_is_in_mm_whatever_the_unit(tmp_path, code, mm):
    """Also with a unit of time beside it (8 s, 16 ms, 24 us)."""
    voxels, labels = make_scan()
    scan, label = in_unit(tmp_path / "in" / "images" / "a.nii.gz", voxels, code, mm), tmp_path / "in/labels/a.nii.gz"
    in_unit(label, labels, code, mm)
    plain = write_nifti(tmp_path / "plain" / "a.nii.gz", labels, AFFINE)
    np.testing.assert_allclose(load(scan).affine, AFFINE, atol=1e-4)
    assert median_spacing([scan]) == median_spacing([plain]) == [1.1, 1.6, 2.3]
    (found,), (expected,) = (structure_sizes([{"label": str(path)}], LABELS) for path in (label, plain))
    assert found["second"] == pytest.approx(expected["second"], rel=1e-5)
    assert class_weights([{"label": str(label)}], LABELS, 0.5) == class_weights([{"label": plain}], LABELS, 0.5)
    prepare(tmp_path / "in", tmp_path / "out", spacing=2, bias_correction=False, quiet=True)
    for kind in ("images", "labels"):
        done = nib.load(tmp_path / "out" / kind / "a.nii.gz")
        assert done.shape == (11, 19, 32) and done.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(done.header.get_zooms(), 2)
    moved = np.roll(labels, 1, axis=2)
    in_unit(tmp_path / "truth" / "a.nii.gz", moved, code, mm)
    result = evaluate(str(tmp_path / "plain"), str(tmp_path / "truth"), labels='{"first": 1}', quiet=True)
    (row,) = [row for row in result.rows if row["structure"] == "first"]
    assert row["hd95_mm"] == pytest.approx(2.3, rel=1e-4)


@pytest.mark.parametrize(
    "code, unit, size", [(1, "metre", "2.2e+04 x 3.84e+04 x 6.44e+04"), (3, "micron", "0.022 x 0.0384 x 0.0644")]
)
def test_mm_that_a_header_calls_something_else_are_refused(tmp_path, code, unit, size):
    path = write_raw(tmp_path / "a.nii.gz", image(), xyzt_units=code)
    words = f"by its unit, {unit} (xyzt_units), its field of view is {size} mm"
    with refused(tmp_path, words, "set xyzt_units to 2 if its lengths are mm"):
        read_nifti(path)
    with pytest.raises(DataError, match=unit):
        load(path)
    np.testing.assert_allclose(read_nifti(write_raw(path, image(), xyzt_units=2)).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("code", [4, 5, 6, 7, 12, 255])
def test_a_unit_that_nobody_knows_is_taken_as_mm_with_a_warning(tmp_path, code):
    path = write_raw(tmp_path / "a.nii.gz", image(), xyzt_units=code)
    assert findings(path) == [
        f"warning: its spatial unit has the unknown code {code & 7} (xyzt_units): it is taken as mm"
    ]
    np.testing.assert_allclose(load(path).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("factor, odd", [(1e-3, True), (1, False), (1e3, True), (0.1, True), (40, False), (60, True)])
def test_a_size_that_no_body_has_is_a_warning_where_no_unit_is_named(tmp_path, factor, odd):
    affine = AFFINE.copy()
    affine[:3] *= factor
    path = write_nifti(tmp_path / "a.nii.gz", damage.image(), affine)
    assert nib.load(path).header["xyzt_units"] == 0
    assert [line.startswith("warning: its field of view is ") for line in findings(path)] == [True] * odd


def test_a_conversion_is_told_as_a_note(tmp_path):
    in_unit(tmp_path / "a.nii.gz", damage.image(), 1, 1000)
    notes = [str(finding) for finding in check(str(tmp_path), quiet=True).findings if finding.severity == "note"]
    assert any("its lengths are in metre (xyzt_units 1): they are converted to mm" in line for line in notes)


# extensions and axes


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_changes_nothing_whatever_is_in_it(dataset, name):
    """The audit, training's loader, and what reads a header alone agree with the file without it."""
    files = (dataset / "source_training" / "0.nii.gz", dataset / "source_training" / "0_label.nii.gz")
    for path in files:
        plain = nib.load(path)
        voxels = np.array(plain.dataobj)
        write_raw(path, nib.Nifti1Image(voxels, plain.affine), EXTENSIONS[name])
        np.testing.assert_array_equal(load(path)[0].numpy(), voxels)
        np.testing.assert_array_equal(load(path).affine, plain.affine)
    check_training_data(dataset / "datalist.json", LABELS)
    assert median_spacing(files) == [1.0, 1.1, 1.2]


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_further_axes_of_length_1_are_left_out_of_scans_and_label_maps(dataset, axes):
    for path in (dataset / "source_training" / "0.nii.gz", dataset / "source_training" / "0_label.nii.gz"):
        plain = nib.load(path)
        voxels = np.array(plain.dataobj)
        write_raw(path, nib.Nifti1Image(voxels.reshape(*plain.shape, *[1] * axes), plain.affine))
        assert nib.load(path).ndim == 3 + axes
        found = load(path)
        assert found.shape == (1, *damage.SHAPE) and found.meta["spatial_shape"].tolist() == list(damage.SHAPE)
        np.testing.assert_array_equal(found[0].numpy(), voxels)
    check_training_data(dataset / "datalist.json", LABELS)


def test_an_axis_of_length_0_after_the_third_is_not_in_use(tmp_path):
    path = write_raw(tmp_path / "a.nii.gz", image(), dim=[5, *damage.SHAPE, 0, 0, 0, 0])
    np.testing.assert_array_equal(load(path)[0].numpy(), damage.image())


@pytest.mark.parametrize(
    "shape, words",
    [
        ((5,), "split a series of 5 volumes into one file per volume"),
        ((5, 1, 1), "split a series of 5 volumes into one file per volume"),
        ((1, 3), "it is a vector image with 3 values for each voxel (colours, displacements): name the scan of grey"),
        ((4, 3), "it is a vector image with 4 x 3 values for each voxel"),
        ((1, 1, 2), "it is a vector image with 2 values for each voxel"),
    ],
)
def test_more_than_one_value_for_a_voxel_is_refused_by_its_kind(tmp_path, shape, words):
    voxels = np.zeros((4, 5, 6, *shape), np.int16)
    path = write_nifti(tmp_path / "a.nii.gz", voxels)
    with refused(tmp_path, f"a.nii.gz: shape (4, 5, 6, {', '.join(map(str, shape))}), expected 3D", words):
        read_nifti(path)


def test_nibabel_has_no_word_on_headers_that_were_judged(tmp_path, capfd):
    """Its repairs of pixdim and codes are logged by itself, and concern nobody."""
    logging.getLogger("nibabel.global").setLevel(logging.DEBUG)
    read_nifti(scan_with(tmp_path / "a.nii.gz", damage.image(), AFFINE, "sform only, pixdim 0"))
    assert capfd.readouterr().err == ""
