# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A law of inputs: whatever lies there is taken, is an error, or is listed with its reason; each path once."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapseg_components.commands.check import check
from mapseg_components.commands.prepare import prepare
from mapseg_components.data.bids import is_bids
from mapseg_components.data.left_out import left_out, summary
from mapseg_components.data.sources import files_of, find_sources
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.keys import IMAGE
from mapseg_components.prediction.inputs import inputs_of, nifti_inputs
from mapseg_components.scans.nifti import read_nifti
from tests import dicom
from tests.conftest import make_scan, write_nifti

PLAIN = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4)).to_bytes()
CONTENTS = {"scan": gzip.compress(PLAIN), "plain scan": PLAIN, "text": b"words", "nothing": b"", "zip": b"PK\3\4"}
FOLDERS = ("", "images", "labels", "deep/b", ".hidden", "sub-1/anat", "sub-1/func")
STEMS = ("a", "sub-1_T2w", "sub-1_dseg", ".b", "é", "e\u0301", "x\ny", "\udcff", "README", "a_mask", "Thumbs", "IM0001")
ENDINGS = (".nii.gz", ".NII.GZ", ".nii", ".Nii", ".nrrd", ".mha", ".img", ".hdr", ".mgz", ".json", ".db", ".zip", "")
FILES = st.tuples(
    st.sampled_from(FOLDERS), st.sampled_from(STEMS), st.sampled_from(ENDINGS), st.sampled_from(sorted(CONTENTS))
)
EXTRAS = st.sets(st.sampled_from(["empty", "broken link", "folder link", "pipe", "slices", "description"]))


def write_tree(top: Path, files, extras) -> None:
    for folder, name, ending, content in files:
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / f"{name}{ending}").write_bytes(CONTENTS[content])
    if "empty" in extras:
        (top / "void").mkdir()
    if "broken link" in extras:
        (top / "gone").symlink_to(top / "nowhere")
        (top / "gone.nii.gz").symlink_to(top / "nowhere.nii.gz")
    if "folder link" in extras:
        (top / "elsewhere").symlink_to(top.parent)
    if "pipe" in extras:
        os.mkfifo(top / "pipe")
    if "slices" in extras:
        dicom.write_series(top / "slices", np.arange(90).reshape(5, 6, 3), modality="MR")
        (top / "slices" / "PHOENIX").write_bytes((top / "slices/IM0001.dcm").read_bytes()[:140])
    if "description" in extras:
        (top / "dataset_description.json").write_text("{}")


def leaves(top: Path) -> set[str]:
    """Every file, link and empty folder, and each hidden folder as one."""
    found = set()
    for folder, folders, files in os.walk(top):
        closed = {n for n in folders if n.startswith(".") or os.path.islink(os.path.join(folder, n))}
        closed |= {n for n in folders if n not in closed and not os.listdir(os.path.join(folder, n))}
        found |= {os.path.join(folder, name) for name in (*files, *closed)}
        folders[:] = [name for name in folders if name not in closed]
    return found


def paths(cases, series, findings, left) -> tuple[set[str], list[str]]:
    """What is taken or an error, and what is left out."""
    used = {case[IMAGE] for case in cases} | {str(file) for one in series for file in one.files}
    return used | {finding.file for finding in findings}, [str(one.path) for one in left]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=st.lists(FILES, min_size=1, max_size=8, unique_by=lambda file: file[:3]), extras=EXTRAS)
def test_each_path_of_an_input_is_taken_or_an_error_or_listed(tmp_path_factory, files, extras):
    top = tmp_path_factory.mktemp("in")
    write_tree(top, files, extras)
    every = leaves(top)

    def predicted():
        found = inputs_of(top, None, top / "out", is_bids(top))
        return paths(
            found.cases[: len(found.cases) - len(found.series)], found.series.values(), found.findings, found.left_out
        )

    def checked():
        found = nifti_inputs(top, None)
        return paths(found.cases, [], found.findings, found.left_out)

    def prepared():
        sources, findings, left = find_sources(top)
        used = {str(file) for source in sources for file in files_of(source)}
        return used | {finding.file for finding in findings}, [str(one.path) for one in left]

    for find in (predicted, checked, prepared):
        try:
            used, left = find()
        except (ConfigError, DataError) as error:  # nothing to do, or two results of one name: nothing is done at all
            assert "correct the path" in str(error) or "correct the input" in str(error) or "rename" in str(error)
            continue
        assert len(left) == len(set(left)) and not used & set(left)
        assert every <= used | set(left), every - used - set(left)


