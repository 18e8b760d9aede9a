#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Make the shipped sample from the CC0 fetal atlas of Fidon et al. (2021): python tools/make_sample.py --atlas DIR.

DIR holds ``T2/<case>.nii.gz`` and ``label/<case>.nii.gz``. Scans are put into RAS, cropped to the brain plus a
margin, and resampled to a coarser isotropic grid: images by averaging, label maps by the class with the largest
share. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.utils import one_hot

from mapseg_components.boxes import box_of_mask

SPLITS = {
    "source": ["GA30_operated", "GA31_operated", "GA33_operated", "GA34_operated"],
    "validation": ["GA32_operated"],
    "target": ["GA22_notoperated", "GA23_notoperated", "GA25_notoperated", "GA26_operated"],
    "test": ["GA24_notoperated", "GA25_operated"],
}
SECTIONS = {
    "source": "source_training",
    "validation": "source_validation",
    "target": "target_training",
    "test": "target_test",
}
LABELS = [
    "background",
    "white matter",
    "ventricles",
    "cerebellum",
    "extra-ventricular CSF",
    "cortical grey matter",
    "deep grey matter",
    "brainstem",
    "corpus callosum",
]
SPACING_MM = 1.6
MARGIN_VOXELS = 2


def average(volume: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks of ``factor`` voxels a side; the volume (C, X, Y, Z) is padded with 0 at its end."""
    padding = [(0, 0), *((0, -side % factor) for side in volume.shape[1:])]
    return torch.nn.functional.avg_pool3d(torch.from_numpy(np.pad(volume, padding)), factor).numpy()


def coarsen(image: nib.Nifti1Image, label: nib.Nifti1Image) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Image and label map on the coarse grid, cropped to the brain."""
    image, label = nib.as_closest_canonical(image), nib.as_closest_canonical(label)
    if image.shape != label.shape or not np.allclose(image.affine, label.affine, atol=1e-3):
        raise SystemExit(f"{image.get_filename()}: image and label map lie on different grids")
    factor = round(SPACING_MM / float(image.header.get_zooms()[0]))
    # the image alone decides, so that no target label shapes what the model is given
    voxels = np.clip(np.asarray(image.dataobj, dtype=np.float32), 0, None)
    brain = voxels > 0
    box = box_of_mask(brain)
    low = np.maximum(box[:, 0] - MARGIN_VOXELS * factor, 0)
    high = np.minimum(box[:, 1] + MARGIN_VOXELS * factor, brain.shape)
    part = tuple(slice(a, b) for a, b in zip(low, high))
    grey = average(voxels[part][None], factor)[0]
    shares = one_hot(torch.from_numpy(np.asarray(label.dataobj)[part].astype(np.int64))[None, None], len(LABELS))
    classes = average(shares[0].numpy().astype(np.float32), factor).argmax(0).astype(np.uint8)
    grey = np.round(grey / grey.max() * 255).astype(np.uint8)
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (low + (factor - 1) / 2)
    affine[:3, :3] *= factor
    return nib.Nifti1Image(grey, affine), nib.Nifti1Image(classes, affine)


def write(scan: nib.Nifti1Image, path: Path) -> None:
    """Write NIfTI with a gzip header that holds no time and no name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scan.header.set_xyzt_units("mm")
    with path.open("wb") as stream, gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as archive:
        archive.write(scan.to_bytes())


def finish(datalist: dict[str, object], folder: Path) -> None:
    """Write ``datalist.json`` and the checksums of all scans in the folder."""
    (folder / "datalist.json").write_text(json.dumps(datalist, indent=4) + "\n")
    scans = sorted(folder.rglob("*.nii.gz"))
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}" for p in scans]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def main() -> None:
    """Make the sample in ``sample/fetal_age``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atlas", type=Path, required=True, help="folder with T2/ and label/")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "sample" / "fetal_age")
    arguments = parser.parse_args()

    datalist: dict[str, object] = {
        "name": "fetal_age",
        "description": "T2w atlases of the fetal brain; source: older fetuses, target: younger ones",
        "licence": "CC0 1.0",
        "labels": {str(value): name for value, name in enumerate(LABELS)},
    }
    for folder, cases in SPLITS.items():
        entries = []
        for case in cases:
            image, label = coarsen(*(nib.load(arguments.atlas / kind / f"{case}.nii.gz") for kind in ("T2", "label")))
            entry = {"image": f"{folder}/images/{case}.nii.gz"}
            write(image, arguments.output / entry["image"])
            if folder != "target":  # nothing in the sample could leak a label of the target's training side
                entry["label"] = f"{folder}/labels/{case}.nii.gz"
                write(label, arguments.output / entry["label"])
            entries.append(entry)
        datalist[SECTIONS[folder]] = entries
    finish(datalist, arguments.output)


if __name__ == "__main__":
    main()
