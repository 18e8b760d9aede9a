# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Labels, intensities and lists: nothing unknown is trained on, nothing leaks, nothing overwrites."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from mapseg_components.data import (
    ScanAudit,
    check_datalist,
    check_labelled_scans,
    check_pretraining_data,
    check_scans,
    check_training_data,
    load_datalist,
    load_scans,
)
from mapseg_components.errors import ConfigError
from mapseg_components.transforms import NegativeValues
from tests.conftest import make_scan, write_nifti
from tests.faults import damage
from tests.faults.common import LABELS, bundle_run, refused, tree
from tests.fuzz.run import datalist_target

LABEL_FAULTS = [
    (damage.stray_label, "unknown values 9 (3 voxels), known are [0, 1, 2]", "labels or in dropped_labels"),
    (damage.fractional_label, "fractions: 1.5 (3 voxels)", "before it was rescaled or resampled"),
    (damage.negative_label, "unknown values -1 (3 voxels)", "labels or in dropped_labels"),
    (damage.image_as_label, "and 13432 more", "a scan and probabilities are none"),
    (damage.nan_label, "1 voxels are NaN or infinite, the first at (3, 4, 5)", "repair it"),
    (damage.truncated, "ends", "copy it again"),
    (damage.missing, "no such file", "correct the datalist"),
]


def edit(dataset, change):
    content = json.loads((dataset / "datalist.json").read_text())
    change(content)
    (dataset / "datalist.json").write_text(json.dumps(content))
    return dataset / "datalist.json"


