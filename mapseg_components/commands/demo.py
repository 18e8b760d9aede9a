# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg demo``: a first result on a shipped sample, by ``mapseg adapt`` or with the shipped weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.commands.demo_adapt import (
    ADAPTED,
    CONTRASTS,
    FIGURES,
    PICTURE,
    PREDICTIONS,
    SCORES,
    Steps,
    adapt_and_compare,
    dice_table,
    draw,
)
from mapseg_components.commands.evaluate import evaluate
from mapseg_components.commands.predict import predict
from mapseg_components.commands.report import require_matplotlib
from mapseg_components.commands.stages import run_stage, threads
from mapseg_components.errors import ConfigError, DataError, MAPSegError
from mapseg_components.files import lock_folder, require_writable, unlock_folders, write_json
from mapseg_components.metrics import require_scipy
from mapseg_components.session import choose_device, working
from mapseg_components.shipped_files import SAMPLES, SEGMENTS, bundles_folder, sample_folder

__all__ = ["demo"]

ADULTS = SAMPLES[0]
# Length of each stage of `mapseg adapt` on the sample of adults, a step is one batch of each side, on patches that cost
# a third of the preset's and without views of whole scans, which cost half of a step and bring nothing to tissues at
# 2 mm (docs/reference/results.md).
SIZES = {"patch_size": [32, 32, 32], "window_size": [48, 48, 48], "global_view": False}
STEPS: Steps = {
    CONTRASTS: {"source": {"max_epochs": 10, "epoch_length": 25, "val_interval": 5}},
    ADAPTED: {
        "source": {"max_epochs": 18, "epoch_length": 25, "val_interval": 6},
        "contrasts": {"max_epochs": 6, "epoch_length": 25, "val_interval": 3},
        "adaptation": {"max_epochs": 3, "epoch_length": 25, "val_interval": 3},
    },
}
TRAINING = ["train.json"]  # of both bundles: holds the labels, sizes and schedule of the shipped weights
STAGES = ("pretraining", "source_only", "adaptation")
RECORD = "demo.json"
LOCK = {".run.lock", ".run.lock.json"}
OWN = {*STAGES, CONTRASTS, ADAPTED, RECORD, PREDICTIONS, SCORES, FIGURES, PICTURE, *LOCK}
# slower than the preset: on this sample faster teachers drift (docs/reference/results.md)
GENTLE = {"learning_rate": 0.0001, "ema_schedule": [[None, 0.999]], "target_scale_range": [0.9, 1.1], "max_epochs": 10}


@dataclass
class DemoReport:
    """Result of `demo`.

    Args:
        folder: of the results.
        text: what came out, for a person.
        figures: content of ``metrics.json`` (of a training) or of ``scores/evaluation.json``.
    """

    folder: str
    text: str
    figures: dict[str, Any]
    exit_code = 0

    def __str__(self) -> str:
        return self.text


