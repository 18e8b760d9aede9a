# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What cannot be prepared: the bad scan is named with its remedy, the others are done, nothing is half there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mapseg_components.commands.prepare import prepare
from mapseg_components.commands.restore import restore
from mapseg_components.data.sources import find_sources
from mapseg_components.errors import ConfigError, DataError, ResourceError
from mapseg_components.files import lock_folder, unlock_folders
from mapseg_components.preparation import run as running
from mapseg_components.preparation.jobs import Job
from mapseg_components.preparation.settings import checked_settings
from tests import dicom
from tests.conftest import ROOT, make_scan, write_nifti
from tests.faults import damage
from tests.faults.common import refused, tree
from tests.faults.test_output import in_child

PLAIN = {"bias_correction": False}


@pytest.fixture
def scans(tmp_path):
    """A scan with its label map and one without, below ``in``."""
    image, label = make_scan()
    write_nifti(tmp_path / "in/images/a.nii.gz", image)
    write_nifti(tmp_path / "in/labels/a.nii.gz", label)
    write_nifti(tmp_path / "in/images/b.nii.gz", make_scan(seed=1)[0])
    return tmp_path / "in"


def written(folder):
    """Names of all files below a folder but the lock's."""
    return sorted(name for name in tree(folder) if not name.startswith(".run.lock"))


def only_a_fails(scans, *words, **settings):
    """Preparing names a, with these words in one line, does b, and leaves nothing of a."""
    out = scans.parent / "out"
    result = prepare(scans, out, **{**PLAIN, **settings})
    assert [(o.name, o.status) for o in result.outcomes] == [("images/a", "failed"), ("images/b", "done")]
    assert result.exit_code == 3
    message = result.outcomes[0].message
    assert len(message.splitlines()) == 1 and "a.nii.gz" in message
    for word in words:
        assert word in message, message
    assert written(out) == ["images/b.json", "images/b.nii.gz"]


@pytest.mark.parametrize(
    ("hurt", "word", "remedy"),
    [
        (damage.truncated, "ends after", "copy it again"),
        (damage.bit_flipped, "damaged gzip", "copy it again"),
        (damage.nan_voxel, "2 voxels are NaN or infinite, the first at (3, 4, 5)", "repair it"),
        (damage.constant, "no contrast", "leave the scan out"),
        (damage.four_axes, "expected 3D", "one file per volume"),
        (damage.unnamed_orientation, "names no orientation", "assume_orientation"),
        (damage.sheared, "sheared by", "orthogonal grid"),
        (damage.forms_differ, "sform and qform differ", "remove the wrong one"),
        (damage.dangling_link, "a link to", "copy the scan there"),
    ],
)
def test_a_bad_scan_is_named_and_the_others_are_prepared(scans, hurt, word, remedy):
    hurt(scans / "images/a.nii.gz")
    (scans / "labels/a.nii.gz").unlink()
    only_a_fails(scans, word, remedy)


@pytest.mark.parametrize(
    ("hurt", "word"),
    [
        (damage.moved, "away from where its scan has it"),
        (damage.other_shape, "label map of shape"),
        (damage.fractional_label, "fractions"),
        (damage.negative_label, "negative values: -1 (3 voxels)"),
        (damage.truncated, "ends after"),
    ],
)
def test_a_bad_label_map_keeps_its_scan_out(scans, hurt, word):
    hurt(scans / "labels/a.nii.gz")
    only_a_fails(scans, word, "labels/a.nii.gz")


def test_negative_voxels_are_not_corrected_as_mr(scans):
    damage.hounsfield(scans / "images/a.nii.gz")
    (scans / "images/b.nii.gz").unlink()
    result = prepare(scans, scans.parent / "out")
    assert result.exit_code == 3
    assert "voxels are negative" in result.outcomes[0].message and "set ct for CT" in result.outcomes[0].message
    assert written(scans.parent / "out") == []


def test_hounsfield_units_that_are_not_recognised_are_not_assumed(scans):
    only = scans / "images/a.nii.gz"
    (scans / "images/b.nii.gz").unlink()
    result = prepare(only, scans.parent / "out", ct="hu")
    assert "neither Hounsfield units nor the same + 1024 is recognised" in result.outcomes[0].message
    assert result.exit_code == 3 and written(scans.parent / "out") == []


