# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg demo` on the adults: `mapseg adapt` with shorter stages, three models measured, nothing done twice."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import demo as demo_command
from mapseg_components.commands.adapt import Adaptation, adapt
from mapseg_components.commands.demo import SIZES, STEPS
from mapseg_components.commands.demo_adapt import ADAPTED, CONTRASTS, MODELS, dice_table, run_of, source_alone
from mapseg_components.errors import ConfigError
from mapseg_components.plans.recipes import Stage, read_recipe
from mapseg_components.shipped_files import sample_folder
from tools.demo_figure import demo_figure

MODULE = sys.modules["mapseg_components.commands.demo"]  # the name itself is the function
PARTS = sys.modules["mapseg_components.commands.demo_adapt"]
OPTIONS = {"device": "cpu", "num_threads": 1, "quiet": True, "verbose": False}
RECIPE = read_recipe(inspect.signature(adapt).parameters["method"].default)
SHORTEST = {"max_epochs": 1, "epoch_length": 2, "val_interval": 1}


def test_every_stage_of_the_recipe_has_its_length_and_no_other():
    # an optional stage, pretraining, is left out
    assert set(STEPS[ADAPTED]) == {stage.name for stage in RECIPE.stages if not stage.optional}
    assert set(STEPS[CONTRASTS]) == {stage.name for stage in source_alone(RECIPE).stages}
    for steps in (*STEPS[CONTRASTS].values(), *STEPS[ADAPTED].values()):
        assert steps["max_epochs"] >= steps["val_interval"], "no epoch would be validated"


def test_the_model_of_random_contrasts_is_the_first_stage_alone_whatever_comes_before_it():
    before = Stage(name="pretraining", bundle="mapseg_pretraining", optional=True)
    alone = source_alone(replace(RECIPE, stages=(before, *RECIPE.stages)))
    first = next(stage for stage in RECIPE.stages if not stage.optional)
    assert alone.stages == (replace(first, contrasts="any_contrast.yaml"),) and alone.order is None
    assert alone.models == {"source_only": f"{first.name}/source_only.pt"}


def test_the_adapted_run_is_mapseg_adapt_as_it_comes_but_for_length_and_sizes(tmp_path):
    sample = sample_folder("adult_t1_to_t2")
    steps = {"adaptation": {"max_epochs": 7}}
    run = run_of(tmp_path, sample, RECIPE, steps, SIZES, 5, OPTIONS)
    defaults = {name: one.default for name, one in inspect.signature(adapt).parameters.items()}
    changed = {name for name, value in run.request.items() if value != defaults[name]}
    assert changed == {"source", "target", "pretraining", "settings", "seed", "device", "num_threads"}
    assert run.request["settings"] == SIZES
    assert set(run.request) == set(defaults) - {"output", "quiet", "verbose"}
    assert Path(run.request["target"]).name == "target", "no label and no test scan is given"
    for own, given in zip(run.recipe.stages, RECIPE.stages):
        assert own.settings == {**given.settings, **steps.get(given.name, {})}
        assert replace(own, settings={}) == replace(given, settings={})


def left_behind(run, calls):
    """Weights that a training leaves behind, and its record."""
    calls.append((run.folder.name, [stage.name for stage in run.recipe.stages], run.request))
    for path in ("source/source_only.pt", *run.recipe.models.values()):
        (run.folder / "stages" / path).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / "stages" / path).write_text(f"{run.folder.name}/{path}")
    run.record["seconds"] = {"source": 1.0}


