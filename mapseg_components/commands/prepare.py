# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg prepare``: scans as they come to scans as models want them, and a record of the way back for each."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from mapseg_components.data.audit import LABEL_LIKE, Audit
from mapseg_components.data.dicom import Series, SeriesScan, read_series
from mapseg_components.data.facts import Facts, facts_of_scan, looks_like_labels
from mapseg_components.data.findings import Finding, fault, raise_findings
from mapseg_components.data.left_out import summary
from mapseg_components.data.nifti import Scan, read_nifti
from mapseg_components.data.sidecars import Grid, Sidecar, digest_of, read_sidecar, write_sidecar
from mapseg_components.data.sources import Source, find_sources
from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError
from mapseg_components.files import (
    lock_folder,
    readable,
    replacing,
    require_writable,
    sha256_of,
    sweep_temporaries,
    unlock_folders,
)
from mapseg_components.memory import naming_memory_errors
from mapseg_components.session import versions, working
from mapseg_components.structures import to_whole, value_fault
from mapseg_components.transforms.hounsfield import CT_SHIFT, ct_scale
from mapseg_components.transforms.n4 import MASKS, bias_field
from mapseg_components.transforms.orientation import assumed_affine, check_axcodes
from mapseg_components.transforms.resampling import resample, spaced_grid, spacing_of, to_canonical
from mapseg_components.transforms.saving import SaveLabelMap, SaveVolume, write_verified

__all__ = ["Outcome", "PrepareResult", "prepare"]

logger = logging.getLogger(__name__)

CT_POLICIES = ("keep", "hu")
FOUND = {"hu": "Hounsfield units", "shifted": f"Hounsfield units + {CT_SHIFT:g}", None: "not recognised"}
LARGEST_LABEL = np.iinfo(np.int16).max
ENDING = ".nii.gz"


@dataclass(frozen=True)
class Settings:
    """What decides the voxels of a result; the arguments of `prepare` of the same names."""

    spacing: tuple[float | None, ...] | None
    bias_correction: bool | None
    bias_mask: str
    bias_shrink: int
    bias_iterations: tuple[int, ...]
    bias_convergence: float
    ct: str | None
    assume_orientation: str | None

    def as_json(self) -> dict[str, Any]:
        """As it stands in a sidecar."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Args:
        name: of the result, relative to the output folder, without ending; of a file that is no scan, its path.
        status: ``"done"``, ``"skipped"`` (it was there, unchanged) or ``"failed"``.
        image: the prepared scan, if there is one.
        message: of a failure, one line or more.
        notes: what a person should know about a scan that was prepared.
        no_room: the failure is the output folder's, so it would meet every scan.
    """

    name: str
    status: str
    image: Path | None = None
    message: str = ""
    notes: tuple[str, ...] = ()
    no_room: bool = False


@dataclass(frozen=True)
class PrepareResult:
    """What became of each scan, by name; ``left_out`` is what else lies in the input, for the screen."""

    outcomes: tuple[Outcome, ...]
    left_out: str = ""

    @property
    def exit_code(self) -> int:
        """0 if every result exists and was verified, else `DataError.exit_code`."""
        return DataError.exit_code if self.named("failed") else 0

    def named(self, status: str) -> list[Outcome]:
        """Outcomes of one status."""
        return [outcome for outcome in self.outcomes if outcome.status == status]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.named(status))} {status}" for status in ("done", "skipped", "failed"))
        failures = [readable(o.message) for o in self.named("failed")]
        return "\n".join([f"{len(self.outcomes)} scans: {counts}", *failures, *filter(None, [self.left_out])])


@dataclass(frozen=True)
class Job:
    """One scan with the paths of its results."""

    source: Source
    output: Path
    settings: Settings

    @property
    def image(self) -> Path:
        """Prepared scan."""
        return self.output / f"{self.source.name}{ENDING}"

    @property
    def label(self) -> Path | None:
        """Prepared label map."""
        return None if self.source.label_name is None else self.output / f"{self.source.label_name}{ENDING}"

    @property
    def sidecar(self) -> Path:
        """Record beside the prepared scan."""
        return self.output / f"{self.source.name}.json"

    @property
    def results(self) -> dict[str, Path]:
        """Role to path, as in `Sidecar.results`."""
        return {"image": self.image, **({} if self.label is None else {"label": self.label})}


