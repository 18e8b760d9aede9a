# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Time to a Dice: the weights that a run of ``mapseg adapt`` has at each moment, scored beside the time they took.

python -m benchmarks.methods.curve runs/benchmark/*/results.json --docs docs/reference/benchmark.md --picture PNG

Results of one task are joined, such as those of two seeds. The table stands between the lines <!-- curves: begin -->
and <!-- curves: end --> of a page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.methods.processes import Usage
from benchmarks.methods.report import joined, markdown
from benchmarks.methods.scoring import mean_dice, scored
from benchmarks.methods.task import Inputs, Task
from benchmarks.report import replace_between
from mapseg_components.commands.stages import finished_epochs
from mapseg_components.files import replacing, write_json
from mapseg_components.plans.recipes import ADAPTATION, read_recipe

__all__ = ["curve_of", "curve_table", "draw_curves", "keep_weights", "minutes_to"]

KEPT = "kept.json"
WEIGHTS = ("source_only.pt", "model.pt")  # of a stage: the best of its validations so far
DICE = (0.6, 0.7)
AS_GOOD = 0.01  # Dice: as good as the last weights
MARKER = "curves"


def kept_weights(folder: Path) -> list[dict[str, Any]]:
    """What `keep_weights` has kept, the oldest first."""
    path = folder / KEPT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def keep_weights(run: Path, method: str, folder: Path, seconds: float) -> None:
    """Copy the weights that a run has chosen since the last call. Stages of other bundles, which segment nothing, are
    left out.

    Args:
        run: folder of ``mapseg adapt``, which may be at work: it replaces files as a whole.
        method: of the run.
        folder: for the copies.
        seconds: processor seconds that the run has used so far.
    """
    kept = kept_weights(folder)
    known = {(one["file"], one["written"]) for one in kept}
    for stage in (stage.name for stage in read_recipe(method).stages if stage.bundle == ADAPTATION):
        for name in WEIGHTS:
            path = run / "stages" / stage / name
            if not path.is_file():
                continue
            one = {"file": f"{stage}/{name}", "written": path.stat().st_mtime_ns}
            if tuple(one.values()) in known:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / f"{len(kept):03d}.pt"
            shutil.copyfile(path, copy)
            epochs = finished_epochs(path.parent)
            kept.append({**one, "stage": stage, "epochs": epochs, "seconds": seconds, "weights": copy.name})
            write_json(kept, folder / KEPT)


def curve_of(
    run: Path, folder: Path, output: Path, task: Task, inputs: Inputs, command: Callable[[Sequence[str]], Usage]
) -> list[dict[str, Any]]:
    """Dice of all kept weights on the test scans, which are shown to each as the finished run shows its target.

    Args:
        run: finished run.
        folder: of `keep_weights`.
        output: for label maps and figures.
        task: of the test.
        inputs: its files.
        command: runs ``mapseg``.

    Returns:
        for each ``stage``, ``epochs`` of it that were done, ``minutes`` (of a processor, of the whole run so far) and
        ``dice`` (mean over cases of the mean over structures).

    Raises:
        CommandError: a command failed.
    """
    points = []
    for one in kept_weights(folder):
        rows = scored(run, folder / one["weights"], output / Path(one["weights"]).stem, task, inputs, command)
        point = {"stage": one["stage"], "epochs": one["epochs"], "minutes": one["seconds"] / 60}
        points.append({**point, "dice": mean_dice(rows)})
    return points


def minutes_to(dice: float, points: Sequence[Mapping[str, Any]]) -> float | None:
    """Processor minutes until the first weights of at least this Dice; ``None`` if there are none.

    Examples:
        >>> from benchmarks.methods.curve import minutes_to
        >>> points = [{"minutes": 2.0, "dice": 0.5}, {"minutes": 4.0, "dice": 0.7}, {"minutes": 6.0, "dice": 0.6}]
        >>> minutes_to(0.6, points), minutes_to(0.8, points)
        (4.0, None)
    """
    return next((point["minutes"] for point in points if point["dice"] >= dice), None)


def with_curve(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Runs whose weights were kept."""
    return [run for run in results["runs"] if run.get("curve")]


def curve_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lines of Markdown.

    Args:
        results: contents of ``results.json``, one of each task.
    """
    head = ["task", "method", "seed", *(f"{dice:.2f}" for dice in DICE), f"last - {AS_GOOD:.2f}", "last Dice"]
    rows = []
    for one in results:
        for run in with_curve(one):
            last = run["curve"][-1]["dice"]
            found = [minutes_to(dice, run["curve"]) for dice in (*DICE, last - AS_GOOD)]
            cells = ["not reached" if minutes is None else f"{minutes:.1f}" for minutes in found]
            whole = f"{run['processor_seconds'] / 60:.1f}"
            rows.append([one["task"]["title"], run["name"], str(run["seed"]), *cells, f"{last:.3f}", whole])
    said = "Processor minutes until the weights that the run had chosen so far have this mean Dice on the test cases:"
    return "\n".join([said, "", *markdown([*head, "whole run"], rows)])


def draw_curves(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each task, in it a line for each run: Dice over processor minutes, a mark for each kept model, larger
    where a stage begins.

    Args:
        results: contents of ``results.json``, one of each task.
        path: PNG to write.
    """
    figure = Figure(figsize=(8 if len(results) == 1 else 5 * len(results), 4.5), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    seen = (point["dice"] for one in results for run in with_curve(one) for point in run["curve"])
    axes[0].set_ylim(int(10 * min(seen, default=0)) / 10, 1)
    for axis, one in zip(axes, results):
        for run in with_curve(one):
            minutes, dice = ([point[key] for point in run["curve"]] for key in ("minutes", "dice"))
            (line,) = axis.plot(minutes, dice, ".-", label=f"{run['name']}, seed {run['seed']}")
            stages = [point["stage"] for point in run["curve"]]
            begins = [number for number, stage in enumerate(stages) if stage not in stages[:number]]
            axis.plot([minutes[n] for n in begins], [dice[n] for n in begins], "o", color=line.get_color())
        axis.set_title(one["task"]["title"], fontsize=10)
        axis.set_xlim(left=0)
        axis.set_xlabel("processor minutes")
        axis.set_ylabel(f"mean Dice, {one['task']['test_cases']} test cases")
        axis.spines[["top", "right"]].set_visible(False)
        if with_curve(one):
            axis.legend(frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    """Print the table of all tasks, or write it into a page; draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of benchmarks with --curve")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    results = joined([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results])
    if arguments.docs:
        replace_between(arguments.docs, MARKER, curve_table(results))
    else:
        print(curve_table(results))
    if arguments.picture:
        draw_curves(results, arguments.picture)


if __name__ == "__main__":
    main()