@pytest.fixture
def small_sample(monkeypatch, tmp_path):
    """The sample's scans cut to the middle, where all structures are: one window each in the place of eight."""
    sample = tmp_path / "sample"
    shutil.copytree(sample_folder("adult_t1_to_t2"), sample)
    for path in sample.rglob("*.nii.gz"):
        scan = nib.load(path)
        middle = [slice((size - 48) // 2, (size + 48) // 2) for size in scan.shape]
        nib.save(scan.slicer[tuple(middle)], path)
    for module in (MODULE, sys.modules["tools.demo_figure"]):
        monkeypatch.setattr(module, "sample_folder", lambda name: sample)


@pytest.fixture
def without_hours(monkeypatch, small_sample):
    """Trainings and models replaced: each label map is the truth with a share of voxels changed."""
    calls, predicted = [], []

    def run(self):
        left_behind(self, calls)
        verdict = {"verdict": "adapted", "ship": "adapted", "why": []}
        order = {"inverted": True, "confidence_as_is": [0.5], "confidence_inverted": [0.75]}
        return {**self.record, "order": order, "assessment": {"verdict": verdict}, "report": "report.html"}

    def predict(scans, output, *, bundle, weights, **options):
        predicted.append((Path(output).name, Path(weights).read_text(), options.get("settings")))
        Path(output).mkdir(parents=True, exist_ok=True)
        wrong = {"source_only": 0.8, "random_contrasts": 0.4, "adapted": 0.1}[Path(output).name]
        rng = np.random.default_rng(0)
        for path in (Path(scans).parent / "labels").iterdir():
            truth = nib.load(path)
            voxels = np.asarray(truth.dataobj).copy()
            voxels[(voxels > 0) & (rng.random(voxels.shape) < wrong)] = 1
            name = path.name.replace(".nii.gz", "_seg.nii.gz")
            nib.save(nib.Nifti1Image(voxels, truth.affine), Path(output) / name)
        return type("Predictions", (), {"exit_code": 0})()

    evaluate = PARTS.evaluate
    labels = str(sample_folder("adult_t1_to_t2") / "datalist.json")
    monkeypatch.setattr(Adaptation, "train", lambda self: left_behind(self, calls))
    monkeypatch.setattr(Adaptation, "run", run)
    monkeypatch.setattr(PARTS, "predict", predict)
    monkeypatch.setattr(PARTS, "evaluate", lambda *given, **named: evaluate(*given, **{**named, "labels": labels}))
    monkeypatch.setattr(PARTS, "VERDICTS", {"adapted": "The adapted model is better."})
    return calls, predicted


def test_three_models_are_measured_each_with_its_own_weights(without_hours, tmp_path, capsys):
    calls, predicted = without_hours
    report = demo_command(str(tmp_path / "out"), seed=4, num_threads=1)
    assert [(name, request["seed"]) for name, _, request in calls] == [(CONTRASTS, 4), (ADAPTED, 4)]
    as_they_are = {"target_inverted": False}
    assert predicted == [
        ("source_only", f"{ADAPTED}/{source_alone(RECIPE).models['source_only']}", as_they_are),
        ("random_contrasts", f"{CONTRASTS}/{source_alone(RECIPE).models['source_only']}", as_they_are),
        ("adapted", f"{ADAPTED}/{RECIPE.models['adapted']}", None),
    ]
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    means = [figures[name]["mean"] for name in MODELS]
    assert means == sorted(means) and 0 < means[0] < means[2] < 1 and figures["seed"] == 4
    text = str(report)
    assert all(name in text for name in MODELS) and "white matter" in text and "silver labels" in text
    assert f"{means[2] - means[0]:+.3f} mean Dice over source-only" in text
    assert f"{means[2] - means[1]:+.3f} over random contrasts" in text and "are shown bright for dark" in text
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert printed.out == "" and [line[:3] for line in printed.err.splitlines()] == ["1/3", "2/3", "3/3"]


def test_it_goes_on_where_it_stopped_and_never_with_other_arguments(without_hours, tmp_path, monkeypatch):
    _, predicted = without_hours
    folder = tmp_path / "out"
    predict = PARTS.predict

    def stopped(scans, output, **named):
        if Path(output).name == "adapted":
            raise KeyboardInterrupt
        return predict(scans, output, **named)

    monkeypatch.setattr(PARTS, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo_command(str(folder), quiet=True)
    assert not (folder / "metrics.json").exists() and len(predicted) == 2
    with pytest.raises(ConfigError, match=r"another kind \(seed was 0, now 1\): repeat its arguments, set overwrite"):
        demo_command(str(folder), seed=1, quiet=True)
    with pytest.raises(ConfigError, match="holds an earlier demo: set overwrite"):
        demo_command(str(folder), sample="fetal_age", quiet=True)
    monkeypatch.setattr(PARTS, "predict", predict)
    first = demo_command(str(folder), quiet=True)
    assert [name for name, _, _ in predicted] == list(MODELS.values()), "what was measured is not measured again"
    assert demo_command(str(folder), quiet=True).figures == first.figures and len(predicted) == 3
    demo_command(str(folder), seed=1, overwrite=True, quiet=True)
    assert len(predicted) == 6 and json.loads((folder / "demo.json").read_text())["seed"] == 1


def test_the_figure_shows_the_finished_demo_and_refuses_others(without_hours, tmp_path):
    demo_command(str(tmp_path / "out"), quiet=True)
    figure = demo_figure(tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    shown = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert [text for text in shown if "Dice" in text] == [f"Dice {figures[name]['mean']:.2f}" for name in MODELS]
    assert tuple(figure.get_facecolor())[:3] == (1, 1, 1)
    with pytest.raises(ConfigError, match="let mapseg demo finish"):
        demo_figure(tmp_path)
    (tmp_path / "metrics.json").write_text('{"adapted": {}}')
    with pytest.raises(ConfigError, match="it is of another demo"):
        demo_figure(tmp_path)


def test_an_unknown_sample_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="sample 'heart' is unknown, expected one of"):
        demo_command(str(tmp_path / "out"), sample="heart")
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_column_a_model_and_lines_of_one_length():
    results = {
        "a": {"structures": {"white matter": 0.5, "cerebrospinal fluid": 0.25}, "mean": 0.375},
        "a longer name": {"structures": {"white matter": 1.0, "cerebrospinal fluid": 0.0}, "mean": 0.5},
    }
    lines = dice_table(results, "Dice").splitlines()
    assert lines[1].split()[-2:] == ["0.500", "1.000"] and lines[-1].split() == ["mean", "0.375", "0.500"]
    assert lines[0].endswith("a longer name") and len({len(line) for line in lines[1:]}) == 1


@pytest.mark.slow
def test_the_whole_way_with_the_shortest_stages(small_sample, warm_processes, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "STEPS", {run: dict.fromkeys(stages, SHORTEST) for run, stages in STEPS.items()})
    report = demo_command(str(tmp_path / "out"), num_threads=1, quiet=True)
    assert all(0 <= report.figures[name]["mean"] <= 1 for name in MODELS)
    done = {"source", "adaptation"}
    assert done <= set(report.figures["seconds"][ADAPTED])
    for stage in done:
        history = (tmp_path / "out" / ADAPTED / "stages" / stage / "history.jsonl").read_text()
        assert history.count("\n") == SHORTEST["max_epochs"], stage
    assert (tmp_path / "out" / ADAPTED / "report.html").is_file()