@pytest.mark.parametrize("fault, what, remedy", LABEL_FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_unknown_label_is_named(dataset, tmp_path, fault, what, remedy):
    fault(dataset / "source_training" / "1_label.nii.gz")
    with refused(tmp_path, "source_training/1_label.nii.gz: ", what, remedy):
        check_training_data(dataset / "datalist.json", LABELS)
    shutil.rmtree(dataset / "source_validation")  # pretraining reads neither labels nor validation
    check_pretraining_data(dataset / "datalist.json")


def test_dropped_label_is_known(dataset):
    damage.stray_label(dataset / "source_training" / "1_label.nii.gz")
    check_training_data(dataset / "datalist.json", LABELS, dropped_labels=[9])


def test_blank_label_is_a_warning(dataset, caplog):
    damage.blank_label(dataset / "source_training" / "1_label.nii.gz")
    check_training_data(dataset / "datalist.json", LABELS)
    assert caplog.text.count("source_training/1_label.nii.gz: label map is blank") == 1


def test_class_without_a_voxel_is_one_warning(dataset, caplog):
    check_training_data(dataset / "datalist.json", {**LABELS, "third": 3, "fourth": 4})
    assert (
        caplog.text.count("source_training: no label map has third (3), fourth (4): such a class cannot be learnt") == 1
    )
    caplog.clear()
    check_training_data(dataset / "datalist.json", LABELS)
    assert "no label map has" not in caplog.text


def test_class_may_be_absent_only_as_far_as_it_was_read(dataset, caplog):
    """A class that an unreadable file may hold is not said to be absent."""
    for number in range(2):
        damage.truncated(dataset / "source_training" / f"{number}_label.nii.gz")
    with pytest.raises(ValueError, match="ends"):
        check_training_data(dataset / "datalist.json", LABELS)
    assert "no label map has" not in caplog.text


# negative values


@pytest.mark.parametrize("side, knob", [("source", "source_negative_values"), ("target", "target_negative_values")])
def test_negative_values_need_a_policy(dataset, tmp_path, side, knob):
    damage.hounsfield(dataset / f"{side}_training" / "1.nii.gz")
    words = [f"{side}_training/1.nii.gz: ", "voxels are negative (values from -1024 to", f"{knob} is null",
             f"set {knob} to 'clip' (MR), 'shift' (CT: adds 1024 first) or 'keep'"]  # fmt: skip
    with refused(tmp_path, *words, kind=ConfigError):
        check_training_data(dataset / "datalist.json", LABELS)
    for policy in ("clip", "shift", "keep"):
        check_training_data(dataset / "datalist.json", LABELS, **{knob: policy})
    with refused(tmp_path, "set negative_values to 'clip'", kind=ConfigError):
        check_pretraining_data(dataset / "datalist.json")
    check_pretraining_data(dataset / "datalist.json", negative_values="shift")


def test_policy_that_leaves_nothing_is_named(dataset, tmp_path):
    damage.all_negative(dataset / "target_training" / "0.nii.gz")
    for policy in ("clip", "shift"):
        with refused(tmp_path, "0.nii.gz: no voxel is above 0 under target_negative_values", "values from -10000"):
            check_training_data(dataset / "datalist.json", LABELS, target_negative_values=policy)
    check_training_data(dataset / "datalist.json", LABELS, target_negative_values="keep")


def test_policies_of_inference_and_evaluation(dataset, tmp_path):
    damage.hounsfield(dataset / "target_test" / "0.nii.gz")
    cases = load_datalist(dataset / "datalist.json", "target_test")
    with refused(tmp_path, "target_test/0.nii.gz", "set negative_values", kind=ConfigError):
        check_labelled_scans(cases, LABELS)
    check_labelled_scans(cases, LABELS, negative_values="shift")
    with refused(tmp_path, "target_test/0.nii.gz", "set negative_values", kind=ConfigError):
        ScanAudit(cases).usable  # noqa: B018
    assert ScanAudit(cases, negative_values="shift").usable == cases


def test_transform_without_a_policy_refuses_negative_values(tmp_path):
    scan = MetaTensor(torch.tensor([[[[-3.0, 0.0, 5.0]]]]), meta={"filename_or_obj": "ct/a.nii.gz"})
    with refused(tmp_path, "ct/a.nii.gz: 1 voxels are negative", "'shift' (CT: adds 1024 first)", kind=ConfigError):
        NegativeValues(None)(scan)
    sound = scan.clamp(min=0)
    assert NegativeValues(None)(sound) is sound


# lists


@pytest.mark.parametrize("section", ["source_training", "target_training"])
def test_empty_list_is_named(dataset, tmp_path, section):
    path = edit(dataset, lambda c: c.update({section: []}))
    with refused(tmp_path, f"datalist.json, '{section}' is empty", "list at least one scan", kind=ConfigError):
        check_datalist(path)
    with refused(tmp_path, f"datalist.json, '{section}' is empty", kind=ConfigError):
        load_datalist(path, section)


def test_empty_folder_and_domain_are_named(tmp_path):
    (tmp_path / "data" / "source" / "images").mkdir(parents=True)
    with refused(tmp_path, "data/source is empty", "list at least one scan", kind=ConfigError):
        check_datalist(tmp_path / "data")
    (tmp_path / "scans").mkdir()
    with refused(tmp_path, "no NIfTI scan", "set dataset_dir", kind=ConfigError):
        check_scans(load_scans(tmp_path / "scans"))


def test_all_entries_of_a_list_are_looked_at(dataset, tmp_path):
    def change(content):
        content["source_training"][0].pop("label")
        content["source_training"].append("a.nii.gz")
        content["target_training"][1]["case_id"] = "../x"

    path = edit(dataset, change)
    damage.truncated(dataset / "source_training" / "1.nii.gz")
    words = [
        "entry 0: 'label' is missing",
        "entry 2: expected an object",
        "case id '../x'",
        "1.nii.gz: ",
        "copy it again",
    ]
    with refused(tmp_path, *words, lines=4):
        check_training_data(path, LABELS)


def test_results_that_would_overwrite_each_other_are_refused(dataset, tmp_path):
    """Results are named by the scan's file, so that different case ids do not help."""
    write_nifti(dataset / "other" / "0.nii.gz", make_scan(seed=50)[0])
    write_nifti(dataset / "other" / "0_label.nii.gz", make_scan(seed=50)[1])
    entry = {"image": "other/0.nii.gz", "label": "other/0_label.nii.gz", "case_id": "other"}
    cases = load_datalist(edit(dataset, lambda c: c["target_test"].append(entry)), "target_test")
    with refused(tmp_path, "scans named ['0'] occur twice and would overwrite", "rename the files"):
        check_labelled_scans(cases, LABELS)


def test_equal_names_in_two_domains_of_a_folder(tmp_path):
    for number, domain in enumerate(("Bonn", "Graz")):
        image, label = make_scan(seed=number)
        write_nifti(tmp_path / "d" / "source" / domain / "images" / "01.nii.gz", image)
        write_nifti(tmp_path / "d" / "source" / domain / "labels" / "01.nii.gz", label)
    cases = check_datalist(tmp_path / "d")["source_training"]
    assert [(case["case_id"], case["domain"]) for case in cases] == [("Bonn_01", "Bonn"), ("Graz_01", "Graz")]


# leaks


def test_case_id_in_training_and_validation_is_refused(dataset, tmp_path):
    path = edit(dataset, lambda c: c["source_validation"][0].update(case_id="source_training-1"))
    with refused(tmp_path, "source_validation: case id 'source_training-1' is in source_training, too", "keep a"):
        check_training_data(path, LABELS)
    path = edit(dataset, lambda c: c["source_validation"][0].update(case_id="target_training-1"))
    check_training_data(path, LABELS)


@pytest.mark.parametrize("section", ["source_validation", "target_training"])
def test_same_voxels_under_two_names_are_refused(dataset, tmp_path, section):
    content = np.asanyarray(damage.image())
    for place in ("source_training", section):
        write_nifti(dataset / place / "0.nii.gz", content)
    words = [f"{section}/0.nii.gz: {section} has the same voxels as ", "source_training/0.nii.gz of source_training",
             "keep one of them"]  # fmt: skip
    with refused(tmp_path, *words):
        check_training_data(dataset / "datalist.json", LABELS)
    with refused(tmp_path, *words, written=["out/audit.json"]):
        check_training_data(dataset / "datalist.json", LABELS, record=tmp_path / "out" / "audit.json")
    with refused(tmp_path, *words):  # from the record
        check_training_data(dataset / "datalist.json", LABELS, record=tmp_path / "out" / "audit.json")


def test_link_to_a_scan_of_another_section_is_the_scan(dataset, tmp_path):
    victim = dataset / "target_training" / "0.nii.gz"
    victim.unlink()
    victim.symlink_to(dataset / "source_training" / "0.nii.gz")
    words = ["target_training/0.nii.gz: is in source_training and in target_training", "keep it in one of them"]
    with refused(tmp_path, *words):
        check_training_data(dataset / "datalist.json", LABELS)


def test_scans_of_the_adaptation_may_be_tested_on(dataset):
    def change(content):
        content["target_test"][0]["image"] = content["target_training"][0]["image"]

    assert len(check_datalist(edit(dataset, change))) == 4


def test_half_a_pair_in_a_folder_is_named(tmp_path):
    folder = tmp_path / "d" / "source"
    for kind, names in (("images", "ab"), ("labels", "bc")):
        for name in names:
            write_nifti(folder / kind / f"{name}.nii.gz", make_scan(seed=ord(name))[kind == "labels"])
    words = ["source/images: scans without a label map of the same name in ", ": a.nii.gz: add what is missing",
             "source/labels: label maps without a scan of the same name in ", ": c.nii.gz: add"]  # fmt: skip
    with refused(tmp_path, *words, lines=2):
        check_datalist(tmp_path / "d")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"image": st.sampled_from(["a.nii.gz", "a.nii", "\0", "", "/", ".."]) | json_values},
    optional={"label": st.just("b.nii.gz") | json_values, "case_id": json_values, "domain": json_values},
)
lists = st.dictionaries(
    st.sampled_from(["source_training", "source_validation", "target_training", "target_test"]),
    st.lists(entries, max_size=3) | json_values,
)