def prepare(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    spacing: str | float | Sequence[float | None] | None = None,
    bias_correction: bool | None = None,
    ct: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    series: str | None = None,
    assume_orientation: str | None = None,
    bias_mask: str = "otsu",
    bias_shrink: int = 4,
    bias_iterations: str | Sequence[int] = (50, 50, 50, 50),
    bias_convergence: float = 0.001,
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> PrepareResult:
    """Turn scans to RAS, correct the bias field, resample, and write NIfTI with a JSON sidecar each.

    Results keep the names and folders of the input. A scan that cannot be prepared is named in the result and does not
    stop the others. The same call again skips what is done.

    Args:
        input: a NIfTI file, or a folder with NIfTI files or DICOM series at any depth; files of equal name in
            ``labels`` beside ``images`` are label maps.
        output: folder of the results, another one than ``input``.
        spacing: mm, one number, or three for the axes to the right, anterior and superior, as a list or as text such as
            ``1,1,none`` (``None`` keeps that axis); ``None`` keeps the grid.
        bias_correction: N4, for MR (``--bias_correction=false`` for none). ``None``: yes, except for CT.
        ct: the scans are CT in Hounsfield units, perhaps with 1024 added: ``"keep"`` leaves the values, and says
            which of the two was recognised; ``"hu"`` takes the 1024 away where they are recognised, and refuses a scan
            where neither is. ``None``: no CT; a DICOM series with modality CT is treated as ``"keep"``.
        labels: folder of label maps named as their scans, if they lie elsewhere.
        series: UID of the only DICOM series to take.
        assume_orientation: three letters such as ``"RAS"`` for NIfTI scans whose header names no orientation; ``None``
            refuses them.
        bias_mask: where the bias field is fitted: ``"otsu"``, above Otsu's threshold, or ``"foreground"``, above 0, for
            skull-stripped scans.
        bias_shrink: the bias field is fitted on every so many voxels; along short axes on more, so that 16 are left.
        bias_iterations: the most at each level of the bias field, with commas between them.
        bias_convergence: change of the bias field at which a level ends.
        workers: processes; each holds one scan in memory.
        overwrite: write again what was prepared with other settings or from another file, or was changed since.
        quiet: no progress bar, errors only.
        verbose: everything that is logged, and tracebacks.

    Returns:
        what became of each scan; ``exit_code`` is 0 or 3.

    Raises:
        ConfigError: a setting makes no sense, there is nothing to prepare, or a result exists that is not of this call.
        DataError: two scans would have results of one name.
        ResourceError: the output folder cannot be written, is full, or is used by another run.
    """
    settings = checked_settings(
        spacing, bias_correction, ct, assume_orientation, bias_mask, bias_shrink, bias_iterations, bias_convergence
    )
    if not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers is {workers!r}, expected a whole number from 1")
    folder = Path(output)
    if os.path.realpath(folder) == os.path.realpath(input):
        raise ConfigError(f"output is the input, {folder}: choose another folder, a scan is never replaced")
    sources, findings, left = find_sources(input, labels, series, leave_out=folder)
    jobs = [Job(source, folder, settings) for source in sources]
    refuse_replacing(jobs)
    require_writable(folder)
    lock_folder(folder)
    try:
        with working(quiet=quiet, verbose=verbose):
            for place in sorted({path.parent for job in jobs for path in job.results.values()}):
                sweep_temporaries(place)
            outcomes = [Outcome(finding.file, "failed", message=str(finding)) for finding in findings]
            open_jobs = []
            for job, done in plan(jobs, overwrite):
                if done:
                    outcomes.append(Outcome(job.source.name, "skipped", job.image))
                else:
                    open_jobs.append(job)
            with tqdm(total=len(open_jobs), desc="prepare", unit="scan", disable=True if quiet else None) as bar:
                for outcome in run(open_jobs, workers):
                    bar.update()
                    for note in outcome.notes:
                        logger.warning(note)
                    if outcome.status == "failed":
                        logger.error(outcome.message)
                    if outcome.no_room:
                        raise ResourceError(outcome.message)
                    outcomes.append(outcome)
    finally:
        unlock_folders([folder])
    return PrepareResult(tuple(sorted(outcomes, key=lambda outcome: outcome.name)), summary(left, input))


def checked_settings(
    spacing: float | Sequence[float | None] | None,
    bias_correction: bool | None,
    ct: str | None,
    assume_orientation: str | None,
    bias_mask: str,
    bias_shrink: int,
    bias_iterations: str | Sequence[int],
    bias_convergence: float,
) -> Settings:
    """Settings that make sense. Raises `ConfigError`."""
    if bias_correction not in (None, True, False):
        raise ConfigError(f"bias_correction is {bias_correction!r}, expected true, false or null")
    if ct is not None and ct not in CT_POLICIES:
        raise ConfigError(f"ct is {ct!r}, expected one of {CT_POLICIES} or null")
    if ct is not None and bias_correction:
        raise ConfigError(f"bias_correction is for MR, and ct is {ct!r}: set one of them to null")
    check_axcodes(assume_orientation)
    if bias_mask not in MASKS:
        raise ConfigError(f"bias_mask is {bias_mask!r}, expected one of {MASKS}")
    if not is_whole(bias_shrink) or bias_shrink < 1:
        raise ConfigError(f"bias_shrink is {bias_shrink!r}, expected a whole number from 1")
    if isinstance(bias_iterations, str) and all(part.strip().isdigit() for part in bias_iterations.split(",")):
        bias_iterations = [int(part) for part in bias_iterations.split(",")]
    if not isinstance(bias_iterations, (tuple, list)) or not bias_iterations or not all(map(is_whole, bias_iterations)):
        raise ConfigError(f"bias_iterations is {bias_iterations!r}, expected a list of whole numbers")
    if min(bias_iterations) < 1:
        raise ConfigError(f"bias_iterations is {bias_iterations!r}, expected numbers from 1")
    if not is_number(bias_convergence) or not bias_convergence >= 0:
        raise ConfigError(f"bias_convergence is {bias_convergence!r}, expected a number from 0")
    return Settings(
        spacing=three_sides(spacing),
        bias_correction=bias_correction,
        bias_mask=bias_mask,
        bias_shrink=bias_shrink,
        bias_iterations=tuple(bias_iterations),
        bias_convergence=float(bias_convergence),
        ct=ct,
        assume_orientation=assume_orientation,
    )


def three_sides(spacing: Any) -> tuple[float | None, ...] | None:
    """Spacing of each axis. Raises `ConfigError`."""
    if isinstance(spacing, str):
        spacing = [parsed(part) for part in spacing.split(",")]
        spacing = spacing[0] if len(spacing) == 1 else spacing
    sides = (spacing,) * 3 if spacing is None or is_number(spacing) else spacing
    if not isinstance(sides, (tuple, list)) or len(sides) != 3:
        raise ConfigError(f"spacing is {spacing!r}, expected mm: one number, or three (None keeps an axis)")
    if not all(side is None or (is_number(side) and 0 < side < math.inf) for side in sides):
        raise ConfigError(f"spacing is {spacing!r}, expected mm above 0 (None keeps an axis)")
    return None if spacing is None else tuple(None if side is None else float(side) for side in sides)


def parsed(text: str) -> Any:
    """A number of a text, ``None`` for none; else the text, which is refused later."""
    try:
        return None if text.strip().lower() in ("none", "null") else float(text)
    except ValueError:
        return text


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def refuse_replacing(jobs: Sequence[Job]) -> None:
    """No result may take the place of a source. Raises `ConfigError`."""
    inputs = set()
    for job in jobs:
        files = job.source.image.files if isinstance(job.source.image, Series) else (job.source.image,)
        inputs |= {os.path.realpath(file) for file in (*files, job.source.label) if file is not None}
    for job in jobs:
        for path in (*job.results.values(), job.sidecar):
            if os.path.realpath(path) in inputs:
                raise ConfigError(f"{path} is a scan of the input: choose another output")


def plan(jobs: Sequence[Job], overwrite: bool) -> list[tuple[Job, bool]]:
    """Each job, and whether it is done. Raises `ConfigError` with all results in the way, unless ``overwrite``."""
    planned, findings = [], []
    for job in jobs:
        done, obstacle = state_of(job)
        if obstacle:
            remedy = "set overwrite to true, or choose another output"
            findings.append(Finding("error", str(job.image), obstacle, remedy, ConfigError))
        planned.append((job, done))
    if not overwrite:
        raise_findings(findings)
    return planned


def state_of(job: Job) -> tuple[bool, str]:
    """Whether a job is done, and if it is not, what stands in its way."""
    there = [path for path in job.results.values() if os.path.lexists(path)]
    if not os.path.lexists(job.sidecar):
        return False, "exists, and no sidecar says how it was made" if there else ""
    try:
        sidecar = read_sidecar(job.sidecar)
    except ConfigError as error:
        return False, f"its sidecar is of no use ({error})"
    wanted = job.settings.as_json()
    differing = [
        f"{key} {sidecar.settings.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if sidecar.settings.get(key) != value
    ]
    if differing:
        return False, f"was prepared with {', '.join(differing)}"
    try:
        same = (identity_of(job.source.image), identity_of(job.source.label)) == (sidecar.source, sidecar.label_source)
        if not same:
            return False, "was prepared from a file with other content, or another name"
        if set(sidecar.results) != set(job.results) or len(there) < len(job.results):
            return False, ""
        changed = [p.name for role, p in job.results.items() if sha256_of(p) != sidecar.results[role]["sha256"]]
    except OSError:  # a source or result that cannot be read: preparing it will say so
        return False, ""
    return (False, f"was changed since: {', '.join(changed)}") if changed else (True, "")


def identity_of(file: Path | Series | None) -> dict[str, Any] | None:
    """What a sidecar says about a source; nothing about a person that the file names of the input do not say."""
    if file is None:
        return None
    if isinstance(file, Series):
        return {
            "file": file.folder.resolve().name,
            "kind": "dicom",
            "series_number": file.number,
            "modality": file.modality,
            "slices": len(file.files),
            "sha256": digest_of(file.files),
        }
    return {"file": file.name, "kind": "nifti", "sha256": sha256_of(file)}


def run(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """Outcomes as they come. A worker that is killed takes the scans that are not done yet with it."""
    if workers == 1 or len(jobs) < 2:
        yield from map(prepare_scan, jobs)
        return
    context = get_context("spawn")  # ITK and torch have threads, which a fork does not copy
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = {pool.submit(prepare_scan, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    what = f"{waiting[future].source.image}: not prepared, a worker process was killed"
                    message = f"{what}: if memory ran out, lower workers; the same command does what is left"
                    yield Outcome(waiting[future].source.name, "failed", message=message)
        finally:
            pool.shutdown(cancel_futures=True)


def prepare_scan(job: Job) -> Outcome:
    """Prepare and write one scan; whatever is wrong with it becomes its outcome."""
    name, image = job.source.name, job.source.image
    try:
        with naming_memory_errors(f"preparing {image}", "workers"):
            sidecar, voxels, label, notes = prepared(job)
    except MAPSegError as error:
        return Outcome(name, "failed", message=str(error))
    except Exception as error:  # one scan must not end the batch, whatever ITK finds
        logger.debug("unexpected", exc_info=True)
        what = " ".join(str(error).split()) or type(error).__name__
        return Outcome(
            name, "failed", message=f"{image}: {type(error).__name__} ({what}): leave the scan out, report it"
        )
    try:
        store(job, sidecar, voxels, label)
    except MAPSegError as error:
        return Outcome(name, "failed", message=str(error), no_room=isinstance(error, ResourceError))
    return Outcome(name, "done", job.image, notes=tuple(f"{image}: {note}" for note in notes))


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
    shape, grid = spaced_grid(voxels.shape, canonical, settings.spacing or (None,) * 3)
    if not np.array_equal(grid, canonical):
        steps.append(
            {
                "step": "resample",
                "from_spacing_mm": spacing_of(canonical).tolist(),
                "to_spacing_mm": spacing_of(grid).tolist(),
                "from_shape": list(voxels.shape),
                "to_shape": list(shape),
                "image": "linear",
                "label": "nearest",
            }
        )
        voxels = resample(voxels, canonical, shape, grid, "linear")
        if label is not None:
            before = set(np.unique(label).tolist())
            label = resample(label, canonical, shape, grid, "nearest")
            lost = sorted(before - set(np.unique(label).tolist()))
            if lost:
                steps[-1]["lost_label_values"] = lost
                notes.append(f"at this spacing no voxel of its label values {lost} is left")
    sidecar = Sidecar(
        source=identity_of(source.image) or {},
        label_source=identity_of(source.label),
        settings=settings.as_json(),
        native=native,
        prepared=Grid(tuple(shape), grid.tolist()),
        steps=steps,
        versions=versions(),
    )
    return sidecar, voxels, label, notes


def check(name: str, scan: Scan, label_path: Path | None, label: Scan | None, settings: Settings) -> list[str]:
    """Warnings about a scan and its label map. Raises what is wrong with them, as training would."""
    audit = Audit(assume_orientation=settings.assume_orientation)
    facts = facts_of_scan(scan, with_values=False)
    audit.geometry(name, facts)
    if facts.not_finite:
        what = f"{facts.not_finite} voxels are NaN or infinite, the first at {facts.first_not_finite}"
        audit.add(name, what, "repair it or leave the scan out")
    elif facts.lowest == facts.highest:
        audit.add(name, f"all voxels are {facts.lowest:g}, no contrast to segment", "leave the scan out")
    if label is not None:
        found = facts_of_scan(label, with_values=True)
        audit.geometry(str(label_path), found)
        audit.pair(str(label_path), found, facts)
        check_values(audit, str(label_path), found)
    raise_findings(finding for finding in audit.findings if finding.severity == "error")
    return [f"{finding.what}: {finding.remedy}" for finding in audit.findings]


def check_values(audit: Audit, path: str, facts: Facts) -> None:
    """A label map has whole numbers that NIfTI's int16 holds."""
    if facts.not_finite:
        what = f"{facts.not_finite} voxels are NaN or infinite, the first at {facts.first_not_finite}"
        audit.add(path, what, "repair it or leave the scan out")
        return
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


def store(job: Job, sidecar: Sidecar, voxels: np.ndarray, label: np.ndarray | None) -> None:
    """Write results, each read back and compared, then the sidecar, and only then give the results their names.

    So a run that is killed leaves no result without a sidecar, and one whose disk fills up leaves all as it was.

    Raises:
        NonFiniteError: a voxel is infinite. ResourceError: the output folder is full or cannot be written.
    """
    assert sidecar.prepared is not None
    affine, results = np.array(sidecar.prepared.affine), {}
    contents = {"image": SaveVolume().typed(voxels, job.image)}
    if label is not None and job.label is not None:
        contents["label"] = SaveLabelMap().typed(label, job.label)
    with contextlib.ExitStack() as stack:
        for role, content in contents.items():
            path = job.results[role]
            temporary = stack.enter_context(replacing(path))
            write_verified(temporary, content, affine, path)
            results[role] = {"file": path.name, "sha256": sha256_of(temporary)}
        write_sidecar(replace(sidecar, results=results), job.sidecar)
