# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Small scans, label maps and datalists; everything is made here and seeded. Tools use it too: no pytest here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "sample" / "fetal_age"


def make_scan(shape=(20, 24, 28), seed=0, contrast=1.0):
    """Image and label map of two nested boxes in noise, background exactly 0, no two axes alike."""
    generator = np.random.default_rng(seed)
    image, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    outer = tuple(slice(2, side - 3) for side in shape)
    image[outer] = 100 + 5 * generator.standard_normal(image[outer].shape)
    for value, (start, width) in enumerate([(0.25, 0.25), (0.55, 0.2)], start=1):
        inner = tuple(slice(int(start * s), int(start * s) + max(int(width * s), 2)) for s in shape)
        image[inner] = 100 + contrast * 60 * value
        label[inner] = value
    return image.clip(min=0), label


def write_nifti(path: Path, voxels, affine=None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.1, 1.2, 1.0]) if affine is None else affine), path)
    return str(path)


def make_domains(folder: Path) -> Path:
    """Three labelled scans in ``t1/images`` and ``t1/labels``, two unlabelled ones of another contrast in ``t2``."""
    for seed in range(3):
        image, label = make_scan(seed=seed)
        write_nifti(folder / "t1" / "images" / f"{seed}.nii.gz", image)
        write_nifti(folder / "t1" / "labels" / f"{seed}.nii.gz", label)
    for seed in (7, 8):
        write_nifti(folder / "t2" / f"{seed}.nii.gz", make_scan(seed=seed, contrast=-0.7)[0])
    return folder


def halve_sample(folder: Path) -> Path:
    """The shipped sample with every second voxel along each axis, an eighth of the work; returns the folder."""
    for path in SAMPLE.rglob("*.nii.gz"):
        scan = nib.load(path)
        voxels = np.asarray(scan.dataobj)[::2, ::2, ::2]
        write_nifti(folder / path.relative_to(SAMPLE), voxels, scan.affine @ np.diag([2, 2, 2, 1]))
    shutil.copy(SAMPLE / "datalist.json", folder)
    return folder


def make_dataset(folder: Path, shape=(20, 24, 28)) -> Path:
    """Two source cases, one validation, two target cases and one test case; returns the datalist."""
    content = {"labels": {"0": "background", "1": "first", "2": "second"}}
    sections = {"source_training": 2, "source_validation": 1, "target_training": 2, "target_test": 1}
    seed = 0
    for section, count in sections.items():
        content[section] = []
        for number in range(count):
            seed += 1
            target = section.startswith("target")
            image, label = make_scan(shape, seed, contrast=-0.7 if target else 1.0)
            entry = {"image": f"{section}/{number}.nii.gz", "case_id": f"{section}-{number}"}
            write_nifti(folder / entry["image"], image)
            if section != "target_training":
                entry["label"] = f"{section}/{number}_label.nii.gz"
                write_nifti(folder / entry["label"], label)
            content[section].append(entry)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"
