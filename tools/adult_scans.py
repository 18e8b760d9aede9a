#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans and silver labels at 2 mm for the sample of adults: python tools/adult_scans.py --database DIR --output SCANS.

DIR holds ``cross_sectional`` and ``longitudinal`` of the 3D MR image database of multiple sclerosis patients (Lesjak
et al. 2016, 2017; CC BY) as in the Git repository muschellij2/open_ms_data, commit 6570490. Writes what
``tools/make_adult_sample.py --scans SCANS`` starts from. Needs ``pip install antspyx``.

T1w and T2w of a session are put on one grid of 2 mm within the database's brain mask, freed of the bias field (N4)
where the database has not done so, and clustered into fluid, grey and white matter by Atropos: silver labels, by no
expert. Atropos draws its start anew in each run, which changes some ten voxels of a label map.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to, resample_to_output

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.boxes import box_of_mask
from tools.make_sample import MARGIN_VOXELS

# cs07: cross-sectional set, patient 07; lg012: longitudinal set, patient 01, study 2
SESSIONS = ["cs07", "cs19", "cs26", "lg011", "lg012", "lg041", "lg121"]
SETS = {"cross_sectional": "cs07, cs19 and cs26", "longitudinal": "lg011, lg012, lg041 and lg121"}
SPACING_MM = 2.0
CLIP_PERCENT = (0.5, 99.5)
WHITE = 3


def like(data: np.ndarray, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Float image on another's grid."""
    return nib.Nifti1Image(data.astype(np.float32), image.affine)


def coarse(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """RAS orientation, 2 mm, linear."""
    return resample_to_output(nib.as_closest_canonical(image), (SPACING_MM,) * 3, order=1)


def to_ants(image: nib.Nifti1Image) -> Any:
    """The same image for ANTs."""
    import ants

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/image.nii.gz"
        nib.save(image, path)
        return ants.image_read(path)


def cross_sectional(root: Path, patient: str) -> dict[str, nib.Nifti1Image]:
    """A patient of the cross-sectional set: N4, skull stripping, MNI frame and consensus lesions are the database's."""
    folder = root / "cross_sectional" / "MNI" / f"patient{patient}"
    ending = "N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
    t1, t2 = (nib.load(folder / f"{kind}_{ending}") for kind in ("T1", "T2"))
    lesions = nib.load(folder / "GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz")
    mask = coarse(like(np.abs(t1.get_fdata()) > 1e-3, t1)).get_fdata() > 0.6
    return clustered(coarse(t1), coarse(t2), mask, coarse(like(lesions.get_fdata(), lesions)).get_fdata() > 0.5)


def longitudinal(root: Path, patient: str, study: str) -> dict[str, nib.Nifti1Image]:
    """A visit of the longitudinal set: raw scans with thick slices, the database's brain mask, N4."""
    import ants

    brain = nib.load(root / "longitudinal" / "coregistered" / f"patient{patient}" / "brainmask.nii.gz")
    grid = coarse(like(brain.get_fdata(), brain))
    folder = root / "longitudinal" / "raw" / f"patient{patient}"
    raw = [nib.load(folder / f"study{study}_{kind}W.nii.gz") for kind in ("T1", "T2")]
    scans = [resample_from_to(like(image.get_fdata(), image), grid, order=1) for image in raw]
    mask = (grid.get_fdata() > 0.5) & np.all([scan.get_fdata() > 0 for scan in scans], axis=0)
    steps = {"shrink_factor": 2, "convergence": {"iters": [20, 20], "tol": 1e-4}}
    inside = to_ants(like(mask, grid))
    t1, t2 = (like(ants.n4_bias_field_correction(to_ants(scan), mask=inside, **steps).numpy(), scan) for scan in scans)
    return clustered(t1, t2, mask, np.zeros_like(mask))


def clustered(
    t1: nib.Nifti1Image, t2: nib.Nifti1Image, mask: np.ndarray, lesions: np.ndarray
) -> dict[str, nib.Nifti1Image]:
    """Grey values within the mask and their clusters in the order of T1w brightness, cropped to the mask, uint8.

    Args:
        t1: T1w (X, Y, Z).
        t2: T2w on the same grid.
        mask: bool (X, Y, Z), of the brain.
        lesions: bool (X, Y, Z), called white matter.
    """
    import ants

    def clipped(image: nib.Nifti1Image) -> np.ndarray:
        grey = image.get_fdata(dtype=np.float32)
        low, high = np.percentile(grey[mask], CLIP_PERCENT)
        return np.clip((grey - low) / (high - low), 0, 1) * mask

    greys = [clipped(t1), clipped(t2)]
    found = ants.atropos(
        a=[to_ants(like(grey, t1)) for grey in greys],
        m="[0.1,1x1x1]",
        c="[12,0]",
        i="kmeans[3]",
        x=to_ants(like(mask, t1)),
    )["segmentation"].numpy()
    tissue = np.zeros(mask.shape, np.uint8)
    for value, cluster in enumerate(sorted((1, 2, 3), key=lambda number: greys[0][found == number].mean()), start=1):
        tissue[found == cluster] = value
    tissue[lesions & mask] = WHITE
    box = box_of_mask(mask)
    low, high = np.maximum(box[:, 0] - MARGIN_VOXELS, 0), box[:, 1] + MARGIN_VOXELS
    part = tuple(slice(a, b) for a, b in zip(low, high))
    affine = t1.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    volumes = [*(np.where(mask, np.round(grey * 254 + 1), 0).astype(np.uint8) for grey in greys), tissue]
    return {kind: nib.Nifti1Image(v[part], affine) for kind, v in zip(("T1", "T2", "tissue"), volumes)}


def notices(root: Path) -> str:
    """The licences of both sets, which name the papers to cite."""
    texts = {name: (root / name / "LICENSE.txt").read_text(encoding="utf-8") for name in SETS}
    lines = [line.rstrip() for name, text in texts.items() for line in [f"# {SETS[name]}", "", *text.splitlines(), ""]]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write every session and the licences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, required=True, help="folder with cross_sectional and longitudinal")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    # read when ants is imported: N4 gives the same grey values in every run
    os.environ |= {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "ANTS_RANDOM_SEED": "1"}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in SESSIONS:
        patient, study = name[2:4], name[4:]
        root = arguments.database
        scans = longitudinal(root, patient, study) if study else cross_sectional(root, patient)
        for kind, scan in scans.items():
            nib.save(scan, arguments.output / f"{name}_{kind}.nii.gz")
        print(name, flush=True)
    (arguments.output / "LICENSE.txt").write_text(notices(arguments.database), encoding="utf-8")


if __name__ == "__main__":
    main()
