# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a scan lies: what is unknown or contradicts itself is refused; what is sound comes back on its own grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, LoadImaged, Spacingd

from mapseg_components.data import ScanAudit, check_labelled_scans, check_training_data, load_scans
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms import AssumeOrientation
from tests.conftest import make_scan, write_nifti
from tests.faults import damage
from tests.faults.common import ADAPTATION, LABELS, SMALL, bundle_run, refused, save_small_weights, tree
from tests.laws.test_inference_laws import ORIENTATIONS

SCAN_FAULTS = [
    (damage.singular_affine, "its affine (sform) is not invertible", "repair the header"),
    (damage.nan_in_affine, "its affine (sform) is not finite", "repair the header"),
    (damage.sheared, "its affine (sform) is sheared by 2.00 degrees (tolerance 0.5)", "resample it to an orthogonal"),
    (damage.unnamed_orientation, "its header names no orientation", "or set assume_orientation"),
    (damage.forms_differ, "0.00 degrees and 15.000 mm at a corner (tolerance 1 mm)", "remove the wrong one"),
]
PAIR_FAULTS = [
    (damage.other_shape, "label map of shape (20, 24, 27), its scan (20, 24, 28)", "resample it to the scan's grid"),
    (damage.flipped, "its affine puts a corner 19.000 mm away", "or repair the header"),
    (damage.moved, "its affine puts a corner 15.000 mm away", "or repair the header"),
    (damage.other_spacing, "its affine puts a corner 2.700 mm away", "or repair the header"),
]


@pytest.mark.parametrize("fault, what, remedy", SCAN_FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_scan_that_lies_nowhere_is_named(dataset, tmp_path, fault, what, remedy):
    fault(dataset / "target_training" / "1.nii.gz")
    with refused(tmp_path, "target_training/1.nii.gz: ", what, remedy):
        check_training_data(dataset / "datalist.json", LABELS)


@pytest.mark.parametrize("fault, what, remedy", PAIR_FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_label_map_of_another_grid_is_named(dataset, tmp_path, fault, what, remedy):
    fault(dataset / "source_validation" / "0_label.nii.gz")
    with refused(tmp_path, "source_validation/0_label.nii.gz: ", what, remedy):
        check_training_data(dataset / "datalist.json", LABELS)
    fault(dataset / "target_test" / "0_label.nii.gz")
    case = {
        "case_id": "a",
        "image": f"{dataset}/target_test/0.nii.gz",
        "label": f"{dataset}/target_test/0_label.nii.gz",
    }
    with refused(tmp_path, "target_test/0_label.nii.gz: ", what, remedy):
        check_labelled_scans([case], LABELS)


@pytest.mark.parametrize("fault", [damage.flipped, damage.moved])
def test_a_mask_of_another_grid_is_named(dataset, tmp_path, fault):
    mask, content = dataset / "mask.nii.gz", json.loads((dataset / "datalist.json").read_text())
    shutil.copyfile(dataset / "source_training" / "0_label.nii.gz", mask)
    content["target_training"][0]["mask"] = str(mask)
    (dataset / "datalist.json").write_text(json.dumps(content))
    check_training_data(dataset / "datalist.json", LABELS)
    fault(mask)
    with refused(tmp_path, "mask.nii.gz: its affine puts a corner", "resample it to the scan's grid"):
        check_training_data(dataset / "datalist.json", LABELS)


@pytest.mark.parametrize("fault", [fault for fault, *_ in SCAN_FAULTS if fault is not damage.singular_affine])
def test_monai_alone_accepts_it(tmp_path, fault):
    """Why the audit looks: LoadImaged reads these without a word."""
    path = Path(write_nifti(tmp_path / "a.nii.gz", damage.image(), damage.affine_of()))
    fault(path)
    assert LoadImaged("image", image_only=True)({"image": str(path)})["image"].shape == damage.SHAPE


@pytest.mark.parametrize("angle, sound", [(0.4, True), (0.6, False)])
def test_shear_has_a_tolerance(tmp_path, angle, sound):
    damage.sheared(tmp_path / "a.nii.gz", angle)
    assert not ScanAudit(load_scans(tmp_path)).findings
    if sound:
        assert len(ScanAudit(load_scans(tmp_path)).usable) == 1
    else:
        with refused(tmp_path, "a.nii.gz", "0.60 degrees"):
            ScanAudit(load_scans(tmp_path)).usable  # noqa: B018


def test_small_disagreement_of_the_forms_is_a_warning(dataset, caplog):
    damage.forms_differ(dataset / "target_training" / "1.nii.gz", 0.3)
    check_training_data(dataset / "datalist.json", LABELS)
    assert caplog.text.count("sform and qform differ by 0.00 degrees and 0.300 mm") == 1
    assert "target_training/1.nii.gz" in caplog.text
    caplog.clear()
    damage.forms_differ(dataset / "target_training" / "1.nii.gz", 0.0)
    check_training_data(dataset / "datalist.json", LABELS)
    assert "differ" not in caplog.text


def test_turned_forms_differ_by_their_angle(dataset, tmp_path):
    path = dataset / "target_training" / "1.nii.gz"
    scan, turned = nib.load(path), damage.affine_of()
    turned[:3, :3] = nib.eulerangles.euler2mat(z=np.deg2rad(17)) @ turned[:3, :3]
    scan.set_qform(turned, 1)
    scan.set_sform(scan.affine, 1)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), None, scan.header), path)
    with refused(tmp_path, "1.nii.gz: sform and qform differ by 17.00 degrees", "remove the wrong one"):
        check_training_data(dataset / "datalist.json", LABELS)


