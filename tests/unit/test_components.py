# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Connected components and holes: what the source's label maps say of them, and what is done after the network."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy import ndimage

from mapseg_components.commands.adapt import Adaptation
from mapseg_components.errors import ConfigError
from mapseg_components.plans.bundle import check_names, write_bundle, write_device
from mapseg_components.plans.components import describe_after, find_after
from mapseg_components.plans.recipes import read_recipe
from mapseg_components.prediction.bundle import open_bundle
from mapseg_components.shipped_files import bundles_folder
from mapseg_components.transforms import FillEnclosed, named_classes
from mapseg_components.transforms.components import holes_of
from mapseg_components.transforms.shapes import shapes_in
from tests.scans import make_scan, write_nifti

LABELS = {"ventricle": 500, "myocardium": 200, "atrium": 9}
SHAPE = (17, 20, 23)
OURS = ("KeepLargestConnectedComponentd", "KeepComponentsd", "FillEnclosedd")
MOVES = [(order, flips) for order in itertools.permutations(range(3)) for flips in [(), (0,), (1, 2), (0, 1, 2)]]


def patches(seed):
    """Random patches of three structures and background, with holes and several components each."""
    noise = np.random.default_rng(seed).standard_normal((4, *SHAPE))
    smooth = np.stack([ndimage.gaussian_filter(one, 2) for one in noise])
    voxels = smooth.argmax(axis=0).astype(np.uint8)
    voxels[noise[0] > 2] = 0
    voxels[noise[1] > 3] = 2
    return voxels


def moved(voxels, order, flips):
    return np.flip(np.transpose(voxels, order), flips).copy()