def test_a_label_map_without_a_scan_is_a_failure(scans):
    (scans / "images/a.nii.gz").unlink()
    result = prepare(scans, scans.parent / "out", **PLAIN)
    assert result.exit_code == 3 and "label map without a scan of the same name" in str(result)


def test_one_label_map_is_not_that_of_scans_of_one_name_in_two_folders(scans):
    labels = scans.parent / "elsewhere"
    labels.mkdir()
    (scans / "labels/a.nii.gz").rename(labels / "a.nii.gz")
    for folder in ("one", "two"):
        (scans / folder).mkdir()
        shutil.copyfile(scans / "images/a.nii.gz", scans / folder / "a.nii.gz")
    shutil.rmtree(scans / "images")
    shutil.rmtree(scans / "labels")
    result = prepare(scans, scans.parent / "out", labels=labels, **PLAIN)
    assert result.exit_code == 3 and "label map of scans in two folders, two/a" in str(result)


def test_a_spacing_that_no_memory_holds_is_refused_before_it_is_tried(scans):
    (scans / "images/b.nii.gz").unlink()
    result = prepare(scans, scans.parent / "out", spacing=0.001, **PLAIN)
    assert "set a larger spacing" in result.outcomes[0].message and "GiB" in result.outcomes[0].message


# ---- DICOM


def series_faults():
    """Name, words, and what writes the series."""
    voxels = np.random.default_rng(0).integers(0, 900, (6, 7, 5))
    z = [0, 0, 1]

    def mixed(folder, **changes):
        uid = dicom.write_series(folder, voxels)
        piece = voxels[: changes.pop("rows", 6), :, :1]
        dicom.write_series(folder, piece, uid=uid, first_file=50, **changes)

    def truncated(folder, keep):
        dicom.write_series(folder, voxels)
        last = sorted(folder.iterdir())[0]  # of the highest position: no gap shows that it is lost
        last.write_bytes(last.read_bytes()[:keep])

    def frames(folder):
        folder.mkdir(parents=True)
        dicom.write_file(folder / "a.dcm", voxels.transpose(2, 1, 0), SeriesInstanceUID="1.2.3", SeriesNumber=3)

    def edited(old, new, **tags):
        """Bytes that no program should write, of the same length."""

        def write(folder):
            dicom.write_series(folder, voxels, **tags)
            for file in folder.iterdir():
                assert file.read_bytes().count(old) == 1
                file.write_bytes(file.read_bytes().replace(old, new))

        return write

    def at(heights):
        return lambda folder: dicom.write_series(folder, voxels, positions=[np.multiply(z, h) for h in heights])

    return {
        "missing slice": (at([0, 3, 6, 12, 15]), "3.00 mm apart, but not between 6.00 and 12.00 mm", "missing slices"),
        "4D": (at([0, 0, 3, 3, 6]), "4D or copied: 2 of 5 slices", "split the volumes"),
        "orientation": (lambda f: mixed(f, axes=((0, 1, 0), (0, 0, -1))), "differ in orientation", "localizers"),
        "size": (lambda f: mixed(f, rows=5), "differ in size", "dcm2niix"),
        "pixel spacing": (lambda f: mixed(f, spacing=(0.8, 0.9)), "differ in size or pixel spacing", "dcm2niix"),
        "tilted": (
            lambda f: dicom.write_series(f, voxels, positions=[(0, n * 0.3, n) for n in range(5)]),
            "16.7 degrees (tilted gantry)",
            "dcm2niix",
        ),
        "frames": (frames, "5 frames in one file", "dcm2niix"),
        "one slice": (lambda f: dicom.write_series(f, voxels[..., :1]), "one slice, expected a volume", "leave"),
        "no position": (
            lambda f: dicom.write_series(f, voxels, ImagePositionPatient=None),
            "its header has no position",
            "leave out",
        ),
        "empty spacing": (
            lambda f: dicom.write_series(f, voxels, PixelSpacing=""),
            "its header has no pixel spacing",
            "leave out",
        ),
        "empty orientation": (
            lambda f: dicom.write_series(f, voxels, ImageOrientationPatient=""),
            "its header has no orientation",
            "leave out",
        ),
        "commas": (edited(b"0.9\\0.7", b"0,9\\0,7"), "its header has no pixel spacing", "leave out"),
        "no length": (
            lambda f: dicom.write_series(f, voxels, PixelSpacing=[0, 0]),
            "its pixel spacing is not above 0",
            "export",
        ),
        "rescale": (edited(b"-1023.5", b"-1023,5", intercept=-1023.5), "its rescale intercept is no number", "export"),
        "truncated": (lambda f: truncated(f, -30), "IM0001.dcm: cannot be read as DICOM images", "export"),
        "truncated header": (lambda f: truncated(f, 300), "IM0001.dcm: cannot be read as DICOM images", "export"),
    }


