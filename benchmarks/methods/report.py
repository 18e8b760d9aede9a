# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The tables of a benchmark in Markdown, and their place in docs/reference/benchmark.md.

python -m benchmarks.methods.report runs/benchmark/TASK/results.json ... --docs docs/reference/benchmark.md

Results of one task are one table, such as one file for each seed. A task's place in a page is between the lines
<!-- benchmark TASK: begin --> and <!-- benchmark TASK: end -->; the other tables of the page stay. What was measured is
kept in benchmarks/results/methods, by --keep, and joined with another seed's there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods.scoring import MODELS, mean_dice
from benchmarks.report import replace_between
from mapseg_components.files import write_text
from mapseg_components.metrics import MEAN, METRICS, case_means, paired_comparison, summarised

__all__ = ["joined", "summary_of", "tables"]

ORACLE = "oracle"
BASELINE = "source_only"  # names of methods that only learn the source begin with it
SMALLEST_GAP = 0.01  # Dice: a share of less says nothing
GIGABYTE, MEGABYTE = 1e9, 1e6
MARKER = "benchmark {}"  # of a task
DIGITS = 5
ALIKE = ("budget_minutes", "source_length", "settings", "knobs")  # of results that may share a table
Record = Mapping[str, Any]


def over_seeds(runs: Sequence[Record], model: str) -> list[dict[str, Any]]:
    """One row per case and structure: the mean over seeds of each metric, as far as it is known."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        for row in run["models"][model]:
            metrics = values.setdefault((row["case"], row["structure"]), {metric: [] for metric in METRICS})
            for metric in METRICS:
                if row[metric] is not None:
                    metrics[metric].append(row[metric])
    return [
        {"case": case, "structure": structure, **{m: float(np.mean(v)) if v else None for m, v in metrics.items()}}
        for (case, structure), metrics in values.items()
    ]


def summary_of(runs: Sequence[Record]) -> dict[str, Any]:
    """Figures of each method over its seeds, and of the verdicts of all.

    Args:
        runs: records of runs, finished and failed.

    Returns:
        ``methods`` (name to figures), ``baseline`` (name of the strongest source-only baseline, or ``None``) and
        ``verdicts``.
    """
    names = list(dict.fromkeys(run["name"] for run in runs))
    methods = {name: figures_of([run for run in runs if run["name"] == name]) for name in names}
    done = {name: one for name, one in methods.items() if one["seeds"]}
    baselines = {name: one["dice"]["adapted"] for name, one in done.items() if name.startswith(BASELINE)}
    strongest = max(baselines, key=lambda name: baselines[name]) if baselines else None
    highest = done[ORACLE]["dice"]["adapted"] if ORACLE in done else None
    for name, one in done.items():
        lowest = one["dice"]["source_only"] if strongest is None else baselines[strongest]
        gap = None if highest is None or name == ORACLE else highest - lowest
        known = gap is not None and gap >= SMALLEST_GAP
        one["gap"] = gap
        one["closed"] = (one["dice"]["adapted"] - lowest) / gap if known else None
    return {"methods": methods, "baseline": strongest, "verdicts": verdicts_of(runs)}


def figures_of(runs: Sequence[Record]) -> dict[str, Any]:
    """Figures of one method over its seeds."""
    done = [run for run in runs if run["state"] == "done"]
    failed = [{"seed": run["seed"], "error": run["error"]} for run in runs if run["state"] == "failed"]
    found: dict[str, Any] = {"method": runs[0]["method"], "seeds": [run["seed"] for run in done], "failed": failed}
    if not done:
        return found
    rows = {model: over_seeds(done, model) for model in MODELS}
    by_seed = {model: [mean_dice(run["models"][model]) for run in done] for model in MODELS}
    shipped = [mean_dice(run["models"][run["verdict"]["ship"]]) for run in done]
    judged = [run for run in done if not run["same_model"]]
    estimated = [run["verdict"]["estimated_gain"] for run in judged if run["verdict"]["estimated_gain"] is not None]
    differences = paired_comparison(*(case_means(rows[model], "dice") for model in reversed(MODELS)))
    minutes = [run["processor_seconds"] / 60 for run in done if run["processor_seconds"] is not None]
    peaks = [run["peak_bytes"] for run in done if run["peak_bytes"]]
    return found | {
        "summary": {model: summarised(rows[model]) for model in MODELS},
        "dice": {model: float(np.mean(by_seed[model])) for model in MODELS},
        "dice_by_seed": by_seed,
        "shipped_dice": float(np.mean(shipped)),
        "gain": differences,
        "by_case": case_means(rows["adapted"], "dice"),
        "missed": {model: missed_of(done, model) for model in MODELS},
        "rolled_back": sum(run["verdict"]["ship"] == "source_only" for run in judged),
        "judged": len(judged),
        "right": sum(run["verdict"]["right"] for run in judged),
        "estimated_gain": float(np.mean(estimated)) if estimated else None,
        "minutes": float(np.mean(minutes)) if minutes else None,
        "by_the_clock": any(run.get("by_the_clock") for run in done),
        "peak_bytes": max(peaks) if peaks else None,
        "weights_bytes": max(run["weights_bytes"] for run in done),
        "lengths": [run["length"] for run in done],
        "inverted": [bool((run.get("order") or {}).get("inverted")) for run in done],
    }


def missed_of(runs: Sequence[Record], model: str) -> dict[str, int]:
    """Structure to the number of label maps that lack it though the truth has it."""
    found: dict[str, int] = {}
    for run in runs:
        for row in run["models"][model]:
            missed = row["dice"] is not None and row["hd95_mm"] is None
            found[row["structure"]] = found.get(row["structure"], 0) + missed
    return found


def verdicts_of(runs: Sequence[Record]) -> dict[str, Any]:
    """How often verdicts were right and how far estimates of Dice were off, over runs with two models, the oracle's
    left out."""
    compared = [run for run in runs if run["state"] == "done" and not run["oracle"] and not run["same_model"]]
    said = [run["verdict"] for run in compared]
    estimates = [(one, verdict["on"]) for verdict in said for one in verdict["estimates"]]
    known = [(one, on) for one, on in estimates if one["estimate"] is not None and one["dice"] is not None]
    errors: dict[str, list[float]] = {}
    for one, on in known:
        errors.setdefault(on, []).append(abs(one["estimate"] - one["dice"]))
    within = [one for one, _ in known if one.get("interval") is not None]
    return {
        "comparisons": len(said),
        "right": sum(verdict["right"] for verdict in said),
        "lost": float(np.mean([verdict["lost"] for verdict in said])) if said else None,
        "errors": {on: {"n": len(each), "mean_absolute": float(np.mean(each))} for on, each in errors.items()},
        "coverage": sorted({verdict["coverage"] for verdict in said if verdict.get("coverage") is not None}),
        "intervals": len(within),
        "intervals_hold": sum(one["interval"][0] <= one["dice"] <= one["interval"][1] for one in within),
    }


def interval_text(figures: Mapping[str, Any], digits: int = 3) -> str:
    """A mean with its bootstrap interval."""
    if figures["mean"] is None:
        return ""
    text = f"{figures['mean']:.{digits}f}"
    return text if figures["ci95"] is None else text + " [{:.{d}f}, {:.{d}f}]".format(*figures["ci95"], d=digits)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def tables(results: Mapping[str, Any], brief: bool = False) -> str:
    """All of a results file in Markdown; if brief, without the single structures."""
    summary, task = results["summary"], results["task"]
    methods = summary["methods"]
    budget = results["budget_minutes"]
    spent = "as long as each method is by itself" if budget is None else f"{budget:g} processor minutes each"
    seeds = sorted({run["seed"] for run in results["runs"]})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    lines = [
        f"{task['title']}: {task['test_cases']} test cases that took no part in training, {named}, {spent}. "
        f"{results['machine']}. Mean over cases [95 % bootstrap interval over cases]; seeds are averaged case by case "
        "before.",
        "",
        *(knob_table(methods, results["knobs"]) if results.get("knobs") else method_table(methods, budget)),
        "",
        *notes(summary, results),
        *([] if brief else ["", *structure_table(methods, task["tolerance_mm"])]),
    ]
    failed = [(name, one) for name, figures in methods.items() for one in figures["failed"]]
    if failed:
        lines += ["", "Failed:", "", *(f"- {name}, seed {one['seed']}: {one['error']}" for name, one in failed)]
    return "\n".join(lines)


def joined(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of the same task as one.

    Args:
        results: contents of ``results.json``, such as one for each seed of a task.

    Returns:
        one for each task, in the order of their first, numbers with five digits after the point.

    Raises:
        ValueError: two of a task have other budgets or settings, or hold the same run.
    """
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        one = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), DIGITS))
        name = one["task"]["name"]
        first = found.setdefault(name, {**one, "runs": []})
        other = [key for key in ALIKE if first[key] != one[key]]
        if other:
            said = "; ".join(f"{key} is {first[key]} and {one[key]}" for key in other)
            raise ValueError(f"two results of the task {name} are no one table: {said}")
        runs = {(run["name"], run["seed"]) for run in first["runs"]}
        twice = [run for run in one["runs"] if (run["name"], run["seed"]) in runs]
        if twice:
            raise ValueError(f"two results of the task {name} hold {twice[0]['name']}, seed {twice[0]['seed']}")
        first["runs"] = [*first["runs"], *one["runs"]]
    return [{**one, "summary": summary_of(one["runs"])} for one in found.values()]


