# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A scan lies where its header says, for whatever reads or writes it: 48 orientations, in all the ways to say them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.transforms import Compose, Invertd, LoadImage

from mapseg_components.data import Audit, NiftiReader, median_spacing, read_nifti, structure_sizes
from mapseg_components.scans.facts import facts_of
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.transforms import SaveLabelMapd
from mapseg_components.transforms.saving import nifti_image
from tests.conftest import ROOT, make_scan
from tests.headers import LONGER, VARIANTS, orientation_affine, scan_with
from tests.laws.test_inference_laws import ORIENTATIONS
from tools.make_bundles import made_bundles

SHAPE = (7, 9, 11)
# what a label map is written from; the other variants come to the same affine
WRITTEN = [name for name in VARIANTS if "quaternion" not in name and "sixth" not in name and "codes" not in name]
CONFIGS = {
    "mapseg_adaptation/configs/train.json": "loading#0",
    "mapseg_adaptation/configs/inference.json": "preprocessing#transforms#0",
    "mapseg_adaptation/configs/evaluate.json": "label_loading#transforms#0",
    "mapseg_pretraining/configs/train.json": "train#preprocessing#transforms#0",
    "mapseg_pretraining/configs/inference.json": "preprocessing#transforms#0",
    "cosmos_translation/configs/train.json": "loading#0",
    "cosmos_translation/configs/inference.json": "preprocessing#transforms#0",
}


def loaders():
    """What loads scans in each config: its keys, and a function."""
    for name, place in CONFIGS.items():
        parser = ConfigParser(ConfigParser.load_config_file(ROOT / "bundles" / name))
        parser["imports"] = []
        yield name, parser.get_parsed_content(place)


