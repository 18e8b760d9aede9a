# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg adapt --method cosmos`: its stages in their order, gone on with wherever it was stopped; its report."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands.adapt import Adaptation, adapt
from mapseg_components.commands.assess import assess
from mapseg_components.commands.report import report
from mapseg_components.commands.report_rounds import rounds_section, translation_section
from mapseg_components.data import load_datalist
from mapseg_components.data.results import result_path
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.shipped_files import bundles_folder
from tests.commands.made_run import make_run
from tests.commands.test_order import bundle
from tests.conftest import make_scan, write_nifti

__all__ = ["bundle"]  # a fixture

ROOMS = [sys.modules[f"mapseg_components.{room}"] for room in ("commands.training", "plans.bundle")]
# a translation that copies, in the place of the bundle's
STAND_IN = {
    "datalist": "",
    "max_epochs": 20,
    "labels": {},
    "seed": 0,
    "slice_size": [64, 64],
    "segmentation_weight": 1.0,
}


class Stopped(BaseException):
    """The end of a process at any moment."""


class FakeStages:
    """In the place of `run_stage`: writes what a stage of the bundles leaves behind, and remembers what it was given.

    The call number `stop_at` ends in its middle; of pseudo labels one scan is written by then.
    """

    def __init__(self):
        self.calls, self.stop_at, self.missing = [], None, {}

    def __call__(self, title, bundle, configs, output, settings, on_epoch=None):
        output.mkdir(parents=True, exist_ok=True)
        stopped = self.stop_at is not None and len(self.calls) == self.stop_at
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        self.calls.append((title, Path(bundle).name, [Path(one).name for one in configs], settings))
        if title.startswith("labels"):
            for case in load_datalist(settings["_datalist"], "target_training"):
                assert not result_path(case["image"], output, "seg").exists(), "a scan is segmented twice"
                classes = make_scan(seed=int(case["case_id"]))[1]
                classes[classes == self.missing.get((title, case["case_id"]))] = 0
                write_nifti(result_path(case["image"], output, "seg"), classes)
                if stopped:
                    raise Stopped
        if stopped:
            self.stop_at = None
            raise Stopped
        if title == "translation":
            self.translate(Path(settings.get("datalist", output.parents[1] / "datalist.json")), output / "translated")
        elif not title.startswith("labels"):
            for name in ("model.pt", "source_only.pt"):
                (output / name).write_text(title)
        return 1.5

    def translate(self, datalist, folder):
        content = json.loads(datalist.read_text())
        for section in ("source_training", "source_validation"):
            for case in content[section]:
                for key in ("image", "label"):
                    path = folder / f"{key}s" / f"{case['case_id']}.nii.gz"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    case[key] = shutil.copyfile(case[key], path).as_posix()
        (folder / "datalist.json").write_text(json.dumps(content))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Stages and a translation bundle that take no time."""
    folder = tmp_path / "bundles"
    for name in ("mapseg_adaptation", "mapseg_pretraining"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(bundles_folder() / name)
    configs = folder / "cosmos_translation" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps(STAND_IN))
    fake = FakeStages()
    for room in ROOMS:
        monkeypatch.setattr(room, "bundles_folder", lambda: folder)
    monkeypatch.setattr(ROOMS[0], "run_stage", fake)
    return fake


@pytest.fixture
def scans(tmp_path):
    for seed in range(3):
        image, label = make_scan(seed=seed)
        write_nifti(tmp_path / "t1" / "images" / f"{seed}.nii.gz", image)
        write_nifti(tmp_path / "t1" / "labels" / f"{seed}.nii.gz", label * 100)
    for seed in (7, 8, 9):
        write_nifti(tmp_path / "t2" / f"{seed}.nii.gz", make_scan(seed=seed, contrast=-0.7)[0])
    return tmp_path


def run_of(scans, name="out", method="cosmos", target_inverted=True, **settings):
    given = {key: one.default for key, one in inspect.signature(adapt).parameters.items()}
    given |= {"source": str(scans / "t1"), "target": str(scans / "t2"), "method": method, "device": "cpu"}
    given |= {"labels": {"box": 100, "ball": 200}}
    request = {key: given[key] for key in given if key not in ("output", "quiet", "verbose")}
    (scans / name).mkdir(exist_ok=True)
    return Adaptation(
        scans / name, {**request, "settings": {"target_inverted": target_inverted, **settings}}, quiet=True
    )


def finish(scans, name="out", **settings):
    """The same command again and again until it comes to its end; returns its record and how often it was stopped."""
    for stops in range(100):
        run = run_of(scans, name, **settings)
        try:
            run.train()
        except Stopped:
            continue
        return run, stops
    raise AssertionError("it never ends")


def files_of(folder):
    """Content of what the stages leave behind, but for paths, which begin with the run's folder."""
    found = {}
    for path in sorted((folder / "stages").rglob("*")):
        if path.is_file() and path.name not in ("log.txt", "to_segment.json"):
            content = path.read_bytes()
            voxels = np.asarray(nib.load(path).dataobj).tolist() if path.name.endswith(".gz") else None
            found[path.relative_to(folder)] = voxels or content.replace(str(folder).encode(), b"")
    return found


