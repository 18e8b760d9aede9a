# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The source learnt from a shipped model of any contrast, where that knows all structures."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.checkpoints import load_weights
from mapseg_components.commands.adapt import adapt
from mapseg_components.commands.order import asks_for_order, recipe_of
from mapseg_components.errors import MAPSegError
from mapseg_components.files import sha256_of
from mapseg_components.plans.initial_model import describe_initial, initial_model_for, write_initial
from mapseg_components.plans.recipes import read_recipe, recipe_names
from mapseg_components.shipped_files import bundle_of
from tests.scans import make_domains

NEWBORN, ADULT = [92.0, 118.0, 94.0], [137.0, 165.0, 134.0]
HOME = bundle_of("brain_any_contrast")
REQUEST = {
    "initial_model": True,
    "random_contrasts": True,
    "match_size": True,
    "settings": {"seed": 1},
    "preset": "small-data-cpu",
    "device": "cpu",
}

SET_BY_HAND = {
    "working_spacing": [1, 1, 1],
    "patch_size": [32, 32, 32],
    "network_def": {"_target_": "DynUNet"},
    "uncertainty": True,
    "global_view": True,
    "encoder_weights": "mae.pt",
    "initial_weights": "own.pt",
}
FITTING = [
    name
    for name in recipe_names()
    if read_recipe(name).order and name not in ("buda_seg", "cosmos", "translation", "intensity_order")
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for name, sides in (("cubes", [1, 1, 1]), ("slices", [1, 1, 5])):
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.diag([*sides, 1])), folder / f"{name}.nii.gz")
    return {name: [{"image": str(folder / f"{name}.nii.gz")}] for name in ("cubes", "slices")}


@pytest.mark.parametrize(
    "structures, extent, spacing",
    [
        (["caudate", "thalamus"], NEWBORN, 1.378),
        (["caudate"], ADULT, 2.0),
        (["Left-Caudate", "Right-Caudate", "Brain-Stem", "Left-Cerebral-White-Matter"], ADULT, 2.0),
        (["caudate", "cochlea"], ADULT, None),
        (["globus pallidus", "leftcaudate"], ADULT, 2.0),
        (["Left-Cerebellum-Cortex"], ADULT, None),
        (["cortex_rightfrontal"], ADULT, None),
        (["Amygdala_LA"], ADULT, None),  # one of its nuclei
        (["caudate"], None, None),
        (["caudate"], [150.0, 200.0, 230.0], None),  # a head with its neck
    ],
)
def test_a_model_that_knows_all_structures_at_the_target_s_size(cases, structures, extent, spacing):
    found = initial_model_for(structures, cases["cubes"], cases["cubes"], extent, read_recipe("mapseg"), REQUEST)
    if spacing is None:
        assert found is None
        return
    assert found["bundle"] == "brain_any_contrast" and found["network"]["filters"] == [12, 24, 96, 192]
    assert found["settings"].pop("working_spacing") == pytest.approx([spacing] * 3, abs=2e-3)
    assert found["settings"] == {"patch_size": [48, 48, 48], "global_view": False}


@pytest.mark.parametrize(
    "method, change",
    [
        ("source_only", {}),
        ("label_maps", {}),
        ("cosmos", {}),
        ("translation", {}),
        ("mapseg_masked", {}),
        ("buda_seg", {}),  # two heads
        ("intensity_order", {}),  # nothing of the target but its order
        ("mapseg", {"initial_model": False}),
        ("mapseg", {"preset": "single-gpu"}),
        *[("mapseg", {"settings": {name: value}}) for name, value in SET_BY_HAND.items()],
    ],
)
def test_it_is_for_methods_that_learn_the_source_by_the_same_network(cases, method, change):
    given = (["caudate"], cases["cubes"], cases["cubes"], ADULT)
    assert initial_model_for(*given, read_recipe("mapseg"), REQUEST) is not None
    assert initial_model_for(*given, read_recipe(method), REQUEST | change) is None


@pytest.mark.parametrize("thick", [0, 1], ids=["source", "target"])
def test_it_is_not_for_thick_slices(cases, thick):
    sides = [cases["cubes"], cases["cubes"]]
    sides[thick] = cases["slices"]
    assert initial_model_for(["caudate"], *sides, ADULT, read_recipe("mapseg"), REQUEST) is None