def after(voxels, largest=(), holes=(), several=None):
    """What the shipped inference config does to class indices."""
    parser = ConfigParser()
    parser.read_config(str(bundles_folder() / "mapseg_adaptation" / "configs" / "inference.json"))
    parser["labels"] = LABELS
    parser["largest_component"], parser["fill_holes"] = list(largest), list(holes)
    parser["kept_components"] = several or {}
    steps = parser.config["postprocessing"]["transforms"]
    ours = [one for one in steps if one["_target_"].endswith(OURS)]
    parser["postprocessing#transforms"] = ours
    compose = parser.get_parsed_content("postprocessing")
    assert len(compose.transforms) == bool(largest) + bool(holes) + bool(several)
    return compose({"pred": MetaTensor(torch.from_numpy(voxels.copy())[None])})["pred"].numpy()[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_component_adds_no_voxel_and_changes_no_other_structure(seed):
    before = patches(seed)
    found = after(before, largest=["myocardium"])
    changed = found != before
    assert changed.any() and (before[changed] == 2).all() and (found[changed] == 0).all()
    _, count = ndimage.label(found == 2, np.ones((3, 3, 3)))
    assert count == 1
    sizes = np.bincount(ndimage.label(before == 2, np.ones((3, 3, 3)))[0].ravel())[1:]
    assert (found == 2).sum() == sizes.max()
    np.testing.assert_array_equal(after(found, largest=["myocardium"]), found)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_so_many_components_are_kept_and_nothing_else_is_changed(number):
    before = patches(0)
    found = after(before, several={"myocardium": number, "atrium": 500})
    changed = found != before
    assert changed.any() and (before[changed] == 2).all() and (found[changed] == 0).all()
    sizes, kept = (np.bincount(ndimage.label(one == 2, np.ones((3, 3, 3)))[0].ravel())[1:] for one in (before, found))
    np.testing.assert_array_equal(np.sort(kept), np.sort(sizes)[-number:])
    np.testing.assert_array_equal(after(before, several={"myocardium": 1}), after(before, largest=["myocardium"]))


@pytest.mark.parametrize("seed", range(3))
def test_filling_changes_background_alone_and_only_once(seed):
    before = patches(seed)
    found = after(before, holes=LABELS)
    changed = found != before
    assert changed.any() and (before[changed] == 0).all()
    np.testing.assert_array_equal(after(found, holes=LABELS), found)
    for value in (1, 2, 3):
        assert not holes_of(found, value).any()


@pytest.mark.parametrize("order, flips", MOVES)
def test_a_turned_or_mirrored_label_map_comes_out_alike(order, flips):
    voxels = patches(5)
    names = list(LABELS)
    expected = moved(after(voxels, names, names), order, flips)
    np.testing.assert_array_equal(after(moved(voxels, order, flips), names, names), expected)
    shapes = shapes_in(voxels.astype(int), 3)
    assert shapes_in(moved(voxels, order, flips).astype(int), 3) == shapes


def test_the_ventricle_within_the_myocardium_and_the_gap_between_them_stay():
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[3:14, 4:15, 5:16] = 2
    voxels[5:10, 6:11, 7:12] = 1
    voxels[10, 6:11, 7:12] = 0  # between both
    np.testing.assert_array_equal(after(voxels, holes=["myocardium", "ventricle"]), voxels)
    voxels[12, 13, 14] = 0  # in the wall
    expected = voxels.copy()
    expected[12, 13, 14] = 2
    np.testing.assert_array_equal(after(voxels, holes=["myocardium", "ventricle"]), expected)


def test_a_speck_of_another_structure_becomes_the_one_around_it():
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[2:12, 3:14, 4:16] = 2
    voxels[14:16, 15:19, 17:22] = 3
    voxels[6, 7, 8] = 3
    found = after(voxels, largest=["atrium"], holes=["myocardium"])
    assert found[6, 7, 8] == 2 and (found[14:16, 15:19, 17:22] == 3).all()


def test_what_opens_to_the_edge_is_no_hole_and_one_slice_has_holes_in_its_plane():
    ring = np.ones((5, 6, 7), np.uint8)
    ring[2, 3, 4:] = 0
    assert not holes_of(ring, 1).any()
    slice_ = np.ones((5, 6, 1), np.uint8)
    slice_[2, 3] = 0
    assert holes_of(slice_, 1).sum() == 1
    assert not holes_of(np.repeat(slice_, 4, axis=2), 1).any()  # a tunnel
    assert not holes_of(np.zeros((5, 6, 7)), 1).any() and not holes_of(np.ones((1, 1, 1)), 1).any()


def test_type_metadata_and_input_are_kept():
    voxels = torch.from_numpy(patches(2))[None]
    given = MetaTensor(voxels.clone(), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])), meta={"filename_or_obj": "a"})
    found = FillEnclosed([1, 2, 3])(given)
    assert (
        found.dtype == torch.uint8 and found.meta["filename_or_obj"] == "a" and torch.equal(found.affine, given.affine)
    )
    assert torch.equal(given.as_tensor(), voxels)
    with pytest.raises(ConfigError, match="label map of one channel, this has 3"):
        FillEnclosed([1])(torch.zeros(3, 4, 5, 6))


def hearts(folder, change=None, count=5, affine=None):
    """Label maps of a ventricle in a myocardium, and an atrium in every second; some are changed."""
    cases = []
    for number in range(count):
        voxels = np.zeros(SHAPE, np.uint16)
        voxels[3:14, 4:15, 5:16] = 200
        voxels[5:10, 6:11, 7:12] = 500
        if number % 2:
            voxels[14:16, 15:19, 17:22] = 9
        if change is not None:
            change(number, voxels)
        cases.append({"label": write_nifti(folder / f"{number}.nii.gz", voxels, affine)})
    return cases


def test_a_myocardium_round_a_ventricle_has_no_hole(tmp_path):
    plan = find_after(hearts(tmp_path), LABELS, {})
    assert plan["largest_component"] == plan["fill_holes"] == list(LABELS)
    assert plan["reasons"] == {"largest_component": {}, "kept_components": {}, "fill_holes": {}}
    assert plan["kept_components"] == {}
    assert describe_after(plan).endswith("holes filled: ventricle, myocardium, atrium.")