def count_text(figures: Mapping[str, Any]) -> str:
    """Seeds that ended well, and those that failed."""
    failed = len(figures["failed"])
    return f"{len(figures['seeds'])} of {len(figures['seeds']) + failed}"


def method_table(methods: Mapping[str, Mapping[str, Any]], budget: float | None) -> list[str]:
    """One line per method: Dice of both models, the gap, the verdict, what it cost."""
    head = ["method", "source-only", "adapted", "gain (estimated)", "shipped", "verdict right", "rolled back"]
    head += ["gap closed", "minutes", "GB", "MB"]
    rows = []
    for name, one in methods.items():
        if not one["seeds"]:
            rows.append([name, f"failed ({count_text(one)} seeds)", *[""] * (len(head) - 2)])
            continue
        means = {model: one["summary"][model][MEAN]["dice"] for model in MODELS}
        gain, estimated = one["gain"]["mean_difference"], one["estimated_gain"]
        compared = name != ORACLE and one["judged"] > 0 and gain is not None
        title = name if not one["failed"] else f"{name} ({count_text(one)} seeds)"
        supervised = name == ORACLE
        rows.append(
            [
                title,
                "" if supervised else interval_text(means["source_only"]),
                interval_text(means["adapted"]),
                (f"{gain:+.3f}" + ("" if estimated is None else f" ({estimated:+.3f})")) if compared else "",
                "" if supervised else f"{one['shipped_dice']:.3f}",
                f"{one['right']} of {one['judged']}" if compared else "",
                f"{one['rolled_back']} of {one['judged']}" if compared else "",
                "" if one["closed"] is None else f"{one['closed']:.0%}",
                cost_text(one, budget),
                "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / GIGABYTE:.1f}",
                f"{one['weights_bytes'] / MEGABYTE:.1f}",
            ]
        )
    return markdown(head, rows)