@pytest.mark.parametrize("name", series_faults())
def test_a_series_that_is_no_volume_is_refused(tmp_path, name):
    write, word, remedy = series_faults()[name]
    write(tmp_path / "in/bad")
    dicom.write_series(tmp_path / "in/good", np.random.default_rng(1).integers(0, 900, (6, 7, 5)))
    result = prepare(tmp_path / "in", tmp_path / "out", **PLAIN)
    assert result.exit_code == 3 and sorted(o.status for o in result.outcomes) == ["done", "failed"]
    message = next(o.message for o in result.outcomes if o.status == "failed")
    assert word in message and remedy in message and str(tmp_path / "in/bad") in message
    assert len(message.splitlines()) == 1
    assert written(tmp_path / "out") == ["good_3.json", "good_3.nii.gz"]


def test_a_modality_against_the_settings_is_refused(tmp_path):
    voxels = np.random.default_rng(1).integers(0, 900, (6, 7, 5))
    dicom.write_series(tmp_path / "mr/head", voxels, modality="MR")
    dicom.write_series(tmp_path / "ct/head", voxels, modality="CT")
    for folder, settings, word in (("mr", {"ct": "hu"}, "modality is MR"), ("ct", {"bias_correction": True}, "is CT")):
        result = prepare(tmp_path / folder, tmp_path / "out", **settings)
        assert word in result.outcomes[0].message and result.exit_code == 3


# ---- settings and the output folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacing": 0}, ["spacing is 0", "above 0"]),
        ({"spacing": (1, 2)}, ["spacing is (1, 2)", "three"]),
        ({"spacing": "1mm"}, ["spacing is '1mm'"]),
        ({"ct": "yes"}, ["ct is 'yes'", "keep", "hu"]),
        ({"ct": "keep", "bias_correction": True}, ["bias_correction is for MR"]),
        ({"bias_correction": "maybe"}, ["bias_correction is 'maybe'"]),
        ({"bias_mask": "brain"}, ["bias_mask is 'brain'", "otsu"]),
        ({"bias_shrink": 0}, ["bias_shrink is 0"]),
        ({"bias_iterations": ()}, ["bias_iterations is ()"]),
        ({"bias_iterations": (50, 0)}, ["bias_iterations is (50, 0)"]),
        ({"bias_convergence": -1}, ["bias_convergence is -1"]),
        ({"assume_orientation": "RAX"}, ["assume_orientation is 'RAX'"]),
        ({"workers": 0}, ["workers is 0"]),
        ({"labels": "nowhere"}, ["nowhere: no such folder"]),
        ({"series": "1.2"}, ["no DICOM series with UID '1.2'"]),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(scans, settings, words):
    with refused(scans.parent, *words, kind=ConfigError):
        prepare(scans, scans.parent / "out", **settings)


def test_inputs_without_scans_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("none")
    for name, word in (("empty", "no NIfTI scan"), ("nowhere", "no such file or folder"), ("empty/notes.txt", "DICOM")):
        with refused(tmp_path, word, kind=ConfigError):
            prepare(tmp_path / name, tmp_path / "out", **PLAIN)


def test_scans_are_never_replaced(scans):
    with refused(scans.parent, "output is the input", kind=ConfigError):
        prepare(scans, scans, overwrite=True, **PLAIN)
    with refused(scans.parent, "is a scan of the input", kind=ConfigError):
        prepare(scans / "images/a.nii.gz", scans / "images", overwrite=True, **PLAIN)


