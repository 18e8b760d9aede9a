# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""COSMOS with nnU-Net as its engine, from the command line, at tiny size, and killed in the middle.

python -m tests.nnunet.run [--keep FOLDER]

Needs the extra [nnunet] (``make nnunet`` installs it). ``mapseg adapt`` is killed, with all its processes, while
nnU-Net trains the teacher, and called again. Exit code 0 only if the run comes to its end, the teacher went on with the
epoch after the last one that was done, and pseudo labels, bundle and label maps are there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from mapseg_components.inferers.nnunet import require_nnunet
from tests.scans import make_scan, write_nifti

SHAPE = (24, 28, 20)
SETTINGS = {
    "engine": "nnunet",
    "rounds": 1,
    "max_epochs": 3,
    "epoch_length": 3,
    "val_interval": 1,
    "patch_size": [16, 16, 16],
    "window_stride": [12, 12, 12],
    "slice_size": [32, 32],
    "required_structures": [],  # in three epochs no model finds a structure
}


def make_scans(folder: Path) -> None:
    """Labelled scans in ``t1``, unlabelled ones of another contrast in ``t2``."""
    for seed in range(4):
        image, label = make_scan(SHAPE, seed)
        write_nifti(folder / "t1" / "images" / f"{seed}.nii.gz", image)
        write_nifti(folder / "t1" / "labels" / f"{seed}.nii.gz", label * 100)
    for seed in (7, 8, 9):
        write_nifti(folder / "t2" / f"{seed}.nii.gz", make_scan(SHAPE, seed, contrast=-0.7)[0])


def command(folder: Path) -> list[str]:
    """The command line of the run."""
    places = ["--source", folder / "t1", "--target", folder / "t2", "--output", folder / "run"]
    method = ["--method", "cosmos", "--preset", "small-data-cpu", "--random_contrasts", "False", "--device", "cpu"]
    given = [*places, *method, "--settings", json.dumps(SETTINGS)]
    return [sys.executable, "-m", "mapseg_components.commands", "adapt", *map(str, given)]


def lines(path: Path) -> list[dict]:
    """Of a history; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def killed(folder: Path) -> int:
    """Start the run and kill it once nnU-Net has done an epoch; returns the number of epochs done."""
    history = folder / "run" / "stages" / "teacher" / "history.jsonl"
    process = subprocess.Popen(command(folder), start_new_session=True)
    while not lines(history):
        if process.poll() is not None:
            sys.exit(f"the run ended with code {process.returncode} before nnU-Net had trained")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(lines(history))


def check(folder: Path, done: int) -> None:
    """Refuse anything but a whole run whose teacher went on after `done` epochs."""
    run, stages = folder / "run", folder / "run" / "stages"
    record = json.loads((run / "run.json").read_text())
    assert record["done"][:5] == ["source", "translation", "teacher", "labels_1", "student_1"], record["done"]
    assert [line["epoch"] for line in lines(stages / "teacher" / "history.jsonl")] == [1, 2, 3]
    log = (stages / "teacher" / "log.txt").read_text()
    first = next(line for line in log.splitlines() if ": Epoch " in line)
    assert done >= 3 or int(first.split()[-1]) >= done, f"epochs done before were done again: {first}"
    assert not (stages / "teacher" / "nnunet" / "preprocessed").exists()
    labelled = json.loads((stages / "labels_1" / "pseudo" / "datalist.json").read_text())["target_labelled"]
    assert len(labelled) == 3
    for case in labelled:
        label, scan = nib.load(case["label"]), nib.load(case["image"])
        assert label.shape == scan.shape and np.allclose(label.affine, scan.affine)
        assert set(np.unique(label.dataobj)) <= {0, 100, 200}
    assert len([*(run / "predictions" / "adapted").glob("*_seg.nii.gz")]) == 3
    assert (run / "models" / "model.pt").is_file() and (run / "report.html").is_file()
    print(json.dumps({"seconds": record["seconds"], "processor_seconds": record["processor_seconds"]}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder to run in, which stays; by default one that is deleted")
    keep = parser.parse_args().keep
    require_nnunet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute() / "with spaces"
        make_scans(folder)
        done = killed(folder)
        print(f"Killed after {done} epoch(s) of nnU-Net; the same command again ...", flush=True)
        subprocess.run(command(folder), check=True)
        check(folder, done)


if __name__ == "__main__":
    main()
