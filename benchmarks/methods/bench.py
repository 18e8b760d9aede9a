# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The runs of a benchmark: which are to be done, how long each may be, what each gave."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods.budget import costs_of
from benchmarks.methods.curve import curve_of, curve_table, draw_curves, keep_weights
from benchmarks.methods.figure import draw
from benchmarks.methods.processes import StoppedError, Usage, last_line, run_mapseg
from benchmarks.methods.report import summary_of, tables
from benchmarks.methods.scoring import CommandError, finished, refuse_seen, score
from benchmarks.methods.task import Task, as_json, write_inputs
from benchmarks.methods.variants import Variant, slug
from benchmarks.timing import machine
from mapseg_components.errors import ConfigError, MAPSegError, ResourceError
from mapseg_components.files import lock_folder, require_writable, unlock_folders, write_json, write_text
from mapseg_components.plans.recipes import read_recipe, recipe_names
from mapseg_components.plans.rounds import REQUIRED
from mapseg_components.session import versions

__all__ = ["Bench"]

STOP_AT = 1.25  # of the budget: a run that used more is ended
SHORTEST = 1e-6  # factor that leaves each stage the fewest epochs
DECIMALS = 4
ADAPTATION_LENGTH = "adaptation_length"  # argument of mapseg adapt that a budget sets, or a task without one may set
Command = Callable[..., Usage]