def demo(
    output: str = "mapseg_demo",
    *,
    sample: str = "adult_t1_to_t2",
    train: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> DemoReport:
    """A first result on scans that come with the package, without a download: label maps, Dice and a picture.

    By default trains a model on T1w MRI of two adults and adapts it to T2w of others without their labels, as mapseg
    adapt does but shorter, and compares three models on two T2w scans of one more person: trained on T1w as it is, in
    random contrasts, and adapted. Minutes on a CPU; stopped at any moment, the same command goes on where it was. The
    truth is silver labels, of a clustering.

    With --sample fetal_age segments two fetal brains (T2w MRI, CC0) that no training saw with the weights of the
    package, by mapseg predict, and compares them with the truth, by mapseg evaluate: less than a minute on a CPU. With
    train its weights are trained first: pretraining on all images, source-only training on older fetuses, adaptation to
    younger ones without their labels, then both models on the two scans: minutes on a CPU.

    Args:
        output: folder of the results.
        sample: adult_t1_to_t2 or fetal_age.
        train: of fetal_age, the whole method instead of the weights of the package; the other one is always trained.
        seed: of everything random in the training.
        overwrite: remove the results of an earlier demo.
        device: auto, cpu, cuda or cuda:1.
        num_threads: of PyTorch on the CPU.
        quiet: no progress, errors only.
        verbose: everything that is logged, and tracebacks.

    Returns:
        a `DemoReport`; its text is the table, and where everything lies.

    Raises:
        ConfigError: the folder holds something, or the package is not installed whole.
        ResourceError: memory, disk or permissions.
    """
    require_matplotlib()
    require_scipy()
    choose_device(device)
    folder = Path(output).absolute()
    bundles, scans = bundles_folder(), sample_folder(sample)
    asked = {"sample": sample, "seed": seed, "steps": STEPS, "sizes": SIZES}
    request = json.loads(json.dumps(asked)) if sample == ADULTS else None
    goes_on = check_folder(folder, overwrite, request)
    require_writable(folder)
    lock_folder(folder)
    try:
        if not goes_on:
            clear(folder)
        with working(num_threads, quiet, verbose):
            options = {"device": device, "num_threads": num_threads, "quiet": quiet, "verbose": verbose}
            if request is not None:
                write_json(request, folder / RECORD)
                text, figures = adapt_and_compare(
                    folder, scans, STEPS, SIZES, seed, options, lambda line: say(line, quiet)
                )
                return DemoReport(str(folder), text, figures)
            if train:
                return train_and_compare(folder, bundles, scans, seed, options)
            return segment(folder, bundles / "mapseg_adaptation", scans, options)
    finally:
        unlock_folders([folder])


def check_folder(folder: Path, overwrite: bool, request: Mapping[str, Any] | None) -> bool:
    """Refuse a folder with results, or with anything that no demo wrote.

    Args:
        folder: of the results.
        overwrite: earlier results may be removed.
        request: what the demo that goes on is to do; ``None`` for one that cannot.

    Returns:
        whether the folder holds the same demo, stopped or finished, which goes on.

    Raises:
        ConfigError: it holds another demo, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file: name a folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in found if name not in OWN]
    if others:
        raise ConfigError(f"{folder} holds {others[:3]}, which no demo wrote: choose a new folder")
    if overwrite or not set(found) - LOCK:
        return False
    earlier = folder / RECORD
    if request is not None and earlier.is_file():
        before = json.loads(earlier.read_text(encoding="utf-8"))
        if before == request:
            return True
        changed = "; ".join(
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in request.items()
            if before.get(name) != value
        )
        raise ConfigError(
            f"{folder} holds an earlier demo of another kind ({changed}): repeat its arguments, set overwrite to "
            "remove it, or choose a new folder"
        )
    raise ConfigError(f"{folder} holds an earlier demo: set overwrite to remove it, or choose a new folder")


def clear(folder: Path) -> None:
    """Remove what an earlier demo wrote; call it under the folder's lock."""
    for name in OWN - LOCK:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def say(text: str, quiet: bool, end: str = "\n") -> None:
    """Progress, on standard error."""
    if not quiet:
        sys.stderr.write(text + end)
        sys.stderr.flush()


def segment(folder: Path, bundle: Path, sample: Path, options: Mapping[str, Any]) -> DemoReport:
    """The two held-out scans by the weights of the package, against the truth."""
    predictions, scores = folder / PREDICTIONS, folder / SCORES
    found = predict(str(sample / "test" / "images"), str(predictions), bundle=str(bundle), **options)
    if found.exit_code:
        raise DataError(f"the sample was not segmented: {found}")
    shared = {key: value for key, value in options.items() if key != "device"}
    truth = str(sample / "test" / "labels")
    scored = evaluate(str(predictions), truth, labels=str(bundle), output=str(scores), **shared)
    names = list(dict.fromkeys(row["structure"] for row in scored.rows))
    draw(sample, {"shipped weights": predictions}, names, folder / PICTURE)
    text = [
        str(scored),
        "",
        f"The weights of the package segment {SEGMENTS}, nothing else.",
        f"Label maps, volumes.csv  {predictions}",
        f"Figures                  {scores}",
        f"Picture                  {folder / PICTURE}",
        "",
        "For your own scans: mapseg check SCANS, then mapseg adapt --source LABELLED --target SCANS --output RUN.",
    ]
    return DemoReport(str(folder), "\n".join(text), json.loads((scores / "evaluation.json").read_text()))


def train_and_compare(folder: Path, bundles: Path, sample: Path, seed: int, options: Mapping[str, Any]) -> DemoReport:
    """Every stage of the method, each as a user types it; source-only beside adapted on the held-out scans."""
    threads(options["num_threads"])
    pretraining, adaptation = bundles / "mapseg_pretraining", bundles / "mapseg_adaptation"
    common: dict[str, Any] = {"dataset_dir": sample}
    if options["device"] != "auto":
        common["device"] = f"$torch.device('{options['device']}')"
    stages = {name: folder / name for name in STAGES}
    weights = {"source-only": stages["source_only"] / "source_only.pt", "adapted": stages["adaptation"] / "model.pt"}
    predictions = {name: folder / PREDICTIONS / name for name in weights}

    def run(title: str, bundle: Path, names: list[str], output: Path, **settings: Any) -> float:
        return announced(title, bundle, names, output, {**common, **settings}, options["quiet"])

    seconds = {
        "pretraining": run("1/5 pretraining, all images", pretraining, TRAINING, stages["pretraining"], seed=seed),
        "source_only": run(
            "2/5 source-only training",
            adaptation,
            [*TRAINING, "source_only.yaml"],
            stages["source_only"],
            encoder_weights=stages["pretraining"] / "model.pt",
            seed=seed,
        ),
        "adaptation": run(
            "3/5 adaptation without target labels",
            adaptation,
            [*TRAINING, "from_source.yaml"],
            stages["adaptation"],
            initial_weights=weights["source-only"],
            seed=seed,
            **GENTLE,
        ),
    }
    results = {}
    for number, (name, file) in enumerate(weights.items(), start=4):
        title = f"{number}/5 inference and evaluation, {name}"
        run(title, adaptation, ["inference.json", "evaluate.json"], predictions[name], weights=file)
        results[name] = json.loads((predictions[name] / "metrics.json").read_text())
    selection = json.loads((stages["adaptation"] / "model_selection.json").read_text())["model.pt"]
    figures = {"seed": seed, "seconds": seconds, "selection": selection, **results}
    write_json(figures, folder / FIGURES)
    names = list(results["adapted"]["structures"])
    draw(sample, predictions, names, folder / PICTURE)
    gain = results["adapted"]["mean"] - results["source-only"]["mean"]
    verdict = "Adaptation helped" if gain > 0.005 else "Adaptation made it worse" if gain < -0.005 else "No difference"
    text = [
        dice_table(results, "Dice on the held-out target"),
        "",
        f"{verdict}: {gain:+.3f} mean Dice (seed {seed}).",
        f"Chosen without target labels: the {selection['weights']} of epoch {selection['epoch']}.",
        "",
        f"Label maps, volumes.csv  {predictions['adapted']}",
        f"Figures                  {folder / FIGURES}",
        f"Picture                  {folder / PICTURE}",
    ]
    return DemoReport(str(folder), "\n".join(text), figures)


def announced(
    title: str, bundle: Path, configs: list[str], output: Path, settings: Mapping[str, Any], quiet: bool
) -> float:
    """A stage with its title before and its seconds behind, on standard error; returns seconds."""
    say(f"{title} ...", quiet, end="")
    try:
        seconds = run_stage(title, bundle, [f"configs/{name}" for name in configs], output, settings)
    except MAPSegError:
        say(f" failed\nThe whole log is in {output / 'log.txt'}", quiet)
        raise
    say(f" {seconds:.0f} s", quiet)
    return seconds