def test_a_run_that_is_stopped_anywhere_ends_as_one_that_was_not(stages, scans):
    whole, _ = finish(scans, "whole", rounds=2)
    calls = list(stages.calls)
    titles = [title for title, *_ in calls]
    assert titles == [stage.name for stage in whole.recipe.stages] == whole.record["done"]
    expected = files_of(scans / "whole")
    for number in range(len(calls)):
        stages.calls, stages.stop_at = [], number
        run, stops = finish(scans, f"stopped-{number}", rounds=2)
        assert stops >= 1 and files_of(run.folder) == expected
        assert run.record["done"] == whole.record["done"]
        again = [title for title, *_ in stages.calls]
        assert len(again) == len(calls) + stops and again.count(titles[number]) == 1 + stops, "only what was stopped"
        for key, found in run.record["pseudo_labels"].items():
            assert found == whole.record["pseudo_labels"][key]


def test_each_stage_is_given_what_the_ones_before_made(stages, scans):
    run, _ = finish(scans)
    given = {title: (bundle, configs, settings) for title, bundle, configs, settings in stages.calls}
    place = str(run.stages)
    assert given["translation"][:2] == ("cosmos_translation", ["train.json", "translation.json"])
    translation = json.loads((run.folder / "configs" / "translation.json").read_text())
    assert translation["labels"] == {"box": 100, "ball": 200}
    assert translation["slice_size"] == [32, 32] and "datalist" not in translation
    assert given["translation"][2]["datalist"] == str(run.folder / "datalist.json")
    assert "max_epochs" not in given["translation"][2], "as its own preset says"
    assert (given["teacher"][2]["max_epochs"], given["student_1"][2]["max_epochs"]) == (14, 14)
    assert "datalist" not in given["source"][2] and "source_only.yaml" in given["source"][1]
    translated = f"{place}/translation/translated/datalist.json"
    assert given["teacher"][2]["datalist"] == translated and "histogram.yaml" in given["teacher"][1]
    axes = json.loads((run.folder / "configs" / "train.json").read_text())["flip_axes"]
    assert axes == [0]
    for number, by in ((1, "teacher/source_only.pt"), (2, "student_1/model.pt"), (3, "student_2/model.pt")):
        _, configs, settings = given[f"labels_{number}"]
        assert configs == ["inference.json", "pseudo_labels.yaml"] and settings["weights"] == f"{place}/{by}"
        assert settings["evaluator#inferer#weights"] == [] and settings["evaluator#inferer#flip_axes"] == axes
        _, configs, settings = given[f"student_{number}"]
        assert settings["datalist"] == f"{place}/labels_{number}/pseudo/datalist.json"
        assert "initial_weights" not in settings and settings["batch_size"] == 1, "from scratch, half of each domain"
        assert settings["source_negative_values"] == "clip"
        labelled = load_datalist(settings["datalist"], "target_labelled")
        assert [case["case_id"] for case in labelled] == ["7", "8", "9"]
        for case in labelled:
            expected = make_scan(seed=int(case["case_id"]))[1].astype(int) * 100
            np.testing.assert_array_equal(np.asarray(nib.load(case["label"]).dataobj), expected)
    assert run.datalist_of_model("source_only") == run.folder / "datalist.json"
    assert str(run.datalist_of_model("adapted")) == settings["datalist"]
    agreement = run.record["pseudo_labels"]["labels_2"]["with_round_before"]
    assert agreement["mean"] == 1.0 and "with_round_before" not in run.record["pseudo_labels"]["labels_1"]


