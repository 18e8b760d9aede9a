#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Make the sample of adult brains, T1w to T2w: python tools/make_adult_sample.py --scans DIR.

DIR holds ``<case>_T1.nii.gz``, ``<case>_T2.nii.gz`` and ``<case>_tissue.nii.gz`` at 2 mm, and ``LICENSE.txt``, which
``tools/adult_scans.py`` makes from the Ljubljana database of people with multiple sclerosis (Lesjak et al. 2017), as
described in ``sample/adult_t1_to_t2/README.md``. The script cleans the rim of two target scans, crops, sorts into
folders and writes the datalist. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.boxes import box_of_mask
from tools.make_sample import MARGIN_VOXELS, SECTIONS, finish, write

# folder: modality, cases
SPLITS = {
    "source": ("T1", ["cs07", "cs19"]),
    "validation": ("T1", ["cs26"]),
    "target": ("T2", ["lg041", "lg121"]),
    "test": ("T2", ["lg011", "lg012"]),
}
LABELS = ["background", "cerebrospinal fluid", "grey matter", "white matter"]
WITH_RIM = {"lg041", "lg121"}  # the brain mask of the database takes in skull and dura
DARK = 0.6  # share of the median grey value; bone is darker in T2w
CORE_MM = 12.0  # what lies deeper is never removed, however dark: vessels, iron
OPENING_MM = 6.0  # radius: what hangs on the brain by less is cut off


def ball(radius: float, spacing: np.ndarray) -> np.ndarray:
    """Structuring element: voxels whose centre is at most ``radius`` mm away."""
    half = np.floor(radius / spacing).astype(int)
    axes = np.ogrid[tuple(slice(-n, n + 1) for n in half)]
    return sum((axis * step) ** 2 for axis, step in zip(axes, spacing)) <= radius**2


def without_rim(grey: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The brain in a skull-stripped T2w scan (X, Y, Z) whose mask was too wide, as a mask; the image alone decides.

    Near the mask's edge bone is dark in T2w, between bright fluid inside and fat outside. Dark voxels of the outer
    shell are left out, an opening cuts what then hangs on the brain by thin bridges, the largest component stays, and
    what the opening took off its surface is given back, as are dark spots inside.
    """
    mask = grey > 0
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    bright = (grey >= DARK * np.median(grey[mask])) | (depth > CORE_MM)
    opened = largest(ndimage.binary_opening(bright, ball(OPENING_MM, spacing)))
    brain = ndimage.binary_dilation(opened, ball(1.5 * spacing.max(), spacing)) & bright
    # the border is no brain: without padding, closing would eat there
    closed = ndimage.binary_closing(np.pad(brain, 3), ball(2 * spacing.max(), spacing))[3:-3, 3:-3, 3:-3]
    return ndimage.binary_fill_holes(largest(closed & mask)) & mask


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask."""
    components, _ = ndimage.label(mask)
    return components == 1 + np.argmax(np.bincount(components.ravel())[1:])


def cropped(voxels: np.ndarray, affine: np.ndarray, box: np.ndarray) -> nib.Nifti1Image:
    """Scan of the voxels in a box, with a margin."""
    low = np.maximum(box[:, 0] - MARGIN_VOXELS, 0)
    part = voxels[tuple(slice(a, b) for a, b in zip(low, box[:, 1] + MARGIN_VOXELS))]
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ low
    return nib.Nifti1Image(part, shifted)


def main() -> None:
    """Make the sample in ``sample/adult_t1_to_t2``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=Path, required=True, help="folder with <case>_T1, _T2, _tissue and LICENSE.txt")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "sample" / "adult_t1_to_t2")
    arguments = parser.parse_args()

    datalist: dict[str, object] = {
        "name": "adult_t1_to_t2",
        "description": "brains of adults; source: T1w with silver labels, target: T2w of other people and scanner",
        "licence": "CC BY",
        "labels": {str(value): name for value, name in enumerate(LABELS)},
    }
    for folder, (modality, cases) in SPLITS.items():
        entries = []
        for case in cases:
            scan = nib.load(arguments.scans / f"{case}_{modality}.nii.gz")
            grey = np.asarray(scan.dataobj).astype(np.uint8)
            brain = grey > 0
            if case in WITH_RIM:
                brain = without_rim(grey, np.abs(np.diag(scan.affine))[:3])
            print(f"{case}: {np.count_nonzero(brain) / np.count_nonzero(grey):.1%} of the mask kept")
            box = box_of_mask(brain)
            entry = {"image": f"{folder}/images/{case}_{modality}.nii.gz"}
            write(cropped(grey * brain, scan.affine, box), arguments.output / entry["image"])
            if folder != "target":  # nothing in the sample could leak a label of the target's training side
                label = np.asarray(nib.load(arguments.scans / f"{case}_tissue.nii.gz").dataobj).astype(np.uint8)
                entry["label"] = f"{folder}/labels/{case}_{modality}.nii.gz"
                write(cropped(label, scan.affine, box), arguments.output / entry["label"])
            entries.append(entry)
        datalist[SECTIONS[folder]] = entries
    shutil.copyfile(arguments.scans / "LICENSE.txt", arguments.output / "LICENSE.txt")
    finish(datalist, arguments.output)


if __name__ == "__main__":
    main()
