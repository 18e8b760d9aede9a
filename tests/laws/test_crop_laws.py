# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the crop does with the entries of other people's cases, and what its random draws mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ResampleToMatch
from scipy.ndimage import map_coordinates

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms import ClassVoxelsd, PercentileTabled, RandGlobalLocalCrop, RandGlobalLocalCropd
from mapseg_components.transforms.deformation import RandomDeformation
from tests.conftest import make_scan

AFFINE = torch.tensor([[0.0, 1.1, 0.0, -7.0], [-0.9, 0.0, 0.0, 4.0], [0.0, 0.0, 1.3, 2.0], [0.0, 0.0, 0.0, 1.0]])
WARPED = {"prob": 1.0, "scale_range": (0.8, 1.3), "rotate_range_deg": 25.0, "flip_prob": 0.5}


def case(shape=(34, 42, 38), seed=0):
    image, label = (torch.from_numpy(v)[None] for v in make_scan(shape, seed))
    return {"image": MetaTensor(image, affine=AFFINE.double()), "label": MetaTensor(label, affine=AFFINE.double())}


@pytest.mark.parametrize("options", [{"prob": 0.0}, WARPED])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_further_volumes_are_cropped_as_image_and_label_are(options, kind):
    data = case()
    image, label = data["image"].as_tensor(), data["label"].as_tensor()
    data |= {"mask": kind(label), "t2": kind(torch.cat([image, 2 * image])), "prior": kind(label.float())}
    crop = RandGlobalLocalCropd(
        (20, 24, 16), **options, other_keys=["mask", "t2", "prior"], other_modes=["nearest", "bilinear", "bilinear"]
    )
    found = crop.set_random_state(1)(data)
    alone = RandGlobalLocalCropd((20, 24, 16), **options).set_random_state(1)(case())
    for side in ("", "global_"):
        assert torch.equal(found[f"{side}image"], alone[f"{side}image"])
        assert torch.equal(found[f"{side}mask"], found[f"{side}label"].as_tensor())
        assert found[f"{side}mask"].dtype == torch.uint8
        torch.testing.assert_close(found[f"{side}t2"][:1], found[f"{side}image"].as_tensor())
        torch.testing.assert_close(found[f"{side}t2"][1:], 2 * found[f"{side}image"].as_tensor())
        if options["prob"]:
            assert ((found[f"{side}prior"] % 1) > 0.01).any()  # a smooth prior is not made a mask


def test_one_mode_holds_for_all_further_volumes_and_nearest_is_the_default():
    data = case() | {"a": torch.rand(1, 34, 42, 38), "b": torch.rand(1, 34, 42, 38)}
    for options in ({}, {"other_modes": "nearest"}):
        found = RandGlobalLocalCropd(8, **WARPED, other_keys=["a", "b"], **options)(data)
        assert set(found["a"].unique().tolist()) <= {0.0, *data["a"].unique().tolist()}
    absent = RandGlobalLocalCropd(8, other_keys="mask", allow_missing_keys=True)(case())
    assert "image" in absent and "mask" not in absent


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 34, 42, 38),
        np.ones((3, 34, 42, 38), np.uint8),
        torch.ones(34, 42, 38),
        MetaTensor(torch.ones(1, 34, 42, 38)),
    ],
    ids=["tensor", "array of channels", "without channels", "metatensor"],
)
def test_a_volume_that_would_stay_whole_is_named(mask):
    with pytest.raises(ConfigError, match=r"\['brain_mask'\] lie on the grid of image.*other_keys.*DeleteItemsd"):
        RandGlobalLocalCropd(8)(case() | {"brain_mask": mask})


def test_entries_that_are_no_volume_of_the_grid_stay():
    others = {"thumbnail": torch.ones(1, 8, 9, 10), "age": torch.tensor(3.0), "matrix": np.eye(4), "id": "x"}
    found = Compose([PercentileTabled("image"), RandGlobalLocalCropd(8)])(case() | others)
    assert all(found[key] is value for key, value in others.items()) and "image_percentiles" in found


def test_a_second_crop_does_not_overwrite_the_first():
    first = RandGlobalLocalCropd(8)(case())
    with pytest.raises(ConfigError, match=r"'box'.*CopyItemsd"):
        RandGlobalLocalCropd(8, image_key="t2", label_key="seg")(first | {"t2": torch.ones(1, 20, 24, 28)})


def test_patches_and_views_have_the_names_of_their_keys():
    data = {"t2": case()["image"], "seg": case()["label"]}
    found = RandGlobalLocalCropd(8, image_key="t2", label_key="seg")(data)
    assert set(found) == {"t2", "seg", "global_t2", "global_seg", "box", "valid_box"}


def test_without_a_global_view_the_patch_is_the_same():
    whole, alone = (
        RandGlobalLocalCropd((8, 12, 10), **WARPED, global_view=view).set_random_state(2)(case())
        for view in (True, False)
    )
    assert set(alone) == {"image", "label", "valid_box"} == set(alone) & set(whole)
    assert torch.equal(alone["image"], whole["image"]) and torch.equal(alone["label"], whole["label"])