@pytest.mark.parametrize(
    "asked, expected", [({}, 3), ({"sites": 2}, 2), ({"sites": {"berlin": ["7", "8"], "lyon": ["9"]}}, 2)]
)
def test_a_federation_has_the_sites_that_are_asked_for(stages, scans, asked, expected):
    run_of(scans, method="federated", **asked).train()
    title, _, _, settings = stages.calls[-1]
    assert title == "federation" and len(settings["sites"]) == expected


def test_each_fold_trains_on_its_own_part_of_the_source(stages, scans):
    run, _ = finish(scans, rounds=1, folds=3)
    given = {title: settings for title, _, _, settings in stages.calls}
    seen = []
    for number in (1, 2, 3):
        settings = given[f"teacher_fold_{number}"]
        assert settings["seed"] == number
        seen += [case["case_id"] for case in load_datalist(settings["datalist"], "source_validation")]
        assert "translated" in load_datalist(settings["datalist"], "source_training")[0]["image"]
    assert sorted(seen) == ["0", "1", "2"]
    assert given["labels_1"]["evaluator#inferer#weights"] == [
        str(run.stages / f"teacher_fold_{number}" / "source_only.pt") for number in (2, 3)
    ]
    assert "seed" not in given["student_1"] and run.recipe.models["adapted"] == "student_1/model.pt"


def test_nnunet_is_given_the_same_datalists_and_labels_the_same_scans(stages, scans, monkeypatch):
    monkeypatch.setattr("mapseg_components.inferers.nnunet.importlib.metadata.version", lambda name: "2.8.1")
    run, _ = finish(scans, rounds=2, engine="nnunet", num_workers=3)
    given = {title: (configs, settings) for title, _, configs, settings in stages.calls}
    place = str(run.stages)
    for model, datalist in (("teacher", "translation/translated"), ("student_1", "labels_1/pseudo")):
        configs, settings = given[model]
        assert configs == ["train.json", "nnunet.yaml", "settings.json"], "the user's settings come last"
        assert settings == {"datalist": f"{place}/{datalist}/datalist.json", "max_epochs": 14}
    for number, by in ((1, "teacher"), (2, "student_1")):
        configs, settings = given[f"labels_{number}"]
        assert configs == ["inference.json", "nnunet_labels.yaml"]
        assert settings["weights"] == f"{place}/{by}/nnunet.pt" and settings["evaluator#inferer#flip_axes"] == [0]
        assert (run.folder / "configs" / "nnunet_labels.yaml").is_file(), "the bundle has what its stages ran"
    assert "self_training.yaml" not in given["student_2"][0] and "translated.yaml" in given["student_2"][0]
    assert run.recipe.models["adapted"] == "student_2/model.pt"
    content = json.loads((run.folder / "configs" / "settings.json").read_text())
    assert content == {"target_inverted": True, "num_workers": 3}, "the engine is no setting of a bundle"


