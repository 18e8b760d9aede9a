# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Time to a Dice: weights of every moment are kept with what they cost, and scored. Nothing is trained."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from benchmarks.methods import curve
from benchmarks.methods.processes import StoppedError, Usage
from benchmarks.methods.run import main
from benchmarks.methods.variants import Variant
from mapseg_components.errors import ConfigError
from tests.test_benchmark_methods import DICE, Commands, bench_of, made_run, option, results_of, scans

__all__ = ["scans"]

ONE = [Variant("mapseg", "mapseg")]
# what a run chooses: stage and file, how far its label maps are off, processor seconds when it is there
MOMENTS = [
    ("source/source_only.pt", 3, 60.0),
    ("source/source_only.pt", 2, 120.0),
    ("adaptation/model.pt", 1, 240.0),
    ("adaptation/model.pt", 0, 300.0),
]


class Training(Commands):
    """``mapseg adapt`` that chooses weights now and then; it may be stopped after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__({"mapseg": (2, 0)})
        self.stop_after, self.done, self.spent, self.stop = stop_after, 0, 0.0, threading.Event()

    def adapt(self, words, log, on_used) -> Usage:
        folder = Path(option(words, "output"))
        before = self.spent
        for file, voxels, seconds in MOMENTS[self.done :]:
            path = folder / "stages" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(voxels))
            history = path.with_name("history.jsonl")
            history.write_text((history.read_text() if history.is_file() else "") + "{}\n")
            self.done, self.spent = self.done + 1, seconds
            on_used(seconds - before)
            on_used(seconds - before + 5)  # nothing is new
            if self.done == self.stop_after:
                self.stop_after = None
                self.stop.set()
                raise StoppedError
        made = made_run(folder.with_name("made"), Path(option(words, "source")), (2, 0), "adapted", words)
        for path in made.iterdir():
            if path.name != "stages":
                path.rename(folder / path.name)
        shutil.rmtree(made)
        return Usage(0, 330.0 - before, 1)


@pytest.mark.parametrize("stop_after", [None, 2])
def test_weights_of_each_moment_are_scored_beside_the_minutes_that_they_took(scans, tmp_path, stop_after):
    commands = Training(stop_after)
    if stop_after:
        one = bench_of(scans, tmp_path / "out", commands, curve=True)
        commands.stop = one.stop
        with pytest.raises(StoppedError):
            results_of(one, ONE, [0])
    results = results_of(bench_of(scans, tmp_path / "out", commands, curve=True), ONE, [0])
    (run,) = results["runs"]
    assert [(point["stage"], point["epochs"]) for point in run["curve"]] == [
        *(("source", 1), ("source", 2)),
        *(("adaptation", 1), ("adaptation", 2)),
    ]
    assert [point["dice"] for point in run["curve"]] == pytest.approx([DICE[3], DICE[2], DICE[1], DICE[0]])
    minutes = [point["minutes"] for point in run["curve"]]
    lost = 5 / 60 if stop_after else 0  # what the first call counted last
    assert minutes == pytest.approx([1, 2, 4 + lost, 5 + lost])
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"| mapseg | 0 | {4 + lost:.1f} | {5 + lost:.1f} | {5 + lost:.1f} | 1.000 |" in text
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_one_page_and_picture_show_all_tasks(scans, tmp_path, monkeypatch):
    results_of(bench_of(scans, tmp_path / "out", Training(), curve=True), ONE, [0])
    one = json.loads((tmp_path / "out" / "results.json").read_text())
    other = {**one, "task": {**one["task"], "name": "other", "title": "another task"}}
    for number, content in enumerate((one, other)):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    page, picture = tmp_path / "page.md", tmp_path / "curves.png"
    page.write_text("before\n<!-- curves: begin -->\nold\n<!-- curves: end -->\nafter\n")
    words = [*(str(tmp_path / f"{number}.json") for number in (0, 1)), "--docs", str(page), "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", ["curve", *words])
    curve.main()
    text = page.read_text()
    assert f"| {one['task']['title']} | mapseg | 0 | 4.0 |" in text and "| another task | mapseg | 0 | 4.0 |" in text
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_begins_with_nothing_of_another_one_and_its_folder_is_no_other_benchmarks(scans, tmp_path):
    variants = [*ONE, Variant("again", "mapseg")]
    commands = Training()
    results_of(bench_of(scans, tmp_path / "out", commands, curve=True), variants[:1], [0])
    commands.done = 0
    results_of(bench_of(scans, tmp_path / "out", commands, curve=True), variants, [0])
    assert not any("--reuse" in word for words in commands.called for word in words)
    with pytest.raises(ConfigError, match="has results of another curve"):
        results_of(bench_of(scans, tmp_path / "out", commands), variants, [0])
    path = tmp_path / "out" / "benchmark.json"
    content = json.loads(path.read_text())
    assert content.pop("curve") is True
    path.write_text(json.dumps(content))  # of a version that had no curves
    with pytest.raises(ConfigError, match="has results of another curve"):
        results_of(bench_of(scans, tmp_path / "out", commands, curve=True), variants, [0])


def test_a_finished_run_has_no_moments(scans, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(scans), "--curve", "--from", str(tmp_path)])
    assert "--curve keeps weights while a run trains, and --from trains nothing" in capsys.readouterr().err


def test_a_benchmark_whose_runs_all_failed_has_an_empty_picture(tmp_path):
    failed = {"task": {"title": "hearts", "test_cases": 1}, "runs": [{"name": "mapseg", "state": "failed"}]}
    curve.draw_curves([failed], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file() and curve.curve_table([failed]).endswith("| --- |")
