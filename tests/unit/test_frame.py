# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The working frame: directions, spacing, and label maps back on the scan's own grid."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd

from mapseg_components.errors import ConfigError
from mapseg_components.plans.frame import Grid, checked_spacing, directions_of, plan_frame, sizes_of
from mapseg_components.transforms import ArgmaxOnScand, WorkingFrame, WorkingFramed
from mapseg_components.transforms.frame import axes_in_frame
from tests.scans import write_nifti

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def turn(degrees, axis):
    """Rotation matrix (3, 3) about an axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    flat = np.array([[c, -s], [s, c]])
    result = np.eye(3)
    others = [i for i in range(3) if i != axis]
    result[np.ix_(others, others)] = flat
    return result


def affine_of(linear):
    return np.block([[np.asarray(linear), np.zeros((3, 1))], [0, 0, 0, 1]])


OBLIQUE = turn(35, 2) @ turn(40, 0)  # columns: directions of the array axes


@pytest.mark.parametrize("order, signs", ORIENTATIONS)
def test_a_scan_is_laid_alike_from_every_orientation_of_its_file_and_comes_back(order, signs):
    scan = MetaTensor(torch.rand(1, 4, 5, 6), affine=affine_of(OBLIQUE @ np.diag([0.8, 0.8, 5.0])))
    ornt = np.array([[order.index(axis), signs[axis]] for axis in range(3)], dtype=float)
    voxels = nib.orientations.apply_orientation(scan.numpy()[0], ornt)
    affine = scan.affine.numpy() @ nib.orientations.inv_ornt_aff(ornt, (4, 5, 6))
    stored = MetaTensor(torch.from_numpy(voxels.copy())[None], affine=torch.from_numpy(affine))
    steps = Compose([WorkingFramed("image", OBLIQUE.T)])
    laid = steps({"image": stored})["image"]
    assert torch.equal(laid.as_subclass(torch.Tensor), scan.as_subclass(torch.Tensor))
    np.testing.assert_allclose(laid.affine, scan.affine, atol=1e-5)
    pred = MetaTensor(laid.clone()).copy_meta_from(laid)
    back = Invertd("pred", transform=steps, orig_keys="image")({"pred": pred, "image": laid})["pred"]
    assert torch.equal(back.as_subclass(torch.Tensor), stored.as_subclass(torch.Tensor))


def test_without_directions_it_is_monais_orientation():
    for order, signs in ORIENTATIONS[::5]:
        linear = np.zeros((3, 3))
        for axis in range(3):
            linear[order[axis], axis] = signs[axis] * (1.0 + axis)
        scan = MetaTensor(torch.rand(1, 4, 5, 6), affine=affine_of(turn(20, 1) @ linear))
        expected = Orientationd("image", axcodes="RAS", labels=None)({"image": scan})["image"]
        found = WorkingFrame()(scan)
        assert torch.equal(found, expected) and torch.equal(found.affine, expected.affine)


@pytest.mark.parametrize("degrees", [-50, -30, 30, 50])
def test_slices_of_tilted_stacks_stay_on_the_last_axis(degrees):
    """Nearest to the body's axes the slices of half of them would lie on another axis."""
    affine = affine_of(OBLIQUE @ turn(degrees, 0) @ np.diag([0.8, 0.8, 5.0]))
    assert axes_in_frame(affine, OBLIQUE.T)[2][0] == 2


def test_other_slices_are_laid_by_the_body():
    """Sagittal slices in a frame of axial ones: their first axis is right to left, whatever its voxels' sides."""
    assert [axis for axis, _ in axes_in_frame(affine_of(np.diag([5.0, 0.8, 0.8])), np.eye(3))] == [0, 1, 2]


@pytest.mark.parametrize("directions", [[[1, 0, 0], [1, 0, 0], [0, 0, 1]], "RAS", [[1, 0], [0, 1, 0]], 3])
def test_directions_that_are_no_frame_are_refused(directions):
    with pytest.raises(ConfigError, match=r"working_directions is .* three unit vectors at right angles"):
        WorkingFrame(directions)


def test_directions_of_thick_stacks_have_the_slices_last_and_those_of_cubes_are_the_bodys():
    stacks = [affine_of(turn(angle, 1) @ OBLIQUE @ np.diag([0.8, 0.8, 6.0])) for angle in (-8, 0, 1, 9)]
    frame = np.array(directions_of(stacks))
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-3)
    assert abs(frame[2] @ OBLIQUE[:, 2]) > 0.99  # one in the middle, not an outlier
    assert directions_of([affine_of(OBLIQUE)] * 3) is None


def grids(spacing, shape=(128, 128, 128), count=3):
    return [Grid(np.array(shape), np.array(spacing, dtype=float))] * count


