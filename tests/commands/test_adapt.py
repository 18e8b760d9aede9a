# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From folders to an adapted bundle: cases, structures, verdict; the whole way and its report at tiny size."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from mapseg_components.commands.adapt import adapt, read_mapping
from mapseg_components.commands.assess import case_figures
from mapseg_components.commands.order import describe_order
from mapseg_components.commands.report import report
from mapseg_components.commands.stages import error_of, run_stage
from mapseg_components.commands.verdict import least_gain_of, verdict_of
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import all_targets
from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError
from mapseg_components.plans.cases import hold_out, source_cases, structure_names, target_cases
from mapseg_components.plans.recipes import read_recipe
from mapseg_components.quality import Calibration
from mapseg_components.reports.slices import overlay, stack
from tests.conftest import ROOT, make_scan, write_nifti
from tests.scans import make_domains
from tests.warm import python, warm_processes

TINY = {
    "patch_size": [16, 16, 16],
    "window_stride": [12, 12, 12],
    "max_epochs": 2,
    "epoch_length": 2,
    "local_block_size": 4,
    "val_interval": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three labelled scans in images/ and labels/, two unlabelled ones in a plain folder."""
    return make_domains(tmp_path_factory.mktemp("scans"))


def call(folders):
    return {"source": str(folders / "t1"), "target": str(folders / "t2"), "num_threads": 1, "settings": TINY}


@pytest.fixture(scope="module")
def finished(folders):
    """A whole run at tiny size."""
    output = folders / "out"
    with warm_processes():
        return output, adapt(**call(folders), output=str(output)).record


@pytest.mark.slow
def test_the_output_is_a_bundle_that_runs(finished, tmp_path):
    output, record = finished
    order = record["order"]["inverted"]
    assert record["done"][: 3 - order] == ["source", *([] if order else ["contrasts"]), "adaptation"]
    for name in ("train.json", "inference.json"):
        config = json.loads((output / "configs" / name).read_text())
        assert config["target_inverted"] is order
    shipped = record["assessment"]["verdict"]["ship"]
    assert (output / "models" / "model.pt").read_bytes() == (output / "models" / f"{shipped}.pt").read_bytes()
    command = [python(), "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    moved = tmp_path / "elsewhere"
    shutil.copytree(output, moved)
    subprocess.run([*command, "--output_dir", str(tmp_path / "again")], cwd=moved, check=True, capture_output=True)
    for scan in ("7", "8"):
        first, second = (
            nib.load(f / f"{scan}_seg.nii.gz") for f in (output / "predictions" / shipped, tmp_path / "again")
        )
        np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(finished, folders):
    output, record = finished
    before = {p: p.stat().st_mtime_ns for p in (output / "stages").rglob("*.pt")}
    again = adapt(**call(folders), output=str(output)).record
    assert again["assessment"] == record["assessment"] and again["seconds"] == record["seconds"]
    assert before == {p: p.stat().st_mtime_ns for p in (output / "stages").rglob("*.pt")}
    with pytest.raises(ConfigError, match=r"holds a run with other arguments \(seed was 0, now 1\)"):
        adapt(**call(folders), output=str(output), seed=1)


@pytest.mark.slow
def test_another_run_takes_over_the_source_only_model_and_trains_the_rest(finished, folders, tmp_path, monkeypatch):
    output, record = finished
    trained = []

    def stage(name, bundle, configs, folder, settings, on_epoch=None):
        trained.append((name, settings["max_epochs"]))
        return 1.0

    monkeypatch.setattr("mapseg_components.commands.training.run_stage", stage)
    with pytest.raises(ConfigError, match="no epoch was validated"):  # nothing is trained here
        adapt(**call(folders), output=str(tmp_path / "out"), adaptation_length=1.5, reuse=str(output))
    again = json.loads((tmp_path / "out" / "run.json").read_text())
    taken = [name for name in record["done"] if name in ("source", "contrasts")]
    assert again["reused"] == dict.fromkeys(taken, str(output)) and trained == [("adaptation", 3)]
    assert again["order"] == record["order"]
    for name in taken:
        weights = [run / "stages" / name / "source_only.pt" for run in (output, tmp_path / "out")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert again["seconds"][name] == record["seconds"][name]


@pytest.mark.slow
def test_a_federation_takes_over_the_stages_of_the_centralized_run_and_deals_out_the_scans(
    finished, folders, tmp_path, monkeypatch
):
    output, record = finished
    trained = {}

    def stage(name, bundle, configs, folder, settings, on_epoch=None):
        trained[name] = (configs, settings)
        return 1.0

    monkeypatch.setattr("mapseg_components.commands.training.run_stage", stage)
    with pytest.raises(ConfigError, match="no epoch was validated"):  # nothing is trained here
        adapt(
            **call(folders), method="federated", output=str(tmp_path / "out"), adaptation_length=0.5, reuse=str(output)
        )
    again = json.loads((tmp_path / "out" / "run.json").read_text())
    taken = [name for name in record["done"] if name in ("source", "contrasts")]
    ((name, (configs, settings)),) = trained.items()
    assert again["reused"] == dict.fromkeys(taken, str(output)) and name == "federation"
    assert configs[-2:] == ["configs/federated.json", "configs/settings.json"]
    assert (settings["rounds"], settings["max_epochs"], settings["epoch_length"]) == ("@max_epochs", 2, 1)  # half of 4
    scans = [load_datalist(path, "target_training") for path in settings["sites"].values()]
    assert [len(part) for part in scans] == [1, 1] and settings["upload"] == "student"


@pytest.mark.slow
def test_the_report_needs_nothing_else(finished):
    output, record = finished
    page = (output / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*.(?!#)|@import|url\((?!data:image/png;base64,|#)", page)
    assert "default-src 'none'" in page and html.escape(describe_order(record["order"])) in page
    for text in ("structure 1", "structure 2", "7", "8", "Score", "teacher agrees with its last look"):
        assert text in page
    assert page.count('class="viewer"') == 2 and page.count('type="range" min') == 6
    assert record["report"] == str(output / "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["entropy", "test_time"])
def test_a_method_without_the_source_goes_the_whole_way(folders, warm_processes, tmp_path, method):
    """Stages, hand-over package, the network that is planned or asked for, label maps and report."""
    arguments = {**call(folders), "method": method, "pretraining": False}
    arguments["random_contrasts"] = method == "test_time"  # without them there is no order to be found
    arguments["target"] = str(tmp_path / "t2")
    for seed in range(5):
        write_nifti(tmp_path / "t2" / f"{seed}.nii.gz", make_scan(seed=seed + 20, contrast=-0.7)[0])
    record = adapt(**arguments, output=str(tmp_path / "out")).record
    contrasts = [] if record.get("order", {"inverted": True})["inverted"] else ["contrasts"]
    assert record["done"][:-2] == ["source", *contrasts, "package", "adaptation"]  # then predictions of two models
    network = json.loads((tmp_path / "out" / "stages" / "package" / "package" / "handover.json").read_text())["network"]
    assert network["_target_"].endswith("GlobalLocalUNet")
    assert np.prod(network["strides"], axis=0).tolist() == [4, 4, 4]  # of a patch of 16
    if method == "entropy":
        models = [torch.load(tmp_path / "out" / "models" / f"{name}.pt") for name in ("source_only", "adapted")]
        moved = {name for name, value in models[0].items() if not torch.equal(value, models[1][name])}
        assert moved and all("norm" in name or name.startswith("fusion.1.") for name in moved)
        with pytest.raises(ConfigError, match=r"\['width'\] are of the paper's network, and preset small-data-cpu"):
            adapt(**{**arguments, "settings": {"width": 8}}, output=str(tmp_path / "other"))
    assert len(list((tmp_path / "out" / "predictions" / "adapted").glob("*_seg.nii.gz"))) == 5
    listed = json.loads((tmp_path / "out" / "datalist.json").read_text())
    held = [case["case_id"] for case in listed["target_heldout"]]
    assert len(held) == 2 and len(listed["target_training"]) == 3
    for figures in record["assessment"]["models"].values():
        assert [case["case"] for case in figures["cases"]] == held
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"2 held out of adaptation: {', '.join(held)}" in page and page.count('class="viewer"') == 2
    assert record["assessment"]["held_out"] and "held out" in record["assessment"]["verdict"]["why"][0]
    with pytest.raises(ConfigError, match=f"method was '{method}', now 'mapseg'"):
        adapt(**{**arguments, "method": "mapseg"}, output=str(tmp_path / "out"))


@pytest.mark.slow
def test_prepared_scans_and_the_way_back(folders, warm_processes, tmp_path):
    """Label maps on the prepared grid, which the model saw, and on the scan's own."""
    for number in (7, 8):
        scan = nib.load(folders / "t2" / f"{number}.nii.gz")
        flipped = nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], scan.affine @ np.diag([-1, 1, 1, 1]))
        (tmp_path / "t2").mkdir(exist_ok=True)
        nib.save(flipped, tmp_path / "t2" / f"{number}.nii.gz")
    arguments = {**call(folders), "target": str(tmp_path / "t2"), "pretraining": False, "output": str(tmp_path / "out")}
    options = {"prepare": {"spacing": 1.25, "bias_correction": False}}
    with pytest.raises(ConfigError, match="so that no epoch would be validated"):
        adapt(**{**arguments, **options, "settings": {**TINY, "val_interval": 5}})
    adapt(**arguments, **options)  # scans that were prepared already are accepted
    scan = nib.load(tmp_path / "t2" / "7.nii.gz")
    results = tmp_path / "out" / "predictions" / "adapted"
    prepared, native = (nib.load(place / "7_seg.nii.gz") for place in (results, results / "native"))
    assert prepared.header.get_zooms()[:3] == (1.25, 1.25, 1.25) and nib.aff2axcodes(prepared.affine) == ("R", "A", "S")
    assert native.shape == scan.shape and np.allclose(native.affine, scan.affine)
    assert "spacing" in (tmp_path / "out" / "docs" / "README.md").read_text()
    with pytest.raises(ConfigError, match="holds a run with other arguments"):
        adapt(**arguments)


