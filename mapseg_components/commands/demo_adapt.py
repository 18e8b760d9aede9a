# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of ``mapseg demo``: ``mapseg adapt`` in a few minutes, and its models beside a plain one on labelled scans."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapseg_components.commands.adapt import Adaptation, adapt
from mapseg_components.commands.evaluate import MEAN, evaluate
from mapseg_components.commands.order import TARGET_INVERTED, describe_order
from mapseg_components.commands.predict import predict
from mapseg_components.commands.report import VERDICTS
from mapseg_components.data import load_datalist, read_nifti
from mapseg_components.errors import DataError
from mapseg_components.files import write_json
from mapseg_components.plans.recipes import Recipe, read_recipe
from mapseg_components.reports import ComparedScan, draw_comparison
from mapseg_components.transforms.resampling import spacing_of, to_canonical

__all__ = ["MODELS", "adapt_and_compare", "dice_table", "draw"]

# model: its folder of predictions and scores
MODELS = {"source-only": "source_only", "source-only, random contrasts": "random_contrasts", "adapted": "adapted"}
CONTRASTS, ADAPTED = "random_contrasts", "adapted"  # folders of the two runs
PREDICTIONS, SCORES, FIGURES, PICTURE = "predictions", "scores", "metrics.json", "comparison.png"

Steps = Mapping[str, Mapping[str, Mapping[str, Any]]]


