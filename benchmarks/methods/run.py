# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Methods of mapseg adapt side by side on a task, as a user runs them (docs/reference/benchmark.md).

make benchmark TASK=benchmarks/methods/tasks/adult_t1_to_t2.yaml BUDGET=20 JOBS=2
python -m benchmarks.methods.run TASK [--data DIR] [--methods mapseg mean_teacher] [--seeds 0 1] [--budget MINUTES]
python -m benchmarks.methods.run TASK --knobs benchmarks/methods/knobs/mapseg.yaml     settings of one method
python -m benchmarks.methods.run TASK --from RUN RUN                                   score finished runs, no training

Each method and seed is ``mapseg adapt``, then ``mapseg predict`` and ``mapseg evaluate`` of both its models on the test
scans. Stopped at any moment, the same command goes on. results.json, results.md and results.png are written anew after
every run, into OUTPUT/<name of the task>.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.bench import Bench
from benchmarks.methods.processes import StoppedError
from benchmarks.methods.task import read_mapping_file, read_task
from benchmarks.methods.variants import Variant, of_methods, read_knobs, slug
from mapseg_components.errors import MAPSegError
from mapseg_components.plans.arguments import read_mapping
from mapseg_components.plans.bundle import check_names
from mapseg_components.plans.recipes import recipe_names

__all__ = ["main"]

OUTPUT = Path("runs/benchmark")
SUPERVISED = "source_only"  # the oracle's recipe: nothing but supervised training


def arguments_of(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="task file, YAML or JSON")
    parser.add_argument("--data", type=Path, help="folder that the task's paths are relative to")
    parser.add_argument("--methods", nargs="+", default=recipe_names(), metavar="NAME", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="of processor time, for each method and seed")
    parser.add_argument(
        "--source_length",
        type=float,
        metavar="F",
        help="of all methods' stages up to the source-only model, trained once",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a processor core of its own")
    parser.add_argument("--settings", help="of mapseg adapt, on top of the task's, JSON text or a file")
    parser.add_argument("--oracle_method", default=SUPERVISED, metavar="NAME", help="recipe of the oracle")
    parser.add_argument("--no_oracle", action="store_true")
    parser.add_argument("--knobs", type=Path, help="a file with variants of one method, in the place of --methods")
    parser.add_argument("--curve", action="store_true", help="score the weights of every moment: minutes to a Dice")
    parser.add_argument("--from", dest="runs", nargs="+", type=Path, metavar="RUN", help="score finished runs alone")
    parser.add_argument("--name", help="of the runs of --from in the tables; by default METHOD, run by hand")
    parser.add_argument("--retry", action="store_true", help="try runs again that failed")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(line)
    if arguments.budget is not None and not arguments.budget > 0:
        parser.error(f"--budget {arguments.budget}: expected minutes above 0")
    if arguments.source_length is not None and not arguments.source_length > 0:
        parser.error(f"--source_length {arguments.source_length}: expected a factor above 0")
    if arguments.knobs and arguments.runs:
        parser.error("--knobs trains and --from does not: name one of them")
    if arguments.curve and arguments.runs:
        parser.error("--curve keeps weights while a run trains, and --from trains nothing: leave one of them out")
    if arguments.name and not arguments.runs:
        parser.error("--name is for --from")
    return arguments


def make_bench(arguments: argparse.Namespace) -> tuple[Bench, list[Variant]]:
    """The benchmark of a command line, and what it is to run. Raises `ConfigError` and `DataError`."""
    task = read_task(arguments.task, arguments.data)
    settings = read_mapping("settings", arguments.settings) or {}
    check_names({**task.settings, **settings})
    folder = arguments.output / task.name
    knobs = None
    if arguments.knobs:
        variants = read_knobs(arguments.knobs)
        knobs = read_mapping_file(arguments.knobs)
        folder = arguments.output / f"{task.name}_{slug(arguments.knobs.stem)}"
    elif arguments.runs:
        variants = []
    else:
        oracle = arguments.oracle_method if "oracle" in task.parts and not arguments.no_oracle else None
        variants = of_methods(arguments.methods, oracle)
    bench = Bench(
        task,
        folder.absolute(),
        settings=settings,
        budget_minutes=arguments.budget,
        source_length=arguments.source_length,
        jobs=arguments.jobs,
        knobs=knobs,
        curve=arguments.curve,
    )
    return bench, variants


def main(line: Sequence[str] | None = None) -> int:
    """Run, write, print the tables; 1 if every run failed, 130 or 143 if it was stopped."""
    arguments = arguments_of(line)
    try:
        bench, variants = make_bench(arguments)
        received: list[int] = []

        def stop(number: int, frame: Any) -> None:
            received.append(number)
            bench.stop.set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with bench.claimed():
                if arguments.runs:
                    bench.score_runs([run.absolute() for run in arguments.runs], arguments.name)
                else:
                    bench.run(variants, arguments.seeds, arguments.retry)
                results = bench.write()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except StoppedError:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 128 + (received[0] if received else signal.SIGTERM)
    except MAPSegError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print((bench.folder / "results.md").read_text(encoding="utf-8"))
    print(f"Results  {bench.folder / 'results.json'}, .md, .png")
    return 0 if any(run["state"] == "done" for run in results["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
