# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of a run besides its weights: its history by epoch, volumes and Dice of its label maps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.networks.utils import one_hot

from mapseg_components.data import structure_volumes, write_volumes_csv
from mapseg_components.data.datalist import stem
from mapseg_components.files import free_space_error, replacing, write_json
from mapseg_components.handlers.outputs import affine_of, cases_of, free_name, label_map_of, loss_terms
from mapseg_components.keys import CASE_ID, LABEL, PRED

__all__ = ["DiceReport", "EpochHistory", "VolumesTable"]


class EpochHistory:
    """Append one JSON line per training epoch: the mean of every loss term, metrics, learning rate and seconds.

    Loss terms are the scalars of a trainer's output, ``loss`` among them.

    Args:
        output_dir: folder of ``history.jsonl``. A resumed run appends to the same file; epochs that it repeats replace
            their lines. A new run renames an earlier file to ``history.previous.jsonl``.
        optimizer: for the learning rate.

    Raises:
        ConfigError: while running, the trainer's output has no ``loss``.
        ResourceError: while running, the file cannot be written.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import EpochHistory
        >>> engine = Engine(lambda engine, batch: {"loss": float(batch)})
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     EpochHistory(folder, optimizer).attach(engine)
        ...     state = engine.run([1, 2, 3])
        ...     line = json.loads(Path(folder, "history.jsonl").read_text())
        >>> line["epoch"], line["iteration"], line["learning_rate"], line["loss"]
        (1, 3, 0.1, 2.0)
    """

    def __init__(self, output_dir: str, optimizer: torch.optim.Optimizer) -> None:
        self.path = Path(output_dir) / "history.jsonl"
        self.optimizer = optimizer
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._started = 0.0
        self._learning_rate = 0.0

    def attach(self, engine: Engine) -> None:
        """Sum over iterations, write at the end of an epoch."""
        engine.add_event_handler(Events.STARTED, self._keep_lines_of_done_epochs)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._accumulate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def state_dict(self) -> dict[str, Any]:
        """Sums and seconds of the epoch that runs."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "seconds": time.monotonic() - self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._started = time.monotonic() - state["seconds"]

    def _keep_lines_of_done_epochs(self, engine: Engine) -> None:
        if idist.get_rank() != 0 or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if 0 < epoch_of_line(line) <= engine.state.epoch]
        if kept != lines:
            with replacing(self.path, keep_previous=self.path.with_name("history.previous.jsonl")) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _reset(self, engine: Engine) -> None:
        engine.state.metrics.clear()
        if engine.state.iteration % engine.state.epoch_length == 0:  # else it was resumed within the epoch
            self._sums, self._counts, self._started = {}, {}, time.monotonic()

    def _accumulate(self, engine: Engine) -> None:
        self._learning_rate = self.optimizer.param_groups[0]["lr"]  # at the epoch's end the schedule may have stepped
        for name, value in loss_terms(engine).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of every loss term over the iterations of the epoch so far."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def _write(self, engine: Engine) -> None:
        if idist.get_rank() != 0:
            return
        line = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "seconds": round(time.monotonic() - self._started, 2),
            "learning_rate": self._learning_rate,
            **self.means(),
            **{name: float(value) for name, value in engine.state.metrics.items() if np.isscalar(value)},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise free_space_error(self.path, error) from error


def epoch_of_line(line: str) -> int:
    """Epoch of a line of the history; 0 for a line that was cut off while it was written."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


