# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Rounds of self-training: the stages written out, the source divided, pseudo labels kept by what they hold."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.federated.privacy import epsilon_of
from mapseg_components.plans.bundle import check_names, settled
from mapseg_components.plans.effects import check_effects, check_epochs, check_parties, check_windows, read_by
from mapseg_components.plans.pseudo_labels import agreement_of, keep_pseudo_labels
from mapseg_components.plans.recipes import PSEUDO_LABELS, read_recipe
from mapseg_components.plans.rounds import check_options, divided, options_of, written_out
from mapseg_components.plans.sizes import PRESETS, plan_sizes, plan_slices
from mapseg_components.shipped_files import bundles_folder
from tests.conftest import write_nifti

COSMOS = read_recipe("cosmos")
LABELS = {"tumour": 500, "cochlea": 7, "nerve": 33}
SHAPE = (7, 8, 9)
AFFINE = np.array([[0, -1.5, 0, 3], [1.2, 0, 0, -7], [0, 0, 2.0, 5], [0, 0, 0, 1]], dtype=float)


@pytest.mark.parametrize("folds", [1, 2, 3])
@pytest.mark.parametrize("rounds", range(4))
def test_each_stage_needs_earlier_ones_alone_and_labels_come_from_the_round_before(rounds, folds):
    recipe = written_out(COSMOS, {"rounds": rounds, "folds": folds})
    names = [stage.name for stage in recipe.stages]
    assert len({*names}) == len(names)
    for number, stage in enumerate(recipe.stages):
        needed = {path.partition("/")[0] for path in (*stage.paths.values(), *stage.weights)}
        assert needed <= {*names[:number]}, stage
    labelling = [stage for stage in recipe.stages if stage.kind == PSEUDO_LABELS]
    students = [stage for stage in recipe.stages if stage.name.startswith("student")]
    assert len(labelling) == rounds and len(students) == (rounds - 1) * folds + 1 if rounds else not students
    for number, stage in enumerate(labelling):
        assert len({*stage.weights}) == folds
        by = "teacher" if number == 0 else f"student_{number}"
        assert all(path.startswith((f"{by}/", f"{by}_fold_")) for path in stage.weights)
    last = names[-1] if rounds else "teacher"
    assert recipe.models["adapted"].partition("/")[0] == last and students[-1:] == [
        stage for stage in students if stage.fold is None and stage.name == last
    ]
    assert recipe.models["source_only"] == COSMOS.models["source_only"]


def test_each_student_is_trained_from_scratch_on_its_own_round():
    recipe = written_out(COSMOS, {})
    students = {stage.name: stage for stage in recipe.stages if stage.name.startswith("student")}
    assert len(students) == COSMOS.rounds == 3
    for number in (1, 2, 3):
        student = students[f"student_{number}"]
        assert student.paths == {"datalist": f"labels_{number}/pseudo/datalist.json"}, "no weights to begin with"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rounds": -1}, "rounds is -1, expected a whole number, 0 or more"),
        ({"rounds": "three"}, "rounds is 'three'"),
        ({"folds": 0}, "folds is 0, expected a whole number, 1 or more"),
        ({"folds": True}, "folds is True"),
    ],
)
def test_wrong_numbers_of_rounds_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        written_out(COSMOS, settings)


def test_settings_of_a_recipe_are_its_own_alone():
    assert options_of(read_recipe("mapseg")) == {} and written_out(read_recipe("mapseg"), {"rounds": -1}).rounds is None
    for name in ("rounds", "folds", "engine", "sites"):  # of a method, which check_effects names
        check_names({name: 3}, read_recipe("mapseg"))
    with pytest.raises(ConfigError, match=r"settings \['round'\] are in no bundle"):
        check_names({"round": 3}, read_recipe("mapseg"))
    with pytest.raises(ConfigError, match="as the argument labels"):
        check_names({"labels": {"liver": 1}})
    check_options(COSMOS, {"folds": 3, "required_structures": ["tumour"]}, LABELS, [1, 2, 3])
    with pytest.raises(ConfigError, match="folds is 4, and the source has 3 cases"):
        check_options(COSMOS, {"folds": 4}, LABELS, [1, 2, 3])
    for wrong in ("tumour", ["liver"]):
        with pytest.raises(ConfigError, match=r"required_structures is .*, expected a list of structures among"):
            check_options(COSMOS, {"required_structures": wrong}, LABELS, [1, 2, 3])


