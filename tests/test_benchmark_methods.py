# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/methods: tables, resumption and failures with commands that train nothing; processes and budgets alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.methods import bench, figure, processes, report
from benchmarks.methods.bench import Bench
from benchmarks.methods.budget import Costs, StageCosts, costs_of
from benchmarks.methods.processes import StoppedError, Usage, run_mapseg
from benchmarks.methods.run import main
from benchmarks.methods.splits import main as write_splits
from benchmarks.methods.task import link, read_task, write_inputs
from benchmarks.methods.variants import Variant, read_knobs
from benchmarks.methods.verdicts import ADAPTED_ON, ALWAYS, HELD_OUT, OTHERS, SOURCE, pooled, rules, rules_table
from benchmarks.methods.verdicts import table as verdict_table
from mapseg_components.commands.main import main as mapseg
from mapseg_components.errors import ConfigError, DataError, ResourceError
from mapseg_components.plans.recipes import recipe_names
from mapseg_components.scans.masks import mask_beside
from mapseg_components.scans.nifti import read_nifti
from tests.conftest import ROOT, write_nifti
from tests.pictures import write_picture

SHAPE = (9, 10, 11)
TRUTH = np.zeros(SHAPE, np.uint8)
TRUTH[2:6, 2:6, 2:6] = 1  # four voxels along the axis
TRUTH[6:8, 6:9, 6:9] = 2  # two
DICE = {0: 1.0, 1: (3 / 4 + 1 / 2) / 2, 2: 2 / 4 / 2, 3: 1 / 4 / 2}  # of both, moved by so many voxels
VALUES = {"first": 5, "second": 10}
EVALUATED: dict[tuple[str, bytes], str] = {}

KEPT = ROOT / "benchmarks" / "results" / "methods"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A benchmark draws nothing."""
    monkeypatch.setattr(bench, "draw", lambda results, path: path.write_bytes(b""))


@pytest.fixture
def scans(tmp_path):
    """Scans and label maps of a task, all different; returns the task's file."""
    number = 0
    for part, names in (("source", "cd"), ("target", "cd"), ("test", "ef")):
        for name in names:
            number += 1
            write_nifti(tmp_path / part / "images" / f"{name}.nii.gz", np.full(SHAPE, number, np.float32))
            write_nifti(tmp_path / part / "labels" / f"{name}.nii.gz", TRUTH * 5)
    folders = {part: {"images": f"{part}/images", "labels": f"{part}/labels"} for part in ("source", "test")}
    oracle = {"oracle": {"images": "target/images", "labels": "target/labels"}}
    content = {"name": "boxes", "title": "two boxes", "labels": VALUES, **folders, **oracle}
    content["source"] |= {"cases": ["c", "d"]}  # named as those of the target are
    content["target"] = {"images": "target/images"}
    return write_task(tmp_path / "boxes.yaml", content)


