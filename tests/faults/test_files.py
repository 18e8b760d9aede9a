# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and absent files: none is read as data, each is named with its remedy, the others are checked."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from monai.transforms import Compose, LoadImaged

from mapseg_components import memory
from mapseg_components.data import (
    AuditRecord,
    Finding,
    ScanAudit,
    check_scan,
    check_scans,
    check_training_data,
    load_scans,
    read_nifti,
)
from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError
from mapseg_components.scans import nifti
from mapseg_components.scans.findings import raise_findings
from mapseg_components.transforms import FillNonFinited
from tests.conftest import make_scan, write_nifti
from tests.faults import damage
from tests.faults.common import LABELS, SMALL, bundle_run, refused, save_small_weights, tree
from tests.fuzz.run import scan_target

COPY = "copy it again"
FAULTS = [
    (damage.truncated, "ends after", COPY),
    (damage.without_its_last_byte, "damaged gzip", COPY),
    (damage.bit_flipped, "damaged gzip", COPY),
    (damage.empty, "the file is empty", COPY),
    (damage.text, "it is not compressed", "rename it to .nii"),
    (damage.gzipped_text, "does not begin with a NIfTI header", "convert it to .nii.gz (dcm2niix for DICOM)"),
    (damage.plain_named_gz, "it is not compressed", "rename it to .nii"),
    (damage.missing, "no such file", "correct the datalist"),
    (damage.folder, "a folder, expected a .nii", "dcm2niix"),
    (damage.pipe, "no regular file", "copy the scan there"),
    (damage.more_voxels_promised, "ends after 54,112 of the 56,032 bytes", COPY),
    (damage.fewer_voxels_promised, "goes on after the 38,752 bytes", COPY),
    (damage.terabytes_promised, "(30000, 30000, 30000), 108,000,000,000,352 bytes, the file of", COPY),
    (damage.dimension_zero, "dimensions [3, 0, 24, 28", "repair the header"),
    (damage.dimension_negative, "dimensions [3, 20, -24, 28", "repair the header"),
    (damage.voxels_in_the_header, "puts the voxels at byte 4", COPY),
    (damage.unknown_type, "type code 777, expected plain numbers", "convert to grey values"),
    (damage.infinite_scaling, "damaged header", COPY),
    (damage.nan_voxel, "2 voxels are NaN or infinite, the first at (3, 4, 5)", "repair it or leave the scan out"),
    (damage.infinite_voxel, "1 voxels are NaN or infinite, the first at (3, 4, 5)", "repair it"),
    (damage.beyond_float32, "1 voxels are NaN or infinite, the first at (3, 4, 5)", "repair it"),
    (damage.constant, "all voxels are 7, no contrast to segment", "leave the scan out"),
    (damage.all_zero, "all voxels are 0, no contrast to segment", "leave the scan out"),
    (damage.four_axes, "shape (20, 24, 28, 5), expected 3D", "one file per volume"),
    (damage.two_axes, "shape (20, 24), expected 3D", "one file per volume"),
    (damage.complex_voxels, "voxels of type complex64, expected plain numbers", "convert to grey values"),
    (damage.colours, "expected plain numbers", "convert to grey values"),
    (damage.dangling_link, "a link to moved_away.nii.gz, which does not exist", "copy the scan there"),
    (damage.link_loop, "cannot be opened", "correct the path or the link"),
]