@pytest.mark.parametrize("cases, folds", [(5, 2), (7, 3), (5, 5)])
def test_every_case_is_validated_on_once(cases, folds):
    content = {"source_training": [*range(cases - 2)], "source_validation": [*range(cases - 2, cases)], "x": 1}
    parts = [divided(content, (number, folds), seed=3) for number in range(1, folds + 1)]
    assert sorted(case for part in parts for case in part["source_validation"]) == [*range(cases)]
    for part in parts:
        assert sorted([*part["source_training"], *part["source_validation"]]) == [*range(cases)]
        assert part["x"] == 1 and abs(len(part["source_validation"]) - cases / folds) < 1
    assert parts[0] == divided(content, (1, folds), seed=3)
    assert any(parts[0] != divided(content, (1, folds), seed) for seed in range(9))


def made(folder, present):
    """A datalist with target scans, and a label map of class indices for each, of the structures given."""
    generator = np.random.default_rng(0)
    cases, maps = [], {}
    for number, classes in enumerate(present):
        case = f"scan-{number}"
        voxels = generator.choice([0, *classes], SHAPE).astype(np.uint8)
        voxels.flat[: len(classes)] = classes
        image = write_nifti(folder / "scans" / f"{case}.nii.gz", generator.random(SHAPE, np.float32), AFFINE)
        cases.append({"image": image, "case_id": case, "domain": "site", "label": f"{folder}/never/opened.nii.gz"})
        maps[case] = folder / f"{case}_seg.nii.gz"
        write_nifti(maps[case], voxels, AFFINE)
    content = {"labels": {"500": "tumour"}, "source_training": [{"image": "a", "label": "b"}], "target_training": cases}
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json", maps


@pytest.mark.parametrize("required", [[], ["cochlea"], ["tumour", "nerve"], [*LABELS]])
def test_what_is_kept_has_all_that_is_required_and_nothing_else_is_left_out(tmp_path, required):
    present = [[1, 2, 3], [1, 3], [2], [1, 2], [1, 2, 3]]
    datalist, maps = made(tmp_path, present)
    found = keep_pseudo_labels(datalist, maps, LABELS, required, tmp_path / "pseudo")
    names, values = list(LABELS), np.array([0, *LABELS.values()])
    lacking = {
        f"scan-{number}": [name for name in required if names.index(name) + 1 not in classes]
        for number, classes in enumerate(present)
    }
    assert found["kept"] == [case for case, missing in lacking.items() if not missing]
    assert found["left_out"] == [{"case": case, "missing": missing} for case, missing in lacking.items() if missing]
    assert json.loads((tmp_path / "pseudo" / "left_out.json").read_text()) == found
    before, after = (json.loads(path.read_text()) for path in (datalist, tmp_path / "pseudo" / "datalist.json"))
    labelled = after.pop("target_labelled")
    assert after == before and [case["case_id"] for case in labelled] == found["kept"]
    for case in labelled:
        kept, said = nib.load(case["label"]), nib.load(maps[case["case_id"]])
        np.testing.assert_array_equal(np.asarray(kept.dataobj), values[np.asarray(said.dataobj)])
        np.testing.assert_array_equal(kept.affine, said.affine)
        assert case["domain"] == "site" and case["image"].endswith(f"{case['case_id']}.nii.gz")


def test_a_filter_that_leaves_nothing_says_what_is_missing_and_loses_nothing(tmp_path):
    datalist, maps = made(tmp_path, [[1], [1, 3], [3]])
    keep_pseudo_labels(datalist, maps, LABELS, [], tmp_path / "pseudo")
    before = {path: path.read_bytes() for path in (tmp_path / "pseudo").rglob("*.*") if path.name != "left_out.json"}
    with pytest.raises(DataError) as caught:
        keep_pseudo_labels(datalist, maps, LABELS, ["tumour", "cochlea"], tmp_path / "pseudo")
    for text in ("no pseudo label is left of 3 target scans", "cochlea in all", "tumour in 1", "required_structures"):
        assert text in str(caught.value)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(json.loads((tmp_path / "pseudo" / "left_out.json").read_text())["left_out"]) == 3


def test_agreement_of_rounds_is_the_mean_dice_of_each_structure(tmp_path):
    _, first = made(tmp_path / "a", [[1], [1]])
    _, second = made(tmp_path / "b", [[1], [1, 2]])
    assert agreement_of(first, first, list(LABELS)) == {"tumour": 1.0, "cochlea": None, "nerve": None}
    found = agreement_of(first, second, list(LABELS))
    assert 0 < found["tumour"] < 1 and found["cochlea"] == 0.0