@seed(0)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(content=lists | json_values)
def test_arbitrary_json_never_escapes(tmp_path, content):
    datalist_target(json.dumps(content).encode(), tmp_path / "d.json")


@seed(0)
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=80))
def test_arbitrary_datalist_bytes_never_escape(tmp_path, content):
    assert datalist_target(content, tmp_path / "d.json") == "refused"


# end to end


@pytest.mark.parametrize("setting, ends", [("null", False), ("shift", True)])
def test_training_on_ct_needs_a_policy(dataset, tmp_path, setting, ends):
    for number, name in enumerate(("source_training/0", "source_training/1", "source_validation/0")):
        scan = make_scan(seed=number + 20)[0] * 5 - 1024
        write_nifti(dataset / f"{name}.nii.gz", scan.astype(np.int16))
    out = str(tmp_path / "out")
    more = {} if setting == "null" else {"source_negative_values": setting}
    arguments = {"dataset_dir": str(dataset), "ckpt_dir": out, "output_dir": out, "labels": LABELS, **more}
    done = bundle_run(["train.json", "tiny.yaml"], **arguments)
    if ends:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "model.pt" in tree(tmp_path / "out")
    else:
        assert done.returncode != 0
        lines = done.stderr.strip().splitlines()[-3:]
        assert lines[0].startswith("ConfigError: ") and all("'shift' (CT: adds 1024 first)" in line for line in lines)
        assert set(tree(tmp_path / "out")) == {"audit.json"}
