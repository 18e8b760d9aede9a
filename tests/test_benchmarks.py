# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs at tiny size and notices results that differ; what it counts can be checked by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchio", reason="pip install -c constraints.txt -e '.[bench]'")

from benchmarks import (
    analytic,
    cases,
    freed_memory,
    guards,
    many_scans,
    memory,
    overlap,
    report,
    run,
    scaling,
    startup,
    timing,
    volume,
)
from benchmarks.package import variants_on
from benchmarks.peers import report as peers_report
from benchmarks.plain import data as plain_data
from benchmarks.plain import inference as plain_inference
from benchmarks.plain import training as plain_training
from mapseg_components.errors import ConfigError
from mapseg_components.networks import GlobalLocalDeepLabV3
from tests.conftest import ROOT

QUICK = ["--quick", "--threads", "1", "--set", "head_channels=8", "--set", "dilations=[1,2]", "--only"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case at tiny size."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = run.arguments_of([*QUICK, *run.CASES, "--output", str(folder)])
    run.run(arguments)
    return json.loads((folder / "results.json").read_text())


def test_every_case_is_measured_and_compared(results):
    known = variants_on(torch.device("cpu"))
    found = {case["case"]: case for case in results["cases"]}
    assert set(found) == {name for name, _ in report.GOALS}
    for name, case in found.items():
        variants = {"plain", *(variant for goal, variant in report.GOALS if goal == name and variant in known)}
        assert set(case["seconds"]) == variants
        assert set(case["speed_up"]) == variants - {"plain"}
        assert all(one["min"] > 0 and one["n"] == 1 for one in case["seconds"].values())
        assert name == "MAE sample" or case["equality"]
    assert [share > 0.99 for share in found["inference"]["trained"].values()] == [True] * (len(known) - 1)
    assert ("bf16 is not measured" in report.tables(results)) == ("package_bf16" not in known)


def test_operations_are_counted_and_set_beside_matrix_products(results):
    steps = [case for case in results["cases"] if case["case"].endswith("step")]
    assert len(steps) == 2 and all(case["flop"] > 1e6 for case in steps)
    rate = steps[0]["flop"] / steps[0]["seconds"]["plain"]["median"]
    share = f"{rate / 1e12:.3g} TFLOP/s, {rate / results['rates']['package']:.0%} |"
    assert share in report.tables(results)


def test_package_and_baseline_agree(results):
    assert [one for case in results["cases"] for one in case["equality"] if not one["ok"]] == []


def test_an_interrupted_run_goes_on(tmp_path, results, caplog):
    (tmp_path / "results.json").write_text(json.dumps(results))
    with caplog.at_level("INFO", logger="benchmarks"):
        again = run.run(run.arguments_of([*QUICK, *run.CASES, "--resume", "--output", str(tmp_path)]))
    assert again["cases"] == results["cases"]
    assert not any("width" in record.message for record in caplog.records)  # nothing was measured


def test_tables_name_every_figure(results):
    text = report.tables(results)
    for case, variant in report.GOALS:
        known = variant in variants_on(torch.device("cpu"))
        assert known == any(line.startswith(f"| {case} | 8 | {report.NAMES[variant]} |") for line in text.splitlines())


@pytest.fixture
def untimed(monkeypatch):
    """Steps are compared and not timed: `results` is of both."""
    monkeypatch.setattr(cases.Bench, "timed", lambda self, variants: {name: [1.0] for name in variants})


def test_another_result_is_noticed(monkeypatch, tmp_path, untimed):
    original = plain_training.adaptation_losses
    monkeypatch.setattr(plain_training, "adaptation_losses", lambda *given, **named: 1.01 * original(*given, **named))
    assert run.main([*QUICK, "adaptation_step", "--output", str(tmp_path)]) == 1


def test_another_gradient_of_the_same_loss_is_noticed(monkeypatch, tmp_path, capsys, untimed):
    original = plain_training.mae_losses  # both steps are compared by one function

    def changed(*given, **named):
        loss = original(*given, **named)
        return loss + 0.005 * (loss - loss.detach())

    monkeypatch.setattr(plain_training, "mae_losses", changed)
    assert run.main([*QUICK, "mae_step", "--output", str(tmp_path)]) == 1
    (differs,) = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert "gradient in float64" in differs


@pytest.mark.parametrize("case", ["mae_step", "adaptation_step"])
def test_both_are_the_same_function_in_float64(case, monkeypatch, tmp_path, untimed):
    monkeypatch.setitem(cases.TOLERANCE, "gradient", -1.0)
    run.main([*QUICK, case, "--output", str(tmp_path)])
    (found,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    in_double = {one["what"]: one["value"] for one in found["equality"] if "float64" in one["what"]}
    assert len(in_double) == 2 and max(in_double.values()) < 1e-6


def test_other_logits_are_noticed():
    scan = torch.ones(1, 4, 5, 6)
    logits = torch.rand(3, 4, 5, 6)
    logits[0, 2, 3, 4] = 2.0
    assert all(one["ok"] for one in cases.same_logits(logits, logits.clone(), scan))
    other = logits.clone()
    other[1, 2, 3, 4] += 5
    assert not any(one["ok"] for one in cases.same_logits(logits, other, scan))
    assert not any(one["ok"] for one in cases.same_logits(logits, logits * float("nan"), scan))


def test_an_unseen_mask_is_noticed():
    batch = {f"{plain_training.PREFIX[scale]}image": torch.rand(1, 1, 16, 16, 16) + 0.01 for scale in cases.BLOCKS}
    with pytest.raises(RuntimeError, match="local image with hidden blocks"):
        cases.masks_of([batch["image"][0]], {"": batch})


def test_masks_are_read_back():
    batch = {f"{plain_training.PREFIX[scale]}image": torch.rand(2, 1, 16, 24, 8) + 0.01 for scale in cases.BLOCKS}
    masks = {
        scale: [plain_training.random_mask(one, block) for one in batch[f"{plain_training.PREFIX[scale]}image"]]
        for scale, block in cases.BLOCKS.items()
    }
    seen = [
        one
        for scale, block in cases.BLOCKS.items()
        for one in plain_training.hide(batch[f"{plain_training.PREFIX[scale]}image"], masks[scale], block)
    ]
    found = cases.masks_of(seen[::-1], {"": batch})
    for scale in cases.BLOCKS:
        assert all(torch.equal(a, b) for a, b in zip(found[scale], masks[scale]))


def test_patches_go_back_to_their_places():
    image = torch.rand(1, 8, 12, 16)
    patches = plain_training.patchify(image, 4)
    assert torch.equal(patches[1].view(4, 4, 4), image[0, :4, :4, 4:8])
    assert torch.equal(plain_training.unpatchify(patches, image.shape, 4), image)


def test_the_baseline_uses_nothing_of_the_package():
    for path in (ROOT / "benchmarks" / "plain").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.startswith("mapseg_components") for module in modules), path.name


def test_windows_at_the_border_count_twice_in_the_baseline():
    torch.manual_seed(0)
    network = GlobalLocalDeepLabV3(1, 3, width=8, depth=1, dilations=(1, 2), head_channels=8).eval()
    calls = []
    network.head.register_forward_hook(lambda *_: calls.append(1))
    scan = torch.rand(1, 16, 20, 40) + 0.01  # windows of 16 every 12: an axis's last is moved onto another
    plain_inference.segment(network, scan, 16, 12)
    twice = len(calls)
    calls.clear()
    plain_inference.segment(network, scan, 16, 12, skip_duplicates=True)
    assert (twice, len(calls)) == (2 * 2 * 4, 1 * 2 * 3)


def test_a_small_scan_is_padded_and_cut_back():
    network = GlobalLocalDeepLabV3(1, 3, width=8, depth=1, dilations=(1, 2), head_channels=8).eval()
    scan = torch.zeros(1, 9, 20, 14)
    scan[:, 2:7, 3:18, 1:12] = 0.5
    logits = plain_inference.segment(network, scan, 16, 12)
    assert logits.shape == (3, 9, 20, 14)
    assert (logits.argmax(0)[0] == 0).all() and float(logits[1, 0, 0, 0]) == -10
    assert (logits[1, 2:7, 3:18, 1:12] != -10).all()


def test_the_box_is_half_open():
    image = torch.zeros(1, 9, 10, 11)
    image[0, 2, 3, 4] = image[0, 5, 8, 10] = 1
    assert plain_data.foreground_box(image).tolist() == [[2, 6], [3, 9], [4, 11]]


def test_variants_take_turns():
    order = []
    variants = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    seconds = timing.interleaved(variants, 2, torch.device("cpu"), warmup=1)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_the_ratio_is_the_median_of_turns():
    assert timing.ratios({"plain": [4.0, 9.0, 100.0], "fast": [2.0, 3.0, 1.0]}, "plain") == {"fast": 3.0}


def test_operations_of_the_encoder_are_those_of_its_formula():
    width, depth, side = 8, 2, 16
    network = analytic.mae(width, depth)
    voxels = (side // 4) ** 3
    first, others = 4**3 * 1 * width, (3 * depth - 1) * 27 * width**2
    assert analytic.counted(lambda: network.encoder(analytic.image(1, side))) == 2 * voxels * (first + others)


def test_padding_is_counted():
    assert analytic.padding_share(3, 3) == pytest.approx(1 - (1 / 3) ** 3)
    assert analytic.padding_share(4, 2) == pytest.approx(1 - (8 / 12) ** 3)


def test_analytic_tables_are_whole():
    text = analytic.tables(width=8, depth=1, patch=16, batch=2, classes=3)
    assert "MAE, 2 pairs" in text and "nan" not in text


def test_a_line_is_fitted():
    fit = scaling.linear_fit([1.0, 2.0, 4.0], [5.0, 8.0, 14.0])
    assert (fit["slope"], fit["constant"], fit["r2"]) == pytest.approx((3.0, 2.0, 1.0))


def test_text_goes_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nz\n")
    report.replace_between(page, "x", "new")
    assert page.read_text() == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nz\n"
    with pytest.raises(ValueError, match="y: begin"):
        report.replace_between(page, "y", "new")


def test_the_page_shows_the_results_file():
    page = (ROOT / "docs" / "reference" / "performance.md").read_text(encoding="utf-8")
    own = {"overlap.json": overlap.table, "scaling.json": scaling.table, "peers.json": peers_report.table}
    own["many_scans.json"] = many_scans.table
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert own.get(path.name, report.tables)(content) in page, path.name


def test_commands_are_measured_on_more_and_more_scans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many_scans, "measured", lambda line: commands.append(line[3:]) or (1.0, 2e6))
    commands = []
    found = many_scans.measure(tmp_path, [1, 3])
    assert [(line[0], Path(line[1]).name) for line in commands] == [("check", "scans"), ("predict", "scans")] * 2
    assert len({path.read_bytes() for path in (tmp_path / "scans").iterdir()}) == 3
    assert found["commands"]["check"] == {"seconds": [1.0, 1.0], "bytes": [2e6, 2e6]}
    grown = {"counts": [1, 10, 100], "machine": found["machine"]}
    grown["commands"] = {"check": {"seconds": [8.0, 9.0, 108.0], "bytes": [1e8] * 3}}
    assert "| `mapseg check` | 8 s, 100 MB | 9 s, 100 MB | 108 s, 100 MB | 2.00 |" in many_scans.table(grown)
    monkeypatch.setattr("sys.argv", ["many_scans", "--scans", "3", "1", "5"])
    with pytest.raises(SystemExit):
        many_scans.main()
    assert "three numbers or more, rising" in capsys.readouterr().err


def test_a_watched_command_tells_what_it_took_or_that_it_failed():
    seconds, peak = many_scans.measured([sys.executable, "-c", "import time; b = bytearray(10**8); time.sleep(0.3)"])
    assert seconds > 0 and peak > 1e8
    with pytest.raises(subprocess.CalledProcessError):
        many_scans.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="--set ptach"):
        run.settings_from(["ptach=3"])
    assert run.settings_from(["amp=bf16", "cache_rate=0.5"]) == {"amp": "bf16", "cache_rate": 0.5}


