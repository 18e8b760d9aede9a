# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg predict` over several scans, of which one fails at each stage, or which is stopped, or whose disk is full."""

from __future__ import annotations

import csv
import gzip
import json
import os
import resource
import signal
import threading
import time

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import predict
from mapseg_components.commands.main import main
from mapseg_components.errors import DataError, ResourceError
from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.prediction.run import Run
from mapseg_components.prediction.writing import Writer
from tests.conftest import ROOT, SAMPLE

BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
SCAN = SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"
STRUCTURES = 8
OVERLAP = pytest.mark.parametrize("no_overlap", [False, True], ids=["overlap", "one_by_one"])


def write_scans(place, sides):
    """Scans "0", "1", ... with these sides."""
    place.mkdir()
    scan = nib.load(SCAN)
    for number, side in enumerate(sides):
        voxels = np.asarray(scan.dataobj)[10 : 10 + side, 12 : 10 + side, 11 : 10 + side]
        nib.save(nib.Nifti1Image(voxels, scan.affine), place / f"{number}.nii.gz")
    return place


def checked(output):
    """Status of each scan by the manifest, after all else in the folder was compared with it."""
    scans = json.loads((output / "manifest.json").read_text())["scans"]
    done = [one["case"] for one in scans if one["status"] == "done"]
    assert sorted(path.name for path in output.glob("*_seg.nii.gz")) == [f"{case}_seg.nii.gz" for case in done]
    for one in scans:
        if one["status"] == "done":
            assert np.asarray(nib.load(one["label_map"]).dataobj).max() <= STRUCTURES  # read to its end
    with (output / "volumes.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row["case"] for row in csv.DictReader(stream)]
    assert rows == [case for case in done for _ in range(STRUCTURES)]
    hidden = [path.name for path in output.rglob(".*") if not path.name.startswith(".run.lock")]
    assert hidden == []
    return {one["case"]: one["status"] for one in scans}


@OVERLAP
def test_a_scan_that_fails_at_any_stage_is_its_own(tmp_path, monkeypatch, no_overlap):
    scans = write_scans(tmp_path / "in", [20] * 6)
    segment_all, segment_one, keep = Run.all, GlobalLocalSlidingWindowInferer._segment, Writer.keep

    def gone(run):
        (scans / "1.nii.gz").unlink()  # it was there when all scans were checked
        segment_all(run)

    def tight(inferer, scan, *arguments):
        if "2.nii.gz" in scan.meta["filename_or_obj"]:
            raise MemoryError
        return segment_one(inferer, scan, *arguments)

    def blocked(writer, one, case, place, output):
        if one.case == "4":
            place.label_map.mkdir()  # the name is taken by a folder, in which nothing can be put
        return keep(writer, one, case, place, output)

    monkeypatch.setattr(Run, "all", gone)
    monkeypatch.setattr(GlobalLocalSlidingWindowInferer, "_segment", tight)
    monkeypatch.setattr(Writer, "keep", blocked)
    found = predict(scans, tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True, no_overlap=no_overlap)
    (tmp_path / "out" / "4_seg.nii.gz").rmdir()
    assert checked(tmp_path / "out") == {
        "0": "done", "1": "failed", "2": "failed", "3": "done", "4": "failed", "5": "done"
    }  # fmt: skip
    read, network, written = (found.predictions[number] for number in (1, 2, 4))
    assert "1.nii.gz: no such file: " in read.message and not issubclass(read.kind, ResourceError)
    assert issubclass(network.kind, ResourceError) and "window_batch_size" in network.message
    assert issubclass(written.kind, ResourceError) and "4_seg.nii.gz" in written.message
    assert found.exit_code == 3 == DataError.exit_code


@OVERLAP
def test_a_header_that_nothing_checked_fails_its_own_scan(tmp_path, no_overlap):
    scans = write_scans(tmp_path / "in", [20] * 3)
    content = bytearray(gzip.decompress((scans / "1.nii.gz").read_bytes()))
    content[70:72] = b"\xff\x7f"  # no data type has this code
    (scans / "1.nii.gz").write_bytes(gzip.compress(bytes(content)))
    (tmp_path / "skip.json").write_text('{"audit": "skip"}')
    options = {"overlays": str(tmp_path / "skip.json"), "no_preview": True, "quiet": True, "no_overlap": no_overlap}
    predict(scans, tmp_path / "out", bundle=BUNDLE, **options)
    assert checked(tmp_path / "out") == {"0": "done", "1": "failed", "2": "done"}


@OVERLAP
def test_a_full_disk_fails_the_scans_that_do_not_fit(tmp_path, no_overlap):
    """A limit on the size of a file stands for the disk: probabilities of a large scan are above, all else is below."""
    scans = write_scans(tmp_path / "in", [20, 44, 20, 20])
    output, limit = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
        found = predict(
            scans, output, bundle=BUNDLE, probabilities=True, no_preview=True, quiet=True, no_overlap=no_overlap
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checked(output) == {"0": "done", "1": "failed", "2": "done", "3": "done"}
    assert found.exit_code == 6 and "1_probabilities.nii.gz" in found.predictions[1].message
    assert not (output / "1_probabilities.nii.gz").exists()


@OVERLAP
def test_a_run_in_which_nothing_can_be_written_ends(tmp_path, no_overlap, monkeypatch):
    def full(writer, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "keep", full)
    scans = write_scans(tmp_path / "in", [20] * 4)
    found = predict(scans, tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True, no_overlap=no_overlap)
    assert set(checked(tmp_path / "out").values()) == {"failed"}
    assert all("No space left" in one.message for one in found.predictions)


@OVERLAP
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl_c", "sigterm"])
def test_a_run_that_is_stopped_lists_what_is_finished(tmp_path, number, code, no_overlap, capsys):
    scans, output = write_scans(tmp_path / "in", [36] * 12), tmp_path / "out"

    def stop():
        deadline = time.monotonic() + 300
        while len(list(output.glob("*_seg.nii.gz"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["predict", str(scans), str(output), *words(no_overlap)]))
    stopper.join()
    assert ended.value.code == code
    status = list(checked(output).values())
    done = status.count("done")
    assert 2 <= done < 12 and status == ["done"] * done + ["not done"] * (12 - done)
    scans = json.loads((output / "manifest.json").read_text())["scans"]
    assert [one["seconds"] is not None for one in scans] == [one["status"] == "done" for one in scans]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [one for one in threading.enumerate() if one.name.startswith(("read_", "write_"))]


def words(no_overlap):
    return ["--bundle", str(BUNDLE), "--no_preview", "--quiet", f"--no_overlap={no_overlap}"]