def plan_of(preset, shape=(120, 130, 110), spacing=(1, 1, 1)):
    """A plan as `mapseg adapt` makes it, of cubes."""
    settings = plan_sizes([shape], [spacing], preset) | {"global_view": False}
    after = {"largest_component": ["tumour"], "kept_components": {}, "fill_holes": []}
    rest = {"fine": True, "labels": LABELS, "flip_axes": [0, 1], "after_network": after}
    sizes = {"slice_size": plan_slices([shape], preset), "working_spacing_mm": spacing, "settings": settings}
    return {"preset": preset, **rest, **sizes}


def request_of(**settings):
    return {"seed": 3, "device": "cpu", "settings": settings, "pretraining": True, "random_contrasts": True}


@pytest.mark.parametrize("name", ["train.json", "inference.json"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_bundle_has_the_method_and_a_network_that_takes_its_patch(preset, name):
    plan = plan_of(preset)
    config = settled(bundles_folder() / "mapseg_adaptation", name, COSMOS, plan, request_of())
    base = ConfigParser.load_config_file(bundles_folder() / "mapseg_adaptation" / "configs" / name)
    assert set(config) == set(base) and config["run"] == base["run"]
    if name == "train.json":
        assert config["method"]["_target_"].endswith("SelfTraining") and config["flip_axes"] == [0, 1]
        assert "target_labelled" in config["train"]["target_dataset"]["data"]
    network = config["network_def"]
    large = preset != "small-data-cpu"
    assert network["_target_"].endswith("DynUNet" if large else "GlobalLocalUNet")
    if large:  # 32 kernels, deep supervision
        assert network["filters"][0] == 32 and len(network["filters"]) == len(network["strides"])
        options = {
            key: value for key, value in network.items() if key not in ("_target_", "in_channels", "out_channels")
        }
        with torch.device("meta"):
            made = DynUNet(in_channels=1, out_channels=4, **options)
            found = made(torch.zeros(1, 1, *plan["settings"]["patch_size"]))
        assert found.shape == (1, network["deep_supr_num"] + 1, 4, *plan["settings"]["patch_size"])


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"target_negative_values": "shift"}, "shift"),
        ({"target_negative_values": "shift", "negative_values": "clip"}, "clip"),
        ({"source_negative_values": "shift"}, None),
    ],
)
def test_the_bundle_reads_scans_as_the_target_was_read(asked, expected):
    plan = plan_of("small-data-cpu")
    config = settled(bundles_folder() / "mapseg_adaptation", "inference.json", COSMOS, plan, request_of(**asked))
    assert config["negative_values"] == expected


def test_an_order_of_intensities_reaches_translation_and_segmentation():
    asked = request_of(target_inverted=True, learning_rate=0.5)
    for name in ("mapseg_adaptation", "cosmos_translation"):
        config = settled(bundles_folder() / name, "train.json", COSMOS, plan_of("small-data-cpu"), asked)
        assert config["target_inverted"] is True and config["learning_rate"] == 0.5


def test_the_shortest_stage_must_reach_a_validation():
    plan = plan_of("small-data-cpu")
    check_epochs(COSMOS, plan, request_of(val_interval=14))
    with pytest.raises(ConfigError, match="max_epochs is 14, val_interval 15"):
        check_epochs(COSMOS, plan, request_of(val_interval=15))
    check_epochs(COSMOS, plan, request_of(val_interval=15, max_epochs=15))
    with pytest.raises(ConfigError, match="in stage adaptation max_epochs is 16, val_interval 17"):
        check_epochs(read_recipe("mapseg"), plan, request_of(val_interval=17))
    with pytest.raises(ConfigError, match="val_interval 0"):
        check_epochs(COSMOS, plan, request_of(val_interval=0))


def test_windows_that_would_leave_gaps_are_refused():
    plan = plan_of("small-data-cpu")
    check_windows(COSMOS, plan, request_of(window_stride=plan["settings"]["patch_size"]))
    with pytest.raises(ConfigError, match=r"window_stride is .*, expected 1 up to the window"):
        check_windows(COSMOS, plan, request_of(window_stride=[400, 400, 400]))