def test_what_is_not_done_has_its_reason(tmp_path):
    def change(number, voxels):
        if number == 1:
            voxels[0:2, 0:2, 0 : 2 + number] = 9  # beside the other part
        if number == 2:
            voxels[12, 13, 14] = 0

    plan = find_after(hearts(tmp_path, change), LABELS | {"valve": 77}, {})
    assert plan["largest_component"] == ["ventricle", "myocardium"] and plan["fill_holes"] == ["ventricle", "atrium"]
    assert plan["reasons"] == {
        "largest_component": {"atrium": "2 components in 1 of 5 label maps", "valve": "in none of 5 label maps"},
        "kept_components": {},
        "fill_holes": {"myocardium": "holes in 1 of 5 label maps", "valve": "in none of 5 label maps"},
    }
    assert "(not atrium: 2 components in 1 of 5 label maps; valve: in none" in describe_after(plan)


def test_specks_are_slips_and_pieces_are_components():
    voxels = np.zeros((30, 20, 25), np.int32)
    voxels[2:12, 2:12, 2:12] = 1  # 1000 voxels
    voxels[20, 15, 10:19] = 1
    assert shapes_in(voxels, 1)[1].components == 1
    voxels[20, 15, 10:20] = 1  # 1 %
    assert shapes_in(voxels, 1)[1].components == 2
    voxels[12:20, 12:15, 12:14] = 1  # corners connect
    assert shapes_in(voxels, 1)[1].components == 1


def test_values_that_are_no_structure_are_background(tmp_path):
    cases = hearts(tmp_path, lambda number, voxels: voxels.__setitem__((12, 13, 14), 33))
    assert "myocardium" in find_after(cases, LABELS, {})["reasons"]["fill_holes"]


@pytest.mark.parametrize("odd", range(1, 25, 4))  # an atrium is in every second
def test_one_label_map_of_many_decides_wherever_it_stands(odd, tmp_path):
    def second_atrium(number, voxels):
        if number == odd:
            there = np.argwhere(voxels == LABELS["atrium"])
            voxels[tuple((there - there.min(0)).T)] = LABELS["atrium"]  # in the corner of the volume

    plan = find_after(hearts(tmp_path, second_atrium, count=25), LABELS, {})
    assert plan["largest_component"] == ["ventricle", "myocardium"] and plan["kept_components"] == {"atrium": 2}


def two_parts(number, voxels):
    """A second atrium wherever there is one."""
    there = np.argwhere(voxels == LABELS["atrium"])
    voxels[tuple((there - there.min(0, initial=99)).T)] = LABELS["atrium"]


def test_two_parts_of_a_structure_are_kept_where_almost_all_label_maps_have_them(tmp_path):
    plan = find_after(hearts(tmp_path, two_parts), LABELS, {})
    assert plan["kept_components"] == {"atrium": 2} and "atrium" not in plan["largest_component"]
    assert not any("atrium" in reasons for reasons in plan["reasons"].values()) and "atrium" in plan["fill_holes"]
    assert "largest components only: atrium 2" in describe_after(plan)

    def many(number, voxels):
        two_parts(number, voxels)
        if number % 2:
            voxels[0, 0:1, 20], voxels[0, 10, 20], voxels[15, 0, 20] = 9, 9, 9

    plan = find_after(hearts(tmp_path, many), LABELS, {})
    assert plan["kept_components"] == {}
    assert plan["reasons"]["largest_component"] == {"atrium": "5 components in 2 of 5 label maps"}


