# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A target without its source: `mapseg adapt --package` and `mapseg predict --adapt_each`, from a tiny bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor

from mapseg_components.checkpoints import write_atomic
from mapseg_components.commands import adapt, check, predict
from mapseg_components.commands.adapt_each import ScanAdaptation
from mapseg_components.commands.order import order_of_package
from mapseg_components.commands.predict import fit_size
from mapseg_components.commands.verdict import verdict_of
from mapseg_components.errors import ConfigError, DataError, MAPSegError, NonFiniteError, ResourceError
from mapseg_components.handover import HandoverPackage, package_of_bundle
from mapseg_components.handover.fragments import network_of
from mapseg_components.plans.cases import target_cases
from mapseg_components.plans.frame import Grid
from mapseg_components.plans.judging import judged_images
from mapseg_components.plans.package import check_method, open_package, place_of, plan_of_package, require_fit
from mapseg_components.plans.recipes import read_recipe, recipe_for, recipe_names
from mapseg_components.prediction.bundle import open_bundle, read_bundle
from mapseg_components.quality import mean_consistencies, within_shares
from mapseg_components.scans import extents
from mapseg_components.transforms.inputs import MASK_FILE
from tests.conftest import ROOT, make_scan, write_nifti

SHIPPED = ROOT / "bundles" / "mapseg_adaptation"
LABELS = {"first": 1, "second": 2}
TINY = {"patch_size": [16, 16, 16], "window_stride": [12, 12, 12], "width": 8, "depth": 1, "dilations": [1, 2]}
TINY |= {"head_channels": 8, "local_block_size": 4, "labels": LABELS, "device": "$torch.device('cpu')", "amp": None}
REQUEST = {"preset": "auto", "device": "cpu", "settings": None}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of a tiny network with random weights."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    (folder / "configs").mkdir(parents=True)
    shutil.copy(SHIPPED / "configs" / "metadata.json", folder / "configs")
    for name in ("train.json", "inference.json"):
        config = ConfigParser.load_config_file(SHIPPED / "configs" / name)
        config |= {key: value for key, value in TINY.items() if key in config}
        (folder / "configs" / name).write_text(json.dumps(config))
    parser = ConfigParser(config)
    fragment = parser.get_parsed_content("network_def", instantiate=False).get_config()
    torch.manual_seed(3)
    write_atomic(network_of(fragment).state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    for seed in (7, 9):
        write_nifti(folder / f"{seed}.nii.gz", make_scan((20, 18, 22), seed=seed, contrast=-0.7)[0])
    return folder


@pytest.fixture
def package(bundle, tmp_path):
    return package_of_bundle(bundle, tmp_path / "package")


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_package_of_a_bundle_is_one_that_a_source_site_could_have_written(bundle, tmp_path):
    before = digests(bundle)
    package = open_package(place_of(str(bundle)), tmp_path / "package")
    assert digests(bundle) == before
    assert package.labels == LABELS and package.content["network"]["width"] == 8
    assert package.settings["preprocessing"]["patch_size"] == [16, 16, 16]
    names = ConfigParser.load_config_file(SHIPPED / "configs" / "train.json")["handover_settings"]
    assert {part: sorted(of) for part, of in package.settings.items()} == {k: sorted(v) for k, v in names.items()}
    found, expected = torch.load(package.weights), torch.load(bundle / "models" / "model.pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert package.content["source_validation"]["mean"] is None and package.share_ranges == {}
    copied = open_package(package.folder, tmp_path / "copy")
    assert copied.content == package.content and {p.name for p in copied.folder.iterdir()} == {
        "handover.json",
        "weights.pt",
    }


def test_figures_of_the_run_that_made_a_bundle_go_into_its_package(bundle, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(bundle, made)
    dice = {"scans": 5, "structures": {"first": 0.75, "second": 0.5}, "mean": 0.625}
    run = {"plan": {"source_validation": 17}, "assessment": {"verdict": {"ship": "adapted"}}}
    run["assessment"] |= {"models": {"adapted": {"validation_dice": dice}}}
    run["assessment"] |= {"prior_ml": {"first": [1.04, 2.06], "second": [0.0, 4.0]}}
    (made / "run.json").write_text(json.dumps(run))
    content = package_of_bundle(made, tmp_path / "package").content
    assert content["source_validation"] == {"metric": "Dice", **dice}, "of those that were segmented"
    assert content["volumes"]["structures"]["first"]["volume_mm3"]["range"] == [1000.0, 2100.0], "rounded outward"
    assert content["volumes"]["structures"]["second"] is None, "of a single scan nothing is said"


def test_either_the_source_or_a_package_is_given(bundle, scans, tmp_path):
    both = {"target": str(scans), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="source or package, neither is given"):
        adapt(**both)
    with pytest.raises(ConfigError, match="source or package, both are given"):
        adapt(**both, source=str(scans), package=str(bundle))
    with pytest.raises(ConfigError, match="labels are of a source"):
        adapt(**both, package=str(bundle), labels={"first": 1})
    with pytest.raises(ConfigError, match="validation_share are of a source"):
        adapt(**both, package=str(bundle), validation_share=0.2)
    with pytest.raises(ConfigError, match=r"neither handover\.json.*nor configs/metadata\.json"):
        adapt(**both, package=str(scans))
    with pytest.raises(ConfigError, match=r"is no folder: .*\[.*'buda_seg', "):
        adapt(**both, package="buda_sag")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in recipe_names() if read_recipe(name).source])
def test_a_method_that_needs_the_source_is_refused_and_others_are_named(name):
    with pytest.raises(
        ConfigError, match=f"method {name} needs the source's scans.*entropy, mean_teacher_test_time, test_time"
    ):
        recipe_for(name, package=True)


@pytest.mark.parametrize("name", [None, *(name for name in recipe_names() if not read_recipe(name).source)])
def test_stages_that_learn_the_source_are_left_out(name):
    recipe = recipe_for(name, package=True)
    assert [stage.name for stage in recipe.stages] == ["adaptation"] and recipe.name == (name or "test_time")
    assert recipe.stages[0].paths == {"handover_dir": "package"}
    assert recipe.models == {"source_only": "package/weights.pt", "adapted": "adaptation/model.pt"}
    assert recipe.order == "package/weights.pt" and not recipe.inverts


def test_what_a_package_cannot_do_is_said_before_any_work(package):
    with pytest.raises(ConfigError, match="buda_seg learns from the uncertainty of a network with two heads"):
        check_method(recipe_for("buda_seg", package=True), package, {})
    with pytest.raises(ConfigError, match="entropy adapts a network without a global view"):
        check_method(recipe_for("entropy", package=True), package, {})
    for name in ("labels", "patch_size", "width", "working_spacing", "network_def"):
        with pytest.raises(ConfigError, match=rf"settings \['{name}'\] are the package's"):
            check_method(recipe_for(None, package=True), package, {name: 3})
    asked = {"source_negative_values": "clip", "dropped_labels": [3], "max_epochs": 3}
    with pytest.raises(ConfigError, match=r"\['dropped_labels', 'source_negative_values'\] are of the source's"):
        check_method(recipe_for(None, package=True), package, asked)
    check_method(recipe_for(None, package=True), package, {"max_epochs": 3, "target_negative_values": "clip"})


def grids(spacing, shape=(20, 24, 28), count=3):
    return [Grid(np.asarray(shape), np.asarray(spacing, float))] * count


@pytest.mark.parametrize(
    "spacing, shape, says",
    [
        ((1.0, 1.1, 1.2), (20, 24, 28), None),
        ((2.5, 1.1, 1.2), (20, 24, 28), None),
        ((3.5, 1.1, 1.2), (20, 24, 28), r"median voxel size is \[3.5, 1.1, 1.2\] mm.* more than 3 times"),
        ((0.001, 0.0011, 0.0012), (20, 24, 28), "correct the spacing in the headers"),
        ((1.0, 1.1, 1.2), (20, 24, 1), "3 of 3 target scans are 2D images, and the package is for volumes"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(package, spacing, shape, says):
    package.content["spacing_mm"] = [1.0, 1.1, 1.2]
    if says is None:
        require_fit(package, grids(spacing, shape))
        return
    with pytest.raises(DataError, match=says):
        require_fit(package, grids(spacing, shape))


def test_scans_that_are_resampled_may_be_further_off_and_channels_may_not(package):
    package.content["spacing_mm"] = [1.0, 1.0, 1.0]
    package.content["settings"]["preprocessing"]["working_spacing"] = [1.0, 1.0, 1.0]
    require_fit(package, grids((1.0, 1.0, 6.0)))
    with pytest.raises(DataError, match="more than 8 times"):
        require_fit(package, grids((1.0, 1.0, 9.0)))
    package.content["settings"]["preprocessing"]["in_channels"] = 2
    with pytest.raises(DataError, match="takes 2 channels, and a scan of the target has 1"):
        require_fit(package, grids((1.0, 1.0, 1.0)))


def test_the_plan_is_the_packages(package, scans):
    package.content["settings"]["preprocessing"]["working_spacing"] = [2.0, 2.2, 2.4]
    plan = plan_of_package(package, target_cases(str(scans)), [], REQUEST)
    assert plan["labels"] == LABELS and plan["network"] == package.content["network"]
    assert plan["settings"]["patch_size"] == [16, 16, 16] and plan["settings"]["stride"] == [4, 4, 4]
    assert plan["working_shape"] == [10, 9, 11] and plan["working_spacing_mm"] == [2.0, 2.2, 2.4]
    asked = {**REQUEST, "settings": {"target_negative_values": "shift", "fill_holes": ["first"]}}
    plan = plan_of_package(package, target_cases(str(scans)), [], asked)
    assert plan["settings"]["negative_values"] == "shift" and plan["after_network"]["fill_holes"] == ["first"]


def test_a_model_gains_nothing_by_a_structure_that_vanishes():
    nan = torch.nan
    whole, gone = torch.tensor([0.8, 0.6]), torch.tensor([0.9, nan])
    assert mean_consistencies(whole, gone) == pytest.approx((0.7, 0.45))
    assert mean_consistencies(gone, whole) == pytest.approx((0.45, 0.7))
    assert mean_consistencies(torch.tensor([0.8, nan]), gone) == pytest.approx((0.8, 0.9)), "neither has it"
    assert mean_consistencies(torch.full((2,), nan), torch.full((2,), nan)) == (0.0, 0.0)


def test_a_structure_that_swallows_others_is_out_of_its_range():
    label_map = torch.ones(3, 4, 5, dtype=torch.long)
    label_map[0, 0, :2] = 2
    assert within_shares(label_map, [(0.1, 0.2), (0.3, 0.5)]).tolist() == [0.0, 0.0]
    assert within_shares(label_map, [(0.4, 0.5), (0.01, 0.02)]).tolist() == [1.0, 1.0], "within a factor of 3"
    assert within_shares(torch.zeros(3, 4, 5), [(0.1, 0.2), None]).tolist() == [1.0, 1.0]


def cases(*values):
    return {"cases": [{"consistency": value} for value in values], "validation_dice": {"mean": None}}


def test_the_verdict_without_labelled_scans_is_by_consistency():
    better = verdict_of(cases(0.5, 0.6, 0.7), cases(0.6, 0.75, 0.8), True, "consistency")
    assert better["verdict"] == "adapted" and better["gain"] == pytest.approx(0.1167, abs=1e-4)
    assert "Dice is not estimated" in " ".join(better["why"]) and better["why"][0].startswith("Consistency on 3")
    little = verdict_of(cases(0.5, 0.6, 0.7), cases(0.505, 0.605, 0.705), True, "consistency", least_gain=0.01)
    assert little["verdict"] == "adapted", "a least gain is in Dice"
    worse = verdict_of(cases(0.6, 0.75, 0.8), cases(0.5, 0.6, 0.7), True, "consistency")
    assert worse["verdict"] == "worse than source" and worse["ship"] == "source_only"
    assert judged_images(30, 7, labelled=False) == (0, 7) and judged_images(3, None, labelled=False) == (0, 3)


def test_a_datalist_of_target_scans_alone_is_checked(scans, tmp_path):
    entries = [{"image": str(path)} for path in sorted(scans.glob("*.nii.gz"))]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"labels": {"1": "first"}, "target_training": entries}))
    found = check(str(path), quiet=True)
    assert found.exit_code == 0 and len(found.files) == 2
    path.write_text(json.dumps({"labels": {"1": "first"}, "target_training": entries, "source_trainng": []}))
    assert check(str(path), quiet=True).exit_code == 2 or "source_training" in str(check(str(path), quiet=True))


def in_this_process(title, bundle, configs, output, settings, on_epoch=None):
    """A stage as `mapseg adapt` runs it, without a process of its own."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [str(bundle / config) for config in configs]
    settings = {name: str(value) if hasattr(value, "parts") else value for name, value in settings.items()}
    places = {"bundle_root": str(bundle), "ckpt_dir": str(output), "output_dir": str(output)}
    run(run_id="run", config_file=paths, **{**places, **settings})
    return 0.1


def test_the_whole_way_from_a_package(bundle, scans, tmp_path, monkeypatch):
    """Order of intensities, one stage, comparison, label maps, report; what it began from is kept."""
    monkeypatch.setattr("mapseg_components.commands.training.run_stage", in_this_process)
    before = digests(bundle)
    settings = {"max_epochs": 1, "epoch_length": 1, "val_interval": 1, "batch_size": 1}
    call = {"package": str(bundle), "target": str(scans), "settings": settings, "device": "cpu", "quiet": True}
    record = adapt(**call, output=str(tmp_path / "out")).record
    assert digests(bundle) == before
    assert record["done"] == ["package", "adaptation", "predictions of source_only", "predictions of adapted"]
    assert len(record["order"]["confidence_as_is"]) == 2 and record["check"]["verdict"].startswith("2 files read; 0")
    found = record["assessment"]
    assert found["by"] == "consistency" and found["verdict"]["gain"] is not None
    assert all(case["estimated_dice"] is None for model in found["models"].values() for case in model["cases"])
    inference = json.loads((tmp_path / "out" / "configs" / "inference.json").read_text())
    assert inference["network_def"] == HandoverPackage(tmp_path / "out" / "stages" / "package").content["network"]
    assert inference["target_inverted"] is record["order"]["inverted"] and inference["labels"] == LABELS
    page = (tmp_path / "out" / "report.html").read_text()
    assert "no source scans" in page and "The package does not say it" in page and "Consistency, adapted" in page
    assert "Estimated Dice" not in page and "a guess" not in page
    again = adapt(**call, output=str(tmp_path / "out")).record
    assert again["assessment"] == found, "the same command goes on where it was"
    with pytest.raises(ConfigError, match="holds a run with other arguments"):
        adapt(**{**call, "package": "shipped"}, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"\['foreground_fraction', 'restart_epochs'\] have no effect.*no method"):
        settings = {**settings, "foreground_fraction": 0.5, "restart_epochs": 2}
        adapt(**{**call, "settings": settings}, output=str(tmp_path / "refused"))
    second = place_of(str(tmp_path / "out"))  # its bundle is a package for the next target
    assert open_package(second, tmp_path / "next").labels == LABELS


@pytest.mark.parametrize("method", ["entropy", "mean_teacher_test_time"])
def test_other_methods_go_on_from_a_package_without_a_global_view(package, scans, tmp_path, method):
    path = package.folder / "handover.json"
    content = json.loads(path.read_text())
    content["settings"]["preprocessing"]["global_view"] = False
    path.write_text(json.dumps(content))
    entries = [{"image": str(path)} for path in sorted(scans.glob("*.nii.gz"))]
    (tmp_path / "datalist.json").write_text(json.dumps({"target_training": entries}))
    recipe = recipe_for(method, package=True)
    check_method(recipe, HandoverPackage(package.folder), {})
    settings = {"handover_dir": str(package.folder), "datalist": str(tmp_path / "datalist.json"), "amp": None}
    settings |= {"max_epochs": 1, "epoch_length": 1, "val_interval": 1, "device": TINY["device"]}
    names = ("train.json", *recipe.overlays, *recipe.stages[0].overlays)
    configs = [str(SHIPPED / "configs" / name) for name in names]
    in_this_process("adaptation", tmp_path, configs, tmp_path / "out", settings)
    before, after = torch.load(tmp_path / "out" / "source_only.pt"), torch.load(tmp_path / "out" / "model.pt")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and (method != "entropy" or all("norm" in name or ".1." in name for name in moved))


def segmented(bundle, scans, output, **options):
    return predict(str(scans), str(output), bundle=str(bundle), device="cpu", no_preview=True, quiet=True, **options)


def maps(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*_seg.nii.gz")}


def test_each_scan_is_adapted_to_alone_and_no_weights_are_written(bundle, scans, tmp_path):
    before = digests(bundle)
    found = segmented(bundle, scans, tmp_path / "all", adapt_each=2, seed=5)
    assert found.exit_code == 0 and digests(bundle) == before
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["settings"]["adapt_each"] == {"steps": 2, "seed": 5}
    records = {one["case"]: one["adaptation"] for one in manifest["scans"]}
    assert all((one["used"] == "adapted") == (one["gain"] > 0) for one in records.values() if one["gain"])
    rows = {row["case"]: (row["adaptation"], row["gain"]) for row in found.volumes}
    assert rows == {case: (one["used"], one["gain"]) for case, one in records.items()}
    alone = segmented(bundle, scans / "9.nii.gz", tmp_path / "alone", adapt_each=2, seed=5)
    assert alone.predictions[0].adaptation == records["9"], "whatever else is segmented, and before"
    assert maps(tmp_path / "alone").items() <= maps(tmp_path / "all").items()
    (tmp_path / "all" / "7_seg.nii.gz").unlink()
    on = {"adapt_each": 2, "continue_prediction": True}
    assert segmented(bundle, scans, tmp_path / "all", seed=5, **on).kept == 1
    with pytest.raises(ConfigError, match=r"other settings \(adapt_each\)"):
        segmented(bundle, scans, tmp_path / "all", seed=6, **on)


@pytest.mark.parametrize("outcome", ["worse", "fails"])
def test_a_scan_that_adaptation_does_not_help_is_segmented_as_without(bundle, scans, tmp_path, monkeypatch, outcome):
    plain = segmented(bundle, scans / "7.nii.gz", tmp_path / "plain")
    assert plain.predictions[0].adaptation is None and "adaptation" not in plain.volumes[0]

    def adapted(self, case):
        if outcome == "fails":
            raise NonFiniteError("the loss is NaN")
        return {name: torch.zeros_like(value) for name, value in self.original.items()}  # background everywhere

    monkeypatch.setattr(ScanAdaptation, "adapted", adapted)
    found = segmented(bundle, scans / "7.nii.gz", tmp_path / "adapted", adapt_each=2)
    assert found.predictions[0].adaptation["used"] == "rolled back" and "rolled back" in str(found)
    assert maps(tmp_path / "plain") == maps(tmp_path / "adapted")


def test_what_cannot_be_adapted_to_each_scan_is_refused(bundle, scans, tmp_path):
    weights = str(bundle / "models" / "model.pt")
    bare = tmp_path / "bare"
    shutil.copytree(bundle, bare)
    (bare / "configs" / "train.json").unlink()
    for home, options, says in (
        (bundle, {"adapt_each": -1}, "adapt_each is -1, expected a number of steps"),
        (bundle, {"adapt_each": 3, "weights": f"{weights},{weights}"}, "adapts one network, and 2 weights are given"),
        (bare, {"adapt_each": 3}, "has no configs/train.json: name a bundle"),
    ):
        with pytest.raises(MAPSegError, match=says):
            segmented(home, scans, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bodies(tmp_path):
    """Bodies in air, of 10 x 9 x 11 voxels of 1 mm."""
    folder = tmp_path / "bodies"
    for seed in (7, 9):
        voxels = np.random.default_rng(seed).uniform(1.0, 2.0, (10, 9, 11)).astype(np.float32)
        write_nifti(folder / f"{seed}.nii.gz", np.pad(voxels, 4), np.eye(4))
    return folder


@pytest.fixture
def of_larger(bundle, tmp_path):
    """The bundle as if it had learnt from bodies of twice the size, on voxels of 2 mm."""
    made = tmp_path / "of_larger"
    shutil.copytree(bundle, made)
    path = made / "configs" / "inference.json"
    config = json.loads(path.read_text()) | {"foreground_mm": [20.0, 18.0, 22.0], "working_spacing": [2.0, 2.0, 2.0]}
    path.write_text(json.dumps(config))
    return made


def test_a_package_works_on_voxels_of_the_target_s_size(of_larger, bodies, tmp_path):
    package = package_of_bundle(of_larger, tmp_path / "package")
    assert package.content["foreground_mm"] == [20.0, 18.0, 22.0]
    cases = target_cases(str(bodies))
    as_it_is = plan_of_package(package, cases, [], REQUEST)
    assert as_it_is["settings"]["working_spacing"] == [2.0, 2.0, 2.0] and "size" not in as_it_is
    assert as_it_is["foreground_mm"] == [20.0, 18.0, 22.0]
    plan = plan_of_package(package, cases, [], REQUEST | {"match_size": True})
    assert plan["settings"]["working_spacing"] == plan["working_spacing_mm"] == [1.0, 1.0, 1.0]
    assert plan["size"]["factor"] == 0.5 and plan["foreground_mm"] == [10.0, 9.0, 11.0]
    kept = HandoverPackage(package.folder)
    assert kept.settings["preprocessing"]["working_spacing"] == [1.0, 1.0, 1.0]
    assert kept.weights and kept.content["foreground_mm"] == [10.0, 9.0, 11.0]
    again = plan_of_package(kept, cases, [], REQUEST | {"match_size": True})
    assert again["settings"] == plan["settings"] and "size" not in again, "it is of their size now"


def test_a_package_of_unknown_voxels_is_left_as_it_is(of_larger, bodies, tmp_path, caplog):
    path = of_larger / "configs" / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"working_spacing": None}))
    package = package_of_bundle(of_larger, tmp_path / "package")
    with caplog.at_level("WARNING", logger="mapseg_components.commands.adapt"):
        plan = plan_of_package(package, target_cases(str(bodies)), [], REQUEST | {"match_size": True})
    assert "size" not in plan and plan["settings"]["working_spacing"] is None
    assert "the package does not say on which voxel size its model works" in caplog.text


def test_predict_says_that_bodies_are_smaller_and_works_at_their_size_if_asked(of_larger, bodies, tmp_path, caplog):
    def call(name, scans=bodies, **options):
        caplog.clear()
        options = {"bundle": str(of_larger), "device": "cpu", "no_preview": True, **options}
        predict(str(scans), str(tmp_path / name), **options)
        return json.loads((tmp_path / name / "manifest.json").read_text())["settings"]["working_spacing"]

    assert call("plain") == [2.0, 2.0, 2.0]
    assert "10 x 9 x 11 mm, what the model learnt from 20 x 18 x 22 mm (0.50): if both show" in caplog.text
    assert call("matched", match_size=True) == [1.0, 1.0, 1.0]
    assert "the model works on voxels of [1.0, 1.0, 1.0] mm" in caplog.text
    by_hand = call("by_hand", settings={"working_spacing": [1.0, 1.0, 1.0]})
    assert by_hand == [1.0, 1.0, 1.0] and "what these scans show" not in caplog.text
    for scan in ("7_seg.nii.gz", "9_seg.nii.gz"):
        assert (tmp_path / "matched" / scan).read_bytes() == (tmp_path / "by_hand" / scan).read_bytes()
    with pytest.raises(ConfigError, match="match_size and working_spacing both say"):
        call("both", match_size=True, settings={"working_spacing": [1.0, 1.0, 1.0]})
    alike = {"match_size": True, "settings": {"foreground_mm": [10.0, 9.0, 11.0]}}
    assert call("alike", **alike) == [2.0, 2.0, 2.0] and "show as much as what the model learnt from" in caplog.text
    for wrong in ("large", [10.0, 9.0], [10.0, 0.0, 11.0]):
        with pytest.raises(ConfigError, match=r"expected (three lengths in mm, or null|numbers such as)"):
            call("wrong", settings={"foreground_mm": wrong})
    unknown = {"match_size": True, "settings": {"foreground_mm": None}}
    assert call("unknown", **unknown) == [2.0, 2.0, 2.0] and "does not say how large" in caplog.text


def test_predict_refuses_to_match_on_voxels_that_are_the_scans_own(of_larger, bodies, tmp_path):
    path = of_larger / "configs" / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"working_spacing": None}))
    with pytest.raises(ConfigError, match="works on the scans' own voxels"):
        predict(str(bodies), str(tmp_path / "out"), bundle=str(of_larger), match_size=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["brain_any_contrast", "mapseg_adaptation", "cosmos_selftraining", "buda_seg"])
def test_every_shipped_model_can_be_planned_and_written_as_a_bundle(name, scans, tmp_path, monkeypatch):
    """Until the first training, whose weights are then missed."""
    monkeypatch.setattr("mapseg_components.commands.training.run_stage", lambda *a, **k: 1.0)
    module = sys.modules["mapseg_components.commands.adapt"]  # the package has the function of that name
    order = {"confidence_as_is": [0.5], "confidence_inverted": [0.4], "inverted": False}
    monkeypatch.setattr(module, "settle_order", lambda *a: order)
    with pytest.raises(ConfigError, match="no epoch was validated"):
        adapt(package=name, target=str(scans), output=str(tmp_path / "run"), device="cpu", quiet=True)
    network = read_bundle(tmp_path / "run", [], {}).get_parsed_content("network_def")
    network.load_state_dict(torch.load(tmp_path / "run" / "stages" / "package" / "weights.pt", weights_only=True))
    formats = json.loads((tmp_path / "run" / "configs" / "metadata.json").read_text())["network_data_format"]
    assert len(formats["inputs"]["image"]["spatial_shape"]) == 3


@pytest.mark.parametrize(
    ("name", "asked", "shown"),
    [("buda_seg", None, True), ("mapseg_adaptation", None, False), ("buda_seg", {"target_inverted": False}, False)],
)
def test_the_order_of_a_bundle_is_that_of_the_next_target_where_nothing_finds_it_out(
    name, asked, shown, scans, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("mapseg_components.commands.training.run_stage", lambda *a, **k: 1.0)
    call = {"package": name, "target": str(scans), "output": str(tmp_path / "run"), "settings": asked}
    with pytest.raises(ConfigError, match="no epoch was validated"):
        adapt(**call, random_contrasts=False, device="cpu")
    for config in ("train", "inference"):
        content = json.loads((tmp_path / "run" / "configs" / f"{config}.json").read_text())
        assert content["target_inverted"] is shown
    words = {
        True: "Target scans are shown bright for dark, as the",
        False: "Target scans are shown as they are, as the",
    }
    assert (words[shown] in caplog.text) is (asked is None)


def test_packages_of_earlier_versions_say_nothing_of_the_order(package):
    assert package.content["target_inverted"] is False
    path = package.folder / "handover.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"target_inverted": "yes"}))
    with pytest.raises(ConfigError, match="target_inverted is 'yes'"):
        HandoverPackage(package.folder).labels  # noqa: B018
    del content["target_inverted"]
    path.write_text(json.dumps(content))
    assert order_of_package(HandoverPackage(package.folder), {"random_contrasts": False, "settings": None}) == {}


def test_a_single_scan_is_judged_by_its_tissue():
    def everywhere_else(image, network):  # a structure in the tissue; another in the zeros where contrast is changed
        two = (image == 0) & (image.max() != 0.5)
        return torch.cat([torch.zeros_like(image), (image > 0) * 2.0, two * 3.0], dim=1)

    image = torch.zeros(1, 4, 4, 4)
    image[:, :2] = 0.5
    judge = SimpleNamespace(network=torch.nn.Identity(), plain=None, device="cpu", inferer=everywhere_else, classes=3)
    judge.ranges = [None, None]
    whole = ScanAdaptation.stability(judge, image)
    masked = ScanAdaptation.stability(judge, MetaTensor(image, meta={MASK_FILE: "mask.nii.gz"}))
    assert masked[0] == 1 and masked[1].isnan() and whole[1] == 0


def test_what_follows_after_the_network_is_the_bundle_s(bundle, scans, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(bundle, made)
    path = made / "configs" / "inference.json"
    after = {"largest_component": ["second"], "kept_components": {"first": 2}, "fill_holes": ["first", "second"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | after))
    package = package_of_bundle(made, tmp_path / "package")
    assert package.content["after_network"] == after
    cases = target_cases(str(scans))
    found = plan_of_package(package, cases, [], REQUEST)["after_network"]
    assert found == {**after, "reasons": {key: {} for key in after}, "in_every_map": []}
    asked = plan_of_package(package, cases, [], REQUEST | {"settings": {"fill_holes": []}})["after_network"]
    assert asked["fill_holes"] == [] and asked["kept_components"] == {"first": 2}
    manifest = package.folder / "handover.json"
    content = json.loads(manifest.read_text())
    for wrong, message in (({"fill_holes": ["liver"]}, "#fill_holes is"), ({"fill_holes": "@x"}, "after_network#fill")):
        manifest.write_text(json.dumps(content | {"after_network": wrong}))
        with pytest.raises(ConfigError, match=message):
            plan_of_package(HandoverPackage(package.folder), cases, [], REQUEST)
    manifest.write_text(json.dumps({name: value for name, value in content.items() if name != "after_network"}))
    silent = plan_of_package(HandoverPackage(package.folder), cases, [], REQUEST)["after_network"]
    assert silent["kept_components"] == {} and silent["largest_component"] == []
    assert silent["reasons"]["fill_holes"] == dict.fromkeys(LABELS, "the package does not say")


def test_a_run_of_predict_goes_on_at_the_size_it_found_whatever_scans_there_are_now(
    of_larger, bodies, tmp_path, caplog
):
    def call(scans, **more):
        predict(
            str(scans),
            str(tmp_path / "out"),
            bundle=str(of_larger),
            device="cpu",
            no_preview=True,
            match_size=True,
            **more,
        )
        return json.loads((tmp_path / "out" / "manifest.json").read_text())

    assert call(bodies)["settings"]["working_spacing"] == [1.0, 1.0, 1.0]
    for number in range(3):  # the median is theirs now
        write_nifti(bodies / f"large{number}.nii.gz", make_scan((26, 22, 28), seed=number)[0], np.diag([2, 2, 2, 1]))
    again = call(bodies, continue_prediction=True)
    assert again["settings"]["working_spacing"] == [1.0, 1.0, 1.0] and len(again["scans"]) == 5
    assert "works on voxels of [1.0, 1.0, 1.0] mm as before" in caplog.text
    settings = {"working_spacing": [2.0, 2.0, 2.0]}  # as of a first run that found no other size
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": settings}))
    bundle = open_bundle(of_larger, [], {"bundle_root": str(of_larger)}, [], (), False, False)
    fit_size(bundle, of_larger, target_cases(str(bodies))[:2], True, manifest)
    assert bundle["working_spacing"] == [2.0, 2.0, 2.0]


def test_a_scan_too_large_for_memory_says_nothing_of_the_size_of_the_others(bodies, monkeypatch):
    def extent(path, policy):
        if Path(path).name.startswith("7"):
            raise ResourceError("too large")
        return extents.Extent(np.array([10.0, 9.0, 11.0]), True)

    monkeypatch.setattr(extents, "extent_of", extent)
    paths = sorted(map(str, bodies.iterdir()))
    assert extents.median_extent([paths[0], *paths[1:] * 9], None) == [10.0, 9.0, 11.0]