def test_the_brain_has_tissue_structures_and_no_skull():
    image, label = volume.brain((40, 48, 44), seed=1)
    assert label.max() == 7 and set(range(8)) == set(label.ravel().tolist())
    assert (image[label > 0] > 0).all() and (image == 0).mean() > 0.5
    other, _ = volume.brain((40, 48, 44), seed=2)
    assert (image != other).any()


@pytest.mark.parametrize("side", ["plain", "package"])
def test_memory_of_a_step_is_measured_in_its_own_process(side, warm_processes):
    found = memory.measure("step", side=side, width=8, depth=1, patch=16, target_clean="true")
    assert 0 < found["before"] < found["peak"]


@pytest.mark.slow
def test_first_iteration_of_a_tiny_run_is_timed(tmp_path: Path, monkeypatch, warm_processes):
    monkeypatch.setattr(startup, "IMPORTS", {"import numpy": "import numpy"})
    found = startup.startup(tmp_path, repeats=1, clock="cpu")
    assert found["import numpy"]["median"] < found["tiny bundle run, until its first iteration"]["median"]


def test_overlap_is_measured_with_equal_files(tmp_path, capsys):
    line = ["--shape", "36", "40", "32", "--scans", "2", "--repeats", "1", "--output", str(tmp_path)]
    assert overlap.main(line) == 0
    found = json.loads((tmp_path / "overlap.json").read_text())
    assert {name: one["n"] for name, one in found["stages"].items()} == {"read": 2, "segment": 2, "write": 2}
    printed = capsys.readouterr().out
    assert "the same bytes" in printed and f"**{found['speed_up']:.2f}**" in printed
    assert "different bytes" in overlap.table({**found, "equal": False})
    (tmp_path / "page.md").write_text("<!-- bench-overlap: begin --><!-- bench-overlap: end -->")
    assert overlap.main(["--results", str(tmp_path / "overlap.json"), "--docs", str(tmp_path / "page.md")]) == 0
    assert overlap.table(found) in (tmp_path / "page.md").read_text()


def test_guards_are_measured_on_and_off():
    seconds = guards.training_steps(2, "tiny.yaml")
    assert {name: len(values) for name, values in seconds.items()} == {"with": 2, "without": 2}
    assert min(min(values) for values in seconds.values()) > 0


@pytest.mark.parametrize("name", freed_memory.CASES)
def test_every_case_of_freed_memory_runs(name, monkeypatch):
    bundle, files, settings, _ = freed_memory.CASES[name]
    monkeypatch.setattr(freed_memory, "SMALL", ["train.json", "fetal_age.yaml", "tiny.yaml"])
    monkeypatch.setattr(freed_memory, "SHAPE", (24, 28, 20))
    if files != ["inference.json"]:
        files = freed_memory.SMALL
    else:
        settings = {**settings, "patch_size": [16, 16, 16], "window_stride": [12, 12, 12]}
    monkeypatch.setitem(freed_memory.CASES, name, (bundle, files, settings, 1))
    found = freed_memory.timed(name, keep=False)
    assert found["seconds"] > 0 and found["peak_mib"] > 100