@pytest.mark.parametrize(
    "asked, message",
    [
        (["atrium"], "expected structures with numbers"),
        ({"liver": 2}, "kept_components names liver"),
        ({"atrium": 0}, "expected whole numbers from 1"),
        ({"atrium": 1.5}, "expected whole numbers from 1"),
    ],
)
def test_numbers_of_components_that_cannot_be_are_refused(tmp_path, asked, message):
    with pytest.raises(ConfigError, match=message):
        find_after(hearts(tmp_path), LABELS, {"kept_components": asked})
    assert find_after(hearts(tmp_path), LABELS, {"kept_components": {}})["kept_components"] == {}


def test_what_the_user_asks_stands_in_the_place_of_the_plan(tmp_path):
    cases = hearts(tmp_path)
    plan = find_after(cases, LABELS, {"largest_component": [], "fill_holes": ["atrium"], "max_epochs": 2})
    assert plan["largest_component"] == [] and plan["fill_holes"] == ["atrium"] and "max_epochs" not in plan
    check_names({"largest_component": [], "fill_holes": []})
    with pytest.raises(ConfigError, match="fill_holes names liver, the bundle has ventricle, myocardium, atrium"):
        find_after(cases, LABELS, {"fill_holes": ["liver"]})
    with pytest.raises(ConfigError, match="largest_component is 'atrium', expected a list"):
        find_after(cases, LABELS, {"largest_component": "atrium"})


def test_without_scikit_image_the_plan_leaves_components_and_a_wish_is_refused(tmp_path, monkeypatch):
    def missing(name):
        return None, False

    monkeypatch.setattr("mapseg_components.transforms.shapes.optional_import", missing)
    monkeypatch.setattr("mapseg_components.transforms.components.optional_import", missing)
    plan = find_after(hearts(tmp_path), LABELS, {})
    assert plan["largest_component"] == [] and plan["fill_holes"] == list(LABELS)
    assert plan["reasons"]["largest_component"]["atrium"].startswith("scikit-image is not installed")
    with pytest.raises(ConfigError, match=r"largest_component needs scikit-image, .*pip install scikit-image"):
        named_classes("largest_component", ["atrium"], LABELS)
    assert named_classes("largest_component", [], LABELS) == []


def planned(tmp_path, settings, target="t2", scan="t2/7.nii.gz"):
    """A bundle as ``mapseg adapt`` writes it before it trains; returns its folder and the plan."""
    for seed in range(3):
        image, label = make_scan(seed=seed)
        label[label == 2] = 0
        label[2:4, 3:5, 4:6] = label[15:17, 18:20, 22:24] = 2
        write_nifti(tmp_path / "t1" / "images" / f"{seed}.nii.gz", image)
        write_nifti(tmp_path / "t1" / "labels" / f"{seed}.nii.gz", label)
    write_nifti(tmp_path / scan, make_scan(seed=7)[0])
    request = {
        **{"source": str(tmp_path / "t1"), "target": str(tmp_path / target), "labels": {"one": 1, "two": 2}},
        **{"method": "mapseg", "preset": "small-data-cpu", "prepare": None, "validation_share": 0.2, "seed": 0},
        **{"held_out": 0.2, "pretraining": True, "random_contrasts": True},
        **{"symmetric": False, "device": "cpu", "settings": settings},
    }
    folder = tmp_path / "out"
    folder.mkdir()
    run = Adaptation(folder, request, True)
    run._plan()
    write_bundle(folder, run.recipe, run.record["plan"], request)
    return folder, json.loads(json.dumps(run.record["plan"]))


@pytest.mark.parametrize(
    "settings, largest",
    [(None, ["one"]), ({"largest_component": []}, []), ({"largest_component": ["two"]}, ["two"])],
)
def test_the_bundle_that_adapt_makes_has_the_plan(tmp_path, settings, largest):
    folder, plan = planned(tmp_path, settings)
    assert plan["after_network"]["largest_component"] == largest
    assert plan["after_network"]["kept_components"] == {"two": 2}
    config = json.loads((folder / "configs" / "inference.json").read_text())
    assert config["largest_component"] == largest and config["fill_holes"] == ["one", "two"]
    assert "largest_component" not in json.loads((folder / "configs" / "settings.json").read_text())
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    names = [type(one).__name__ for one in parser.get_parsed_content("postprocessing").transforms]
    assert names[-3:] == ["KeepComponentsd", "FillEnclosedd", "SaveLabelMapd"]
    assert ("KeepLargestConnectedComponentd" in names) == bool(largest)