@pytest.mark.slow
def test_the_scans_were_checked(finished, folders):
    output, record = finished
    found = json.loads((output / "check" / "check.json").read_text())
    files = {row["file"] for row in found["files"]}
    assert files >= {str(folders / "t2" / "7.nii.gz"), str(folders / "t1" / "labels" / "0.nii.gz")}
    page = (output / "report.html").read_text()
    assert "<h2>Check of the scans</h2>" in page and record["check"]["verdict"] in page
    assert all(html.escape(finding["what"]) in page for finding in found["findings"])


@pytest.mark.slow
def test_the_history_has_what_the_report_shows(finished):
    output, _ = finished
    lines = [json.loads(line) for line in (output / "stages" / "adaptation" / "history.jsonl").read_text().splitlines()]
    assert all(0 <= line["target_agreement_teacher_student"] <= 1 for line in lines)
    assert "target_agreement_previous" not in lines[0] and 0 <= lines[1]["target_agreement_previous"] <= 1
    assert {"target_ml_structure 1", "target_ml_structure 2"} <= set(lines[0])


def test_a_folder_of_something_else_is_not_touched(folders, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds \['thesis.txt'\] and no run of this command"):
        adapt(**call(folders), output=str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


FEDERATED = {"method": "federated"}
ADVENT = {"_target_": "mapseg_components.methods.AdvEnt", "loss": "@loss"}
SUPERVISED = "mapseg_components.methods.Supervised"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "nowhere"}, "source .*nowhere does not exist"),
        ({"target": "t1/labels/none"}, "target .* does not exist"),
        ({"validation_share": 2}, "validation_share is 2, expected"),
        ({"held_out": 1}, "held_out is 1, expected a share from 0 to below 1"),
        ({"held_out": -0.1}, "held_out is -0.1, expected"),
        ({"length": 0}, "length is 0, expected a factor above 0"),
        ({"labels": "liver"}, "labels 'liver' is no JSON object"),
        ({"preset": "huge"}, "preset 'huge' is unknown"),
        ({"prepare": {"overwrite": True}}, "prepare has \\['overwrite'\\], expected options among"),
        ({"prepare": {}, "target": "t2/7.nii.gz"}, "prepare needs target as a folder"),
        ({"settings": {"widht": 3}}, "settings \\['widht'\\] are in no bundle"),
        ({"settings": {"widht": 3}, "prepare": {}}, "settings \\['widht'\\] are in no bundle"),
        ({"symmetric": True, "labels": {"Lung_Lt": 1, "liver": 2}}, "symmetric mirrors left and right.*Lung_Lt"),
        ({"labels": {"background": 0, "all": [1, 2], "inner": [2]}}, "labels: .inner. or its value 2 occurs twice"),
        ({"settings": {"label_rounds": 3}}, r"\['label_rounds'\] have no effect, .* mapseg .*: leave .*: buda_seg\)"),
        (
            {"settings": {"beta": 1, "constant_epochs": 3}, "method": "mean_teacher"},
            r"\['beta', 'constant_epochs'\] have.*\(beta: mapseg, federated, .*constant_epochs: mapseg_masked\)",
        ),
        ({**FEDERATED, "settings": {"local_layers": ["*batchnorm*"]}}, "local_layers: '.batchnorm.' fits no tensor"),
        ({**FEDERATED, "settings": {"method": ADVENT}}, "AdvEnt needs patches of the source beside those of"),
        (
            {**FEDERATED, "settings": {"labels_by": "broadcast", "method": {**ADVENT, "_target_": SUPERVISED}}},
            "labels_by is broadcast, and this method has no '@pseudo_labels'",
        ),
        ({"settings": {"max_epochs": "x"}}, 'max_epochs is "x", expected a number such as 30'),
        ({"settings": {"max_epochs": 2}}, "max_epochs is 2, val_interval 5, .*: set val_interval to 1, or more epochs"),
    ],
)
def test_wrong_arguments_are_named(folders, tmp_path, change, message, monkeypatch):
    monkeypatch.chdir(folders)
    with pytest.raises(ConfigError, match=message):
        adapt(**{"source": "t1", "target": "t2", "output": str(tmp_path / "out"), **change})
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").is_dir() else []
    assert [path.name for path in left if not path.name.startswith(".run.lock")] == [], (
        "the folder is not free any more"
    )


