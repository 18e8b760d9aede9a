# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A source of label maps alone: where they lie, what is refused, merged values, the plan and what training reads."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.commands.adapt import Adaptation, adapt
from mapseg_components.commands.check import check
from mapseg_components.data import check_training_data, load_datalist
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.plans.bundle import write_bundle
from mapseg_components.plans.label_maps import label_map_cases, labelled_cases, merged, several_values
from mapseg_components.plans.recipes import recipe_for
from mapseg_components.structures import parts_of
from mapseg_components.transforms import SelectLabels
from tests.conftest import make_scan, write_nifti

SHAPE = (20, 24, 28)
PARTS = {"hippocampus": [17, 53], "brainstem": [16]}


def head(seed=0):
    """A label map of a head (3) with two sides of a structure, another one and one that nobody asks for (2)."""
    label = np.zeros(SHAPE, np.int16)
    label[2:-2, 2:-2, 2:-2] = 3
    for number, value in enumerate((17, 53, 16, 2)):
        label[4 + seed : 8 + seed, 5:9, 4 + 5 * number : 7 + 5 * number] = value
    return label


@pytest.fixture
def maps(tmp_path):
    """Three of them in a folder, and two scans to segment."""
    for seed in range(3):
        write_nifti(tmp_path / "maps" / f"{seed}.nii.gz", head(seed))
    for seed in (7, 8):
        write_nifti(tmp_path / "t2" / f"{seed}.nii.gz", make_scan(seed=seed)[0])
    return tmp_path


def request_of(folder, **changes):
    named = {"source": str(folder / "maps"), "target": str(folder / "t2"), "labels": PARTS, "source_label_maps": True}
    plain = {"method": "label_maps", "preset": "small-data-cpu", "prepare": None, "validation_share": 0.2, "seed": 0}
    more = {
        "held_out": 0.2,
        "symmetric": False,
        "device": "cpu",
        "settings": None,
        "random_contrasts": False,
        "pretraining": False,
    }
    return {**named, **plain, **more, **changes}


def planned(folder, **changes):
    """A bundle as `mapseg adapt` writes it before it trains."""
    output, request = folder / "out", request_of(folder, **changes)
    output.mkdir(exist_ok=True)
    run = Adaptation(output, request, True)
    run._plan()
    write_bundle(output, run.recipe, run.record["plan"], request)
    return output, run


def lay_out(folder, kind):
    """Label maps in a layout; returns the source to name."""
    if kind == "folder":
        return folder / "maps"
    if kind == "source":
        (folder / "data" / "source").mkdir(parents=True)
        (folder / "maps").rename(folder / "data" / "source" / "labels")
        return folder / "data"
    if kind in ("labels", "labelsTr"):
        (folder / "data").mkdir()
        (folder / "maps").rename(folder / "data" / kind)
        return folder / "data"
    entries = [{"label": f"maps/{n}.nii.gz"} for n in range(3)]
    content = {"source_training": entries, "source_label_maps": kind == "alone"}
    if kind == "images":
        for entry in entries:
            entry["image"] = f"elsewhere/{entry['label']}"
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


@pytest.mark.parametrize("kind", ["folder", "labels", "labelsTr", "source", "alone", "images"])
def test_label_maps_are_found_and_one_is_held_out(maps, kind):
    training, validation = label_map_cases(str(lay_out(maps, kind)), 0.2, 0)
    assert len(training) == 2 and len(validation) == 1
    for case in (*training, *validation):
        assert case["image"] == case["tissues"] == case["label"] and nib.load(case["label"]).shape == SHAPE