def cost_text(figures: Mapping[str, Any], budget: float | None) -> str:
    """Minutes of a method, and by what factor it was longer or shorter than by itself."""
    if figures["minutes"] is None:
        return ""
    text = f"{figures['minutes']:.1f}"
    if figures["by_the_clock"]:
        return f"{text} by the clock"
    lengths = figures["lengths"]
    return text if budget is None else f"{text} (x {np.mean(lengths):.2g})"


def knob_table(methods: Mapping[str, Mapping[str, Any]], knobs: Mapping[str, Any]) -> list[str]:
    """One line per variant: Dice, and the difference to the first one on the same cases."""
    first = next((one for one in methods.values() if one["seeds"]), None)
    rows = []
    for name, one in methods.items():
        changed = knobs["variants"].get(name, {})
        what = json.dumps({**changed.get("settings", {}), **changed.get("arguments", {})}) if changed else ""
        if not one["seeds"]:
            rows.append([name, f"`{what}`" if what else "", f"failed ({count_text(one)} seeds)", *[""] * 4])
            continue
        difference = ""
        if one is not first and first is not None:
            found = paired_comparison(one["by_case"], first["by_case"])
            if found["mean_difference"] is not None:
                ends = found["ci95"] and " [{:+.3f}, {:+.3f}]".format(*found["ci95"])
                difference = f"{found['mean_difference']:+.3f}{ends or ''}"
        by_seed = ", ".join(f"{value:.3f}" for value in one["dice_by_seed"]["adapted"])
        means = {model: one["summary"][model][MEAN]["dice"] for model in MODELS}
        cells = [name, f"`{what}`" if what else "", interval_text(means["source_only"])]
        cells += [interval_text(means["adapted"]), difference, by_seed]
        rows.append([*cells, f"{one['rolled_back']} of {one['judged']}"])
    head = ["variant", "changed", "source-only", "adapted", "difference to the first", "adapted, by seed"]
    return markdown([*head, "rolled back"], rows)