def test_an_installation_without_that_model_goes_on_without_it(cases, monkeypatch):
    monkeypatch.setattr("mapseg_components.plans.initial_model.shipped_bundles", lambda: ["mapseg_adaptation"])
    assert initial_model_for(["caudate"], *[cases["cubes"]] * 2, ADULT, read_recipe("mapseg"), REQUEST) is None


def test_without_a_comparison_of_sizes_it_works_on_its_own_voxels(cases):
    given = (["caudate"], cases["cubes"], cases["cubes"])
    for extent in (NEWBORN, None):
        found = initial_model_for(*given, extent, read_recipe("mapseg"), REQUEST | {"match_size": False})
        assert found["settings"]["working_spacing"] == [2.0, 2.0, 2.0]


def test_a_folder_of_its_name_is_not_taken_for_it(cases, tmp_path, monkeypatch):
    (tmp_path / "brain_any_contrast").mkdir()
    monkeypatch.chdir(tmp_path)
    for names in (["caudate"], ["liver"]):
        found = initial_model_for(names, *[cases["cubes"]] * 2, ADULT, read_recipe("mapseg"), REQUEST)
        assert (found is None) is (names == ["liver"])


@pytest.mark.parametrize("name", FITTING)
def test_the_source_is_learnt_from_it_in_any_order_for_a_third_of_the_epochs(name):
    recipe = read_recipe(name)
    record = {"plan": {"initial_model": {}}, "done": [recipe.first[0].name]}
    found = recipe_of(recipe, record, REQUEST)
    assert found == recipe_of(found, record, REQUEST), "a run that goes on"
    first, *others = found.stages
    assert first.paths["initial_weights"] == "initial_model/weights.pt" and first.contrasts == "any_order.yaml"
    factors = first.factors("small-data-cpu")
    assert factors["max_epochs"] == pytest.approx(1 / 3) and factors["learning_rate"] == 0.5
    assert first.settings == recipe.first[0].settings | {"class_weight_power": 0.0, "val_interval": 4}
    assert not any(stage.only_as_is for stage in found.stages)
    assert not asks_for_order(found, first, record, REQUEST), "a model of any contrast says nothing of an order"
    before = {stage.name: stage for stage in recipe.stages}
    for stage in others:
        assert stage.scale["max_epochs"] == 0.5 * before[stage.name].scale.get("max_epochs", 1)
        assert stage.contrasts == ("any_order.yaml" if before[stage.name].contrasts else None)
        assert stage.paths.get("initial_weights") in (None, f"{first.name}/source_only.pt")