def test_a_slice_is_neither_scaled_nor_turned_out_of_its_plane():
    """A 2D image is a volume with one slice: nothing of it is lost to the empty space beside it."""
    image = torch.rand(1, 40, 36, 1) * 0.5 + 0.5
    turned = set()
    for seed in range(5):
        crop = RandGlobalLocalCropd(
            (16, 24, 1), prob=1.0, scale_range=(0.7, 1.4), rotate_range_deg=40, global_view=False
        )
        patch = crop.set_random_state(seed)({"image": image})["image"]
        centre = patch[0, 7:9, 11:13, 0]
        assert centre.min() > 0.45
        turned.add(float(np.abs(crop.transform.warp[0, 1]).round(3)))
        np.testing.assert_allclose(crop.transform.warp[2], [0, 0, 1, 0], atol=1e-9)
    assert len(turned) == 5


def test_a_slice_is_one_of_the_volume_s_and_no_mean_of_two():
    slices = torch.tensor([0.2, 0.6, 0.4, 0.9, 0.5]).expand(1, 24, 20, 5)
    crop = RandGlobalLocalCropd((8, 8, 1), prob=1.0, scale_range=(0.9, 1.1), rotate_range_deg=5, global_view=False)
    crop.set_random_state(0)
    found = [float(crop({"image": slices.clone()})["image"][0, 4, 4, 0]) for _ in range(60)]
    counts = [sum(abs(one - value) < 1e-4 for one in found) for value in (0.2, 0.6, 0.4, 0.9, 0.5)]
    assert sum(counts) == 60 and min(counts) > 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"other_keys": "mask", "other_modes": "cubic"}, "other_modes is cubic"),
        ({"other_keys": ["mask", "label"]}, r"\['mask', 'label'\] name the scan or its label"),
        ({"image_key": "t1", "other_keys": ["image"]}, "name the scan"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        RandGlobalLocalCropd(8, **options)


def test_bad_entries_are_named():
    with pytest.raises(KeyError, match=r"'image' of RandGlobalLocalCropd is missing.*'t1'"):
        RandGlobalLocalCropd(8)({"t1": torch.ones(1, 9, 10, 11)})
    with pytest.raises(DataError, match=r"shape \(9, 10, 11\), expected \(C, X, Y, Z\): put EnsureChannelFirstd"):
        RandGlobalLocalCropd(8)({"image": torch.ones(9, 10, 11)})
    with pytest.raises(DataError, match=r"\(9, 10, 11\), its mask a scan \(9, 10, 12\)"):
        RandGlobalLocalCropd(8, other_keys="mask")(
            {"image": torch.ones(1, 9, 10, 11), "mask": torch.ones(1, 9, 10, 12)}
        )
    with pytest.raises(ConfigError, match=r"got a? ?str, expected a tensor"):
        RandGlobalLocalCropd(8)({"image": "scan.nii.gz"})


def test_foreground_fraction_needs_no_table_but_a_label():
    options = {"prob": 0.0, "foreground_fraction": 1.0}
    with_table = RandGlobalLocalCropd(8, **options).set_random_state(0)(ClassVoxelsd("label")(case()))
    without = RandGlobalLocalCropd(8, **options).set_random_state(0)(case())
    assert torch.equal(with_table["label"], without["label"]) and without["label"].any()
    with pytest.raises(ConfigError, match=r"foreground_fraction is 1\.0 and .* has no label"):
        RandGlobalLocalCropd(8, **options)({"image": case()["image"]})


@pytest.mark.parametrize("seed", range(3))
def test_a_patch_comes_back_to_its_place_by_its_affine(seed):
    """What the refusal of an inverse advises."""
    image = case()["image"]
    crop = RandGlobalLocalCrop((20, 24, 16), prob=0.0, flip_prob=0.5).set_random_state(seed)
    patch = crop(image)["image"]
    back = ResampleToMatch(mode="nearest", padding_mode="zeros")(patch, image)
    inside = back != 0
    assert inside.sum() == (patch != 0).sum() > 1000
    assert torch.equal(back.as_tensor()[inside], image.as_tensor()[inside])


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_a_scale_above_one_enlarges(scale):
    """The warped foreground is as many times longer, the patch shows as many times less of the scan."""
    crop = RandGlobalLocalCrop(8, prob=1.0, scale_range=(scale, scale))
    found = crop(case()["image"])
    sides = np.array([34, 42, 38]) - 5  # the foreground of a scan of the factory
    np.testing.assert_allclose(crop.foreground[:, 1] - crop.foreground[:, 0], (sides - 1) * scale + 1)
    spacing = np.array([0.9, 1.1, 1.3])
    np.testing.assert_allclose(found["image"].pixdim.numpy(), spacing / scale, rtol=1e-5)


def test_scales_are_drawn_evenly_over_their_range():
    crop = RandGlobalLocalCrop(8, prob=1.0, scale_range=(0.5, 2.0)).set_random_state(0)
    extremes = np.array([[0, 0, 0], [9, 10, 11]])
    drawn = []
    for _ in range(400):
        crop.randomize(extremes)
        drawn.append(np.linalg.det(crop.warp[:3, :3]) ** (1 / 3))
    assert min(drawn) < 0.55 and max(drawn) > 1.95 and np.mean(drawn) == pytest.approx(1.25, abs=0.07)


def test_each_axis_is_flipped_on_its_own():
    crop = RandGlobalLocalCrop(8, prob=0.0, flip_prob=0.5).set_random_state(0)
    extremes = np.array([[0, 0, 0], [9, 10, 11]])
    drawn = []
    for _ in range(160):
        crop.randomize(extremes)
        drawn.append(tuple(np.diag(crop.warp)[:3]))
    counts = [drawn.count(signs) for signs in set(drawn)]
    assert len(counts) == 8 and min(counts) >= 8  # 20 each, by chance


def deformed(prob=1.0, std=2.0):
    return WARPED | {"deformation": RandomDeformation(prob, (std, std), spacing=10.0)}


def spline(crop, places):
    """Displacement at places (3, N) of the warped scan: a sum over all control points, one by one."""

    def weight(distance):
        distance = np.abs(distance)
        inner = (4 - 6 * distance**2 + 3 * distance**3) / 6
        return np.where(distance < 1, inner, np.where(distance < 2, (2 - distance) ** 3 / 6, 0))

    found, apart = np.zeros_like(places), 10.0 / np.array([1.0, 1.1 / 0.9, 1.3 / 0.9])  # sides of 0.9, 1.1 and 1.3 mm
    controls = crop.deformation.controls
    for at in np.ndindex(controls.shape[1:]):
        middle = crop.box[:, 0] + apart * (np.array(at) - 1)
        part = weight((places - middle[:, None]) / apart[:, None]).prod(axis=0)
        found += controls[(slice(None), *at)][:, None] * part
    return np.linalg.inv(crop.warp)[:3, :3] @ found


def test_patch_and_view_are_deformed_by_one_spline():
    data, size = case(), (20, 24, 16)
    crop = RandGlobalLocalCrop(size, **deformed())
    crop.set_random_state(3)
    found = crop(data["image"], data["label"])
    for side, box in (("", crop.window), ("global_", crop.box)):
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).reshape(3, -1)
        warped = box[:, :1] + (grid + 0.5) * (box[:, 1:] - box[:, :1]) / np.array(size)[:, None]  # edges of voxels at 0
        unwarp = np.linalg.inv(crop.warp)
        places = unwarp[:3, :3] @ (warped - 0.5) + unwarp[:3, 3:] + spline(crop, warped)
        volume = data["image"].numpy()[0].astype(float)
        expected = map_coordinates(volume, places, order=1, mode="grid-constant").reshape(size)
        np.testing.assert_allclose(found[f"{side}image"][0].numpy(), expected, atol=2e-3 * volume.max())
        labels = map_coordinates(data["label"].numpy()[0], places, order=0, mode="grid-constant").reshape(size)
        assert (found[f"{side}label"][0].numpy() == labels).mean() > 0.999


