# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of DICOM series: no slice leaves its line in any direction, and values mean what the standard says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydicom import dcmread

from mapseg_components.commands.prepare import prepare
from mapseg_components.errors import DataError
from mapseg_components.scans.dicom import list_series, read_series
from tests import dicom

VOXELS = np.random.default_rng(5).integers(1, 900, (6, 7, 9))
SPACING, STEP = (0.7, 0.9), 2.5
TURN = np.deg2rad(23)
OBLIQUE = ((np.cos(TURN), np.sin(TURN), 0.0), (0.0, 0.0, -1.0))
FRAMES = {"axial": dicom.AXES, "oblique": OBLIQUE}
COUNT = VOXELS.shape[2]


def positions_of(axes, moved=None, by=0.0, direction=0):
    """Regular positions, one of them moved along a row, a column or the normal by a share of the voxel's side."""
    normal = np.cross(*axes)
    positions = [np.array([10.0, 20.0, -30.0]) + n * STEP * normal for n in range(COUNT)]
    if moved is not None:
        positions[moved] = positions[moved] + by * (*SPACING, STEP)[direction] * np.array([*axes, normal][direction])
    return positions


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("moved", "direction"), itertools.product((0, 4, COUNT - 1), range(3)))
def test_a_slice_that_leaves_its_line_is_named_whichever_way_it_moved(tmp_path, frame, moved, direction):
    axes = FRAMES[frame]
    for by, refused in ((0.04, False), (-0.04, False), (0.4, True), (-0.4, True), (40.0, True)):
        if direction == 2 and by == 40.0:  # that is a gap, or another order
            continue
        folder = tmp_path / f"{by}"
        positions = positions_of(axes, moved, by, direction)
        dicom.write_series(folder, VOXELS, positions=positions, axes=axes, spacing=SPACING, modality="MR")
        [series] = list_series(folder)
        if not refused:
            np.testing.assert_array_equal(read_series(series).voxels, VOXELS)
            continue
        with pytest.raises(DataError) as caught:
            read_series(series)
        if direction < 2:
            distance = abs(by) * SPACING[direction]
            assert f"slice {moved + 1} of {COUNT}" in str(caught.value) and f" {distance:.2f} mm" in str(caught.value)
        else:
            assert "mm apart, but not between" in str(caught.value)


def test_distances_that_drift_are_refused_though_each_is_near_the_next(tmp_path):
    heights = np.cumsum([0, *([1.0] * 10), *([1.04] * 10)])
    voxels = np.random.default_rng(6).integers(1, 900, (6, 7, len(heights)))
    dicom.write_series(tmp_path, voxels, positions=[np.array([0, 0, h]) for h in heights], spacing=SPACING)
    with pytest.raises(DataError, match="out of line with the others"):
        read_series(list_series(tmp_path)[0])


def test_positions_rounded_to_a_hundredth_of_a_millimetre_are_in_line(tmp_path):
    voxels = np.random.default_rng(6).integers(1, 900, (6, 7, 60))
    normal = np.cross(*OBLIQUE)
    positions = [np.round(np.array([1.234, 2.345, -3.456]) + n * 1.2345 * normal, 2) for n in range(60)]
    dicom.write_series(tmp_path, voxels, positions=positions, axes=OBLIQUE, spacing=SPACING)
    np.testing.assert_array_equal(read_series(list_series(tmp_path)[0]).voxels, voxels)


def test_one_slice_of_another_orientation_is_refused(tmp_path):
    small = np.deg2rad(0.5)
    turned = ((np.cos(small), np.sin(small), 0.0), (-np.sin(small), np.cos(small), 0.0))
    uid = dicom.write_series(tmp_path, VOXELS[..., :4], modality="MR")
    where = [np.array([10.0, 20.0, -30.0 + 4 * STEP])]
    dicom.write_series(tmp_path, VOXELS[..., :1], positions=where, axes=turned, uid=uid, first_file=50, modality="MR")
    with pytest.raises(DataError, match="differ in orientation"):
        read_series(list_series(tmp_path)[0])