def write_task(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def option(words, name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


class Commands:
    """``mapseg`` without training: models move the true label map along an axis; ``evaluate`` is the real one.

    Args:
        moved: method to voxels of the source-only and of the adapted model.
        ships: what verdicts say; the estimates are 0.7 and 0.8.
        fails: method to the line that ``adapt`` ends with, and its exit code.
    """

    def __init__(self, moved: dict[str, tuple[int, int]], ships: str = "adapted", fails: dict | None = None) -> None:
        self.moved, self.ships, self.fails = moved, ships, fails or {}
        self.called: list[list[str]] = []

    def __call__(self, words, log, core=None, limit=None, stop=None, on_used=None) -> Usage:
        self.called.append(list(words))
        log.parent.mkdir(parents=True, exist_ok=True)
        if words[0] == "adapt":
            return self.adapt(words, log, on_used)
        if words[0] == "predict":
            moved = int(Path(option(words, "weights")).read_text())
            for scan in Path(words[1]).glob("*.nii.gz"):
                name = scan.name.replace(".nii.gz", "_seg.nii.gz")
                write_nifti(Path(words[2]) / name, np.roll(TRUTH, moved, axis=0))
            return Usage(0, 5.0, 1)
        first = sorted(Path(words[1]).glob("*.nii.gz"))[0]
        key = first.name, first.read_bytes()
        output = Path(option(words, "output"))
        if key in EVALUATED:  # the same label maps and truth: the same figures
            output.mkdir(parents=True, exist_ok=True)
            (output / "evaluation.csv").write_text(EVALUATED[key])
            return Usage(0, 1.0, 1)
        code = mapseg(words)
        EVALUATED[key] = (output / "evaluation.csv").read_text()
        return Usage(code, 1.0, 1)

    def adapt(self, words, log, on_used) -> Usage:
        method, folder = option(words, "method"), Path(option(words, "output"))
        if method in self.fails:
            line, code = self.fails[method]
            log.write_text(f"INFO: Stage source\n{line}\n")
            if on_used is not None:
                on_used(30.0)
            return Usage(code, 30.0, 10)
        made_run(folder, Path(option(words, "source")), self.moved[method], self.ships, words)
        return Usage(0, 600.0, 3_000_000_000)


def made_run(folder: Path, datalist: Path, moved: tuple[int, int], ships: str, words=()) -> Path:
    """What ``mapseg adapt`` leaves, as far as it is read."""
    content = json.loads(datalist.read_text())
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps({"labels": VALUES}))
    content.setdefault("source_validation", content["source_training"][:1])
    (folder / "datalist.json").write_text(json.dumps(content))
    models = {}
    for (name, estimate), voxels in zip((("source_only", 0.7), ("adapted", 0.8)), moved):
        (folder / "models" / f"{name}.pt").write_text(str(voxels))
        for case in content["target_training"]:
            file = Path(case["image"]).name.replace(".nii.gz", "_seg.nii.gz")
            write_nifti(folder / "predictions" / name / file, np.roll(TRUTH, voxels, axis=0))
        cases = [
            {"case": case["case_id"], "estimated_dice": estimate, "interval": [0.6, 0.9]}
            for case in content["target_training"]
        ]
        models[name] = {"cases": cases}
    request = {"method": "mapseg", "seed": 3, "settings": None}
    verdict = {"ship": ships, "gain": 0.1, "interval": [0.0, 0.2]}
    stages = {"source": {"max_epochs": 36, "val_interval": 5}, "adaptation": {"max_epochs": 16, "val_interval": 5}}
    record = {"request": request, "assessment": {"models": models, "verdict": verdict}, "epochs": stages}
    record["models"] = {"source_only": "source/source_only.pt", "adapted": "adaptation/model.pt"}
    record |= {"seconds": {"source": 40.0, "adaptation": 80.0}}
    record |= {"processor_seconds": {"source": 20.0, "adaptation": 40.0}}
    (folder / "run.json").write_text(json.dumps(record))
    for stage, epochs in (("source", (10.0, 14.0)), ("adaptation", (30.0, 30.0))):
        (folder / "stages" / stage).mkdir(parents=True)
        lines = [json.dumps({"epoch": number, "seconds": seconds}) for number, seconds in enumerate(epochs, 1)]
        (folder / "stages" / stage / "history.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def bench_of(scans: Path, output: Path, commands: Commands, **more) -> Bench:
    return Bench(read_task(scans), output, command=commands, **more)


def results_of(one: Bench, variants, seeds=(0, 1), **more) -> dict:
    with one.claimed():
        one.run(variants, seeds, **more)
    return json.loads((one.folder / "results.json").read_text())


THREE = [Variant("mapseg", "mapseg"), Variant("entropy", "entropy"), Variant("oracle", "mean_teacher", oracle=True)]


def test_a_table_has_every_method_with_its_figures_and_the_one_that_failed(scans, tmp_path):
    fails = {"entropy": (f"NonFiniteError: {tmp_path}/out/runs/x: the loss is NaN", 5)}
    commands = Commands({"mapseg": (2, 1), "mean_teacher": (3, 0)}, fails=fails)
    results = results_of(bench_of(scans, tmp_path / "out", commands, jobs=1), THREE)
    methods = results["summary"]["methods"]
    one = methods["mapseg"]
    assert one["dice"] == pytest.approx({"source_only": DICE[2], "adapted": DICE[1]}) and one["seeds"] == [0, 1]
    assert one["closed"] == pytest.approx((DICE[1] - DICE[2]) / (1 - DICE[2]))  # no baseline: its own source-only
    assert one["minutes"] == 10 and one["peak_bytes"] == 3e9 and one["rolled_back"] == 0 and one["judged"] == 2
    mean = one["summary"]["adapted"]["mean of structures"]
    assert set(mean) == {"dice", "surface_dice", "hd95_mm", "assd_mm"} and mean["dice"]["n"] == 2
    assert mean["dice"]["ci95"] == pytest.approx([DICE[1], DICE[1]])
    assert [each["seed"] for each in methods["entropy"]["failed"]] == [0, 1] and methods["entropy"]["seeds"] == []
    said = "NonFiniteError: runs/x: the loss is NaN (exit code 5; logs/entropy_0.txt)"
    assert methods["entropy"]["failed"][0]["error"] == said
    assert methods["oracle"]["dice"]["adapted"] == 1 and methods["oracle"]["closed"] is None
    assert results["summary"]["verdicts"]["comparisons"] == 2
    on = {run["name"]: run["verdict"]["on"] for run in results["runs"] if run["state"] == "done"}
    assert on == {"mapseg": "the judged scans", "oracle": "the test scans"}  # the oracle judged other scans
    text = (tmp_path / "out" / "results.md").read_text()
    assert "Of 6 runs 2 failed." in text
    assert "| entropy | failed (0 of 2 seeds) |" in text and "- entropy, seed 1: NonFiniteError" in text
    assert f"| {DICE[1]:.3f} [{DICE[1]:.3f}, {DICE[1]:.3f}] | {DICE[1] - DICE[2]:+.3f} (+0.100) |" in text
    assert "surface Dice at 1 mm" in text and "surface Dice" not in report.tables(results, brief=True)
    figure.draw(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_no_method_reads_a_label_of_the_target_or_a_test_scan(scans, tmp_path):
    commands = Commands({"mapseg": (2, 1), "mean_teacher": (3, 0)})
    results_of(bench_of(scans, tmp_path / "out", commands), THREE[::2], [0])
    texts = {option(w, "method"): Path(option(w, "source")).read_text() for w in commands.called if w[0] == "adapt"}
    assert "target/labels" not in texts["mapseg"] and "target/labels" in texts["mean_teacher"]  # the oracle
    assert all("/test/" not in text and "/source/" in text for text in texts.values())
    for text in texts.values():
        assert all("label" not in case for case in json.loads(text)["target_training"])


def test_the_same_command_again_does_what_is_missing_alone(scans, tmp_path):
    commands = Commands({"mapseg": (2, 1)}, fails={"entropy": ("ResourceError: out of memory", 6)})
    one = bench_of(scans, tmp_path / "out", commands)
    results_of(one, THREE[:1], [0])
    before = len(commands.called)
    again = results_of(bench_of(scans, tmp_path / "out", commands), THREE[:1], [0])
    assert len(commands.called) == before and again["summary"]["methods"]["mapseg"]["seeds"] == [0]
    (tmp_path / "out" / "records" / "mapseg_0.json").unlink()  # stopped while the test scans were predicted
    found = results_of(bench_of(scans, tmp_path / "out", commands), THREE[:1], [0])
    assert "adapt" not in [words[0] for words in commands.called[before:]]
    assert found["runs"][0]["processor_seconds"] == 600
    (tmp_path / "out" / "records" / "mapseg_0.json").unlink()  # killed, and its command ended later by itself
    (tmp_path / "out" / "used" / "mapseg_0.json").write_text('{"seconds": 2.0, "peak": 7}')
    again = Commands({})
    again.adapt = lambda words, log, on_used: Usage(0, 3.0, 5)
    found = results_of(bench_of(scans, tmp_path / "out", again), THREE[:1], [0])
    assert (found["runs"][0]["processor_seconds"], found["runs"][0]["peak_bytes"]) == (60, 7)
    results_of(bench_of(scans, tmp_path / "out", commands), THREE[:2], [0])
    commands.fails, commands.moved = {"mapseg": ("DataError: no", 3)}, {"entropy": (1, 1)}
    found = results_of(bench_of(scans, tmp_path / "out", commands), [*THREE[:2]], [0, 1])
    states = {(run["name"], run["seed"]): run["state"] for run in found["runs"]}
    # memory may be there now, and is tried again by itself; other failures by retry alone
    assert states == {("mapseg", 0): "done", ("entropy", 0): "done", ("entropy", 1): "done", ("mapseg", 1): "failed"}
    entropy = next(run for run in found["runs"] if run["name"] == "entropy")
    assert entropy["processor_seconds"] == 630  # the failed attempt counts
    commands.fails, commands.moved = {}, {"mapseg": (2, 1)}
    assert len(results_of(bench_of(scans, tmp_path / "out", commands), THREE[:1], [1])["runs"]) == 4
    found = results_of(bench_of(scans, tmp_path / "out", commands), THREE[:1], [1], retry=True)
    assert all(run["state"] == "done" for run in found["runs"])


def test_results_of_another_budget_are_not_mixed_in(scans, tmp_path):
    results_of(bench_of(scans, tmp_path / "out", Commands({"mapseg": (2, 1)})), THREE[:1], [0])
    with pytest.raises(ConfigError, match="has results of another budget_minutes, settings: repeat that, or choose"):
        results_of(bench_of(scans, tmp_path / "out", Commands({}), budget_minutes=5, settings={"seed": 1}), THREE[:1])


@pytest.mark.parametrize(
    ("moved", "ships", "right", "lost"),
    [
        ((2, 1), "adapted", True, 0.0),
        ((2, 1), "source_only", False, DICE[1] - DICE[2]),
        ((1, 2), "adapted", False, DICE[1] - DICE[2]),
        ((1, 2), "source_only", True, 0.0),
        ((1, -1), "source_only", True, 0.0),  # as good: either is right
    ],
)
def test_verdicts_are_right_if_they_ship_the_better_model_or_one_as_good(scans, tmp_path, moved, ships, right, lost):
    found = results_of(bench_of(scans, tmp_path / "out", Commands({"mapseg": moved}, ships)), THREE[:1], [0])
    said = found["summary"]["verdicts"]
    assert (said["comparisons"], said["right"]) == (1, right) and said["lost"] == pytest.approx(lost)
    assert found["summary"]["methods"]["mapseg"]["rolled_back"] == (ships == "source_only")
    truths = [DICE[abs(voxels)] for voxels in moved]
    error = np.mean([abs(truths[0] - 0.7), abs(truths[1] - 0.8)])
    assert said["errors"] == {"the judged scans": {"n": 4, "mean_absolute": pytest.approx(error)}}
    assert said["intervals"] == 4 and said["intervals_hold"] == 2 * sum(0.6 <= truth <= 0.9 for truth in truths)


def test_without_labels_of_the_target_estimates_are_held_against_the_test_and_one_model_is_no_comparison(
    scans, tmp_path
):
    content = yaml.safe_load(scans.read_text())
    del content["oracle"]
    task = write_task(scans, content)
    commands = Commands({"mapseg": (2, 1), "entropy": (1, 1)})
    found = results_of(bench_of(task, tmp_path / "out", commands), THREE[:2], [0])["summary"]
    error = np.mean([abs(DICE[2] - 0.7), abs(DICE[1] - 0.8)])
    assert found["verdicts"]["errors"] == {"the test scans": {"n": 2, "mean_absolute": pytest.approx(error)}}
    assert found["verdicts"]["comparisons"] == 1 and found["methods"]["entropy"]["judged"] == 0


def test_the_gap_is_that_to_the_strongest_baseline(scans, tmp_path):
    moved = {"mapseg": (2, 1), "entropy": (3, 3), "mean_teacher": (3, 0), "copy_paste": (2, 2)}
    variants = [
        *THREE[::2],
        Variant("source_only", "entropy"),
        Variant("source_only_contrasts", "copy_paste"),
    ]
    found = results_of(bench_of(scans, tmp_path / "out", Commands(moved)), variants, [0])["summary"]
    assert found["baseline"] == "source_only_contrasts"
    closed = {name: one["closed"] for name, one in found["methods"].items()}
    assert closed["source_only_contrasts"] == 0 and closed["source_only"] < 0
    assert closed["mapseg"] == pytest.approx((DICE[1] - DICE[2]) / (1 - DICE[2]))


def test_a_budget_sets_one_length_and_what_cannot_fit_or_goes_over_is_said(scans, tmp_path):
    commands = Commands({"mapseg": (2, 1)})
    found = results_of(bench_of(scans, tmp_path / "out", commands, budget_minutes=20), THREE[:1])
    lengths = [float(option(words, "length")) for words in commands.called if words[0] == "adapt"]
    assert len(lengths) == 3 and lengths[0] < 0.001 and lengths[1] == lengths[2] == found["runs"][0]["length"]
    # rates of a half: epochs of 5 and 15 s, a validation of 2 s; 8 s and 10 s of starts, 540 s of all else
    cost = Costs(540.0, (StageCosts(36, 5, 8.0, 5.0, 2.0, False), StageCosts(16, 5, 10.0, 15.0, 0.0)))
    assert lengths[1] == pytest.approx(cost.length_for(1200), abs=1e-4)
    assert json.loads(option(commands.called[0], "settings")) == {"target_inverted": False}
    assert not (tmp_path / "out" / "calibration" / "mapseg").exists()
    rounds = Commands({"cosmos": (2, 1)})
    results_of(bench_of(scans, tmp_path / "rounds", rounds, budget_minutes=20), [Variant("cosmos", "cosmos")], [0])
    asked = [
        option(words, "settings") for words in rounds.called if words[0] == "adapt" and "settings" in " ".join(words)
    ]
    # the pseudo labels of its shortest run may lack a structure, those of the run itself may not
    assert [json.loads(one) for one in asked] == [{"target_inverted": False, "required_structures": []}]
    found = results_of(bench_of(scans, tmp_path / "small", commands, budget_minutes=2), THREE[:1], [0])
    error = found["summary"]["methods"]["mapseg"]["failed"][0]["error"]
    assert "the budget of 2 processor minutes is too small: the shortest run, two epochs of each stage, needs" in error

    def greedy(words, log, **more):
        used = commands(words, log, **more)
        over = words[0] == "adapt" and float(option(words, "length")) > 0.001
        return dataclasses.replace(used, code=-15, processor_seconds=1501.0, over=True) if over else used

    found = results_of(bench_of(scans, tmp_path / "over", greedy, budget_minutes=20), THREE[:1], [0])
    error = found["summary"]["methods"]["mapseg"]["failed"][0]["error"]
    assert error == "ended after 25.0 processor minutes, more than 1.25 times the budget of 20"


def test_the_longest_run_within_a_budget_is_within_it_and_a_longer_one_is_not(tmp_path):
    costs = Costs(30.0, (StageCosts(36, 5, 8.0, 5.0, 2.0), StageCosts(3, None, 10.0, 15.0, 0.0)))
    for seconds in (130.0, 301.0, 1000.0, 12345.0):
        length = costs.length_for(seconds)
        assert costs.predicted(length) <= seconds < costs.predicted(length * 1.2)
    assert costs.length_for(60.0) is None and Costs(5.0, ()).length_for(1000.0) is None
    datalist = tmp_path / "datalist.json"
    content = {"source_training": [{"image": "a", "label": "b"}], "target_training": [{"image": "c", "case_id": "c"}]}
    datalist.write_text(json.dumps(content))
    found = costs_of(made_run(tmp_path / "run", datalist, (1, 0), "adapted"), 100.0)
    assert found == Costs(40.0, (StageCosts(36, 5, 8.0, 5.0, 2.0, False), StageCosts(16, 5, 10.0, 15.0, 0.0)))
    # 40 s, the source's 36 epochs and 7 validations, 10 s and a tenth of the adaptation beside its epochs
    shared = dataclasses.replace(found, source_length=1.0)
    assert shared.predicted(0.5) == 40 + 8 + 36 * 5 + 7 * 2 + 1.1 * (10 + 8 * 15)
    assert shared.length_for(shared.predicted(0.5) + 1.0) >= 0.5 and shared.length_for(60.0) is None


def test_a_common_source_length_leaves_the_budget_to_adaptation_and_runs_know_each_other(scans, tmp_path):
    commands = Commands({"mapseg": (2, 1), "entropy": (3, 3)})
    bench = bench_of(scans, tmp_path / "out", commands, budget_minutes=20, source_length=0.5)
    found = results_of(bench, THREE[:2], [0])
    assert found["source_length"] == 0.5
    called = [words for words in commands.called if words[0] == "adapt"]
    assert [option(words, "length") for words in called] == ["0.5"] * 4
    assert not any(word.startswith("--settings") for words in called for word in words)
    shortest, chosen = (float(option(called[n], "adaptation_length")) for n in (0, 1))
    assert shortest < 0.001 < chosen == next(run["length"] for run in found["runs"] if run["name"] == "mapseg")
    names = [option(words, "reuse").split(",") if "--reuse" in " ".join(words) else [] for words in called]
    folders = [[str(Path(name).relative_to(tmp_path / "out")) for name in one] for one in names]
    assert folders[:2] == [[], ["calibration/mapseg"]]
    assert folders[2] == ["calibration/mapseg", "runs/mapseg_0"]


def test_without_a_budget_a_task_may_set_the_length_of_the_adaptation(scans, tmp_path):
    commands = Commands({"mapseg": (2, 1)})
    task = read_task(scans)
    task.arguments["adaptation_length"] = 0.25
    bench = Bench(task, tmp_path / "out", source_length=0.5, command=commands)
    results_of(bench, THREE[:1], [0])
    called = [words for words in commands.called if words[0] == "adapt"]
    assert [word for word in called[0] if "length=" in word] == ["--length=0.5", "--adaptation_length=0.25"]
    assert len(called) == 1
    budgeted = Bench(task, tmp_path / "other", budget_minutes=20, command=commands)
    longer = [dataclasses.replace(THREE[0], arguments={"adaptation_length": 2.0})]
    for one, variants in (
        (budgeted, THREE[:1]),
        (bench_of(scans, tmp_path / "third", commands, budget_minutes=20), longer),
    ):
        with pytest.raises(ConfigError, match="adaptation_length is set, and the budget of 20 minutes sets it, too"):
            one.run(variants, [0])


def test_runs_made_by_hand_are_scored_where_they_lie(scans, tmp_path):
    inputs = write_inputs(read_task(scans), tmp_path / "inputs")
    run = made_run(tmp_path / "elsewhere" / "run", inputs.datalist, (2, 1), "adapted")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    one = bench_of(scans, tmp_path / "out", Commands({}))
    with one.claimed():
        one.score_runs([run])
        one.score_runs([run], "again")
        with pytest.raises(ConfigError, match=r"again, seed 3 is .*run already: set name"):
            one.score_runs([made_run(tmp_path / "other", inputs.datalist, (2, 1), "adapted")], "again")
        with pytest.raises(ConfigError, match="has no run of mapseg adapt"):
            one.score_runs([tmp_path / "inputs"])
        tested = dataclasses.replace(inputs, datalist=tmp_path / "tested.json")
        cases = [{"image": str(tmp_path / "test" / "images" / "e.nii.gz"), "case_id": "e"}]
        content = json.loads(inputs.datalist.read_text())
        tested.datalist.write_text(json.dumps({**content, "target_training": cases}))
        with pytest.raises(DataError, match=r"was trained on test scans of the task: .*e\.nii\.gz: name another"):
            one.score_runs([made_run(tmp_path / "seen", tested.datalist, (2, 1), "adapted")])
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["methods"]
    assert found["mapseg, run by hand"]["dice"]["adapted"] == pytest.approx(DICE[1])
    assert found["again"]["minutes"] == 1


def test_estimates_are_held_against_the_truth_over_tasks_and_moved_by_the_others():
    def result(title, errors):
        runs = [
            {"state": "done", "oracle": False, "same_model": False, "name": "mapseg", "seed": seed}
            | {"verdict": {"right": True, "lost": 0.0, "on": "the judged scans", "estimates": estimates}}
            for seed, estimates in enumerate(
                [{"model": "adapted", "case": case, "estimate": 0.5 + error, "dice": 0.5} for case in "ab"]
                for error in errors
            )
        ]
        return {"task": {"title": title, "name": title}, "runs": [*runs, {"state": "failed", "oracle": False}]}

    rows = pooled([result("one", [0.1, 0.2, 0.3, 0.1, 0.2]), result("two", [0.25, 0.35])])
    one, two, both = rows
    assert [row["models"] for row in rows] == [5, 2, 7] and [row["comparisons"] for row in rows] == [5, 2, 7]
    assert two["error"] == pytest.approx(0.3) == pytest.approx(two["bias"])
    assert two["moved_error"] == pytest.approx(0.1)  # by 0.2, the other's median error
    assert two["held"] == 1  # four fifths of five errors and one more: all are within 0.1, and 0.15 is not
    assert one["moved_error"] == pytest.approx(0.12)  # by 0.3
    assert both["moved_error"] == pytest.approx((5 * 0.12 + 2 * 0.1) / 7)
    assert pooled([result("one", [0.1])])[0]["moved_error"] is None
    assert "| two | 2 of 2 | 0.000 | 2 | 0.300 | +0.300 | 0.100 | 1 of 2 |" in verdict_table(rows)


def test_other_rules_are_judged_task_by_task_with_the_least_gain_of_the_others():
    def result(task, *verdicts):
        keys = {"state": "done", "oracle": False, "same_model": False, "seed": 0}
        said = [
            {"method": method, "verdict": {"ship": ship, "estimated_gain": estimated, "gain": gain, "held_out": True}}
            for method, ship, estimated, gain in verdicts
        ]
        return {"task": {"title": task, "name": task}, "runs": [keys | one for one in said]}

    missed = ("mapseg", "source_only", -0.012, 0.03)  # a gain that the estimate does not see
    found = ("mapseg", "source_only", -0.022, -0.05)
    let_go = ("test_time", "adapted", 0.005, -0.04)
    unlucky = ("entropy", "source_only", 0.012, 0.04)  # in most scans its estimate is lower
    results = [result("hearts", missed, found), result("brains", found, let_go, unlucky), result("hearts", missed)]
    rows = rules(results, SOURCE)
    right = {row["least"]: row["right"] for row in rows}
    assert {row["comparisons"] for row in rows} == {4}
    assert right == {
        0.0: 2,
        -0.005: 2,
        -0.01: 2,
        -0.015: 4,
        -0.02: 4,
        -0.025: 2,
        -0.03: 2,
        -0.04: 2,
        ALWAYS: 2,
        OTHERS: 2,
    }
    lost = {row["least"]: row["lost"] for row in rows}
    assert lost[0.0] == pytest.approx(0.06 / 4) and lost[-0.02] == 0 and lost[-0.03] == pytest.approx(0.1 / 4)
    without = {row["least"]: (row["right"], row["lost"]) for row in rules(results, HELD_OUT)}
    assert without[0.0] == (0, pytest.approx(0.04)) and without[0.005] == (1, pytest.approx(0.02))
    text = rules_table(results)
    assert "| -0.02 | 4 of 4 | 4 of 4 | 0.0000 |" in text and "| 0.005 | 1 of 2 | 1 of 2 | 0.0200 |" in text
    assert f"| {ALWAYS} | 2 of 4 | 2 of 4 | 0.0250 |" in text
    for run in results[1]["runs"]:
        run["verdict"]["held_out"] = False
    seen = {row["least"]: row["comparisons"] for row in rules(results, ADAPTED_ON)}
    assert seen[0.05] == 2 and {row["comparisons"] for row in rules(results, HELD_OUT)} == {0}
    same = ("mapseg", "adapted", 0.01, 0.009)
    text = rules_table([result("hearts", missed, same)])
    assert "| -0.02 | 2 of 2 | 1 of 1 | 0.0000 |" in text and "| 0.0 | 1 of 2 | 0 of 1 | 0.0150 |" in text
    assert [row["least"] for row in rules([result("hearts", missed)], SOURCE)][-1] == ALWAYS, "one task has no others"


def test_knobs_are_compared_with_the_first_variant(scans, tmp_path):
    file = tmp_path / "knobs.yaml"
    variants = {
        "as it comes": {},
        "masked": {"settings": {"target_masked": True}},
        "all": {"arguments": {"held_out": 0}},
    }
    file.write_text(yaml.safe_dump({"method": "mapseg", "variants": variants}, sort_keys=False))
    moved = {(): 2, ("target_masked",): 1}

    def command(words, log, **more):
        chosen = tuple(json.loads(option(words, "settings"))) if any("--settings" in word for word in words) else ()
        return Commands({"mapseg": (3, moved[chosen] if words[0] == "adapt" else 0)})(words, log, **more)

    knobs = yaml.safe_load(file.read_text())
    one = bench_of(scans, tmp_path / "out", command, knobs=knobs)
    results = results_of(one, read_knobs(file), [0])
    lines = report.tables(results).splitlines()
    assert lines[4].startswith("| as it comes |  |") and f"| {DICE[1] - DICE[2]:+.3f} [" in lines[5]
    assert '`{"target_masked": true}`' in lines[5] and '| all | `{"held_out": 0}` |' in lines[6]
    for change, message in (({"masked": {"setting": {}}}, "expected settings and"), ({"a": {}}, "two or more")):
        file.write_text(yaml.safe_dump({"method": "mapseg", "variants": change}))
        with pytest.raises(ConfigError, match=message):
            read_knobs(file)
    shipped = [read_knobs(path) for path in sorted((ROOT / "benchmarks" / "methods" / "knobs").glob("*.yaml"))]
    assert len(shipped) == 4 and all(len(variants) > 2 for variants in shipped)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tests": []}, ConfigError, r"has \['tests'\] \(did you mean 'test'\?\), expected keys among"),
        ({"test": None}, ConfigError, "has no test: name these scans"),
        ({"data": "nowhere"}, ConfigError, "the folder of the scans, .*nowhere, does not exist"),
        ({"name": "a/b"}, ConfigError, "name is 'a/b', expected letters"),
        ({"labels": {"first": 5, "second": 5}}, ConfigError, "labels"),
        ({"target": [3]}, ConfigError, "target, entry 0 is 3, expected image, each a path"),
        ({"test": ["test/images/e.nii.gz"]}, ConfigError, "test, entry 0 is .*, expected image and label"),
        ({"test": {"images": "test/images"}}, ConfigError, r"expected \['images', 'labels'\]"),
        ({"target": {"images": "target/images", "cases": ["x"]}}, ConfigError, r"has no scan \['x'\]"),
        ({"source": ["a.nii.gz"] * 2}, ConfigError, "source, entry 0"),
        ({"target": ["target/images/c.nii.gz", "target/images/c.nii.gz"]}, ConfigError, "has several cases 'c'"),
        ({"target": [{"image": "a.nii.gz", "case_id": "../a"}]}, ConfigError, r"case id '\.\./a' cannot name a file"),
        ({"target": ["target/images/z.nii.gz"]}, DataError, r"missing .*z\.nii\.gz: correct the paths"),
        ({"target": {"images": "test/images"}}, DataError, "test scans that are trained on: .*e.nii.gz of target"),
        ({"target": ["copy.nii.gz"]}, DataError, r"f\.nii\.gz is .*copy\.nii\.gz of target"),
        ({"arguments": {"prepare": "{}"}}, ConfigError, r"arguments has \['prepare'\], expected those of mapseg adapt"),
        ({"tolerance_mm": -1}, ConfigError, "tolerance_mm is -1, expected a number from 0"),
    ],
)  # fmt: skip
def test_a_task_that_does_not_do_is_named(scans, tmp_path, change, error, message):
    shutil.copyfile(tmp_path / "test" / "images" / "f.nii.gz", tmp_path / "copy.nii.gz")
    write_task(scans, {**yaml.safe_load(scans.read_text()), **change})
    with pytest.raises(error, match=message):
        read_task(scans)


def test_the_forms_of_a_task_say_the_same_and_data_may_lie_elsewhere(scans, tmp_path):
    expected = read_task(scans)
    content = yaml.safe_load(scans.read_text())
    pairs = [{"image": f"source/images/{n}.nii.gz", "label": f"source/labels/{n}.nii.gz"} for n in "cd"]
    (tmp_path / "list.json").write_text(json.dumps({"labels": VALUES, "source_training": pairs}))
    others = [
        {**content, "source": pairs},
        {**content, "source": {"images": "source/images", "labels": "source/labels", "cases": ["c", "d"]}},
        {**{key: value for key, value in content.items() if key not in ("source", "labels")}, "datalist": "list.json"},
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for other in others:
        assert read_task(write_task(scans, other)) == expected
        (folder / "boxes.json").write_text(json.dumps(other))
        assert read_task(folder / "boxes.json", tmp_path) == expected
        (folder / "boxes.json").write_text(json.dumps({**other, "data": ".."}))
        assert read_task(folder / "boxes.json") == expected


def test_test_scans_and_label_maps_get_one_name_whatever_their_format_and_folder(scans, tmp_path):
    content = yaml.safe_load(scans.read_text())
    content["test"] = [{"image": "x/1.TIF", "label": "y/1_mask.png", "case_id": "first"}]
    for place in ("x/1.TIF", "y/1_mask.png"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(place.encode())
    inputs = write_inputs(read_task(write_task(scans, content)), tmp_path / "inputs")
    assert [path.name for path in inputs.images.iterdir()] == ["first.TIF"]
    assert (inputs.truth / "first.png").read_bytes() == b"y/1_mask.png"
    assert sorted(path.name for path in inputs.target_truth.iterdir()) == ["c.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize("name", ["adult_t1_to_t2", "fetal_age"])
def test_the_shipped_tasks_are_those_of_the_samples(name):
    task = read_task(ROOT / "benchmarks" / "methods" / "tasks" / f"{name}.yaml")
    assert task.name == name and len(task.parts["test"]) == 2 and "oracle" not in task.parts


def test_splits_become_tasks(tmp_path, capsys):
    names = {"T1": ["01", "02", "15"], "T2": ["03", "04", "15"], "label": ["01", "02", "03", "15"]}
    for folder, cases in names.items():
        for case in cases:
            values = np.full((2, 3, 4), int(case) + (folder == "T2") / 2)
            write_nifti(tmp_path / folder / f"{case}.nii.gz", values)
    for number in (1, 2, 10, 11):
        for ending in ("", "_label"):
            (tmp_path / "png").mkdir(exist_ok=True)
            (tmp_path / "png" / f"rat{number}_x{ending}.png").touch()
    beside = {"image": "png", "train": "rats 1-2", "validation": "rats 10-10"}
    splits = {
        "one": {
            "labels": {"0": "background", "1": "first"},
            "source": {"image": "T1/*", "label": "label", "train": ["01", "02"], "validation": ["15"]},
            "target": {"image": "T2", "train": ["03", "04"]},
        },
        "two": {"labels": "as above", "source": beside, "target": {"image": "png", "train": "all (never used)"}},
    }
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    line = [str(tmp_path / "splits.json"), "--data", str(tmp_path), "--output", str(tmp_path / "tasks")]
    assert write_splits([*line, "--hold_out", "1"]) == 0
    one, two = (json.loads((tmp_path / "tasks" / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [case["case_id"] for case in one["test"]] == ["T2_15"] and one["test"][0]["label"] == "label/15.nii.gz"
    assert [case["case_id"] for case in one["oracle"]] == ["T2_03"] and "label" not in one["target"][0]
    assert [case["image"] for case in two["source"]] == ["png/rat1_x.png", "png/rat2_x.png"]
    assert two["source"][0]["label"] == "png/rat1_x_label.png" and two["labels"] == {"first": 1}
    assert [case["image"] for case in two["validation"]] == ["png/rat10_x.png"]
    assert len(two["target"]) == 3 and [case["image"] for case in two["test"]] == ["png/rat2_x.png"]
    assert read_task(tmp_path / "tasks" / "one.json").parts["validation"][0]["case_id"] == "T1_15"
    splits["one"]["source"]["train"] = "some"
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert write_splits(line) == 2 and "expected a list of names, 'all', or such as" in capsys.readouterr().err


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Has `run_mapseg` start a small program in the place of Python with the package."""

    def write(code: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!{sys.executable} -S\nimport os, signal, subprocess, sys, time\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setattr(processes.sys, "executable", str(path))

    monkeypatch.setattr(processes, "USED_SECONDS", 0.05)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    return write


BURN = "def burn(seconds):\n    end = time.process_time() + seconds\n    while time.process_time() < end: pass\n"


def test_what_a_command_uses_is_that_of_all_its_processes(program, tmp_path):
    core = min(os.sched_getaffinity(0))
    child = f"import time\n{BURN}burn(0.3)"
    program(
        f"{BURN}block = bytearray(50_000_000)\nburn(0.1)\n"
        f"subprocess.run([{sys.executable!r}, '-S', '-c', {child!r}], check=True)\n"
        "print(sys.argv[1:], os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"
    )
    seen: list[float] = []
    used = run_mapseg(["adapt", "--seed=1"], tmp_path / "logs" / "a.txt", core=core, on_used=seen.append)
    assert used.code == 0 and 0.4 <= used.processor_seconds < 2 and used.peak_bytes > 50_000_000 and not used.over
    assert seen == sorted(seen) and seen[-1] == used.processor_seconds and seen[0] < used.processor_seconds
    words = f"['-m', 'mapseg_components.commands', 'adapt', '--seed=1'] {{{core}}} 1 True"
    assert (tmp_path / "logs" / "a.txt").read_text().strip() == words


def test_a_command_ends_when_it_has_used_its_share_or_the_benchmark_is_stopped(program, tmp_path):
    program(f"{BURN}burn(20)")
    used = run_mapseg(["adapt"], tmp_path / "log.txt", limit=0.2)
    assert used.over and used.code == -15 and 0.2 < used.processor_seconds < 5
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StoppedError):
        run_mapseg(["adapt"], tmp_path / "log.txt", stop=stop)


def test_the_benchmark_stops_between_runs_and_asks_for_no_more_cores_than_there_are(scans, tmp_path):
    one = bench_of(scans, tmp_path / "out", Commands({"mapseg": (2, 1)}))
    one.stop.set()
    with one.claimed(), pytest.raises(StoppedError):
        one.run(THREE[:1], [0])
    assert not (tmp_path / "out" / "records").exists()
    with pytest.raises(ConfigError, match="jobs is 1000, expected 1 to"):
        bench_of(scans, tmp_path / "out", Commands({}), jobs=1000)
    with one.claimed():
        assert ResourceError.exit_code == 6  # what a run that another process has ends with: tried again


def test_the_command_line_names_what_is_wrong_and_the_page_takes_several_results(scans, tmp_path, capsys, monkeypatch):
    assert main([str(scans), "--methods", "mapsg", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'mapseg'" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert main([str(scans), "--settings", '{"widht": 1}']) == 2
    assert "settings ['widht'] are in no bundle" in capsys.readouterr().err
    for line in (["--budget", "0"], ["--knobs", "a", "--from", "b"], ["--name", "x"]):
        with pytest.raises(SystemExit):
            main([str(scans), *line])
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark other: begin -->stays<!-- benchmark other: end -->")
    files = []
    for seed in range(2):
        results_of(bench_of(scans, tmp_path / f"r{seed}", Commands({"mapseg": (2, seed)})), THREE[:1], [seed])
        files.append(str(tmp_path / f"r{seed}" / "results.json"))
    monkeypatch.setattr(sys, "argv", ["report", *files, "--docs", str(page)])
    with pytest.raises(ValueError, match="has no lines"):
        report.main()
    name = json.loads(Path(files[0]).read_text())["task"]["name"]
    page.write_text(page.read_text() + f"<!-- benchmark {name}: begin --><!-- benchmark {name}: end -->")
    report.main()
    text = page.read_text()
    assert "stays" in text and text.count("### two boxes") == 1 and "seeds 0, 1" in text
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--keep", str(tmp_path / "kept")])
    report.main()
    (again,) = report.joined([json.loads((tmp_path / "kept" / f"{name}.json").read_text())])
    assert report.tables(again) in page.read_text() == text, "what is kept is all that the table needs"
    one = json.loads(Path(files[0]).read_text())
    with pytest.raises(ValueError, match="hold mapseg, seed 0"):
        report.joined([one, one])
    with pytest.raises(ValueError, match="budget_minutes is None and 3"):
        report.joined([one, {**one, "budget_minutes": 3}])


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_shows_what_is_kept(path):
    (result,) = report.joined([json.loads(path.read_text())])
    assert report.tables(result, brief=True) in (ROOT / "docs" / "reference" / "benchmark.md").read_text()


def test_every_method_is_compared_by_default(scans, tmp_path):
    from benchmarks.methods.run import arguments_of, make_bench

    _, variants = make_bench(arguments_of([str(scans), "--output", str(tmp_path), "--oracle_method", "entropy"]))
    assert [one.name for one in variants] == [*recipe_names(), "oracle"] and variants[-1].method == "entropy"


def test_two_target_scans_of_one_file_name_are_refused_and_no_label_map_is_written_over(scans, tmp_path):
    content = yaml.safe_load(scans.read_text())
    for site in "ab":
        for kind in ("images", "labels"):
            (tmp_path / site / kind).mkdir(parents=True)
            shutil.copyfile(tmp_path / "target" / kind / "c.nii.gz", tmp_path / site / kind / "c.nii.gz")
    pairs = [{"image": f"{s}/images/c.nii.gz", "label": f"{s}/labels/c.nii.gz", "case_id": f"{s}_c"} for s in "ab"]
    content |= {"target": [{"image": pair["image"], "case_id": pair["case_id"]} for pair in pairs], "oracle": pairs}
    with pytest.raises(DataError, match="several target scans are files named 'c': rename them"):
        read_task(write_task(scans, content))
    first, second = (Path(write_task(tmp_path / f"{name}.txt", {"name": name})) for name in "ab")
    link(str(first), tmp_path / "links", "one")
    with pytest.raises(DataError, match="are both 'one' of a task"):
        link(str(second), tmp_path / "links", "one")
    assert first.read_text() == "name: a\n"


def test_masks_and_pixel_sizes_stand_beside_test_images_under_their_names(scans, tmp_path):
    content = yaml.safe_load(scans.read_text())
    voxels = np.random.default_rng(0).integers(1, 255, (20, 24)).astype(np.uint8)
    for name in ("x/1.png", "x/1_mask.png", "y/1.png", "t/other_mask.png"):
        write_picture(tmp_path / name, (voxels > 99).astype(np.uint8) if "mask" in name else voxels)
    write_picture(tmp_path / "t" / "2.png", voxels.T)
    (tmp_path / "x" / "pixel_size.json").write_text(json.dumps({"PixelSize": 0.25, "PixelSizeUnits": "um"}))
    content["test"] = [{"image": "x/1.png", "label": "y/1.png", "case_id": "first"}]
    content["target"] = [{"image": "t/2.png", "mask": "t/other_mask.png", "case_id": "second"}]
    twin = {**content, "test": [{"image": "x/1.png", "label": "x/1_mask.png"}]}
    assert "mask" not in read_task(write_task(scans, twin)).parts["test"][0], "the truth is not shown to a method"
    inputs = write_inputs(read_task(write_task(scans, content)), tmp_path / "inputs")
    for folder in (inputs.images, inputs.truth):
        assert sorted(path.name for path in folder.iterdir()) == ["first.json", "first.png", "first_mask.png"]
        sides = np.abs(np.diag(read_nifti(folder / "first.png").affine)[:2])
        assert sides.tolist() == [0.25, 0.25]  # in um
    assert mask_beside(inputs.truth / "first.png") == inputs.truth / "first_mask.png"
    (entry,) = json.loads(inputs.datalist.read_text())["target_training"]
    assert entry == {
        "image": str(tmp_path / "t" / "2.png"),
        "mask": str(tmp_path / "t" / "other_mask.png"),
        "case_id": "second",
    }