class VolumesTable:
    """Write ``volumes.csv`` for the label maps of an evaluator: voxels and mm3 per structure, and an edge flag.

    Attach it to an evaluator whose output ``pred`` is the label map (1, X, Y, Z) on the scan's original grid. Each run
    of the evaluator replaces the table, as a whole.

    Args:
        output_dir: folder of the table.
        names: structures in the order of their class index, background left out.

    Raises:
        ConfigError: while running, the output is no label map of these classes with a voxel size.
        ResourceError: the file cannot be written.

    Examples:
        >>> import csv, tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai.data import MetaTensor
        >>> from mapseg_components.handlers import VolumesTable
        >>> label_map = MetaTensor(torch.ones(1, 3, 4, 5), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
        >>> engine = Engine(lambda engine, batch: [{"pred": label_map}])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     VolumesTable(folder, ["liver"]).attach(engine)
        ...     state = engine.run([[{"case_id": "a"}]])
        ...     row = next(csv.DictReader(Path(folder, "volumes.csv").read_text().splitlines()))
        >>> row["case"], row["structure"], row["voxels"], float(row["volume_mm3"])  # voxels of 8 mm3
        ('a', 'liver', '60', 480.0)
    """

    def __init__(self, output_dir: str, names: list[str]) -> None:
        self.path = Path(output_dir) / "volumes.csv"
        self.names = list(names)
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Collect after each scan, write at the end."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for batch, case in cases_of(engine):
            label_map = label_map_of(case, PRED, len(self.names) + 1)
            for row in structure_volumes(label_map.numpy(), np.asarray(affine_of(case, PRED)), self.names):
                self.rows.append({"case": case_name(batch, case), **row})

    def _write(self, engine: Engine) -> None:
        write_volumes_csv(self.rows, self.path)


class DiceReport:
    """Write ``metrics.json``: Dice per case and structure and their means, on the scans' original grids.

    Attach it to an evaluator whose output holds ``pred`` and ``label`` (1, X, Y, Z) of class indices. A structure that
    is absent from the truth of a case is ``null`` there and left out of the means. Each run of the evaluator replaces
    the file, as a whole; cases of one name are numbered.

    Args:
        output_dir: folder of the file.
        names: structures in the order of their class index, background left out.
        settings: further entries of the file, e.g. the weights' path.

    Raises:
        ConfigError: while running, the output does not hold two label maps of these classes.
        ResourceError: the file cannot be written.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import DiceReport
        >>> label_map = torch.ones(1, 3, 4, 5)
        >>> engine = Engine(lambda engine, batch: [{"pred": label_map, "label": label_map}])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DiceReport(folder, ["liver", "spleen"]).attach(engine)
        ...     state = engine.run([[{"case_id": "a"}]])
        ...     json.loads(Path(folder, "metrics.json").read_text())["cases"]
        {'a': {'liver': 1.0, 'spleen': None}}
    """

    def __init__(self, output_dir: str, names: list[str], settings: dict[str, Any] | None = None) -> None:
        self.path = Path(output_dir) / "metrics.json"
        self.names = list(names)
        self.settings = settings or {}
        self.cases: dict[str, dict[str, float | None]] = {}

    def attach(self, engine: Engine) -> None:
        """Measure after each scan, write at the end."""
        engine.add_event_handler(Events.STARTED, lambda _: self.cases.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _measure(self, engine: Engine) -> None:
        classes = len(self.names) + 1
        for batch, case in cases_of(engine):
            maps = [one_hot(label_map_of(case, key, classes)[None, None], classes) for key in (PRED, LABEL)]
            dice = compute_dice(*maps, include_background=False)[0].tolist()
            present = maps[1].flatten(2).any(dim=2)[0, 1:].tolist()
            self.cases[free_name(self.cases, case_name(batch, case))] = {
                name: value if there else None for name, value, there in zip(self.names, dice, present)
            }

    def _write(self, engine: Engine) -> None:
        def mean(values: list[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        structures = {name: mean([case[name] for case in self.cases.values()]) for name in self.names}
        content = {
            **self.settings,
            "metric": "Dice",
            "cases": self.cases,
            "structures": structures,
            "mean": mean(list(structures.values())),
        }
        write_json(content, self.path)


def case_name(batch: dict[str, Any], output: dict[str, Any]) -> str:
    """Case id of a decollated batch, or the file name of its label map's scan."""
    pred = output[PRED]
    name = pred.meta.get("filename_or_obj", "case") if isinstance(pred, MetaTensor) else "case"
    return str(batch.get(CASE_ID) or stem(Path(str(name))))