def test_without_a_deformation_nothing_else_is_drawn():
    plain, moved, never = (
        RandGlobalLocalCrop(8, **one).set_random_state(5) for one in (WARPED, deformed(), deformed(0))
    )
    one, other, same = (crop(case()["image"])["image"] for crop in (plain, moved, never))
    assert np.array_equal(plain.window, moved.window) and not torch.equal(one, other)
    assert torch.equal(one, same) and plain.R.uniform() == never.R.uniform()
    still = RandGlobalLocalCrop(8, **deformed(std=0.0)).set_random_state(5)
    torch.testing.assert_close(still(case()["image"])["image"], one)


def test_a_slice_is_deformed_in_its_plane():
    crop = RandGlobalLocalCrop((16, 16, 1), deformation=RandomDeformation(1.0, (2.0, 2.0), 10.0))
    crop.set_random_state(0)
    crop(torch.rand(1, 30, 32, 1) + 0.1)
    controls = crop.deformation.controls
    assert np.abs(controls[:2]).max() > 1 and not controls[2].any()


def test_thick_slices_are_moved_by_as_many_millimetres():
    moved = RandomDeformation(1.0, (2.0, 2.0), 12.0)
    box, spacing = np.array([[0, 60], [0, 60], [0, 12]]), np.array([1.0, 1.0, 5.0])
    moved.draw(np.random.RandomState(0), box, spacing, np.zeros(3, bool))
    assert moved.controls.shape[1:] == (8, 8, 8)  # of boxes of 60 mm
    spread = moved.controls.std(axis=(1, 2, 3)) * spacing
    np.testing.assert_allclose(spread, 2.0, rtol=0.15)


@pytest.mark.parametrize(
    "numbers, expected", [((2, (0, 1), 9), "prob"), ((1, (2, 1), 9), "std_range"), ((1, (0, 1), 0), "spacing")]
)
def test_a_deformation_that_cannot_be_drawn_is_refused(numbers, expected):
    with pytest.raises(ConfigError, match=expected):
        RandomDeformation(*numbers)