@pytest.mark.parametrize("fault, what, remedy", FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_fault_is_named(dataset, tmp_path, fault, what, remedy):
    victim = dataset / "source_training" / "1.nii.gz"
    fault(victim)
    with refused(tmp_path, "source_training/1.nii.gz", what, remedy, written=("out/audit.json",)):
        check_training_data(dataset / "datalist.json", LABELS, record=tmp_path / "out" / "audit.json")
    files = json.loads((tmp_path / "out" / "audit.json").read_text())["files"]
    assert str(dataset / "source_training" / "0.nii.gz") in files and len(files) >= 7


@pytest.mark.parametrize("fault", [damage.truncated, damage.more_voxels_promised, damage.terabytes_promised])
def test_plain_file_is_measured_before_it_is_read(tmp_path, fault):
    path = Path(write_nifti(tmp_path / "a.nii", make_scan()[0]))
    fault(path)
    with refused(tmp_path, "a.nii: its header promises shape", "the file of", "holds at most", COPY):
        check_scan(path)


def test_compressed_file_named_nii(tmp_path):
    path = Path(write_nifti(tmp_path / "a.nii.gz", make_scan()[0])).rename(tmp_path / "a.nii")
    with refused(tmp_path, "a.nii: ", "it is compressed with gzip", "rename it to .nii.gz"):
        check_scan(path)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.dcm", "a.img", "a.NHDR"])
def test_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0" * 500)
    with refused(tmp_path, name, "expected a file named .nii or .nii.gz", "dcm2niix for DICOM"):
        check_scan(tmp_path / name)


def test_bomb_is_not_unpacked(tmp_path):
    """Ten thousand times the promised bytes follow: reading ends soon after the promise."""
    path = Path(write_nifti(tmp_path / "a.nii.gz", make_scan((8, 9, 10))[0]))
    path.write_bytes(gzip.compress(bytes(damage.plain(path)) + bytes(30_000_000), 1))
    with refused(tmp_path, "a.nii.gz: goes on after the 3,232 bytes", COPY):
        check_scan(path)


def test_a_scan_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz", make_scan()[0])
    monkeypatch.setattr(memory, "memory_of", lambda device: 100_000)
    with refused(tmp_path, "a.nii.gz: shape (20, 24, 28) needs", "crop the scan", kind=ResourceError):
        check_scan(path)


def test_unreadable_file_does_not_hide_the_others(dataset, tmp_path, monkeypatch):
    """As root every file can be read, so that the system's answer is put in."""
    opened = Path.open

    def deny(self, *args, **kwargs):
        if self.name == "0.nii.gz" and self.parent.name == "source_training":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", deny)
    damage.nan_voxel(dataset / "target_training" / "1.nii.gz")
    words = [
        "source_training/0.nii.gz: no permission to read it: allow it (chmod u+r)",
        "target_training/1.nii.gz: 2 vox",
    ]
    with refused(tmp_path, *words, lines=2):
        check_training_data(dataset / "datalist.json", LABELS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(tmp_path):
    path = Path(write_nifti(tmp_path / "a.nii.gz", make_scan()[0]))
    path.chmod(0)
    with refused(tmp_path, "a.nii.gz", "no permission to read it", "chmod u+r"):
        check_scan(path)


def test_links_are_followed(tmp_path):
    write_nifti(tmp_path / "real" / "scan.nii.gz", make_scan()[0])
    (tmp_path / "a.nii.gz").symlink_to("real/scan.nii.gz")
    assert check_scan(tmp_path / "a.nii.gz")[0] == damage.SHAPE


def test_findings_are_records(dataset):
    damage.truncated(dataset / "source_training" / "0.nii.gz")
    with pytest.raises(DataError) as caught:
        check_training_data(dataset / "datalist.json", LABELS)
    (finding,) = caught.value.findings
    assert (finding.severity, finding.kind) == ("error", DataError)
    assert finding.file.endswith("source_training/0.nii.gz") and finding.remedy.startswith("copy it again")


def test_kinds_decide_the_error(dataset, tmp_path):
    first, second = (dataset / "source_training" / f"{number}.nii.gz" for number in range(2))
    damage.hounsfield(first)
    with refused(tmp_path, "0.nii.gz", kind=ConfigError):
        check_training_data(dataset / "datalist.json", LABELS)
    damage.truncated(second)
    with refused(tmp_path, "0.nii.gz", "1.nii.gz", kind=DataError, lines=2):
        check_training_data(dataset / "datalist.json", LABELS)
    mixed = [Finding("error", "a", "b", "c", kind) for kind in (ConfigError, ResourceError)]
    with refused(tmp_path, "a: b: c", kind=DataError, lines=2):
        raise_findings(mixed)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("scaled", [False, True])
def test_reads_what_nibabel_reads(tmp_path, dtype, name, scaled):
    scan = nib.Nifti1Image(damage.image().astype(dtype), np.diag([1.0, 1.1, 1.2, 1.0]))
    scan.header.set_slope_inter(*((0.5, -3) if scaled else (1, 0)))
    nib.save(scan, tmp_path / name)
    found, expected = read_nifti(tmp_path / name), nib.load(tmp_path / name)
    np.testing.assert_array_equal(found.voxels, np.asarray(expected.dataobj))
    np.testing.assert_array_equal(found.affine, expected.affine)


def test_nifti_2_and_big_endian_and_several_members_are_read(tmp_path):
    voxels = damage.image()
    nib.save(nib.Nifti2Image(voxels, np.eye(4)), tmp_path / "two.nii.gz")
    big = nib.Nifti1Image(voxels, np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    content = (tmp_path / "big.nii").read_bytes()
    assert content[:4] == b"\0\0\1\x5c"
    (tmp_path / "parts.nii.gz").write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]) + bytes(512))
    for name in ("two.nii.gz", "big.nii", "parts.nii.gz"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).voxels, voxels)