def adapt_and_compare(
    folder: Path,
    sample: Path,
    steps: Steps,
    sizes: Mapping[str, Any],
    seed: int,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Train a source-only model in random contrasts, run ``mapseg adapt``, and measure three models on the test scans.

    The third is the first source-only model of ``mapseg adapt``, on the scans as they are. What is done already in the
    folder is not done again.

    Args:
        folder: of the results, locked by this process.
        sample: folder with ``datalist.json``.
        steps: settings of each stage, of the runs ``random_contrasts`` and ``adapted``.
        sizes: settings of both runs.
        seed: of everything random.
        options: device, num_threads, quiet, verbose.
        say: prints a line of progress.

    Returns:
        what came out, for a person; and content of ``metrics.json``.

    Raises:
        MAPSegError: of a stage.
    """
    recipe = read_recipe(inspect.signature(adapt).parameters["method"].default)
    alone = source_alone(recipe)
    contrasts = run_of(folder / CONTRASTS, sample, alone, steps[CONTRASTS], sizes, seed, options)
    whole = run_of(folder / ADAPTED, sample, recipe, steps[ADAPTED], sizes, seed, options)
    for run in (contrasts, whole):
        run.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger(Adaptation.__module__).setLevel(logging.ERROR if options["quiet"] else logging.INFO)
    say("1/3 source-only training in random contrasts")
    contrasts.train()
    say("2/3 mapseg adapt: source-only training, adaptation to T2w without its labels")
    record = whole.run()
    say("3/3 the three models on the test scans")
    as_they_are = {**options, "settings": {TARGET_INVERTED: False}}
    first, adapted = alone.models["source_only"], whole.recipe.models["adapted"]
    shown = ((whole, first, as_they_are), (contrasts, first, as_they_are), (whole, adapted, options))
    results = {}
    for (name, own), (run, path, asked) in zip(MODELS.items(), shown):
        weights = run.folder / "stages" / path
        results[name] = scored(run.folder, weights, sample, folder / PREDICTIONS / own, folder / SCORES / own, asked)
    seconds = {CONTRASTS: contrasts.record["seconds"], ADAPTED: record["seconds"]}
    verdict = record["assessment"]["verdict"]
    figures = {"sample": sample.name, "seed": seed, "seconds": seconds, "verdict": verdict["verdict"], **results}
    write_json(figures, folder / FIGURES)
    predictions = {name: folder / PREDICTIONS / own for name, own in MODELS.items()}
    draw(sample, predictions, structures(results), folder / PICTURE)
    plain, random, best = (results[name]["mean"] for name in MODELS)
    text = [
        dice_table(results, f"Dice on {len(load_datalist(sample, 'target_test'))} T2w scans"),
        "",
        describe_order(record["order"]),
        f"Adapted: {best - plain:+.3f} mean Dice over source-only, {best - random:+.3f} over random contrasts "
        f"(seed {seed}).",
        f"What mapseg adapt says without labels: {VERDICTS[verdict['verdict']]}",
        "The truth here are silver labels, made by clustering grey values, and both scans show one person.",
        "",
        f"Label maps  {folder / PREDICTIONS}",
        f"Figures     {folder / FIGURES}",
        f"Picture     {folder / PICTURE}",
        f"Report      {record['report']}",
        f"Bundle      {folder / ADAPTED}",
        "",
        "For your own scans: mapseg check SCANS, then mapseg adapt --source LABELLED --target SCANS --output RUN.",
    ]
    return "\n".join(text), figures


def run_of(
    folder: Path,
    sample: Path,
    recipe: Recipe,
    steps: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Any],
    seed: int,
    options: Mapping[str, Any],
) -> Adaptation:
    """``mapseg adapt`` with its defaults on a sample, but for the length of each stage and sizes."""
    request = {
        name: one.default
        for name, one in inspect.signature(adapt).parameters.items()
        if name not in ("output", "quiet", "verbose")
    }
    request |= {
        "source": str(sample / "datalist.json"),
        "target": str(sample / "target"),
        "pretraining": False,
        "settings": dict(sizes),
        "seed": seed,
        "device": options["device"],
        "num_threads": options["num_threads"],
    }
    run = Adaptation(folder, request, options["quiet"])
    stages = [replace(stage, settings={**stage.settings, **steps.get(stage.name, {})}) for stage in recipe.stages]
    run.recipe = replace(recipe, stages=tuple(stages))
    return run


def source_alone(recipe: Recipe) -> Recipe:
    """The first training on the source of a recipe, in contrasts of either order, and nothing after it."""
    stage = replace(next(stage for stage in recipe.stages if not stage.optional), contrasts="any_contrast.yaml")
    return replace(recipe, stages=(stage,), models={"source_only": f"{stage.name}/source_only.pt"}, order=None)


def scored(
    bundle: Path, weights: Path, sample: Path, predictions: Path, scores: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Dice of a model on the test scans, per structure and in the mean; measured once."""
    result = scores / "evaluation.json"
    if not result.is_file():
        found = predict(
            str(sample / "test" / "images"),
            str(predictions),
            bundle=str(bundle),
            weights=str(weights),
            no_preview=True,
            no_overlap=True,
            overwrite=True,
            **options,
        )
        if found.exit_code:
            raise DataError(f"the sample was not segmented: {found}")
        shared = {key: value for key, value in options.items() if key not in ("device", "settings")}
        truth = str(sample / "test" / "labels")
        evaluate(str(predictions), truth, labels=str(bundle), output=str(scores), overwrite=True, **shared)
    content = json.loads(result.read_text(encoding="utf-8"))["structures"]
    means = {key: value["dice"]["mean"] for key, value in content.items()}
    return {"mean": means.pop(MEAN), "structures": means}


def structures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the structures in results, in their order."""
    return list(next(iter(results.values()))["structures"])


def dice_table(results: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Dice per structure and in the mean, a column a model.

    Args:
        results: model to ``structures`` (name to Dice) and ``mean``.
        title: of the first column.
    """
    names = structures(results)
    width = max(map(len, [title, *names])) + 2
    lines = [f"{title:<{width}}  " + "  ".join(results)]
    for name in [*names, "mean"]:
        row = [r["mean"] if name == "mean" else r["structures"][name] for r in results.values()]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{dice:{len(model)}.3f}" for dice, model in zip(row, results)))
    return "\n".join(lines)


def draw(sample: Path, folders: Mapping[str, Path], names: Sequence[str], path: Path) -> None:
    """Picture of the held-out scans: the truth beside the label maps of each model's folder."""
    scans = []
    for case in load_datalist(sample, "target_test"):
        results = [folder / f"{case['case_id']}_seg.nii.gz" for folder in folders.values()]
        (grey, affine), *maps = (
            to_canonical(scan.voxels, scan.affine) for scan in map(read_nifti, (case["image"], case["label"], *results))
        )
        scans.append(ComparedScan(case["case_id"], spacing_of(affine).tolist(), grey, [voxels for voxels, _ in maps]))
    draw_comparison(scans, list(folders), names, path)