@pytest.mark.parametrize("grey", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("padding", [None, (7, None), (3, 9), (2000, None)])
def test_values_are_those_that_the_standard_gives(tmp_path, grey, modality, padding):
    """Against pydicom's stored values: scaled slice by slice, padding taken out, and dark where the standard has it."""
    chance = np.random.default_rng([len(grey + modality), *(padding or ())[:1]])
    stored = chance.integers(10, 1500, VOXELS.shape)
    slopes = chance.choice([1.0, 2.0, 0.5, 1.2345, 0.0123, 3.0], COUNT)
    intercept = {"CT": -1024.0, "MR": 17.5}[modality]
    bits, signed = [(12, 0), (16, 0), (16, 1)][chance.integers(3)]
    tags = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": signed}
    if padding is not None:
        stored[1:3, 2:4, ::2] = padding[0]
        stored[0, 0, :] = padding[1] or padding[0]
        tags |= {"PixelPaddingValue": padding[0]} | ({"PixelPaddingRangeLimit": padding[1]} if padding[1] else {})
    dicom.write_series(
        tmp_path, stored, slope=slopes, intercept=intercept, modality=modality, PhotometricInterpretation=grey, **tags
    )
    scan = read_series(list_series(tmp_path)[0])
    files = sorted(tmp_path.iterdir(), reverse=True)  # names fall with the position
    raw = np.stack([dcmread(file).pixel_array.T for file in files], axis=2).astype(float)
    np.testing.assert_array_equal(raw, stored)
    expected = raw * slopes + intercept
    padded = np.zeros(raw.shape, bool)
    if padding is not None:
        padded = (raw >= padding[0]) & (raw <= (padding[1] or padding[0]))
    if grey == "MONOCHROME1" and modality == "MR":
        expected = expected[~padded].max() - expected
    lowest = expected[~padded].min()
    expected[padded] = min(lowest, -1000.0 if modality == "CT" and lowest < 0 else 0.0)
    np.testing.assert_allclose(scan.voxels, expected, atol=0.02, rtol=1e-6)
    assert any("padding" in note for note in scan.notes) == (padding is not None)
    assert any("MONOCHROME1" in note for note in scan.notes) == (grey == "MONOCHROME1")


@pytest.mark.parametrize("written_as", ["signed", "unsigned"])
def test_padding_has_the_sign_of_the_voxels_whatever_its_own_tag_says(tmp_path, written_as):
    stored = np.random.default_rng(9).integers(-500, 900, VOXELS.shape)
    stored[2:4, 1:3] = -2000
    value = -2000 if written_as == "signed" else 65536 - 2000
    dicom.write_series(tmp_path, stored, intercept=-24, PixelPaddingValue=None)
    for file in tmp_path.iterdir():
        content = dcmread(file)
        content.add_new(0x00280120, "SS" if written_as == "signed" else "US", value)
        content.save_as(file)
    scan = read_series(list_series(tmp_path)[0])
    assert (scan.voxels[2:4, 1:3] == -1000).all()
    kept = np.ones(stored.shape, bool)
    kept[2:4, 1:3] = False
    np.testing.assert_array_equal(scan.voxels[kept], (stored - 24)[kept])


@pytest.mark.parametrize("photometric", ["RGB", "PALETTE COLOR", "YBR_FULL"])
def test_colours_are_refused_by_name(tmp_path, photometric):
    dicom.write_series(tmp_path, VOXELS, PhotometricInterpretation=photometric)
    with pytest.raises(DataError, match=f"photometric interpretation is {photometric}: colours, expected grey values"):
        read_series(list_series(tmp_path)[0])


def test_what_was_done_to_values_stands_in_the_sidecar_and_is_said(tmp_path, caplog):
    stored = VOXELS.copy()
    stored[2:4, 1:3] = 1000
    dicom.write_series(tmp_path / "in", stored, modality="MR", PixelPaddingValue=1000)
    assert prepare(tmp_path / "in", tmp_path / "out", bias_correction=False).exit_code == 0
    text = f"{2 * 2 * COUNT} voxels are pixel padding, no tissue: they were set to 0"
    assert text in (tmp_path / "out/in_3.json").read_text() and text in caplog.text