@pytest.mark.parametrize("ending", [".nii", ".NII", ".Nii", ".nii.gz", ".NII.GZ", ".nii.GZ", ".Nii.Gz"])
def test_a_nifti_ending_is_one_in_capitals_as_well(tmp_path, ending):
    voxels = make_scan()[0]
    write_nifti(tmp_path / "other.nii.gz", voxels)
    content = (tmp_path / "other.nii.gz").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a{ending}").write_bytes(content if "gz" in ending.lower() else gzip.decompress(content))
    np.testing.assert_array_equal(read_nifti(tmp_path / f"in/a{ending}").voxels, voxels)
    assert [case["case_id"] for case in nifti_inputs(tmp_path / "in", None).cases] == ["a"]
    assert [one.name for one in prepare(tmp_path / "in", tmp_path / "out", bias_correction=False).named("done")] == [
        "a"
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.nrrd", b"NRRD0004", "another format: convert it to NIfTI"),
        ("a.MHA", b"ObjectType = Image", "another format: convert it to NIfTI"),
        ("a.img", b"\0" * 400, "half of an Analyze or NIfTI pair"),
        ("a.hdr", PLAIN[:348], "half of an Analyze or NIfTI pair"),
        ("a.mgz", b"\x1f\x8b", "another format: convert it to NIfTI"),
        ("a.nii.bz2", b"BZh", "packed: unpack it"),
        ("a.zip", b"PK\3\4", "packed: unpack it"),
        ("a", CONTENTS["scan"], "rename it, so that its name ends with .nii.gz"),
        ("a.nii.old", PLAIN, "rename it, so that its name ends with .nii"),
        ("a.dcm", b"none", "named as DICOM, but it is none"),
        ("a.ima", b"", "an empty file"),
        (".a.nii.gz", CONTENTS["scan"], "hidden: rename it if it is a scan"),
        ("._a.nii.gz", b"x", "of the operating system"),
        ("Thumbs.db", b"x", "of the operating system"),
        ("a.xyz", b"words", "neither NIfTI nor DICOM by its content"),
        ("sub/a.nii.gz", CONTENTS["scan"], "a scan in a sub-folder"),
        ("scan_seg.nii.gz", CONTENTS["scan"], "a label map by its name"),
        ("sub-1_desc-brain_mask.NII.GZ", CONTENTS["scan"], "a label map by its name"),
        ("a.json", b"{}", "sidecar or text"),
    ],
)
def test_what_is_left_out_is_named_with_its_reason(tmp_path, name, content, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "scan.nii.gz").write_bytes(CONTENTS["scan"])
    found = inputs_of(tmp_path, None, tmp_path / "out", derivative=False)
    assert [case["case_id"] for case in found.cases] == ["scan"]
    [one] = found.left_out
    assert words in one.reason and str(one.path) == str(tmp_path / name)
    assert f"Left out, 1:\n  {one.reason} (1): {name}" == summary(found.left_out, tmp_path)


def test_check_has_a_note_for_each_and_one_for_all_sidecars(tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", make_scan()[0])
    for n in range(30):
        (tmp_path / f"{n}.json").write_text("{}")
    (tmp_path / "a.nrrd").write_bytes(b"NRRD")
    dicom.write_series(tmp_path / "d", np.arange(90).reshape(5, 6, 3), modality="MR")
    notes = [finding for finding in check(str(tmp_path)).findings if finding.what.startswith("left out")]
    assert sum("sidecar" in note.what for note in notes) == 1 and "and 20 more" in str(notes)
    assert {note.file for note in notes if "DICOM: mapseg prepare converts it" in note.what} == {
        str(path) for path in (tmp_path / "d").iterdir()
    }
    assert any(note.file == str(tmp_path / "a.nrrd") for note in notes)


def test_an_input_of_other_formats_alone_is_refused_with_their_names(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD")
    for find in (lambda: inputs_of(tmp_path, None, tmp_path / "o", False), lambda: nifti_inputs(tmp_path, None)):
        with pytest.raises(ConfigError, match=r"Left out, 1: another format: convert it to NIfTI .*: a\.nrrd"):
            find()
    with pytest.raises(ConfigError, match=r"Left out, 1: another format"):
        prepare(tmp_path, tmp_path / "o")


def test_of_a_single_file_nothing_is_left_out(tmp_path):
    (tmp_path / "a_seg.nii.gz").write_bytes(CONTENTS["scan"])
    found = inputs_of(tmp_path / "a_seg.nii.gz", None, tmp_path / "out", derivative=False)
    assert len(found.cases) == 1 and left_out(tmp_path / "a_seg.nii.gz", []) == []
