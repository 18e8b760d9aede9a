# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg prepare``: scans as they come to scans as models want them, and a record of the way back for each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mapseg_components.data.left_out import summary
from mapseg_components.data.sources import find_sources
from mapseg_components.errors import ConfigError, ResourceError
from mapseg_components.files import lock_folder, require_writable, sweep_temporaries, unlock_folders
from mapseg_components.preparation.jobs import Job, plan, refuse_replacing
from mapseg_components.preparation.records import Outcome, PrepareResult
from mapseg_components.preparation.run import run
from mapseg_components.preparation.settings import checked_settings
from mapseg_components.session import progress, working

__all__ = ["Outcome", "PrepareResult", "prepare"]

logger = logging.getLogger(__name__)


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
            for outcome in progress(run(open_jobs, workers), "preparing", quiet, len(open_jobs)):
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
