# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The steps from a scan as it comes to a scan as models want it, each of them recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mapseg_components.data.audit import Audit
from mapseg_components.data.file_audit import LABEL_LIKE
from mapseg_components.errors import DataError
from mapseg_components.preparation.jobs import Job, identity_of
from mapseg_components.preparation.settings import Settings
from mapseg_components.scans.dicom import Series, SeriesScan, read_series
from mapseg_components.scans.facts import Facts, facts_of_scan, looks_like_labels
from mapseg_components.scans.findings import fault, raise_findings
from mapseg_components.scans.nifti import Scan, read_nifti
from mapseg_components.scans.sidecars import Grid, Sidecar
from mapseg_components.session import versions
from mapseg_components.structures import to_whole, value_fault
from mapseg_components.transforms.hounsfield import CT_SHIFT, ct_scale
from mapseg_components.transforms.n4 import bias_field
from mapseg_components.transforms.orientation import assumed_affine
from mapseg_components.transforms.resampling import resample, spaced_grid, spacing_of, to_canonical

__all__ = ["prepared"]

FOUND = {"hu": "Hounsfield units", "shifted": f"Hounsfield units + {CT_SHIFT:g}", None: "not recognised"}
LARGEST_LABEL = np.iinfo(np.int16).max


def prepared(job: Job) -> tuple[Sidecar, np.ndarray, np.ndarray | None, list[str]]:
    """Sidecar without results, voxels, label and notes of one scan. Raises the errors of a scan."""
    source, settings = job.source, job.settings
    name = str(source.image)
    steps: list[dict[str, Any]] = []
    scan = read_series(source.image) if isinstance(source.image, Series) else read_nifti(source.image)
    label_scan = None if source.label is None else read_nifti(source.label)
    if source.label is None and looks_like_labels(scan.voxels):
        remedy = (
            "name the folder of label maps by labels, or put them into labels beside images; rescale it if it is a scan"
        )
        raise fault(name, LABEL_LIKE, remedy)
    notes = check(name, scan, source.label, label_scan, settings)
    if isinstance(scan, SeriesScan) and scan.notes:
        steps.append({"step": "DICOM values", "done": list(scan.notes)})
        notes += scan.notes
    affine = scan.affine
    if scan.sform is None and scan.qform is None and settings.assume_orientation is not None:
        affine = assumed_affine(settings.assume_orientation, spacing_of(scan.affine), scan.voxels.shape)
        steps.append({"step": "assume orientation", "orientation": settings.assume_orientation})
    native = Grid(scan.voxels.shape, affine.tolist())

    voxels, canonical = to_canonical(as_float32(scan.voxels, steps), affine)
    label = None if label_scan is None else to_canonical(to_whole(label_scan.voxels).astype(np.int16), affine)[0]
    steps.append({"step": "reorient", "from": letters(affine), "to": letters(canonical)})
    is_ct = declared_ct(source.image, settings)
    voxels = ct_intensities(name, voxels, is_ct, steps, notes)
    if settings.bias_correction or (settings.bias_correction is None and is_ct is None):
        voxels = without_bias(name, voxels, canonical, settings, steps)
    voxels, label, grid = on_grid(voxels, label, canonical, settings.spacing or (None,) * 3, steps, notes)
    sidecar = Sidecar(
        source=identity_of(source.image) or {},
        label_source=identity_of(source.label),
        settings=settings.as_json(),
        native=native,
        prepared=Grid(voxels.shape, grid.tolist()),
        steps=steps,
        versions=versions(),
    )
    return sidecar, voxels, label, notes


def check(name: str, scan: Scan, label_path: Path | None, label: Scan | None, settings: Settings) -> list[str]:
    """Warnings about a scan and its label map. Raises what is wrong with them, as training would."""
    audit = Audit(assume_orientation=settings.assume_orientation)
    facts = facts_of_scan(scan, with_values=False)
    audit.geometry(name, facts)
    if audit.finite(name, facts):
        audit.contrast(name, facts)
    if label is not None:
        found = facts_of_scan(label, with_values=True)
        audit.geometry(str(label_path), found)
        audit.pair(str(label_path), found, facts, name)
        if audit.finite(str(label_path), found):
            check_values(audit, str(label_path), found)
    raise_findings(finding for finding in audit.findings if finding.severity == "error")
    return [f"{finding.what}: {finding.remedy}" for finding in audit.findings]


def check_values(audit: Audit, path: str, facts: Facts) -> None:
    """A label map has whole numbers that NIfTI's int16 holds."""
    wrong = value_fault(facts.values or (), more_values=facts.more_values)
    if wrong is not None:
        audit.add(path, *wrong)
    elif facts.highest > LARGEST_LABEL:
        span = f"values from {facts.lowest:g} to {facts.highest:g}"
        audit.add(path, f"{span}, expected whole numbers from 0 to {LARGEST_LABEL}", "number structures anew")


