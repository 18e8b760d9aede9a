# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans of the comparison: synthetic brains, in folders that each side reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from benchmarks.package import write_datalist
from benchmarks.peers.plan import Plan
from benchmarks.volume import write_brain

__all__ = ["CHANNEL", "DATASET", "cases", "datalist", "scan_folder", "write_scans"]

DATASET = "Dataset001_peers"
CHANNEL = "_0000.nii.gz"  # nnU-Net's ending of a scan's first channel


def datalist(folder: Path) -> Path:
    """File that names the labelled scans."""
    return folder / "datalist.json"


def scan_folder(folder: Path, number: int) -> Path:
    """Folder of that many scans to segment."""
    return folder / f"scans_{number}"


def cases(folder: Path) -> list[dict[str, str]]:
    """Labelled scans, ``image`` and ``label``."""
    return json.loads(datalist(folder).read_text(encoding="utf-8"))["source_training"]


def write_scans(folder: Path, plan: Plan) -> None:
    """Labelled scans as a datalist and as nnU-Net's raw dataset, and folders of one and of all scans to segment."""
    raw, listed = folder / "nnUNet_raw" / DATASET, []
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number in range(plan.training):
        image, label = write_brain(folder / "labelled", plan.shape, seed=number)
        listed.append((image, label))
        shutil.copyfile(image, raw / "imagesTr" / f"brain_{number}{CHANNEL}")
        shutil.copyfile(label, raw / "labelsTr" / f"brain_{number}.nii.gz")
    write_datalist(datalist(folder), listed)
    dataset = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, **plan.labels},
        "numTraining": plan.training,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    (raw / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    for number in range(plan.scans):
        image, _ = write_brain(folder / "unseen", plan.shape, seed=1000 + number)
        for amount in {1, plan.scans}:
            if number < amount:
                scan_folder(folder, amount).mkdir(exist_ok=True)
                os.link(image, scan_folder(folder, amount) / f"brain_{1000 + number}{CHANNEL}")