# no orientation in the header


def test_orientation_is_assumed_only_when_it_is_said(dataset, tmp_path):
    for name in ("0.nii.gz", "0_label.nii.gz"):
        damage.unnamed_orientation(dataset / "source_training" / name)
    with refused(tmp_path, "0.nii.gz", "0_label.nii.gz", "set assume_orientation", lines=2):
        check_training_data(dataset / "datalist.json", LABELS)
    check_training_data(dataset / "datalist.json", LABELS, assume_orientation="RAS")
    write_nifti(dataset / "source_training" / "0_label.nii.gz", damage.label())
    with refused(tmp_path, "0_label.nii.gz: only the label map, not its scan, names", "copy the header"):
        check_training_data(dataset / "datalist.json", LABELS, assume_orientation="RAS")


def test_spacing_of_zero_cannot_be_assumed(dataset, tmp_path):
    damage.unnamed_orientation_flat(dataset / "target_training" / "0.nii.gz")
    with refused(tmp_path, "target_training/0.nii.gz", "repair the header"):
        check_training_data(dataset / "datalist.json", LABELS, assume_orientation="RAS")


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
def test_assumed_affine_has_the_orientation_and_the_spacing(tmp_path, axcodes):
    path = Path(write_nifti(tmp_path / "a.nii.gz", damage.image(), damage.affine_of()))
    damage.unnamed_orientation(path)
    scan = LoadImaged("image", image_only=True, ensure_channel_first=True)({"image": str(path)})["image"]
    found = AssumeOrientation(axcodes)(scan)
    assert "".join(nib.aff2axcodes(found.affine.numpy())) == axcodes
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), [1.0, 1.1, 1.2], atol=1e-6)
    centre = found.affine.numpy() @ np.array([9.5, 11.5, 13.5, 1])
    np.testing.assert_allclose(centre, [0, 0, 0, 1], atol=1e-5)
    torch.testing.assert_close(found.as_tensor(), scan.as_tensor())


