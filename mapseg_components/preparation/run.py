# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""All scans of ``mapseg prepare``, by one process or several: prepared, written, verified."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch

from mapseg_components.errors import MAPSegError, ResourceError
from mapseg_components.files import replacing, sha256_of
from mapseg_components.memory import naming_memory_errors
from mapseg_components.preparation.jobs import Job
from mapseg_components.preparation.processing import prepared
from mapseg_components.preparation.records import Outcome
from mapseg_components.scans.sidecars import Sidecar, write_sidecar
from mapseg_components.transforms.saving import SaveLabelMap, SaveVolume, write_verified

__all__ = ["prepare_scan", "run", "store"]

logger = logging.getLogger(__name__)


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


def store(job: Job, sidecar: Sidecar, voxels: np.ndarray, label: np.ndarray | None) -> None:
    """Write results, each read back and compared, then the sidecar, and only then give the results their names.

    So a run that is killed leaves no result without a sidecar, and one whose disk fills up leaves all as it was.

    Raises:
        NonFiniteError: a voxel is infinite.
        ResourceError: the output folder is full or cannot be written.
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