def structure_table(methods: Mapping[str, Mapping[str, Any]], tolerance_mm: float) -> list[str]:
    """One line per method and structure, of the adapted model."""
    titles = {"surface_dice": f"surface Dice at {tolerance_mm:g} mm"}
    head = ["method", "structure", *(titles.get(key, title) for key, (title, _) in METRICS.items()), "missed"]
    rows = []
    for name, one in methods.items():
        for structure, figures in (one["summary"]["adapted"] if one["seeds"] else {}).items():
            texts = [interval_text(figures[key], 3 if better else 1) for key, (_, better) in METRICS.items()]
            missed = one["missed"]["adapted"]
            total = sum(missed.values()) if structure == MEAN else missed[structure]
            rows.append([name, structure, *texts, str(total)])
    return markdown(head, rows)


def notes(summary: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """What the columns of the first table mean, with the figures of all verdicts."""
    methods, said = summary["methods"], summary["verdicts"]
    lines = [
        "Adapted: the model that the method ends with, whether its verdict ships it or not. Estimated: by the verdict, "
        "on target scans without labels. Rolled back: the verdict, "
        "which knows no label of the target, shipped the source-only model. Missed: label maps without a structure "
        "that the truth has, over all seeds; it has Dice 0 and no distance."
    ]
    if not results.get("knobs"):
        lines.append(
            "Minutes: processor time of `mapseg adapt` with one thread, all of its processes, a mean over seeds; GB: "
            "memory of its largest process; MB: file of weights."
        )
        if ORACLE in methods and methods[ORACLE]["seeds"]:
            from_ = f"`{summary['baseline']}`" if summary["baseline"] else "its own source-only model"
            lines.append(f"Gap closed: of the way from {from_} to the oracle, which trains on labels of target scans.")
    ended = [run for run in results["runs"] if run["state"] == "done"]
    failed = len(results["runs"]) - len(ended)
    rolled_back = sum(one.get("rolled_back", 0) for name, one in methods.items() if name != ORACLE)
    counted = f"Of {len(results['runs'])} runs {failed} failed"
    lines.append(f"{counted}; {rolled_back} of the others were rolled back." if rolled_back else f"{counted}.")
    if said["comparisons"]:
        text = (
            f"The verdict without labels was right in {said['right']} of {said['comparisons']} comparisons "
            f"({said['right'] / said['comparisons']:.0%}; right: it ships the better model by Dice on the test scans, "
            f"or they differ by less than 0.01); {said['lost']:.3f} Dice were lost by the choice in the mean."
        )
        for on, errors in said["errors"].items():
            unit = "scans" if on == "the judged scans" else "means of a model over scans"
            text += f" Estimated Dice was off by {errors['mean_absolute']:.3f} on {on} ({errors['n']} {unit})."
        if said["intervals"]:
            nominal = "".join(f" (nominal {share:.0%})" for share in said["coverage"])
            text += f" Its intervals{nominal} held the Dice in {said['intervals_hold']} of {said['intervals']}."
        lines.append(text)
    return [" ".join(lines)]


def main() -> None:
    """Print the tables of results files, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of benchmarks")
    parser.add_argument("--docs", type=Path, help="page whose tables of these tasks are replaced")
    parser.add_argument("--brief", action="store_true", help="leave single structures out")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write what the tables are made of to DIR/TASK.json")
    arguments = parser.parse_args()
    for one in joined([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]):
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            kept = {key: value for key, value in one.items() if key != "summary"}
            write_text(json.dumps(kept) + "\n", arguments.keep / f"{one['task']['name']}.json")
        text = f"### {one['task']['title']}\n\n{tables(one, arguments.brief)}"
        if arguments.docs:
            replace_between(arguments.docs, MARKER.format(one["task"]["name"]), text)
        else:
            print(f"{text}\n")


if __name__ == "__main__":
    main()
