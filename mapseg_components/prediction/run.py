# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The scans of ``mapseg predict``, one after the other: read, segmented, written; an error is that of one scan."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose

from mapseg_components.errors import MAPSegError, ResourceError, user_error
from mapseg_components.keys import IMAGE
from mapseg_components.memory import memory_of
from mapseg_components.prediction.bundle import SAVING, InferenceBundle
from mapseg_components.prediction.intake import Todo
from mapseg_components.prediction.journal import Journal
from mapseg_components.prediction.overlap import in_stages
from mapseg_components.prediction.writing import Writer
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.session import progress

__all__ = ["Run"]

logger = logging.getLogger(__name__)

Around = Callable[[Todo, Mapping[str, Any]], contextlib.AbstractContextManager[None]]
# Bytes per voxel while one scan is read, one segmented and one written; measured in docs/reference/command_line.md
BYTES_OVERLAPPED, BYTES_A_CLASS = 70, 4
SAVES = 100  # of the journal in a run, about: each takes time in proportion to the scans, as would one after every scan


class Run:
    """Segments what can be segmented with a bundle, and notes what became of it.

    Args:
        bundle: what runs, with its weights in the network.
        journal: of all scans.
        writer: of their files.
        todo: what is to be segmented, each with its case; at least one.
        quiet: no progress bars.
        overlap: read the next scan and write the one before while the network works on one.
        around: context in which a scan, of which it gets the batch, is segmented; by default none.
    """

    def __init__(
        self,
        bundle: InferenceBundle,
        journal: Journal,
        writer: Writer,
        todo: Sequence[Todo],
        quiet: bool = False,
        overlap: bool = True,
        around: Around | None = None,
    ) -> None:
        self.around = around or no_context
        self.bundle, self.journal, self.writer, self.todo = bundle, journal, writer, todo
        self.quiet, self.overlap = quiet, overlap
        self.together = -(-len(journal.predictions) // SAVES)  # scans that are claimed, and noted as done, at once
        self.unsaved = 0
        self.noted, self.ahead = set[str](), set[str]()  # cases whose claim is written; of these, those new with it
        self.output: dict[str, Any] = {}  # of the evaluator's last iteration
        self.evaluator: Engine = bundle["evaluator"]
        self.evaluator.interrupt_resume_enabled = False  # else the run after one that raised would do nothing
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.take)
        self.dataset, self.collate = bundle["dataset"], self.evaluator.data_loader.collate_fn
        self.saving = split(bundle["postprocessing"])

    def all(self) -> None:
        """Read, segment and write each scan."""
        with progress(None, "segmenting", self.quiet, len(self.todo)) as bar:

            def write(todo: Todo, output: dict[str, Any]) -> None:
                self.write(todo, output)
                bar.update()

            try:
                in_stages(self.todo, self.read, self.segment, write, self.overlap and self.memory_allows_overlap())
            finally:
                for one, _ in self.todo:
                    one.seconds = None if one.status == "not done" else one.seconds

    def memory_allows_overlap(self) -> bool:
        """Whether three of the largest scans together take at most half of the memory."""
        voxels = max(voxels_of(case[IMAGE]) for _, case in self.todo)
        channels = (len(self.bundle.names) + 1) * (2 if self.bundle.uncertainty else 1)
        needed = voxels * (BYTES_OVERLAPPED + BYTES_A_CLASS * channels)
        available = memory_of("cpu")
        if available is None or 2 * needed <= available:
            return True
        found = f"{needed / 2**30:.1f} GiB, more than half of {available / 2**30:.1f} GiB"
        logger.info(f"Scans are segmented one after the other: several at once would take {found}.")
        return False

    @contextlib.contextmanager
    def stage(self, todo: Todo) -> Iterator[None]:
        """Context of a stage of a scan, whose error ends this scan alone, and whose seconds are counted."""
        one, case = todo
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.journal.failed(one, user_error(error) or origin(error), case[IMAGE])
        finally:
            one.seconds = round((one.seconds or 0.0) + time.monotonic() - started, 2)

    def read(self, todo: Todo) -> dict[str, Any] | None:
        """A scan as the network takes it, a batch of one; ``None`` if that failed."""
        with self.stage(todo):
            self.dataset.data = [todo[1]]
            return self.collate([self.dataset[0]])
        return None

    def segment(self, todo: Todo, batch: dict[str, Any] | None) -> dict[str, Any] | None:
        """All that runs on the device, from the network up to saving; what is to be saved lies on the CPU."""
        if batch is None:
            return None
        loader, engine, output = [batch], self.evaluator, None
        with self.stage(todo), self.around(todo, batch):
            engine.data_loader, engine.state.epoch_length = loader, 1
            engine.run()
            output = self.output
        loader.clear()  # no more references to the scan than the one that is returned
        self.output, engine.state.batch, engine.state.output = {}, None, None
        return output

    def take(self, engine: Engine) -> None:
        """Take the output of an iteration from the device."""
        output = engine.state.output[0]
        self.output = {key: value.cpu() if torch.is_tensor(value) else value for key, value in output.items()}

    def write(self, todo: Todo, output: dict[str, Any] | None) -> None:
        """Save what the network made of a scan, and note that it is done, so that a run that is killed can go on."""
        one, case = todo
        if output is not None:
            with self.stage(todo):
                self.claim(todo)
                place = self.writer.output.places[one.case]
                self.journal.volumes += self.writer.keep(one, case, place, self.saving(output))
                one.status = "done"
            self.unsaved += 1
            if self.unsaved >= self.together:
                with contextlib.suppress(ResourceError):  # a full disk is reported by the next claim, or at the end
                    self.journal.save()
                    self.unsaved = 0
        elif one.case in self.ahead:
            one.claimed = False  # it has no files
        if one.series is not None:
            Path(case[IMAGE]).unlink(missing_ok=True)

    def claim(self, todo: Todo) -> None:
        """Have the manifest say that the files of this scan, and of the next ones, are this run's, before they are."""
        if todo[0].case in self.noted:
            return
        place = next(number for number, other in enumerate(self.todo) if other[0] is todo[0])
        chosen = [one for one, _ in self.todo[place : place + self.together]]
        new = [one.case for one in chosen if not one.claimed]
        for one in chosen:
            one.claimed = True
        self.ahead.update(new)  # known here even if the disk is full
        self.journal.write_manifest()
        self.noted.update(one.case for one in chosen)


def no_context(todo: Todo, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """A scan is segmented as it is."""
    return contextlib.nullcontext()


def voxels_of(scan: str) -> int:
    """Number of voxels by a scan's header; 0 if that cannot be read: reading the scan reports why."""
    try:
        return math.prod(read_geometry(scan).shape)
    except MAPSegError:
        return 0


def origin(error: BaseException) -> BaseException:
    """The error that MONAI wraps into one which only names a transform."""
    return error if error.__cause__ is None else origin(error.__cause__)


def split(postprocessing: Compose) -> Compose:
    """Take saving, and what comes after it, out of a bundle's postprocessing; returns what was taken."""
    steps = postprocessing.transforms
    saving = next(i for i, step in enumerate(steps) if type(step).__name__.endswith(SAVING))
    taken = copy.copy(postprocessing)
    postprocessing.transforms, taken.transforms = steps[:saving], steps[saving:]
    return taken