@pytest.fixture
def ball(tmp_path):
    """Label map of 2 mm voxels with a ball of 24 mm across inside a shell 8 mm thick."""
    radius = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij")), axis=0) * 2
    path = tmp_path / "ball.nii.gz"
    write_nifti(path, np.where(radius < 12, 1, np.where(radius < 20, 2, 0)).astype(np.uint8), np.diag([2.0, 2, 2, 1]))
    return str(path)


def test_sizes_of_structures_are_in_mm(ball):
    sizes = sizes_of([ball], {"ball": 1, "shell": 2}, None)
    np.testing.assert_allclose(sizes.extent, 40, atol=2)
    assert abs(sizes.widths["shell"] - 8) < 2.5 and 16 < sizes.widths["ball"] < 26
    assert sizes_of([ball], {"absent": 7}, None) is None


def test_scans_of_one_spacing_whose_structures_fit_are_not_resampled(ball):
    sizes = sizes_of([ball], {"ball": 1, "shell": 2}, None)
    assert plan_frame(grids((2, 2, 2)), grids((2, 2, 2.05)), sizes, [64, 64, 64]) is None


def test_structures_that_no_patch_holds_are_seen_coarser_as_long_as_the_thinnest_is_kept(ball):
    sizes = sizes_of([ball], {"ball": 1, "shell": 2}, None)
    found = plan_frame(grids((0.4,) * 3), grids((0.4,) * 3), sizes, [64, 64, 64])
    assert found == [pytest.approx(40 * 1.3 / 64, rel=0.1)] * 3
    found = plan_frame(grids((0.4,) * 3), grids((0.4,) * 3), sizes, [16, 16, 16])
    assert found[0] == pytest.approx(min(sizes.widths.values()) / 4, rel=0.01)  # not 3.25 mm


def test_the_coarser_side_decides_and_slices_stay():
    assert plan_frame(grids((0.7, 0.7, 5)), grids((0.9, 0.9, 8)), None, [96, 96, 8]) == [0.9, 0.9, 0.0]
    assert plan_frame(grids((1, 1, 1)), grids((0.8, 0.8, 0.8)), None, [48] * 3) == [1.0, 1.0, 1.0]
    assert plan_frame(grids((1, 1, 3), (90, 80, 1)), grids((2, 2, 3), (40, 40, 1)), None, [96, 96, 1]) == [2, 2, 0]


@pytest.mark.parametrize("wrong", [1.5, [1, 1], [1, 1, -1], ["a", 1, 1], [1, 1, float("inf")]])
def test_a_working_spacing_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"working_spacing is .*expected mm for each of three axes"):
        checked_spacing(wrong)


def test_on_one_grid_the_label_map_is_the_likeliest_class():
    scan = MetaTensor(torch.rand(1, 6, 7, 8), meta={"original_affine": np.eye(4), "spatial_shape": np.array([6, 7, 8])})
    logits = MetaTensor(torch.randn(4, 6, 7, 8), affine=np.eye(4))
    found = ArgmaxOnScand()({"pred": logits, "image": scan})["pred"]
    assert torch.equal(found[0].as_subclass(torch.Tensor).long(), logits.argmax(dim=0).as_subclass(torch.Tensor))


def test_a_plane_between_two_classes_is_found_between_the_voxels_of_the_working_grid():
    """Half a voxel of 4 mm is 2 voxels of 1 mm: nearest interpolation would be off by that."""
    fine = MetaTensor(torch.zeros(1, 32, 8, 8), affine=np.eye(4), meta={"filename_or_obj": "a.nii.gz"})
    fine.meta["original_affine"], fine.meta["spatial_shape"] = np.eye(4), np.array([32, 8, 8])
    steps = Compose([WorkingFramed("image"), Spacingd("image", (4, 4, 4))])
    scan = steps({"image": fine})["image"]
    place = (torch.arange(9) * 4.0).reshape(9, 1, 1).expand(9, 3, 3)  # mm
    logits = torch.stack([13.0 - place, place - 13.0]) / 4
    pred = MetaTensor(logits, affine=scan.affine)
    found = ArgmaxOnScand()({"pred": pred, "image": scan})["pred"]
    assert found.shape == (1, 32, 8, 8) and found.meta["filename_or_obj"] == "a.nii.gz"
    assert abs(int((found[0, :, 4, 4] == 0).sum()) - 13) <= 1
    np.testing.assert_array_equal(found.affine, np.eye(4))


def test_without_a_files_grid_classes_stay_on_that_of_the_logits():
    logits = torch.randn(3, 4, 5, 6)
    for scan in (torch.zeros(1, 8, 10, 12), MetaTensor(torch.zeros(1, 8, 10, 12))):
        found = ArgmaxOnScand()({"pred": logits, "image": scan})["pred"]
        assert torch.equal(found[0].as_subclass(torch.Tensor).long(), logits.argmax(dim=0))