def test_each_of_several_source_models_is_learnt_from_it():
    recipe = read_recipe("mapseg").with_source_models(3)
    found = recipe_of(recipe, {"plan": {"initial_model": {}}}, REQUEST)
    weights = [stage.paths["initial_weights"] for stage in found.first]
    assert weights == ["initial_model/weights.pt"] * 3 and len({stage.name for stage in found.first}) == 3


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A call of `adapt` that trains nothing and so ends in an error; the record that it leaves."""
    folder = make_domains(tmp_path)
    for path in (*folder.glob("t1/images/*.nii*"), *folder.glob("t2/*.nii*"), *folder.glob("t1/labels/*.nii*")):
        scan = nib.load(path)
        voxels = np.pad(np.asarray(scan.dataobj), 3)
        sides = np.diag([6.1, 5.6, 3.4, 1.0])  # of a newborn's brain
        nib.save(nib.Nifti1Image(voxels, scan.affine @ sides), path)
    stages = []
    monkeypatch.setattr(
        "mapseg_components.commands.training.run_stage", lambda *given, **named: stages.append(given) or 1.0
    )

    def run(output=tmp_path / "run", ends="no epoch was validated", **options):
        stages.clear()
        options = {"labels": {"caudate": 1, "putamen": 2}, **options}
        with pytest.raises(MAPSegError, match=ends):
            adapt(source=str(folder / "t1"), target=str(folder / "t2"), output=str(output), quiet=True, **options)
        path = output / "run.json"
        return json.loads(path.read_text()) if path.is_file() else None, [*stages]

    return run


def test_a_run_begins_with_its_weights_network_and_spacing(call, tmp_path):
    record, stages = call()
    folder = tmp_path / "run"
    weights = folder / "stages" / "initial_model" / "weights.pt"
    assert [stage[0] for stage in stages] == ["source", "adaptation"] and "order" not in record
    source, adaptation = (stage[4] for stage in stages)
    assert source["initial_weights"] == weights and source["max_epochs"] == 12 and adaptation["max_epochs"] == 8
    assert all(stage["max_epochs"] % stage["val_interval"] == 0 for stage in (source, adaptation)), "the last as well"
    assert "configs/any_order.yaml" in stages[0][2] and "configs/any_order.yaml" in stages[1][2]
    for name in ("train.json", "inference.json"):
        config = json.loads((folder / "configs" / name).read_text())
        assert config["working_spacing"] == [1.37] * 3 and config["global_view"] is False
    network = ConfigParser(config).get_parsed_content("network_def")
    load_weights(network, weights)
    shipped = torch.load(HOME / "models" / "model.pt", weights_only=True)
    kept = network.state_dict()
    for name, value in shipped.items():
        rows = [0, 3, 4] if name.startswith("head.") else slice(None)  # caudate and putamen, there
        assert torch.equal(kept[name], value[rows]), name
    told = describe_initial(record["plan"]["initial_model"])
    assert "1.37 x 1.37 x 1.37 mm" in told and told in (folder / "docs" / "README.md").read_text()
    again, _ = call()
    assert again["plan"] == record["plan"]


@pytest.mark.parametrize("method", FITTING)
def test_each_method_that_begins_with_it_is_planned_and_run(call, tmp_path, method):
    record, stages = call(method=method)
    assert record["plan"]["initial_model"]["bundle"] == "brain_any_contrast"
    assert stages[0][4]["initial_weights"] == tmp_path / "run" / "stages" / "initial_model" / "weights.pt"
    assert stages[0][4]["max_epochs"] == 12


def test_the_bundle_says_so(call, tmp_path):
    record, _ = call()
    folder = tmp_path / "run"
    readme = (folder / "docs" / "README.md").read_text()
    assert readme.count("brain_any_contrast") == 1 and "initial_model_license.txt" in readme
    assert "SynthSeg" in (folder / "docs" / "initial_model_license.txt").read_text()
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert "after brain_any_contrast" in metadata["data_source"]
    assert record["identities"]["initial_model"] == sha256_of(HOME / "models" / "model.pt")
    write_initial(folder, record["plan"])  # as after a call that was killed before the record was written
    assert (folder / "docs" / "README.md").read_text() == readme


def test_its_source_stage_is_reused_where_classes_are_in_the_same_order(call, tmp_path):
    call()
    (tmp_path / "run" / "stages" / "source").mkdir()
    for names, taken in ((["caudate", "putamen"], True), (["putamen", "caudate"], False)):
        labels = {name: ["caudate", "putamen"].index(name) + 1 for name in names}
        _, stages = call(tmp_path / "_".join(names), labels=labels, reuse=str(tmp_path / "run"))
        assert ("source" not in [stage[0] for stage in stages]) is taken


def test_a_refused_check_leaves_the_folder_free(call, tmp_path):
    path = next(iter(sorted(tmp_path.rglob("t1/images/*.nii*"))))
    good = path.read_bytes()
    scan = nib.load(path)
    voxels = np.asarray(scan.dataobj).astype(np.float32)
    voxels[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(voxels, scan.affine), path)
    assert call(ends="NaN") == (None, [])
    path.write_bytes(good)
    assert call()[0]["plan"]["initial_model"]


def test_an_unknown_preset_is_named(call):
    call(ends="preset 'small' is unknown", preset="small")


@pytest.mark.parametrize("names", [["putamen", "caudate"], ["Left-Putamen", "caudate_nucleus"]], ids=str)
def test_its_structures_may_come_in_another_order_and_spelling(call, tmp_path, names):
    call(labels={name: value for value, name in enumerate(names, start=1)})
    found = torch.load(tmp_path / "run" / "stages" / "initial_model" / "weights.pt", weights_only=True)
    shipped = torch.load(HOME / "models" / "model.pt", weights_only=True)
    for name in ("head.conv.conv.weight", "head.conv.conv.bias"):
        assert torch.equal(found[name], shipped[name][[0, 4, 3]])


def test_a_run_of_an_earlier_version_goes_on_without_one(call, tmp_path):
    options = {"initial_model": False, "settings": {"target_inverted": False}}
    record, _ = call(**options)
    assert "initial_model" not in record["plan"]
    del record["request"]["initial_model"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert "initial_model" not in call(**options)[0]["plan"]