def test_a_datalist_of_label_maps_has_no_images_but_for_validation(maps):
    content = {"source_label_maps": True, "source_training": [{"label": "maps/0.nii.gz", "tissues": "maps/1.nii.gz"}]}
    content["source_validation"] = [{"label": "maps/2.nii.gz"}, {"label": "maps/2.nii.gz", "image": "t2/7.nii.gz"}]
    (maps / "list.json").write_text(json.dumps(content))
    [case] = load_datalist(maps / "list.json", "source_training")
    assert case["image"] == case["tissues"] == str(maps / "maps" / "1.nii.gz") and case["case_id"] == "0"
    first, second = load_datalist(maps / "list.json", "source_validation")
    assert first["image"] == first["tissues"] == first["label"]
    assert second["image"].endswith("7.nii.gz") and "tissues" not in second
    content["source_training"][0]["image"] = "t2/7.nii.gz"
    (maps / "list.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"7\.nii\.gz is an image, and source_label_maps says that the source has none"):
        load_datalist(maps / "list.json", "source_training")


def test_merged_label_maps_have_a_number_for_each_structure_and_nothing_else(maps):
    training, _ = label_map_cases(str(maps / "maps"), 0.2, 0)
    [case, _] = merged(training, PARTS, "others", maps / "new")
    before, after = (nib.load(case[key]) for key in ("tissues", "label"))
    values, numbers = np.asarray(before.dataobj), np.asarray(after.dataobj)
    np.testing.assert_array_equal(numbers == 1, np.isin(values, [17, 53]))
    np.testing.assert_array_equal(numbers == 2, values == 16)
    assert set(np.unique(numbers)) == {0, 1, 2} and np.array_equal(before.affine, after.affine)
    with pytest.raises(DataError, match=r"unknown values 2 \(48 voxels\), 3 \(.*known are \[0, 16, 17, 53\]"):
        merged(training, PARTS, [], maps / "new")


def test_a_validation_map_of_a_training_maps_name_takes_nothing_of_its_place(maps):
    for folder, seed in (("source", 0), ("validation", 1)):
        write_nifti(maps / "data" / folder / "labels" / "1.nii.gz", head(seed))
    request = request_of(maps, source=str(maps / "data"))
    parts = labelled_cases(request, request["source"], maps / "out")[:2]
    for (case,), seed in zip(parts, (0, 1)):
        assert case["case_id"] == "1"
        np.testing.assert_array_equal(np.asarray(nib.load(case["label"]).dataobj) == 2, head(seed) == 16)


def test_structures_of_several_values_are_merged_for_a_source_of_images_too(maps):
    for seed in range(3):
        write_nifti(maps / "t1" / "images" / f"{seed}.nii.gz", make_scan(SHAPE, seed=seed)[0])
        write_nifti(maps / "t1" / "labels" / f"{seed}.nii.gz", head(seed))
    settings = {"dropped_labels": [2, 3]}
    changes = {"source": str(maps / "t1"), "source_label_maps": False, "method": "mapseg", "settings": settings}
    output, run = planned(maps, **changes)
    assert run.record["plan"]["labels"] == {"hippocampus": 1, "brainstem": 2}
    assert run.record["plan"]["label_values"] == PARTS, "what the truth has"
    cases = load_datalist(output / "datalist.json", "source_training")
    assert all("t1/images" in case["image"] and "out/label_maps/merged" in case["label"] for case in cases)
    check_training_data(output / "datalist.json", {"hippocampus": 1, "brainstem": 2}, label_maps=False)


def test_the_plan_trains_on_label_maps_and_validates_on_fixed_scans(maps):
    output, run = planned(maps)
    plan, listed = run.record["plan"], json.loads((output / "datalist.json").read_text())
    assert plan["settings"]["synthesis_alike"] == [[17, 53]] and run.recipe.order is None and run.recipe.inverts
    assert len(listed["source_validation"]) == 4, "several contrasts of one map"
    scans = [nib.load(case["image"]).get_fdata() for case in listed["source_validation"]]
    assert not any(np.allclose(scans[0], one) for one in scans[1:]) and all(0 <= s.min() < s.max() <= 1 for s in scans)
    found = check(str(output / "datalist.json"), quiet=True)
    assert found.counts["error"] == 0 and not [f for f in found.findings if "looks like a label map" in f.what]
    planned(maps)
    again = [nib.load(case["image"]).get_fdata() for case in listed["source_validation"]]
    assert all(np.array_equal(one, other) for one, other in zip(scans, again))

    files = ["train.json", *run.recipe.stages[0].overlays, "settings.json"]
    parser = ConfigParser(ConfigParser.load_config_files([str(output / "configs" / name) for name in files]))
    for name, value in {"bundle_root": str(output), "patch_size": [16, 8, 12], "global_view": True}.items():
        parser[name] = value
    parser["foreground_fraction"] = 1.0
    data = parser.get_parsed_content("train#source_dataloader").dataset
    for seed in range(4):
        sample, again = data[0, seed], data[0, seed]
        assert all(torch.equal(sample[key], again[key]) for key in ("image", "global_image", "label"))
        assert sample["image"].shape == sample["label"].shape == (1, 16, 8, 12)
        assert 0 <= sample["image"].min() < sample["image"].max() <= 1
        assert set(sample["label"].unique().tolist()) <= {0, 1, 2} and sample["label"].max() > 0


def spoil(folder, kind):
    """A fault of the source; returns changes of the request."""
    path = folder / "maps" / "1.nii.gz"
    if kind == "fractions":
        write_nifti(path, head().astype(np.float32) + 0.5)
    elif kind == "scan":
        write_nifti(path, np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE))
    elif kind == "blank":
        write_nifti(path, np.zeros(SHAPE, np.uint8))
    elif kind == "negative":
        write_nifti(path, -head())
    elif kind == "one":
        for name in ("1", "2"):
            (folder / "maps" / f"{name}.nii.gz").unlink()
    elif kind == "none":
        return {"source": str(folder / "t2" / "..")}
    elif kind == "absent":
        return {"labels": {**PARTS, "accumbens": [26, 58]}}
    elif kind == "twice":
        return {"labels": {**PARTS, "accumbens": [16]}}
    return {}


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("fractions", DataError, "1.nii.gz: label map has fractions: 0.5"),
        ("scan", DataError, "1.nii.gz: 13440 different values, no label map: name a label map"),
        ("blank", DataError, "1.nii.gz: all voxels are 0, no tissue"),
        ("negative", DataError, "1.nii.gz: label map has negative values"),
        ("one", DataError, r"has 1 labelled case\(s\): two at least"),
        ("none", ConfigError, r"has no label map \(.nii, .nii.gz\) itself, but its sub-folder"),
        ("absent", ConfigError, r"no label map of .* has accumbens \(26, 58\): correct .*found are \[0, 2, 3, 16, 17"),
        ("twice", ConfigError, "'accumbens' or its value 16 occurs twice"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_planned(maps, kind, error, message):
    with pytest.raises(error, match=message):
        planned(maps, **spoil(maps, kind))
    assert not (maps / "out" / "datalist.json").exists()


def test_floats_and_maps_without_background_are_label_maps(maps):
    for seed in range(3):
        label = head(seed).astype(np.float32)
        label[label == 0] = 3
        write_nifti(maps / "maps" / f"{seed}.nii.gz", label)
    output, run = planned(maps)
    assert run.record["plan"]["labels"] == {"hippocampus": 1, "brainstem": 2}
    scan = nib.load(load_datalist(output / "datalist.json", "source_validation")[0]["image"]).get_fdata()
    assert (scan > 0).mean() > 0.9


@pytest.mark.parametrize("alone, asked", [(True, False), (False, True)])
def test_run_and_datalist_must_agree_that_there_are_no_images(maps, alone, asked):
    entries = [{"label": "maps/0.nii.gz", **({} if alone else {"image": "t2/7.nii.gz"})}]
    content = {"source_label_maps": alone, "source_training": entries, "target_training": [{"image": "t2/8.nii.gz"}]}
    (maps / "list.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"label_maps\.yaml"):
        check_training_data(maps / "list.json", {"stem": 16}, "others", label_maps=asked)
    check_training_data(maps / "list.json", {"stem": 16}, "others", label_maps=alone)


def test_any_method_may_have_label_maps_unless_it_translates_images(maps):
    assert recipe_for("mapseg", True).name == recipe_for("label_maps").name == "label_maps"
    other = recipe_for("mean_teacher", True)
    assert all(stage.overlays[0] == "label_maps.yaml" for stage in other.stages) and other.of_label_maps
    assert not recipe_for("mean_teacher").of_label_maps
    call = {"source": str(maps / "maps"), "target": str(maps / "t2"), "output": str(maps / "out")}
    with pytest.raises(ConfigError, match="prepare is for scans, and the source is label maps alone"):
        adapt(**call, source_label_maps=True, prepare={})


def test_several_values_are_named_in_lists_or_by_a_name_twice():
    assert several_values(PARTS, "nowhere") == PARTS
    assert several_values({"0": "background", "17": "hippocampus", "53": "hippocampus"}, "") == {
        "hippocampus": [17, 53]
    }
    assert several_values({"liver": 1, "spleen": 2}, "") is None
    for labels, message in (
        ({"a": []}, "'a' has no value"),
        ({"a": [1, 0]}, "'a, value 2' is 0"),
        ({"a": [1, 2], "b": 2}, "its value 2 occurs twice"),
        ({"a": [1, 1.5]}, "'a, value 2' is 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            parts_of(labels)


def test_others_are_dropped_where_that_is_asked_for_by_name():
    labels = torch.tensor([[0.0, 2, 17, 53]])
    assert SelectLabels({"left": 17, "right": 53}, "others")(labels).tolist() == [[0, 0, 1, 2]]
    with pytest.raises(DataError, match="fractions"):
        SelectLabels([17], "others")(labels + 0.5)
    with pytest.raises(ConfigError, match="expected a list of values or 'others'"):
        SelectLabels([17], "other")