@pytest.fixture(scope="module")
def loading():
    """Loading and turning of train.json, both keys."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "bundles" / next(iter(CONFIGS))))
    return Compose([parser.get_parsed_content(f"loading#{number}") for number in (0, 1, 4)])


@pytest.mark.parametrize("variant", [*VARIANTS, *LONGER])
def test_whatever_reads_a_scan_puts_it_where_its_header_says(tmp_path, variant):
    _, labels = make_scan(SHAPE)
    configs = list(loaders())
    assert len(configs) == len(CONFIGS)
    for number, axcodes in enumerate(ORIENTATIONS):
        affine = orientation_affine(axcodes)
        path = scan_with(tmp_path / f"{axcodes}.nii", labels, affine, variant)
        scan = read_nifti(path)
        near = {"rtol": 0, "atol": 2e-4 if "quaternion" in variant else 2e-5}
        np.testing.assert_allclose(scan.affine, affine, **near)
        np.testing.assert_array_equal(read_geometry(path).affine, scan.affine)
        np.testing.assert_array_equal(facts_of(path, False).affine, scan.affine)
        name, load = configs[number % len(configs)]  # each of them meets each axis, flipped and not
        for key in load.keys:
            found = load({key: str(path)})[key]
            np.testing.assert_array_equal(found.affine.numpy(), scan.affine, err_msg=f"{name} {axcodes}")
            np.testing.assert_array_equal(found[0].numpy(), labels)
        ((_, mm3), *_) = structure_sizes([{"label": str(path)}], {"first": 1})[0].values()
        assert mm3 == pytest.approx((labels == 1).sum() * 1.1 * 1.6 * 2.3, rel=1e-4)
        spacing = np.abs(affine[:3, :3]).sum(axis=1)
        np.testing.assert_allclose(median_spacing([path]), spacing, atol=0.006)


@pytest.mark.parametrize("variant", [*VARIANTS, *LONGER])
def test_scan_and_label_map_are_never_mirrored_to_each_other_in_training(tmp_path, loading, variant):
    """Both come from one grid, with headers written by two programs; each voxel keeps its partner."""
    _, labels = make_scan(SHAPE)
    for number, axcodes in enumerate(ORIENTATIONS):
        affine = orientation_affine(axcodes)
        other = "both" if number % 2 else "sform only"
        image = scan_with(tmp_path / f"{axcodes}.nii", labels, affine, variant)
        label = scan_with(tmp_path / f"{axcodes}_label.nii", labels, affine, other)
        case = loading({"image": str(image), "label": str(label)})
        np.testing.assert_array_equal(case["image"].numpy(), case["label"].numpy(), err_msg=axcodes)
        canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, affine))
        np.testing.assert_array_equal(case["image"][0].numpy(), np.asarray(canonical.dataobj), err_msg=axcodes)
        np.testing.assert_allclose(case["image"].affine.numpy(), canonical.affine, atol=1e-3)


@pytest.mark.parametrize("variant", WRITTEN)
def test_a_label_map_lies_on_its_scan_in_every_viewer(tmp_path, loading, variant):
    """By its sform, its qform, its pixdim, and with or without regard to its unit."""
    _, labels = make_scan(SHAPE)
    save = SaveLabelMapd("image", tmp_path, output_ext=".nii", overwrite=True, num_classes=3)
    for axcodes in ORIENTATIONS:
        affine = orientation_affine(axcodes)
        path = scan_with(tmp_path / f"{axcodes}.nii", labels, affine, variant)
        case = loading({"image": str(path)})
        save(Invertd("image", loading, nearest_interp=True)(case))
        found = nib.load(tmp_path / f"{axcodes}_seg.nii")
        np.testing.assert_array_equal(np.asarray(found.dataobj), labels)
        assert found.header.get_xyzt_units()[0] == "mm"
        expected = read_nifti(path).affine
        np.testing.assert_allclose(found.get_sform(), expected, atol=1e-5)
        np.testing.assert_allclose(found.header.get_zooms(), np.linalg.norm(expected[:3, :3], axis=0), rtol=1e-6)
        assert int(found.header["sform_code"]) == 1
        if int(found.header["qform_code"]):
            np.testing.assert_allclose(found.get_qform(), expected, atol=1e-3)
        assert read_nifti(tmp_path / f"{axcodes}_seg.nii").remarks == ()


@pytest.mark.parametrize("variant, remarked", VARIANTS.items())
def test_the_audit_says_what_is_odd_and_refuses_none_of_these(tmp_path, variant, remarked):
    for axcodes in ORIENTATIONS:
        path = scan_with(tmp_path / f"{axcodes}.nii", make_scan(SHAPE)[0], orientation_affine(axcodes), variant)
        audit = Audit()
        audit.scan(str(path), "keep", "negative_values")
        assert {finding.severity for finding in audit.findings} <= {"warning", "note"}, audit.findings
        if remarked:
            assert audit.findings and all(finding.file == str(path) for finding in audit.findings)
        elif "16 bits" not in variant:  # rounding that turns the scan by more than a thousandth of a mm is named
            assert not audit.findings


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
def test_oblique_and_sheared_grids_are_written_so_that_both_forms_agree(axcodes):
    """Near a half turn a quaternion is too coarse, and it holds no shear: then the qform is not in use."""
    affine = orientation_affine(axcodes)
    used = []
    for angle in (0.0, 0.3, 1.2):
        for shear in (0.0, 0.004):
            turned = affine.copy()
            turned[:3, :3] = nib.eulerangles.euler2mat(z=angle, y=angle / 3) @ affine[:3, :3]
            turned[:3, 1] += shear * turned[:3, 0]
            image = nifti_image(np.zeros((200, 220, 90), np.uint8), turned)
            np.testing.assert_allclose(image.get_sform(), turned, atol=1e-4)
            used.append((shear, int(image.header["qform_code"])))
            corner = np.array([199, 219, 89, 1])
            if image.header["qform_code"]:
                assert np.linalg.norm((image.get_qform() - turned) @ corner) < 1e-3
    assert (0.0, 1) in used and (0.004, 1) not in used


def test_every_config_names_the_reader():
    found = []

    def look(part):
        if isinstance(part, dict):
            if str(part.get("_target_", "")).endswith(("LoadImaged", "LoadImage")):
                found.append(part.get("reader"))
            part = list(part.values())
        for inner in part if isinstance(part, list) else []:
            look(inner)

    for path in (ROOT / "bundles").glob("*/configs/*.json"):
        if path.parents[1].name in made_bundles():  # the adaptation bundle's
            continue
        look(json.loads(path.read_text()))
    assert len(found) == len(CONFIGS) and set(found) == {"mapseg_components.data.NiftiReader"}


def test_one_door_for_scans():
    """Nothing in the package opens a scan past `read_nifti`; probabilities are read back from the file just written."""
    doors = []
    for path in sorted((ROOT / "mapseg_components").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name, owner = getattr(node, "attr", getattr(node, "id", "")), getattr(node, "value", None)
            if name in ("get_best_affine", "LoadImage", "LoadImaged"):
                doors.append(path.name)
            if name == "load" and getattr(owner, "id", "") in ("nib", "nibabel"):
                doors.append(path.name)
    assert doors == ["probabilities.py"]


def test_the_reader_stacks_files_and_leaves_other_formats_to_monai(tmp_path):
    files = []
    for number in range(3):
        voxels = np.full(SHAPE, number, np.int16)
        files.append(scan_with(tmp_path / f"{number}.nii.gz", voxels, orientation_affine("LPS"), "both, metre"))
    stacked = LoadImage(NiftiReader, ensure_channel_first=True)(files)
    assert stacked.shape == (3, *SHAPE) and stacked[:, 0, 0, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(stacked.affine.numpy(), orientation_affine("LPS"), atol=1e-5)
    np.save(tmp_path / "other.npy", np.ones(SHAPE))
    assert LoadImage(NiftiReader)(tmp_path / "other.npy").shape == SHAPE
    assert Path(stacked.meta["filename_or_obj"]) == files[0]