def test_two_scans_with_results_of_one_name_are_refused(scans):
    write_nifti(scans / "images/a.nii", make_scan()[0])
    with refused(scans.parent, "a.nii", "results of one name, images/a"):
        prepare(scans, scans.parent / "out", **PLAIN)


@pytest.mark.parametrize("sidecar", [None, "{", '{"format": 9}', '{"format": 1}'])
def test_a_file_in_the_way_is_left_alone(scans, sidecar):
    out = scans.parent / "out"
    write_nifti(out / "images/b.nii.gz", make_scan()[0])
    if sidecar is not None:
        (out / "images/b.json").write_text(sidecar)
    with refused(scans.parent, "images/b.nii.gz", "overwrite", kind=ConfigError, written=("out/.run.lock.json",)[:0]):
        prepare(scans, out, **PLAIN)
    assert prepare(scans, out, overwrite=True, **PLAIN).exit_code == 0


def test_a_full_disk_ends_the_run_and_leaves_what_was_there(scans):
    out = scans.parent / "out"
    prepare(scans, out, **PLAIN)
    before = tree(out)
    for spacing, largest in ((0.5, 2000), (1.0, 20_000)):
        kind, code, message = in_child(
            lambda spacing=spacing: prepare(scans, out, spacing=spacing, overwrite=True, **PLAIN), largest_file=largest
        )
        assert (kind, code) == ("ResourceError", 6), message
        assert (
            str(out / "images/a.nii.gz") in message and "free space" in message and "tmp" not in message.split("/")[-1]
        )
        assert tree(out) == before


def test_an_output_that_is_a_file_or_in_use_is_refused(scans, monkeypatch):
    (scans.parent / "file").write_text("")
    with refused(scans.parent, "is a file: name a folder", kind=ConfigError):
        prepare(scans, scans.parent / "file", **PLAIN)
    out = scans.parent / "out"
    out.mkdir()
    code = (
        "import sys; from mapseg_components.files import lock_folder; lock_folder(sys.argv[1]); print(1, flush=True); "
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.stdin.read()", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as other:
        assert other.stdout.readline() == b"1\n"
        monkeypatch.setattr(lock_folder, "__defaults__", (0.2,))  # seconds to wait
        with pytest.raises(ResourceError, match=f"in use by process {other.pid}"):
            prepare(scans, out, **PLAIN)
        assert written(out) == []
    lock_folder(out, timeout=1)
    unlock_folders([out])


def dies(job):
    """Instead of `prepare_scan`: a worker that the system kills on scan b."""
    if job.source.name.endswith("b"):
        os._exit(9)
    return running.prepare_scan(job)


def test_a_worker_that_is_killed_does_not_hang_the_run(scans, monkeypatch, warm_processes):
    jobs = [
        Job(
            s,
            scans.parent / "out",
            checked_settings(None, False, None, None, "otsu", 4, (50, 50, 50, 50), 0.001),
        )
        for s in find_sources(scans)[0]
    ]
    done = running.prepare_scan
    monkeypatch.setattr(running, "prepare_scan", dies)
    outcomes = {outcome.name: outcome for outcome in running.run(jobs, 2)}
    monkeypatch.setattr(running, "prepare_scan", done)
    assert outcomes["images/b"].status == "failed"
    assert (
        "a worker process was killed" in outcomes["images/b"].message
        and "lower workers" in outcomes["images/b"].message
    )
    assert prepare(scans, scans.parent / "out", **PLAIN).exit_code == 0


# ---- the way back


def test_a_sidecar_that_is_none_is_refused(scans):
    out = scans.parent / "out"
    prepare(scans, out, **PLAIN)
    content = json.loads((out / "images/a.json").read_text())
    label = out / "labels/a.nii.gz"
    for broken in (
        "",
        "[]",
        json.dumps({**content, "format": 2}),
        json.dumps({**content, "native": {"shape": [1, 2]}}),
    ):
        (scans.parent / "broken.json").write_text(broken)
        with refused(scans.parent, "broken.json", "sidecar", "prepare the scan again", kind=ConfigError):
            restore(label, scans.parent / "broken.json", scans.parent / "back.nii.gz")
    damage.truncated(label)
    with refused(scans.parent, "labels/a.nii.gz", "ends after", kind=DataError):
        restore(label, out / "images/a.json", scans.parent / "back.nii.gz")
