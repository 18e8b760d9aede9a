# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders as scanners and archives export them: what is no image, or damaged, costs no sound series of its folder."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from mapseg_components.commands.prepare import prepare
from mapseg_components.errors import DataError
from mapseg_components.prediction.inputs import inputs_of
from mapseg_components.scans.dicom import list_series, look_into, read_series
from tests import dicom

VOXELS = np.random.default_rng(3).integers(0, 900, (6, 7, 5))
NO_IMAGES = {
    "Siemens CSA": "1.3.12.2.1107.5.9.1",
    "Philips examination": "1.3.46.670589.11.0.0.12.4",
    "GE private": "1.2.840.113619.4.30",
    "spectroscopy": "1.2.840.10008.5.1.4.1.1.4.2",
    "raw data": "1.2.840.10008.5.1.4.1.1.66",
    "registration": "1.2.840.10008.5.1.4.1.1.66.1",
    "report": "1.2.840.10008.5.1.4.1.1.88.67",
    "presentation state": "1.2.840.10008.5.1.4.1.1.11.1",
    "PDF": "1.2.840.10008.5.1.4.1.1.104.1",
    "structures": "1.2.840.10008.5.1.4.1.1.481.3",
    "performed protocol": "1.2.840.10008.5.1.4.1.1.200.2",
    "index": "1.2.840.10008.1.3.10",
}


def write_object(path, sop_class, **tags):
    """An object of a class that has no pixels."""
    meta, data = FileMetaDataset(), Dataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop_class, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = meta, sop_class, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.SeriesNumber = "MR", generate_uid(entropy_srcs=[path.name, "s"]), 99
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def without_preamble(file, implicit=True):
    """Rewrite a file as the data set alone."""
    content, stream = dcmread(file), DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, implicit
    write_dataset(stream, content)
    file.write_bytes(stream.getvalue())


@pytest.mark.parametrize("kind", NO_IMAGES)
@pytest.mark.parametrize("tags", [{}, {"Rows": 4, "Columns": 4}], ids=["plain", "with rows"])
def test_an_object_without_an_image_costs_no_series(tmp_path, kind, tags):
    dicom.write_series(tmp_path / "in", VOXELS, modality="MR")
    write_object(tmp_path / "in/A0001", NO_IMAGES[kind], **tags)
    write_object(tmp_path / "in/Z0001.dcm", NO_IMAGES[kind], **tags)
    found = look_into(tmp_path / "in")
    assert [one.number for one in found.series] == [3] and not found.findings
    assert set(found.left_out) == {tmp_path / "in/A0001", tmp_path / "in/Z0001.dcm"}
    assert all("DICOM object without a scan (" in reason for reason in found.left_out.values())
    np.testing.assert_array_equal(read_series(found.series[0]).voxels, VOXELS)
    everything = inputs_of(tmp_path / "in", None, tmp_path / "out", derivative=False)
    assert len(everything.series) == 1 and {one.path for one in everything.left_out} == set(found.left_out)