def test_same_voxels_have_one_digest_whatever_the_name_and_packing(tmp_path):
    one = read_nifti(write_nifti(tmp_path / "a.nii", damage.image())).digest
    assert read_nifti(write_nifti(tmp_path / "b.nii.gz", damage.image(), np.eye(4))).digest == one
    other = damage.image()
    other[5, 5, 5] += 1
    assert read_nifti(write_nifti(tmp_path / "c.nii", other)).digest != one


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Gzipped noise and a gzipped smooth volume, whose damage no statistic would show: folder, bytes and voxels."""
    grid = np.meshgrid(*[np.linspace(0, 3, side) for side in (20, 22, 24)], indexing="ij")
    smooth = (1000 * np.exp(-sum(g**2 for g in grid))).astype(np.int16)
    noise = np.random.default_rng(0).integers(0, 30000, (10, 11, 12)).astype(np.int16)
    folder = tmp_path_factory.mktemp("flips")
    paths = [Path(write_nifti(folder / f"{name}.nii.gz", v)) for name, v in (("noise", noise), ("smooth", smooth))]
    return folder, [(path.read_bytes(), read_nifti(path).voxels.copy()) for path in paths]


flips = given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
many = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@seed(0)
@many
@flips
def test_every_flipped_bit_is_found(packed, place, bit):
    """In noise no other stream decodes alike. Flag for text, time stamp, level, system and name of the gzip header, and
    the bits that fill its last byte of data, carry no data: flips there are not found, and change nothing."""
    folder, [(content, voxels), _] = packed
    at = int(place * len(content))
    name_end = content.index(b"\0", 10) if content[3] & 8 else 9
    path = folder / "flipped.nii.gz"
    path.write_bytes(content)
    damage.bit_flipped(path, at * 8 + bit)
    if 4 <= at <= 9 or 10 <= at < name_end or (at, bit) == (3, 0):
        np.testing.assert_array_equal(read_nifti(path).voxels, voxels)
    elif at != len(content) - 9:
        with pytest.raises(DataError, match=r"flipped\.nii\.gz: .*copy it again"):
            read_nifti(path)


@seed(0)
@many
@flips
def test_a_flipped_bit_never_changes_a_voxel(packed, place, bit):
    """In a smooth volume some flips name another copy of the same run: the decoded bytes are equal, which is sound."""
    folder, [_, (content, voxels)] = packed
    path = folder / "flipped.nii.gz"
    path.write_bytes(content)
    damage.bit_flipped(path, int(place * len(content)) * 8 + bit)
    try:
        np.testing.assert_array_equal(read_nifti(path).voxels, voxels)
    except DataError as error:
        assert "flipped.nii.gz" in str(error) and COPY in str(error)


def test_flips_of_the_gzip_header_change_no_data(packed):
    folder, [_, (content, voxels)] = packed
    path = folder / "flipped.nii.gz"
    for at in range(4, 10):
        path.write_bytes(content)
        damage.bit_flipped(path, at * 8 + 3)
        np.testing.assert_array_equal(read_nifti(path).voxels, voxels)


@seed(0)
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=600), name=st.sampled_from(["a.nii", "a.nii.gz"]), wrap=st.booleans())
def test_arbitrary_bytes_never_escape(tmp_path, content, name, wrap):
    scan_target(gzip.compress(content, 1) if wrap else content, tmp_path / name)


@seed(0)
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.integers(0, 351), st.integers(0, 255), min_size=1, max_size=6), gz=st.booleans())
def test_mutated_header_never_escapes(tmp_path, changes, gz):
    scan = nib.Nifti1Image(damage.image()[:6, :7, :8], np.diag([1.0, 1.1, 1.2, 1.0])).to_bytes()
    content = bytearray(scan)
    for at, value in changes.items():
        content[at] = value
    scan_target(gzip.compress(bytes(content), 1) if gz else bytes(content), tmp_path / ("a.nii.gz" if gz else "a.nii"))


# the record


def counted(monkeypatch):
    read = []
    original = nifti.decode
    monkeypatch.setattr(nifti, "decode", lambda path, *rest: read.append(path.name) or original(path, *rest))
    return read


def test_no_file_is_read_twice(dataset, tmp_path, monkeypatch):
    read, record = counted(monkeypatch), tmp_path / "out" / "audit.json"
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    assert len(read) == 8  # five scans, three label maps
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    assert len(read) == 8
    write_nifti(dataset / "target_training" / "1.nii.gz", make_scan(seed=99)[0])
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    assert read[8:] == ["1.nii.gz"]
    assert list(record.parent.iterdir()) == [record]


def test_record_answers_as_the_file_does(dataset, tmp_path):
    """Findings that depend on settings come from the record as well."""
    record = tmp_path / "audit.json"
    damage.hounsfield(dataset / "source_training" / "0.nii.gz")
    check_training_data(dataset / "datalist.json", LABELS, source_negative_values="shift", record=record)
    messages = []
    for kept in (record, None):
        with pytest.raises(DataError) as caught:
            check_training_data(dataset / "datalist.json", {"first": 1}, record=kept)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and len(messages[0].splitlines()) == 4


def test_damaged_file_is_read_again_and_not_believed(dataset, tmp_path, monkeypatch):
    record, victim = tmp_path / "audit.json", dataset / "source_training" / "0.nii.gz"
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    good = victim.read_bytes()
    damage.truncated(victim)
    for _ in range(2):
        with refused(dataset, "0.nii.gz", COPY):
            check_training_data(dataset / "datalist.json", LABELS, record=record)
    victim.write_bytes(good)
    check_training_data(dataset / "datalist.json", LABELS, record=record)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "files": {}}', '{"format": 1, "files": [1]}', "\0"])
def test_useless_record_is_written_anew(dataset, tmp_path, content, caplog):
    record = tmp_path / "audit.json"
    record.write_text(content)
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    assert "audit.json is no record of this version's audit" in caplog.text
    assert len(json.loads(record.read_text())["files"]) == 8


def test_mistyped_entries_of_a_record_are_not_used(dataset, tmp_path):
    record = tmp_path / "audit.json"
    check_training_data(dataset / "datalist.json", LABELS, record=record)
    content = json.loads(record.read_text())
    for number, entry in enumerate(content["files"].values()):
        entry["facts"] = [None, 3, {**entry["facts"], "affine": "x"}, {"shape": [1]}][number % 4]
    record.write_text(json.dumps(content))
    read = AuditRecord(record)
    assert read.facts(dataset / "source_training" / "0.nii.gz", False).shape == damage.SHAPE and read.reused == 0
    check_training_data(dataset / "datalist.json", LABELS, record=record)


def test_record_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "out").write_text("a file")
    with refused(tmp_path, "out/audit.json (File exists", "choose a folder",
                 kind=ResourceError):  # fmt: skip
        check_training_data(dataset / "datalist.json", LABELS, record=tmp_path / "out" / "audit.json")


def test_bad_voxels_become_background_only_by_choice(dataset, tmp_path):
    path = dataset / "source_training" / "0.nii.gz"
    damage.nan_voxel(path)
    raw = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    finite = np.isfinite(raw)
    load = Compose([LoadImaged("image"), FillNonFinited("image", "background")])
    filled = load({"image": path})["image"]
    np.testing.assert_array_equal(filled.numpy()[finite], raw[finite])
    assert (~finite).sum() == 2 and (filled.numpy()[~finite] == raw[finite].min()).all()
    assert FillNonFinited("image")({"image": filled})["image"] is filled
    check_training_data(dataset / "datalist.json", LABELS, non_finite="background")
    with refused(tmp_path, "source_training/0.nii.gz: 2 voxels are NaN", "or set non_finite to 'background'"):
        check_training_data(dataset / "datalist.json", LABELS)
    with pytest.raises(ConfigError, match="non_finite is 'zero', expected 'background', or null"):
        FillNonFinited("image", "zero")
    damage.nan_label(dataset / "source_training" / "0_label.nii.gz")
    with refused(tmp_path, "0_label.nii.gz: 1 voxels are NaN", "repair it or leave the scan out"):
        check_training_data(dataset / "datalist.json", LABELS, non_finite="background")


def test_audit_can_be_skipped_but_says_so(dataset, tmp_path, caplog, monkeypatch):
    read = counted(monkeypatch)
    damage.truncated(dataset / "source_training" / "0.nii.gz")
    check_training_data(dataset / "datalist.json", LABELS, record=tmp_path / "audit.json", audit="skip")
    assert "no scan was checked" in caplog.text and not read and not (tmp_path / "audit.json").exists()
    with refused(tmp_path, "audit is 'no', expected 'full' or 'skip'", kind=ConfigError):
        check_training_data(dataset / "datalist.json", LABELS, audit="no")


# batch inference


def test_bad_scans_are_left_out_and_named_at_the_end(dataset, tmp_path, caplog):
    scans = dataset / "target_training"
    damage.truncated(scans / "0.nii.gz")
    cases = load_scans(scans)
    audit = ScanAudit(cases, record=tmp_path / "audit.json")
    assert [Path(case["image"]).name for case in audit.usable] == ["1.nii.gz"]
    assert "left out" in caplog.text and "0.nii.gz" in caplog.text
    with refused(tmp_path, "target_training/0.nii.gz", COPY):
        audit.finish()
    damage.truncated(scans / "1.nii.gz")
    with refused(tmp_path, "0.nii.gz", "1.nii.gz", lines=2):
        ScanAudit(cases).usable  # noqa: B018
    assert ScanAudit(cases, audit="skip").usable == cases


def test_scans_that_cannot_be_told_apart_stop_before_any_is_read(tmp_path):
    assert ScanAudit([]).usable == []  # a config may be looked at without data
    with refused(tmp_path, "no NIfTI scan", "set dataset_dir", kind=ConfigError):
        ScanAudit([]).start()
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).write_text("not read")
    with refused(tmp_path, "['a'] occur twice"):
        ScanAudit(load_scans(tmp_path)).start()


def test_scans_of_one_name_are_refused(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        write_nifti(tmp_path / name, make_scan()[0])
    with refused(tmp_path, "['a'] occur twice and would overwrite each other's results", "rename the files"):
        check_scans(load_scans(tmp_path))


def test_name_that_leaves_no_room_for_results(tmp_path):
    write_nifti(tmp_path / f"{'x' * 240}.nii.gz", make_scan()[0])
    with refused(tmp_path, "xxx.nii.gz", "its name has 240 bytes", "shorten it"):
        check_scans(load_scans(tmp_path))


# end to end, as a user types it


def test_training_stops_before_it_writes_weights(dataset, tmp_path):
    damage.bit_flipped(dataset / "source_training" / "1.nii.gz")
    damage.nan_voxel(dataset / "target_training" / "0.nii.gz")
    out = tmp_path / "out"
    done = bundle_run(["train.json", "tiny.yaml"], dataset_dir=str(dataset), ckpt_dir=str(out), output_dir=str(out),
                      labels=LABELS)  # fmt: skip
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()[-2:]
    assert lines[0].startswith("DataError: ") and "source_training/1.nii.gz" in lines[0] and COPY in lines[0]
    assert "target_training/0.nii.gz: 2 voxels are NaN" in lines[1]
    assert set(tree(out)) == {"audit.json"}


def test_inference_does_the_good_scans_and_fails_at_the_end(tmp_path):
    """One damaged scan; one smaller than the window on every axis; names with spaces, umlauts and 200 characters."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    names = ["klein", "Kopf Müller 頭", "x" * 200]
    shapes = [(9, 11, 13), (20, 24, 28), (31, 9, 14)]
    for name, shape in zip(names, shapes):
        write_nifti(scans / f"{name}.nii.gz", make_scan(shape)[0], np.diag([-1.0, 1.1, 3.0, 1.0]))
    shutil.copy(scans / "klein.nii.gz", scans / "broken.nii.gz")
    damage.bit_flipped(scans / "broken.nii.gz")
    weights = save_small_weights(tmp_path / "weights.pt")
    done = bundle_run(["inference.json"], dataset_dir=str(scans), output_dir=str(out), weights=str(weights), **SMALL)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("DataError: ") and "broken.nii.gz" in last and COPY in last
    assert set(tree(out)) == {f"{name}_seg.nii.gz" for name in names} | {"audit.json", "volumes.csv"}
    for name, shape in zip(names, shapes):
        found = nib.load(out / f"{name}_seg.nii.gz")
        assert found.shape == shape and found.get_data_dtype() == np.uint8
        np.testing.assert_allclose(found.affine, np.diag([-1.0, 1.1, 3.0, 1.0]), atol=1e-6)


def test_a_foreign_folder_ends_with_the_remedy(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "IM0001.dcm").write_bytes(b"\0" * 128 + b"DICM")
    weights = save_small_weights(tmp_path / "weights.pt")
    done = bundle_run(
        ["inference.json"],
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "out"),
        weights=str(weights),
        **SMALL,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConfigError: no NIfTI scan") and "mapseg prepare" in last
    assert not (tmp_path / "out").exists() or not tree(tmp_path / "out")


def test_every_error_here_is_a_user_error():
    assert all(issubclass(kind, MAPSegError) for kind in (ConfigError, DataError, ResourceError))
    assert [kind.exit_code for kind in (ConfigError, DataError, ResourceError)] == [2, 3, 6]