@pytest.mark.parametrize(
    "target, scan", [("t2", "t2/7.nii.gz"), ("t2", "t2/images/7.nii.gz"), ("list.json", "some/7.nii.gz")]
)
def test_inference_of_that_bundle_reads_the_targets_scans_unless_a_folder_is_named(tmp_path, target, scan):
    write_nifti(tmp_path / "some" / "8.nii.gz", make_scan(seed=8)[0])
    (tmp_path / "list.json").write_text(json.dumps({"target_training": [{"image": "some/7.nii.gz"}]}))
    folder, _ = planned(tmp_path, None, target, scan)
    for changes, names in (({}, ["7"]), ({"dataset_dir": str(tmp_path / "t1" / "images")}, ["0", "1", "2"])):
        parser = ConfigParser()
        parser.read_config(str(folder / "configs" / "inference.json"))
        parser.update({"bundle_root": str(folder), **changes})
        assert [case["case_id"] for case in parser.get_parsed_content("cases")] == names


@pytest.mark.parametrize("settings, default", [(None, "'cuda' if"), ({"device": "$torch.device('meta')"}, "'meta'")])
def test_a_run_that_goes_on_has_the_device_that_it_is_given_then(tmp_path, settings, default):
    folder, _ = planned(tmp_path, settings)
    for device, expected in (("cuda:1", "'cuda:1'"), ("auto", default)):
        write_device(folder, read_recipe("mapseg"), {"settings": settings, "device": device})
        for name in ("train.json", "inference.json", "pretraining.json"):
            assert expected in json.loads((folder / "configs" / name).read_text())["device"]
    assert "device" not in json.loads((folder / "configs" / "settings.json").read_text()), "which comes last"


def test_a_network_that_is_asked_for_is_planned_alike_for_training_and_inference(tmp_path):
    own = {"_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "norm_name": "instance"}
    own |= {"kernel_size": [3, 3], "strides": [1, 2], "upsample_kernel_size": [2], "filters": [4, 8]}
    folder, _ = planned(tmp_path, {"network_def": own, "learning_rate": 0.5})
    names = ("train.json", "inference.json", "settings.json", "settings_of_target.json")
    configs = {name: json.loads((folder / "configs" / name).read_text()) for name in names}
    networks = [config["network_def"] for config in configs.values() if "network_def" in config]
    assert len(networks) == 3 and all(network == networks[0] for network in networks)
    assert len(networks[0]["strides"]) > 2 and configs["settings.json"]["learning_rate"] == 0.5


def test_predict_adds_to_the_plan_or_switches_it_off_for_one_run(tmp_path):
    folder, _ = planned(tmp_path, None)

    def opened(settings=None, keep=()):
        own = {"bundle_root": str(folder), **(settings or {})}
        return open_bundle(folder, [], own, [str(folder / "none.pt")], keep, False, False)

    def kept(bundle):
        steps = bundle["postprocessing"].transforms
        found = [one for one in steps if type(one).__name__ == "KeepLargestConnectedComponentd"]
        return [one.converter.applied_labels for one in found]

    assert kept(opened()) == [(1,)]
    assert kept(opened(keep=["two"])) == kept(opened(keep=["all"])) == [(1, 2)]
    assert kept(opened({"largest_component": []})) == []
    assert kept(opened({"largest_component": []}, keep=["two"])) == [(2,)]
    assert opened({"fill_holes": []}).recipe != opened().recipe != opened({"kept_components": {}}).recipe
    with pytest.raises(ConfigError, match="fill_holes names liver, the bundle has one, two"):
        opened({"fill_holes": ["liver"]})