def as_float32(voxels: np.ndarray, steps: list[dict[str, Any]]) -> np.ndarray:
    """The type of the results; a step if it was another one, with what was rounded away."""
    result = voxels.astype(np.float32)
    if voxels.dtype != np.float32:
        exact = voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2
        lost = 0.0 if exact else float(np.abs(result.astype(np.float64) - voxels).max())
        steps.append({"step": "convert", "from": voxels.dtype.name, "to": "float32", "largest_rounding": lost})
    return result


def letters(affine: np.ndarray) -> str:
    """Where the axes point to, such as ``"RAS"``."""
    return "".join(nib.aff2axcodes(affine))


def declared_ct(image: Path | Series, settings: Settings) -> str | None:
    """Policy for CT intensities; ``None`` if the scan is not declared as CT. Raises `DataError` if both disagree."""
    modality = image.modality if isinstance(image, Series) else ""
    if modality == "CT":
        if settings.bias_correction:
            raise fault(str(image), "its modality is CT, and bias_correction is for MR", "set bias_correction to null")
        return settings.ct or "keep"
    if modality and settings.ct:
        raise fault(str(image), f"its modality is {modality}, and ct is {settings.ct!r}", "leave it out, or ct null")
    return settings.ct


def ct_intensities(
    name: str, voxels: np.ndarray, policy: str | None, steps: list[dict[str, Any]], notes: list[str]
) -> np.ndarray:
    """Intensities under a policy, with a step; what was found is named, changed or not."""
    scale = ct_scale(voxels)
    if policy is None:
        if scale is not None:
            notes.append(f"looks like CT in {FOUND[scale]}, and is treated as MR: set ct if it is CT")
        return voxels
    step = {"step": "ct intensities", "policy": policy, "found": FOUND[scale], "added": 0.0}
    step["range"] = [float(voxels.min()), float(voxels.max())]
    steps.append(step)
    if policy == "hu" and scale is None:
        what = f"neither {FOUND['hu']} nor the same + {CT_SHIFT:g} is recognised (values from {voxels.min():g} to "
        raise fault(name, f"{what}{voxels.max():g})", "set ct to 'keep', or leave it out")
    if scale == "hu":
        return voxels
    if policy == "hu":
        step["added"] = -CT_SHIFT
        notes.append(f"is in {FOUND[scale]}, {CT_SHIFT:g} were taken away")
        return voxels - np.float32(CT_SHIFT)
    notes.append(f"CT scale: {FOUND[scale]}; left as it is")
    return voxels


def without_bias(
    name: str, voxels: np.ndarray, affine: np.ndarray, settings: Settings, steps: list[dict[str, Any]]
) -> np.ndarray:
    """Scan divided by its bias field, with a step."""
    negative = int((voxels < 0).sum())
    if negative:
        what = f"{negative} voxels are negative (from {voxels.min():g}), MR that N4 corrects has none"
        raise fault(name, what, "set ct for CT, or bias_correction to false")
    try:
        field = bias_field(
            voxels,
            affine,
            mask=settings.bias_mask,
            shrink=settings.bias_shrink,
            iterations=settings.bias_iterations,
            convergence=settings.bias_convergence,
        )
    except DataError as error:
        raise fault(name, *str(error).rsplit(": ", 1)) from error
    steps.append(
        {
            "step": "bias field",
            "method": "N4",
            "mask": settings.bias_mask,
            "shrink": settings.bias_shrink,
            "iterations": list(settings.bias_iterations),
            "convergence": settings.bias_convergence,
            "divided_by": [float(field.min()), float(field.max())],
        }
    )
    return voxels / field


def on_grid(
    voxels: np.ndarray,
    label: np.ndarray | None,
    affine: np.ndarray,
    spacing: Sequence[float | None],
    steps: list[dict[str, Any]],
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Scan and label map at a spacing, with a step if that changes the grid, and the affine of the new grid.

    Args:
        voxels: (X, Y, Z), resampled linearly.
        label: (X, Y, Z), resampled by nearest neighbour, or ``None``.
        affine: of both.
        spacing: mm of each axis; ``None`` keeps an axis.
        steps: gets what was done.
        notes: gets the label values that are lost.
    """
    shape, grid = spaced_grid(voxels.shape, affine, spacing)
    if np.array_equal(grid, affine):
        return voxels, label, grid
    step: dict[str, Any] = {
        "step": "resample",
        "from_spacing_mm": spacing_of(affine).tolist(),
        "to_spacing_mm": spacing_of(grid).tolist(),
        "from_shape": list(voxels.shape),
        "to_shape": list(shape),
        "image": "linear",
        "label": "nearest",
    }
    steps.append(step)
    voxels = resample(voxels, affine, shape, grid, "linear")
    if label is not None:
        before = set(np.unique(label).tolist())
        label = resample(label, affine, shape, grid, "nearest")
        lost = sorted(before - set(np.unique(label).tolist()))
        if lost:
            step["lost_label_values"] = lost
            notes.append(f"at this spacing no voxel of its label values {lost} is left")
    return voxels, label, grid