def test_a_missing_matplotlib_is_told_before_hours_of_training(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mapseg_components.commands.report"], "can_draw", lambda: False)
    with pytest.raises(ConfigError, match="the report needs matplotlib"):
        adapt(source=str(folders / "t1"), target=str(folders / "t2"), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_cases_are_held_out_by_the_seed(folders):
    training, validation = source_cases(str(folders / "t1"), 0.2, seed=0)
    assert len(training) == 2 and len(validation) == 1
    assert source_cases(str(folders / "t1"), 0.2, seed=0) == (training, validation)
    assert {c["case_id"] for c in (*training, *validation)} == {"0", "1", "2"}


@pytest.mark.parametrize(
    "number, share, expected",
    [(1, 0.2, 0), (4, 0.9, 0), (5, 0.2, 2), (5, 0.01, 2), (5, 0.99, 4), (12, 0.2, 2), (25, 0.2, 5), (25, 0, 0)],
)
def test_target_scans_are_held_out_by_the_seed_and_none_is_lost(number, share, expected):
    cases = [{"case_id": str(index)} for index in range(number)]
    for seed in range(3):
        rest, held = hold_out(cases, share, seed)
        assert len(held) == expected and hold_out(cases, share, seed) == (rest, held)
        assert sorted([*rest, *held], key=lambda case: int(case["case_id"])) == cases


def test_targets_of_a_run_are_those_adapted_on_and_those_held_out(tmp_path):
    content = {"target_training": [{"image": "a.nii"}], "target_heldout": [{"image": "b.nii", "label": "c.nii"}]}
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps(content))
    assert [case["case_id"] for case in all_targets(path)] == ["a", "b"]
    assert "label" not in load_datalist(path, "target_heldout")[0]
    path.write_text(json.dumps({"target_training": content["target_training"]}))
    assert [case["case_id"] for case in all_targets(path)] == ["a"]


def test_unpaired_labels_are_named(folders, tmp_path):
    shutil.copytree(folders / "t1", tmp_path / "t1")
    (tmp_path / "t1" / "labels" / "2.nii.gz").unlink()
    with pytest.raises(DataError, match=r"images and labels do not pair \(\['2'\]\)"):
        source_cases(str(tmp_path / "t1"), 0.2, 0)
    with pytest.raises(ConfigError, match="has none of images/ and labels/, imagesTr/ and labelsTr/"):
        source_cases(str(folders / "t2"), 0.2, 0)
    shutil.rmtree(tmp_path / "t1" / "labels")
    with pytest.raises(ConfigError, match=r"has no NIfTI file .* itself, but its sub-folder t1/images has 3:"):
        target_cases(str(tmp_path))


def test_structures_as_asked_as_listed_or_as_found(folders, dataset):
    cases = source_cases(str(folders / "t1"), 0.2, 0)[0]
    assert structure_names(None, str(folders / "t1"), cases) == {"structure 1": 1, "structure 2": 2}
    assert structure_names({"liver": 5}, str(folders / "t1"), cases) == {"liver": 5}
    assert structure_names(None, str(dataset / "datalist.json"), []) == {"first": 1, "second": 2}
    assert structure_names(None, str(dataset), []) == {"first": 1, "second": 2}, "a folder with a datalist.json"
    assert read_mapping("labels", '{"liver": 1}') == {"liver": 1}
    long = {f"structure {value}": value for value in range(1, 300)}  # longer than a name of a file can be
    assert read_mapping("labels", json.dumps(long)) == long


def figures(estimates, dice=0.8, within=True):
    cases = [{"estimated_dice": e, "within_calibration": within} for e in estimates]
    return {"cases": cases, "validation_dice": {"mean": dice}}


def test_verdicts():
    base = [0.5, 0.6, 0.7, 0.55]
    better, worse = [b + 0.1 for b in base], [b - 0.1 for b in base]
    assert verdict_of(figures(base), figures(better))["verdict"] == "adapted"
    down = verdict_of(figures(base), figures(worse))
    assert down["verdict"] == "worse than source" and down["ship"] == "source_only"
    mixed = verdict_of(figures(base), figures([0.6, 0.5, 0.8, 0.45]))
    assert mixed["verdict"] == "no gain" and mixed["ship"] == "source_only"
    lucky = verdict_of(figures(base), figures([b + d for b, d in zip(base, [0.2, -0.05, -0.02, -0.01])]))
    assert lucky["gain"] > 0.01 and lucky["verdict"] == "no gain", "one scan is no gain"
    likely = verdict_of(figures(base), figures([b + d for b, d in zip(base, [0.03, 0.02, -0.03, 0.01])]))
    assert likely["verdict"] == likely["ship"] == "adapted" and "the gain is uncertain" in " ".join(likely["why"])
    assert "uncertain" not in " ".join(verdict_of(figures(base), figures(better))["why"])
    failing = verdict_of(figures([0.1, 0.1]), figures([0.3, 0.3]))
    assert failing["verdict"] == "adapted" and "look at its label maps before any use" in failing["why"][-1]
    outside = "4 of 4 target scans lie outside the consistency of all labelled scans: guesses."
    assert outside in verdict_of(figures(base), figures(better, within=False))["why"]
    assert verdict_of(figures([None]), figures([None]))["ship"] == "source_only"


@pytest.mark.parametrize(
    "method, held_out, change, verdict",
    [
        ("mapseg", True, -0.015, "adapted"),
        ("mapseg", False, -0.015, "adapted"),
        ("mapseg", True, -0.03, "worse than source"),
        ("test_time", True, -0.015, "worse than source"),
        ("test_time", True, 0.008, "no gain"),
        ("test_time", True, 0.012, "adapted"),
        ("test_time", False, 0.04, "no gain"),
        ("test_time", False, 0.06, "adapted"),
    ],
)
def test_the_least_gain_is_less_for_a_method_that_keeps_learning_the_source(method, held_out, change, verdict):
    base, least = [0.5, 0.6, 0.7, 0.55], least_gain_of(read_recipe(method), held_out)
    said = verdict_of(figures(base), figures([each + change for each in base]), held_out, least_gain=least)
    assert said["verdict"] == verdict and (said["ship"] == "adapted") == (verdict == "adapted")
    why = " ".join(said["why"])
    assert ("within what estimates are off by (0.02)" in why) == (change == -0.015 and method == "mapseg")
    assert ("within what estimates are off by (0.01)" in why) == (verdict == "no gain" and held_out)
    assert ("off by on scans adapted on (0.05)" in why) == (verdict == "no gain" and not held_out)


@pytest.mark.parametrize("after, verdict", [(0.6, "adapted"), (0.5, "no gain"), (0.3, "no gain")])
def test_one_scan_has_no_interval_and_an_uncertain_gain(after, verdict):
    said = verdict_of(figures([0.5]), figures([after]))
    assert said["verdict"] == verdict and said["interval"] is None and said["gain"] == pytest.approx(after - 0.5)
    assert "(one scan: no interval)" in said["why"][0]
    assert "One scan: no interval, the gain is uncertain." in said["why"]


def test_an_estimate_is_no_higher_than_the_places_of_the_structures_allow():
    label_map, confidence = torch.ones(2, 3, 4, dtype=torch.long), torch.ones(2, 3, 4)
    lines = {"consistency": (0.5, 0.4), "expected_dice": (1.0, 0.0)}
    line = Calibration(lines, points=9, error=0.1, lowest=0.0, highest=1.0)

    def estimate(stable, bound, calibration=line, expected=(0.95, 0.95, 0.95)):
        signs = {"consistency": torch.tensor(stable), "expected_dice": torch.tensor(expected)}
        found = case_figures(label_map, confidence, signs, torch.tensor(bound), calibration, 1.0, ["a", "b", "c"])
        return found["estimated_dice"], found["misplaced"]

    assert estimate([0.8, 0.6, 0.4], [1.0, 1.0, 1.0]) == (pytest.approx(0.7), [])
    assert estimate([0.8, 0.6, 0.4], [1.0, 0.1, 1.0]) == (pytest.approx((0.8 + 0.1 + 0.6) / 3), ["b"])
    nowhere = estimate([0.8, torch.nan, torch.nan], [1.0, 0.0, torch.nan], expected=(0.95, torch.nan, torch.nan))
    assert nowhere == (pytest.approx(0.4), ["b"])
    assert estimate([0.8, 0.6, 0.4], [1.0, 1.0, 1.0], None)[0] is None
    unsure = estimate([0.8, 0.6, 0.4], [1.0, 1.0, 1.0], expected=(0.5, 0.95, 0.95))
    assert unsure == (pytest.approx((0.5 + 0.7 + 0.6) / 3), []), "no higher than the probabilities expect"


def test_the_verdict_counts_scans_with_structures_off_their_place():
    source, adapted = figures([0.5, 0.6, 0.7]), figures([0.6, 0.7, 0.8])
    for case, names in zip(source["cases"], (["a"], ["a", "b"], [])):
        case["misplaced"] = names
    why = " ".join(verdict_of(source, adapted)["why"])
    assert "in 2 of 3 target scans by the source-only model, in 0 by the adapted one" in why
    assert "no labelled scan has them" not in " ".join(verdict_of(adapted, adapted)["why"])


def test_slices_stand_upright_with_the_right_side_on_the_left():
    volume = np.zeros((4, 5, 6))
    volume[3, 2, 5] = 1  # at the right end and at the top
    strip = stack(volume, 1, np.array([1, 2]))
    assert strip.shape == (12, 4) and np.argwhere(strip).tolist() == [[6, 0]]


def test_overlays_are_clear_where_nothing_is():
    image = overlay(np.array([[0, 1, 25]]), 30)
    assert image.convert("RGBA").getpixel((0, 0))[3] == 0
    assert image.convert("RGBA").getpixel((1, 0)) == image.convert("RGBA").getpixel((2, 0))


def test_report_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.json: name the output folder"):
        report(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no assessment yet"):
        report(str(tmp_path))


def test_a_stages_error_comes_back_as_it_was(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Traceback ...\n\nResourceError: the disk is full: free space")
    error = error_of("source", log, 1)
    assert isinstance(error, ResourceError) and str(error) == "the disk is full: free space"
    log.write_text("INFO: begun\nDataError: a.nii.gz: unknown values\nb.nii.gz: unknown values\n")
    assert str(error_of("source", log, 1)) == "a.nii.gz: unknown values\nb.nii.gz: unknown values"
    log.write_text("Traceback\nKeyError: 'x'")
    assert type(error_of("source", log, 1)) is MAPSegError and "KeyError: 'x'" in str(error_of("source", log, 1))
    log.write_text("SystemError: nothing of ours")
    assert type(error_of("source", log, 1)) is MAPSegError
    assert isinstance(error_of("source", log, -9), ResourceError)


@pytest.mark.slow
def test_a_stage_that_fails_says_why(warm_processes, tmp_path):
    bundle = ROOT / "bundles" / "mapseg_adaptation"
    with pytest.raises(ConfigError, match="no datalist at"):
        run_stage("source", bundle, ["configs/train.json", "configs/tiny.yaml"], tmp_path, {"dataset_dir": tmp_path})


def test_faults_of_all_files_end_the_call_before_any_stage_and_leave_the_folder_free(tmp_path, monkeypatch):
    domains, begun = make_domains(tmp_path), []
    monkeypatch.setattr(
        "mapseg_components.commands.training.run_stage", lambda *args, **kwargs: begun.append(args) or 1.0
    )
    given = {"source": str(domains / "t1"), "target": str(domains / "t2"), "output": str(tmp_path / "run")}
    with pytest.raises(DataError) as caught:
        adapt(**given, labels={"a": 1}, quiet=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(f"labels/{seed}.nii.gz" in str(caught.value) for seed in range(3))
    assert begun == [] and not (tmp_path / "run" / "run.json").exists()
    assert (tmp_path / "run" / "check" / "check.html").is_file()
    with pytest.raises(ConfigError, match="no epoch was validated"):  # the stages do nothing here
        adapt(**given, labels={"a": 1, "b": 2}, random_contrasts=False, quiet=True)
    assert begun


@pytest.mark.parametrize("asked", [{"student_change": None}, {}])
def test_a_part_of_a_setting_gives_way_to_the_whole_one(tmp_path, monkeypatch, asked):
    domains, given = make_domains(tmp_path), {}
    name = "mapseg_components.commands.training.run_stage"
    monkeypatch.setattr(name, lambda *args: given.update({args[0]: args[4]}) or 1.0)  # settings of each stage
    call = {"source": str(domains / "t1"), "target": str(domains / "t2"), "output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="no epoch was validated"):
        adapt(**call, labels={"a": 1, "b": 2}, source_label_maps=True, settings=asked, quiet=True)
    assert ("student_change#invert_prob" in given["adaptation"]) == (not asked)