@pytest.mark.parametrize(
    "method, read, unread",
    [
        ("mapseg", ["beta", "ema_schedule", "teacher_views"], ["label_rounds", "synthesis_alike", "constant_epochs"]),
        ("mapseg_masked", ["constant_epochs", "samples"], ["variance_penalty"]),
        ("buda_seg", ["label_rounds", "variance_penalty", "handover_min_scans"], ["mask_ratio", "prior_weight"]),
        ("entropy", ["val_interval", "diagnostics_scans"], ["teacher_views", "samples"]),
        ("cosmos", ["rounds", "engine", "slice_size", "fill_holes"], ["teacher_views"]),
        ("label_maps", ["synthesis_alike", "synthesis_optional"], ["handover_dir"]),
        ("federated", ["local_layers", "privacy_noise", "max_epochs", "weight_decay"], ["reinitialise"]),
    ],
)
def test_a_setting_is_refused_where_no_stage_of_the_method_refers_to_it(method, read, unread):
    recipe, plan = written_out(read_recipe(method), {}), plan_of("single-gpu")
    request = {"random_contrasts": True, "pretraining": True}
    check_effects(recipe, plan, {**request_of(**dict.fromkeys(read, 1)), **request})
    for name in unread:
        with pytest.raises(
            ConfigError, match=rf"settings \['{name}'\] have no effect, .* {method} in preset single-gpu"
        ):
            check_effects(recipe, plan, {**request_of(**{name: 1}), **request})


@pytest.mark.parametrize("method, stage", [("federated", "federation"), ("test_time", "adaptation")])
def test_class_shares_of_a_source_are_refused_where_the_last_stage_has_none(method, stage):
    recipe, plan = read_recipe(method), plan_of("small-data-cpu")
    request = {"random_contrasts": True, "pretraining": True}
    with pytest.raises(ConfigError, match=rf"prior_weight is 0\.1, and stage {stage} of method {method} learns from"):
        check_parties(recipe, plan, {**request_of(prior_weight=0.1), **request})
    check_parties(recipe, plan, {**request_of(prior_weight=0), **request})
    check_parties(read_recipe("mapseg"), plan, {**request_of(prior_weight=0.1), **request})


def test_a_privacy_budget_that_ends_before_the_last_round_is_refused_before_any_stage():
    """An update at noise 5 costs mu squared 0.16; 20 rounds are the recipe's."""
    recipe, plan = read_recipe("federated"), plan_of("small-data-cpu")
    noise = {"privacy_clip": 0.003, "privacy_noise": 5.0}
    request = {**request_of(**noise, privacy_max_epsilon=5.0), "random_contrasts": True, "pretraining": True}
    fit = max(number for number in range(20) if epsilon_of(0.16 * number, 1e-5) <= 5)
    assert 0 < fit < 20
    with pytest.raises(
        ConfigError, match=rf"20 rounds cost every site epsilon 8\.7.*rounds that fit: {fit}: set rounds"
    ):
        check_parties(recipe, plan, request)
    for changes in ({"rounds": fit}, {"participation": 0.5}, {"privacy_max_epsilon": 9.0}):
        check_parties(recipe, plan, request | {"settings": request["settings"] | changes})
    check_parties(recipe, plan, request | {"length": fit / 20})
    check_parties(recipe, plan, request | {"adaptation_length": fit / 20})
    with pytest.raises(ConfigError, match=f"{fit + 1} rounds cost"):
        check_parties(recipe, plan, request | {"settings": request["settings"] | {"rounds": fit + 1}})


def test_what_is_read_is_followed_through_lists_macros_and_parts_but_not_what_is_disabled():
    config = {
        "run": ["$@train#steps[0] + len(@names)"],
        "train": {"steps": ["%a#inner", 2], "other": "@never"},
        "a": {"inner": {"x": "@deep"}, "outer": "@never"},
        "names": [{"_target_": "A", "_disabled_": True, "x": "@never"}, {"_target_": "A", "_disabled_": "$@off"}],
        **dict.fromkeys(("deep", "never", "off"), 1),
    }
    assert read_by(config) == {"initialize", "run", "train", "a", "names", "deep", "off"}


@pytest.mark.parametrize("shape", [(20, 300, 90), (120, 97, 8), (50, 40, 1)])
def test_slices_of_a_translation_hold_the_scan_as_far_as_a_machine_affords(shape):
    small, large = plan_slices([shape], "small-data-cpu"), plan_slices([shape], "paper")
    for axis in range(2):
        assert small[axis] % 16 == large[axis] % 16 == 0 and 32 <= small[axis] <= large[axis] <= 256
        assert large[axis] >= min(shape[axis], 256)