class Bench:
    """A benchmark in its folder.

    Args:
        task: what is compared on.
        folder: of this benchmark's runs, records and results.
        settings: of ``mapseg adapt``, for all methods, on top of the task's.
        budget_minutes: processor minutes of each run, or ``None``.
        source_length: factor of the epochs of the stages up to the source-only model, the same for all methods, so that
            those that begin with the same model train it once; without, one factor for all stages of a run.
        jobs: runs at a time.
        knobs: content of the file of variants, if that is what is compared.
        curve: whether the weights of every moment are kept and scored; no run takes over stages of another one then.
        command: runs ``mapseg``; another one in tests.

    Raises:
        ConfigError: there are fewer processor cores than jobs.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        *,
        settings: dict[str, Any] | None = None,
        budget_minutes: float | None = None,
        source_length: float | None = None,
        jobs: int = 1,
        knobs: dict[str, Any] | None = None,
        curve: bool = False,
        command: Command = run_mapseg,
    ) -> None:
        self.task, self.folder, self.knobs, self.curve, self.command = task, folder, knobs, curve, command
        self.settings = {**task.settings, **(settings or {})}
        self.budget_minutes, self.source_length = budget_minutes, source_length
        self.stop = threading.Event()
        self.writing = threading.Lock()
        self.calibrating: dict[str, threading.Lock] = {}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * (os.cpu_count() or 1)
        if not 1 <= jobs <= len(cores):
            raise ConfigError(f"jobs is {jobs}, expected 1 to {len(cores)}, a processor core for each")
        self.jobs = jobs
        self.cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for core in cores[:jobs]:
            self.cores.put(core)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Context in which the folder is this process's. Raises `ResourceError`, `ConfigError` if it is of another
        task, budget or settings."""
        require_writable(self.folder)
        lock_folder(self.folder)
        try:
            same = {"task": as_json(self.task), "budget_minutes": self.budget_minutes, "settings": self.settings}
            same |= {"source_length": self.source_length, "knobs": self.knobs, "curve": self.curve}
            same = json.loads(json.dumps(same))
            path = self.folder / "benchmark.json"
            if path.is_file():
                earlier = {"curve": False, **json.loads(path.read_text(encoding="utf-8"))}
                changed = [name for name in same if earlier.get(name) != same[name]]
                if changed:
                    raise ConfigError(
                        f"{self.folder} has results of another {', '.join(changed)}: repeat that, or choose another "
                        "output"
                    )
            write_json(same, path)
            self.inputs = write_inputs(self.task, self.folder / "inputs")
            yield
        finally:
            unlock_folders([self.folder])

    def run(self, variants: Sequence[Variant], seeds: Sequence[int], retry: bool = False) -> None:
        """Every variant by every seed that has no record yet.

        Raises:
            ConfigError: arguments of the task or a variant set what the budget sets.
            StoppedError: `stop` is set.
        """
        self.calibrating = {variant.name: threading.Lock() for variant in variants}
        for arguments in (self.task.arguments, *(variant.arguments for variant in variants)):
            if self.budget_minutes is not None and ADAPTATION_LENGTH in arguments:
                raise ConfigError(
                    f"{ADAPTATION_LENGTH} is set, and the budget of {self.budget_minutes:g} minutes sets it, too: "
                    "leave one of them out"
                )
        todo = [(variant, seed) for seed in dict.fromkeys(seeds) for variant in variants]
        todo = [(variant, seed) for variant, seed in todo if self._is_due(f"{slug(variant.name)}_{seed}", retry)]
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run, variant, seed) for variant, seed in todo]
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None and not isinstance(error, StoppedError):
                raise error  # a fault of the benchmark, not of a method
        if self.stop.is_set():
            raise StoppedError

    def score_runs(self, runs: Sequence[Path], name: str | None = None) -> None:
        """Score finished runs of ``mapseg adapt`` that lie elsewhere; nothing is trained, and nothing written there.

        Args:
            runs: their folders.
            name: in tables.

        Raises:
            ConfigError: a run is not finished, or has the name and seed of another one.
            DataError: a run was trained on test scans, or for other structures.
        """
        for run in runs:
            found = finished(run)
            refuse_seen(run, self.task)
            request = found["request"]
            title = name or f"{request['method']}, run by hand"
            key = f"{slug(title)}_{request['seed']}"
            earlier = self._record(key)
            if earlier is not None and earlier.get("from") != str(run):
                raise ConfigError(
                    f"{title}, seed {request['seed']} is {earlier.get('from') or 'here'} already: set name"
                )
            if earlier is not None and earlier["state"] == "done":
                continue
            by_processor = found.get("processor_seconds") or {}
            times = by_processor or found["seconds"]
            record = {
                **{"name": title, "method": request["method"], "seed": request["seed"]},
                **{"oracle": False, "from": str(run)},
                **{"settings": request["settings"] or {}, "length": request.get("length", 1.0), "peak_bytes": None},
                **{"processor_seconds": sum(times.values()), "by_the_clock": not by_processor},
            }
            with self._core() as core:
                self._score(record, key, run, core)

    def write(self) -> dict[str, Any]:
        """Write results.json, results.md and results.png from all records; returns the content of the first."""
        with self.writing:
            results = self._results()
            if results["runs"]:
                write_json(results, self.folder / "results.json")
                curve = f"\n{curve_table([results])}\n" if self.curve else ""
                write_text(f"{tables(results)}\n{curve}", self.folder / "results.md")
                draw(results, self.folder / "results.png")
                if self.curve:
                    draw_curves([results], self.folder / "curve.png")
        return results

    def _results(self) -> dict[str, Any]:
        files = [path for path in (self.folder / "records").glob("*.json") if not path.name.startswith(".")]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        names = list(self.knobs["variants"]) if self.knobs else recipe_names()
        place = {name: number for number, name in enumerate(names)}
        last = len(place)
        records.sort(key=lambda run: (run["oracle"], place.get(run["name"], last), run["name"], run["seed"]))
        facts = machine(torch.device("cpu"))
        return {
            "task": {
                **{"name": self.task.name, "title": self.task.title, "labels": self.task.labels},
                **{"tolerance_mm": self.task.tolerance_mm, "test_cases": len(self.task.parts["test"])},
                "cases": {name: [case["case_id"] for case in cases] for name, cases in self.task.parts.items()},
            },
            "budget_minutes": self.budget_minutes,
            "source_length": self.source_length,
            "settings": self.settings,
            "knobs": self.knobs,
            "machine": f"{facts['processor']}, one thread for each run, {self.jobs} at a time",
            "versions": versions(),
            "runs": records,
            "summary": summary_of(records),
        }

    def _is_due(self, key: str, retry: bool) -> bool:
        record = self._record(key)
        if record is None:
            return True
        # memory, disk or a run that another process has: it may be otherwise now
        return record["state"] == "failed" and (retry or record["code"] == ResourceError.exit_code)

    def _record(self, key: str) -> dict[str, Any] | None:
        path = self.folder / "records" / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @contextlib.contextmanager
    def _core(self) -> Iterator[int | None]:
        core = self.cores.get()
        try:
            yield core
        finally:
            self.cores.put(core)

    def _run(self, variant: Variant, seed: int) -> None:
        """One variant by one seed: a record of what it gave, or why it failed."""
        if self.stop.is_set():
            raise StoppedError
        key = f"{slug(variant.name)}_{seed}"
        record = {
            **{"name": variant.name, "method": variant.method, "seed": seed, "oracle": variant.oracle},
            **{"settings": {**self.settings, **variant.settings}, "from": None, "length": 1.0},
            **{"processor_seconds": None, "peak_bytes": None},
        }
        folder = self.folder / "runs" / key
        with self._core() as core:
            try:
                record["length"] = self._length(variant, seed, core)
                self._adapt(variant, seed, folder, record, core)
            except (CommandError, MAPSegError) as error:
                code = error.code if isinstance(error, CommandError) else error.exit_code
                self._finish({**record, "state": "failed", "error": str(error), "code": code}, key)
                return
            self._score(record, key, folder, core)

    def _score(self, record: dict[str, Any], key: str, run: Path, core: int | None) -> None:
        def command(words: Sequence[str]) -> Usage:
            return self._call(words, key, core)

        try:
            places = run, self.folder / "scores" / key
            found = score(*places, self.task, self.inputs, command)
            if self.curve:
                kept, output = self.folder / "kept" / key, places[1] / "kept"
                found["curve"] = curve_of(run, kept, output, self.task, self.inputs, command)
            self._finish({**record, "state": "done", **found}, key)
        except (CommandError, MAPSegError) as error:
            code = error.code if isinstance(error, CommandError) else error.exit_code
            self._finish({**record, "state": "failed", "error": f"scoring: {error}", "code": code}, key)

    def _finish(self, record: dict[str, Any], key: str) -> None:
        write_json(record, self.folder / "records" / f"{key}.json")
        self.write()
        minutes = "" if record["processor_seconds"] is None else f", {record['processor_seconds'] / 60:.1f} minutes"
        outcome = "done" if record["state"] == "done" else f"failed: {record['error']}"
        print(f"{record['name']}, seed {record['seed']}{minutes}: {outcome}", flush=True)

    def _call(self, words: Sequence[str], key: str, core: int | None, **more: Any) -> Usage:
        """A command of ``mapseg``, logged. Raises `CommandError` and `StoppedError`."""
        if self.stop.is_set():
            raise StoppedError
        log = self.folder / "logs" / f"{key}.txt"
        used = self.command(words, log, core=core, stop=self.stop, **more)
        if used.code and not used.over:
            raise CommandError(last_line(log, used.code, self.folder), used.code)
        return used

    def _words(self, variant: Variant, seed: int, folder: Path, length: float, more: dict[str, Any]) -> list[str]:
        """``mapseg adapt`` as a user types it."""
        data = self.inputs.oracle if variant.oracle else self.inputs.datalist
        settings = {**self.settings, **more, **variant.settings}
        given = {"initial_model": False, **self.task.arguments, **variant.arguments}  # methods are compared
        words = ["adapt", f"--source={data}", f"--target={data}", f"--output={folder}", f"--method={variant.method}"]
        words += [f"--seed={seed}", "--num_threads=1"]
        words += [f"--settings={json.dumps(settings)}"] if settings else []
        if self.source_length is None:
            words += [f"--length={length}"] if length != 1 else []
        else:
            words += [f"--length={self.source_length}"]
            words += [] if ADAPTATION_LENGTH in given else [f"--{ADAPTATION_LENGTH}={length}"]
        others = [] if self.curve else [run for run in self._runs() if run != folder]
        words += [f"--reuse={','.join(map(str, others))}"] if others else []
        return words + [f"--{name}={text_of(value)}" for name, value in given.items()]

    def _runs(self) -> list[Path]:
        """Folders of all runs so far, whose stages may be the same as those of another one."""
        runs = [path.parent for path in (self.folder / "runs").glob("*/run.json")]
        measured = [] if self.source_length is None else (self.folder / "calibration").glob("*.json")
        # its file is written when it is finished; one that is not may be made anew by another job
        folders = [path.with_name(path.stem) for path in measured]
        return sorted([*runs, *(folder for folder in folders if (folder / "run.json").is_file())])

    def _adapt(self, variant: Variant, seed: int, folder: Path, record: dict[str, Any], core: int | None) -> None:
        """Train, unless that is done; what was used before a stop counts. Raises `CommandError` and `StoppedError`."""
        key = folder.name
        path = self.folder / "used" / f"{key}.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "peak": 0}
        record |= {"processor_seconds": before["seconds"], "peak_bytes": before["peak"]}
        if before.get("done"):
            return
        limit = None
        if self.budget_minutes is not None:
            limit = max(self.budget_minutes * 60 * STOP_AT - before["seconds"], 1.0)

        def keep(seconds: float, peak: int = 0, done: bool = False) -> None:
            spent = {"seconds": round(before["seconds"] + seconds, 1), "peak": max(before["peak"], peak), "done": done}
            write_json(spent, path)
            if self.curve:
                keep_weights(folder, variant.method, self.folder / "kept" / key, spent["seconds"])
            record.update(processor_seconds=spent["seconds"], peak_bytes=spent["peak"])

        words = self._words(variant, seed, folder, record["length"], {})
        used = self._call(words, key, core, limit=limit, on_used=keep)
        found = {} if used.over else finished(folder)
        trained = found.get("processor_seconds", {})
        # a command that outlived a killed benchmark has written what its stages used
        seconds = max(used.processor_seconds + reused_seconds(found), sum(trained.values()) - before["seconds"])
        keep(seconds, used.peak_bytes, not used.over)
        if used.over:
            raise CommandError(
                f"ended after {record['processor_seconds'] / 60:.1f} processor minutes, more than {STOP_AT:g} times "
                f"the budget of {self.budget_minutes:g}",
                used.code,
            )

    def _length(self, variant: Variant, seed: int, core: int | None) -> float:
        """Factor of the epochs by which a run takes the budget; measured once per variant, by its shortest run.

        Raises:
            CommandError: the shortest run failed, or does not fit.
            ResourceError: another process still makes the shortest run.
        """
        if self.budget_minutes is None:
            return 1.0
        name = slug(variant.name)
        with self.calibrating[variant.name]:
            path, folder = self.folder / "calibration" / f"{name}.json", self.folder / "calibration" / name
            if not path.is_file():
                if folder.is_dir():  # of a benchmark that was killed, whose command may still run
                    lock_folder(folder)
                    unlock_folders([folder])
                    shutil.rmtree(folder, ignore_errors=True)
                # the stage for targets as they are is measured, too, unless the source-only model will be the same
                order = {"target_inverted": False} if self.source_length is None else {}
                # pseudo labels of two epochs may lack a structure
                all_kept = {} if read_recipe(variant.method).rounds is None else {REQUIRED: []}
                words = self._words(variant, seed, folder, SHORTEST, {**order, **all_kept, **self.settings})
                try:
                    used = self._call(words, f"{name}_calibration", core, limit=self.budget_minutes * 60 * STOP_AT)
                except CommandError as error:
                    raise CommandError(f"its shortest run, to measure its speed: {error}", error.code) from error
                seconds = used.processor_seconds
                if used.over:
                    found: dict[str, Any] = {"length": None, "shortest": seconds}
                else:
                    whole = seconds + reused_seconds(finished(folder))
                    costs = costs_of(folder, whole, self.source_length)
                    length = costs.length_for(self.budget_minutes * 60)
                    found = {"length": length, "shortest": costs.predicted(SHORTEST), "costs": asdict(costs)}
                write_json({**found, "processor_seconds": seconds}, path)
                if self.source_length is None:  # its source stages are too short for others
                    shutil.rmtree(folder, ignore_errors=True)
            found = json.loads(path.read_text(encoding="utf-8"))
        if found["length"] is None:
            raise CommandError(
                f"the budget of {self.budget_minutes:g} processor minutes is too small: the shortest run, two epochs "
                f"of each stage, needs {found['shortest'] / 60:.1f}",
                ConfigError.exit_code,
            )
        return max(int(found["length"] * 10**DECIMALS) / 10**DECIMALS, SHORTEST)


def reused_seconds(record: Mapping[str, Any]) -> float:
    """Processor seconds of the stages that a run took over, which count as if it had trained them."""
    return float(sum(record.get("processor_seconds", {}).get(name, 0.0) for name in record.get("reused", {})))


def text_of(value: Any) -> str:
    """A value as ``mapseg`` reads it."""
    return value if isinstance(value, str) else json.dumps(value)