def test_known_orientation_and_plain_tensors_are_left_alone(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", damage.image())
    scan = LoadImaged("image", image_only=True, ensure_channel_first=True)({"image": path})["image"]
    for axcodes in (None, "LPS"):
        assert AssumeOrientation(axcodes)(scan) is scan
    for bare in (torch.ones(1, 2, 3, 4), MetaTensor(torch.ones(1, 2, 3, 4))):
        assert AssumeOrientation("LPS")(bare) is bare


def test_transform_refuses_too_when_the_audit_is_skipped(tmp_path):
    path = Path(write_nifti(tmp_path / "a.nii.gz", damage.image()))
    damage.unnamed_orientation(path)
    scan = LoadImaged("image", image_only=True, ensure_channel_first=True)({"image": str(path)})["image"]
    with refused(tmp_path, "a.nii.gz: its header names no orientation", "set assume_orientation"):
        AssumeOrientation(None)(scan)


@pytest.mark.parametrize("axcodes", ["", "RA", "RRS", "RASL", "ras", "XYZ"])
def test_letters_must_be_an_orientation(tmp_path, axcodes):
    with refused(tmp_path, f"assume_orientation is {axcodes!r}", "one letter each of L or R", kind=ConfigError):
        AssumeOrientation(axcodes)


# round trips through the shipped inference


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    """Function from a scan's path to the path of its label map, by the parts of inference.json and a small network."""
    out = tmp_path_factory.mktemp("labels")
    parser = ConfigParser(ConfigParser.load_config_file(ADAPTATION / "configs" / "inference.json"))
    parser.update({**SMALL, "output_dir": str(out), "overwrite": True, "device": "$torch.device('cpu')"})
    names = ("preprocessing", "inferer", "postprocessing")
    before, inferer, after = (parser.get_parsed_content(name) for name in names)

    def segment(path):
        data = before({"image": str(path)})
        bright = lambda x: torch.stack([1.1 - x[:, 0], x[:, 0] - 0.3, x[:, 0] * 2 - 1.0], 1)  # noqa: E731
        data["pred"] = inferer(data["image"][None], bright)[0]
        after(data)
        return out / path.name.replace(".nii.gz", "_seg.nii.gz")

    return segment


@seed(0)
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(*[st.integers(5, 26)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    axcodes=st.sampled_from(ORIENTATIONS),
    angles=st.tuples(*[st.floats(-0.5, 0.5)] * 3),
)
def test_label_map_comes_back_on_the_scans_grid(inference, tmp_path, shape, spacing, axcodes, angles):
    ornt = nib.orientations.axcodes2ornt(tuple(axcodes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(ornt):
        affine[int(world), axis] = sign * spacing[axis]
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) @ affine[:3, :3]
    affine[:3, 3] = [-3, 5, 7]
    path = Path(write_nifti(tmp_path / "scan.nii.gz", make_scan(shape)[0], affine))
    assert ScanAudit(load_scans(tmp_path)).usable
    found = nib.load(inference(path))
    assert found.shape == shape and found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)
    plain = np.asarray(nib.load(path).dataobj)
    voxels = np.asarray(found.dataobj)
    assert not voxels[plain == 0].any() and voxels[plain == plain.max()].all()


@pytest.mark.parametrize("spacing, shape", [((0.7, 0.7, 5.0), (30, 34, 9)), ((1.0, 1.0, 1.0), (24, 26, 28))])
def test_oblique_label_map_survives_a_resampling(tmp_path, spacing, shape):
    """To 1 mm and back: the same grid, Dice per class above 0.9 for slices of 5 mm, 0.98 for 1 mm at 17 degrees."""
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(z=np.deg2rad(17)) @ np.diag(spacing)
    path = write_nifti(tmp_path / "a.nii.gz", make_scan(shape)[1], affine)
    load = Compose([
        LoadImaged("label", image_only=True, ensure_channel_first=True),
        Spacingd("label", pixdim=(1.0, 1.0, 1.0), mode="nearest"),
    ])  # fmt: skip
    data = load({"label": path})
    back = Invertd("label", load, nearest_interp=True)(data)["label"]
    truth = np.asarray(nib.load(path).dataobj)
    assert back.shape[1:] == shape
    np.testing.assert_allclose(back.affine.numpy(), affine, atol=1e-5)
    for value in (1, 2):
        one, two = truth == value, back[0].numpy() == value
        assert 2 * (one & two).sum() / (one.sum() + two.sum()) >= (0.98 if spacing[2] == 1 else 0.9)


# end to end


def test_inference_without_orientation_needs_the_knob(tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    path = Path(write_nifti(scans / "a.nii.gz", make_scan((18, 20, 22))[0], damage.affine_of()))
    damage.unnamed_orientation(path)
    common = {"dataset_dir": str(scans), "output_dir": str(out), **SMALL}
    common["weights"] = str(save_small_weights(tmp_path / "weights.pt"))
    done = bundle_run(["inference.json"], **common)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("DataError: ") and "a.nii.gz" in last and "set assume_orientation" in last
    assert set(tree(out)) <= {"audit.json"}
    done = bundle_run(["inference.json"], assume_orientation="LPS", **common)
    assert done.returncode == 0, done.stderr[-2000:]
    found = nib.load(out / "a_seg.nii.gz")
    assert found.shape == (18, 20, 22) and nib.aff2axcodes(found.affine) == ("L", "P", "S")
    np.testing.assert_allclose(found.header.get_zooms(), [1.0, 1.1, 1.2], atol=1e-6)


def test_training_stops_at_a_label_map_of_another_place(dataset, tmp_path):
    damage.moved(dataset / "source_training" / "0_label.nii.gz")
    out = str(tmp_path / "out")
    done = bundle_run(
        ["train.json", "tiny.yaml"], dataset_dir=str(dataset), ckpt_dir=out, output_dir=out, labels=LABELS
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("DataError: ") and "0_label.nii.gz" in last and "15.000 mm" in last and "resample it" in last
    assert set(tree(tmp_path / "out")) == {"audit.json"}


def test_every_fault_here_is_an_error_of_the_data():
    assert DataError.exit_code == 3