def test_a_run_without_nnunet_ends_before_anything_is_written(stages, scans, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("mapseg_components.inferers.nnunet.importlib.metadata.version", absent)
    with pytest.raises(ConfigError, match=r"pip install 'mapseg-monai\[nnunet\]'"):
        run_of(scans, engine="nnunet").train()
    assert list((scans / "out").iterdir()) == [] and stages.calls == []


def test_a_scan_without_a_structure_is_left_out_and_said(stages, scans):
    stages.missing = {("labels_2", "8"): 2}
    run, _ = finish(scans)
    found = run.record["pseudo_labels"]
    assert found["labels_1"]["left_out"] == [] and found["labels_3"]["left_out"] == []
    assert found["labels_2"]["left_out"] == [{"case": "8", "missing": ["ball"]}]
    labelled = load_datalist(run.stages / "labels_2" / "pseudo" / "datalist.json", "target_labelled")
    assert [case["case_id"] for case in labelled] == ["7", "9"]


def test_a_structure_that_is_in_no_pseudo_label_ends_the_run_and_another_rule_goes_on(stages, scans):
    stages.missing = {("labels_2", str(case)): 2 for case in (7, 8, 9)}
    with pytest.raises(DataError, match=r"no pseudo label is left of 3 target scans .*ball in all"):
        run_of(scans).train()
    run = run_of(scans)
    with pytest.raises(DataError, match="no pseudo label is left"):
        run.train()
    assert run.record["done"] == ["source", "translation", "teacher", "labels_1", "student_1"]
    titles = [title for title, *_ in stages.calls]
    assert titles.count("labels_2") == 1, "what is segmented is not segmented again"
    with pytest.raises(ConfigError, match="holds a run with other arguments"):
        run_of(scans, rounds=1).train()
    run, _ = finish(scans, required_structures=["box"])
    assert run.record["done"][-1] == "student_3" and len(run.record["pseudo_labels"]["labels_2"]["kept"]) == 3
    assert [title for title, *_ in stages.calls][: len(titles)] == titles
    assert [title for title, *_ in stages.calls][len(titles) :] == ["student_2", "labels_3", "student_3"]


@pytest.mark.parametrize(
    "method, rounds, last", [("cosmos", {"rounds": 0}, "teacher"), ("translation", {}, "adaptation")]
)
def test_a_translation_alone_is_a_method_too(stages, scans, method, rounds, last):
    run = run_of(scans, method=method, **rounds)
    run.train()
    assert run.record["done"] == ["source", "translation", last]
    assert run.recipe.models == {"source_only": "source/source_only.pt", "adapted": f"{last}/source_only.pt"}
    weight = {title: settings for title, _, _, settings in stages.calls}["translation"].get("segmentation_weight")
    assert weight == (0.0 if method == "translation" else None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rounds": 0.5}, "rounds is 0.5, expected a whole number"),
        ({"folds": 4}, "folds is 4, and the source has 3 cases"),
        ({"required_structures": ["liver"]}, "expected a list of structures among"),
        ({"segmentation_wait": 1}, r"\['segmentation_wait'\] are in no bundle"),
        ({"flip_axes": [4]}, "flip_axes is"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(stages, scans, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_of(scans, **settings).train()
    assert list((scans / "out").iterdir()) == [] and stages.calls == []


def test_the_report_shows_translation_and_rounds(tmp_path):
    folder = make_run(tmp_path / "run", structures=2, scans=1, epochs=2)
    run = json.loads((folder / "run.json").read_text())
    names = list(run["plan"]["labels"])
    run["models"] = {"source_only": "source/source_only.pt", "adapted": "student_2/model.pt"}
    kept = {"scans": 4, "required": names[:1], "kept": ["a", "b", "c"], "left_out": []}
    run["pseudo_labels"] = {
        "labels_1": {**kept, "left_out": [{"case": "<scan d>", "missing": [names[0]]}]},
        "labels_2": {**kept, "with_round_before": {"structures": {names[0]: 0.8125, names[1]: None}, "mean": 0.8125}},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "stages" / "adaptation").rename(folder / "stages" / "student_2")
    (folder / "stages" / "translation").mkdir()
    for epoch in (5, 10, 15):
        (folder / "stages" / "translation" / f"translation_{epoch:04d}.png").write_bytes(b"\x89PNG" + bytes([epoch]))
    page = Path(report(str(folder))).read_text()
    assert page.count('src="data:image/png;base64,iVBOR') >= 2
    assert "translation_0005" in page and "translation_0015" in page and "translation_0010" not in page
    for text in ("Pseudo labels</h2>", "&lt;scan d&gt;", "0.812", "Adaptation: the Score", f"Required: {names[0]}."):
        assert text in page
    assert translation_section(tmp_path) == rounds_section({}) == "", "of other methods"


def test_each_model_is_calibrated_on_validation_scans_as_it_was_trained_on_them(bundle, tmp_path):
    folder, weights = bundle
    content = json.loads((folder / "datalist.json").read_text())
    for number, case in enumerate(content["source_validation"]):
        voxels = np.asarray(nib.load(folder / case["image"]).dataobj)  # an absolute path stays
        case["image"] = write_nifti(
            tmp_path / "translated" / f"{number}.nii.gz", (voxels.max() - voxels) * (voxels > 0)
        )
        case["label"] = str(folder / case["label"])
    (tmp_path / "translated" / "datalist.json").write_text(json.dumps(content))
    both = {"source_only": str(weights), "adapted": str(weights)}
    found = assess(str(folder), both, quiet=True, validation={"adapted": str(tmp_path / "translated/datalist.json")})
    source, adapted = (found["models"][name] for name in both)
    assert (source["translated_validation"], adapted["translated_validation"]) == (False, True)
    assert source["validation_dice"] != adapted["validation_dice"], "one model, two kinds of scans"
    assert any("translated for the adapted model" in text for text in found["verdict"]["why"])