def test_prepare_does_the_series_and_lists_the_rest(tmp_path):
    dicom.write_series(tmp_path / "in", VOXELS, modality="MR")
    write_object(tmp_path / "in/CSA", NO_IMAGES["Siemens CSA"])
    result = prepare(tmp_path / "in", tmp_path / "out", bias_correction=False)
    assert result.exit_code == 0 and [one.status for one in result.outcomes] == ["done"]
    assert "private class 1.3.12.2.1107.5.9.1) (1): CSA" in str(result)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_is_read_whatever_its_name(tmp_path, implicit):
    voxels = {3: VOXELS, 4: VOXELS[::-1, :6], 5: VOXELS[:5]}
    for number, one in voxels.items():
        dicom.write_series(tmp_path / "in", one, modality="MR", number=number, first_file=10 * number)
    for n, file in enumerate(sorted((tmp_path / "in").iterdir())):
        if dcmread(file).SeriesNumber != 3:
            without_preamble(file, implicit)
        file.rename(file.with_name(f"{n}{['', '.ima', '.MR', '.1.2.3', '.DCM', '.nii.dcm'][n % 6]}"))
    (tmp_path / "in/notes.txt").write_text("no slice")
    found = look_into(tmp_path / "in")
    assert [one.number for one in found.series] == [3, 4, 5] and not found.findings and not found.left_out
    for one in found.series:
        np.testing.assert_array_equal(read_series(one).voxels, voxels[one.number])


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_files_are_read_and_refused_where_they_are_cut_off(tmp_path, syntax):
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls")
    voxels = np.random.default_rng(4).integers(0, 900, (64, 48, 3))
    dicom.write_series(tmp_path, voxels, modality="MR", PixelRepresentation=0)
    for file in tmp_path.iterdir():
        content = dcmread(file)
        content.compress(syntax)
        content.save_as(file)
    np.testing.assert_array_equal(read_series(list_series(tmp_path)[0]).voxels, voxels)
    last = max(tmp_path.iterdir())
    last.write_bytes(last.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{last.name}: cannot be read as DICOM images .*cut off"):
        read_series(list_series(tmp_path)[0])


def two_series(folder):
    """Two series whose names follow each other, and a slice of the second one."""
    dicom.write_series(folder, VOXELS, modality="MR", number=3, first_file=0)
    dicom.write_series(folder, VOXELS[:5], modality="MR", number=4, first_file=20)
    return folder / "IM0025.dcm"


def outcomes(folder, output):
    result = prepare(folder, output, bias_correction=False)
    return {one.name: one.status for one in result.outcomes}, str(result), result.exit_code


def test_a_damaged_slice_costs_its_own_series_alone(tmp_path):
    last = two_series(tmp_path / "in")
    last.write_bytes(last.read_bytes()[:-9])
    status, text, code = outcomes(tmp_path / "in", tmp_path / "out")
    assert status == {"in_3": "done", "in_4": "failed"} and code == 3 and "IM0025.dcm: cannot be read" in text


@pytest.mark.parametrize("keep", [0, 140, 400])
def test_a_file_whose_series_is_lost_costs_those_that_it_may_belong_to(tmp_path, keep):
    """Of the kind of its neighbours by name: the second series, never the first."""
    last = two_series(tmp_path / "in")
    dicom.write_series(tmp_path / "in/other", VOXELS, modality="MR", number=5)
    last.write_bytes(last.read_bytes()[:keep])
    status, text, code = outcomes(tmp_path / "in", tmp_path / "out")
    assert status == {"in_3": "done", "in_4": "failed", "other_5": "done"} and code == 3
    assert "IM0025.dcm: cannot be read" in text and "may be a slice of this series" in text


def test_a_damaged_file_of_another_class_costs_no_series(tmp_path):
    dicom.write_series(tmp_path / "in", VOXELS, modality="MR")
    dicom.write_series(tmp_path / "ct", VOXELS, modality="CT")
    shutil.copy(tmp_path / "ct/IM0002.dcm", tmp_path / "in/IM9999")
    (tmp_path / "in/IM9999").write_bytes((tmp_path / "in/IM9999").read_bytes()[:330])
    status, text, code = outcomes(tmp_path / "in", tmp_path / "out")
    assert status["in_3"] == "done" and code == 3 and "IM9999: cannot be read as DICOM images" in text


def test_a_pipe_among_slices_is_never_opened(tmp_path):
    dicom.write_series(tmp_path / "in", VOXELS, modality="MR")
    os.mkfifo(tmp_path / "in/IM0003")
    found = inputs_of(tmp_path / "in", None, tmp_path / "out", derivative=False)
    assert len(found.series) == 1 and [one.reason for one in found.left_out] == ["no regular file"]


@pytest.mark.parametrize("name", ["é", "e\u0301", "two\nlines", "tab\t", "-dash", "emoji\U0001f600", "\udcfc\udcff"])
def test_a_series_is_read_whatever_the_names_of_its_files_and_folder(tmp_path, name):
    dicom.write_series(tmp_path / "in", VOXELS, modality="MR")
    place = (tmp_path / "in").rename(tmp_path / name)
    for n, file in enumerate(sorted(place.iterdir())):
        file.rename(place / f"{name}{n}")
    [series] = list_series(place)
    np.testing.assert_array_equal(read_series(series).voxels, VOXELS)
    status, _, code = outcomes(tmp_path, tmp_path.with_name(f"{tmp_path.name}_out"))
    assert list(status.values()) == ["done"] and code == 0
