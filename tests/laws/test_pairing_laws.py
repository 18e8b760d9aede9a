# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of the global-local pair, on volumes with three different sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.networks.layers import AffineTransform
from monai.transforms import Compose
from monai.transforms.utils import create_rotate

from mapseg_components.boxes import index_affine, resample_box, transformed_box
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms import (
    AxisExtremesd,
    ClassVoxelsd,
    PercentileClip,
    PercentileTabled,
    RandGlobalLocalCrop,
    RandGlobalLocalCropd,
    RandPercentileClipd,
)
from mapseg_components.transforms.percentiles import clipped
from mapseg_components.transforms.sampling import sample
from tests.conftest import make_scan

AFFINE = torch.tensor([[0.0, 1.1, 0.0, -7.0], [-0.9, 0.0, 0.0, 4.0], [0.0, 0.0, 1.3, 2.0], [0.0, 0.0, 0.0, 1.0]])
WARPED = {"prob": 1.0, "scale_range": (0.8, 1.3), "rotate_range_deg": 25.0}


def smooth(volume):
    kernel = torch.ones(1, 1, 5, 5, 5) / 125
    for _ in range(2):
        volume = torch.nn.functional.conv3d(volume[None], kernel, padding=2)[0]
    return volume


def scan(shape=(34, 42, 38)):
    image, label = (torch.from_numpy(v)[None] for v in make_scan(shape))
    return MetaTensor(image, affine=AFFINE.double()), MetaTensor(label, affine=AFFINE.double())


def dice(a, b):
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"prob": 0.0}, WARPED, {"prob": 0.0, "flip_prob": 1.0}])
def test_global_label_in_the_box_is_the_local_label(seed, options):
    image, label = scan()
    crop = RandGlobalLocalCrop((20, 24, 16), (40, 32, 36), **options).set_random_state(seed)
    out = crop(image, label)
    inside = resample_box((out["global_label"].as_tensor() > 0)[None].float(), out["box"][None], [20, 24, 16])
    local = out["label"].as_tensor()[None] > 0
    if local.sum() > 200:
        assert dice(inside > 0.5, local) > 0.85
    box = out["box"]
    assert (box[:, 0] >= -1e-4).all() and (box[:, 1] <= torch.tensor([40, 32, 36]) + 1e-3).all()


def test_without_a_warp_the_patch_is_an_exact_copy():
    image, label = scan()
    crop = RandGlobalLocalCrop((20, 24, 16), prob=0.0).set_random_state(5)
    out = crop(image, label)
    part = tuple(slice(int(a), int(b)) for a, b in crop.window)
    assert torch.equal(out["image"].as_tensor(), image.as_tensor()[(slice(None), *part)])
    assert torch.equal(out["label"].as_tensor(), label.as_tensor()[(slice(None), *part)])
    assert out["label"].dtype == torch.uint8


def test_flip_copies_voxels_exactly():
    image, _ = scan()
    crop = RandGlobalLocalCrop((20, 24, 16), prob=0.0, flip_prob=1.0).set_random_state(1)
    patch = crop(image)["image"].as_tensor()
    assert set(patch.unique().tolist()) <= set(image.as_tensor().unique().tolist())


@pytest.mark.parametrize("seed", range(3))
def test_pair_equals_warping_the_whole_volume_and_then_cropping(seed):
    image = smooth(scan()[0].as_tensor())
    crop = RandGlobalLocalCrop((16, 20, 12), (24, 16, 20), **WARPED).set_random_state(seed)
    points = np.argwhere(np.ones(image.shape[1:], bool))  # whole canvas as foreground: windows stay inside
    out = crop(image, extremes=torch.from_numpy(points))
    # independent: warp everything onto a large canvas at whole voxels, then resample the two boxes from it
    low = np.floor(crop.box[:, 0]) - 2
    size = (np.ceil(crop.box[:, 1]) + 2 - low).astype(int)
    shift = np.eye(4)
    shift[:3, 3] = low
    theta = torch.from_numpy(np.linalg.inv(crop.warp) @ shift).float()[None]
    canvas = AffineTransform(spatial_size=tuple(size), normalized=False, padding_mode="zeros", align_corners=False)
    warped = canvas(image[None], theta)
    for key, box, grid in (
        ("image", crop.window, [16, 20, 12]),
        ("global_image", crop.box, [24, 16, 20]),
    ):
        expected = resample_box(warped, torch.from_numpy(box - low[:, None])[None].float(), grid)[0]
        error = (out[key] - expected).abs()
        assert error.mean() < 0.01 * image.max(), key


def test_box_of_the_warped_scan_holds_the_warped_foreground():
    image, _ = scan()
    crop = RandGlobalLocalCrop((8, 8, 8), **WARPED).set_random_state(0)
    crop(image)
    moved = transformed_box(np.argwhere(image[0].numpy() > 0), crop.warp)
    np.testing.assert_allclose(crop.box, moved, atol=1e-6)


def test_small_scan_is_padded_and_comes_back():
    image, label = scan((10, 14, 30))
    out = RandGlobalLocalCrop((24, 20, 16), prob=0.0).set_random_state(2)(image, label)
    patch, box = out["image"].as_tensor(), out["valid_box"].int().tolist()
    inner = patch[(slice(None), *(slice(*ends) for ends in box))]
    assert patch.shape == (1, 24, 20, 16)
    assert (
        patch.count_nonzero() == inner.count_nonzero() and inner.shape[1] == 5 and inner.shape[2] == 9
    )  # foreground of 2:7 and 2:11
    start = [a for a, _ in box]
    assert (start[0], start[1]) == ((24 - 5) // 2, (20 - 9) // 2)
    assert torch.equal(inner[0, :, :, 0] > 0, torch.ones(5, 9, dtype=torch.bool))


@pytest.mark.parametrize("options", [{"prob": 0.0}, WARPED])
def test_landmark_keeps_its_place_in_the_world(options):
    """The voxel of the patch that shows a landmark has the landmark's world coordinates."""
    image, _ = scan()
    voxels = torch.zeros_like(image.as_tensor())
    voxels[:, 5:30, 5:38, 5:34] = 1
    place = (15, 20, 18)
    marked = voxels.clone()
    marked[(0, *place)] = 1000
    crop = RandGlobalLocalCrop((24, 28, 24), **options).set_random_state(3)
    out = crop(MetaTensor(marked, affine=AFFINE.double()))
    found = torch.tensor(np.unravel_index(int(out["image"].argmax()), (24, 28, 24))).double()
    world = out["image"].affine @ torch.cat([found, torch.ones(1)]).double()
    expected = AFFINE.double() @ torch.tensor([*place, 1.0]).double()
    assert (world - expected)[:3].norm() < 1.3  # within a voxel


def test_foreground_fraction_centres_on_every_class():
    image, label = scan()
    crop = Compose(
        [
            AxisExtremesd("image"),
            ClassVoxelsd("label"),
            RandGlobalLocalCropd(8, prob=0.0, foreground_fraction=1.0),
        ]
    ).set_random_state(0)
    centres = [int(crop({"image": image, "label": label})["label"][0, 4, 4, 4]) for _ in range(30)]
    assert 8 <= centres.count(1) and 8 <= centres.count(2) and centres.count(0) <= 2


def test_same_seed_same_sample_and_inputs_stay_untouched():
    image, label = scan()
    before = image.clone()
    out = [RandGlobalLocalCrop(16, **WARPED).set_random_state(9)(image, label) for _ in range(2)]
    for key in out[0]:
        assert torch.equal(torch.as_tensor(out[0][key]), torch.as_tensor(out[1][key])), key
    assert torch.equal(image, before)
    crop = RandGlobalLocalCrop(16, **WARPED).set_random_state(9)
    first = crop(image)
    assert torch.equal(crop(image, randomize=False)["image"], first["image"])


def test_works_in_a_cached_dataset_and_collates():
    image, label = scan()
    transform = Compose(
        [
            AxisExtremesd("image"),
            PercentileTabled("image"),
            RandPercentileClipd("image", deferred=True),
            RandGlobalLocalCropd(16, prob=1.0, rotate_range_deg=10),
        ]
    )
    data = [{"image": image, "label": label, "case_id": str(i)} for i in range(2)]
    batch = next(iter(DataLoader(CacheDataset(data, transform, progress=False, copy_cache=False), batch_size=2)))
    assert batch["image"].shape == batch["global_label"].shape == (2, 1, 16, 16, 16)
    assert batch["box"].shape == (2, 3, 2) and batch["case_id"] == ["0", "1"]
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1


@pytest.mark.parametrize("copy_cache", [True, False])
def test_cached_scan_gives_a_new_crop_each_time(copy_cache):
    image, label = scan()
    steps = [AxisExtremesd("image"), ClassVoxelsd("label"), RandGlobalLocalCropd(16, **WARPED)]
    data = CacheDataset([{"image": image, "label": label}], Compose(steps), progress=False, copy_cache=copy_cache)
    first, second = data[0], data[0]
    assert not torch.equal(first["box"], second["box"])
    assert torch.equal(data._cache[0]["image"], image)


def test_every_start_is_drawn_including_the_last():
    image = torch.ones(1, 9, 11, 10)
    crop = RandGlobalLocalCrop((7, 8, 9), prob=0.0).set_random_state(0)
    starts = []
    for _ in range(60):
        crop(image)
        starts.append(crop.window[:, 0])
    assert [sorted(set(axis)) for axis in np.transpose(starts)] == [[0, 1, 2], [0, 1, 2, 3], [0, 1]]


def test_rotation_is_drawn_about_every_axis():
    image, _ = scan()
    crop = RandGlobalLocalCrop(8, prob=1.0, rotate_range_deg=25.0).set_random_state(0)
    crop(image)
    assert (np.abs(crop.warp[:3, :3][~np.eye(3, dtype=bool)]) > 1e-3).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"prob": 0.0}, {"prob": 0.0, "flip_prob": 1.0}, WARPED])
def test_every_voxel_shows_its_place_in_the_world(options, seed):
    """A ramp in world coordinates is linear, so that trilinear sampling reproduces it exactly inside the scan."""
    shape, weights = (40, 46, 34), np.array([0.7, -1.3, 2.1])

    def places(affine, size):
        index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
        return index @ affine[:3, :3].T + affine[:3, 3]

    ramp = torch.from_numpy(places(AFFINE.double().numpy(), shape) @ weights + 500)[None].float()
    crop = RandGlobalLocalCrop((16, 20, 12), (24, 18, 22), **options).set_random_state(seed)
    out = crop(MetaTensor(ramp, affine=AFFINE.double()))
    for key in ("image", "global_image"):
        affine, size = out[key].affine.numpy(), out[key].shape[1:]
        source = places(np.linalg.inv(AFFINE.double().numpy()) @ affine, size)
        inside = ((source > 1e-3) & (source < np.array(shape) - 1.001)).all(-1)
        assert inside.any()
        np.testing.assert_allclose(
            out[key].numpy()[0][inside], (places(affine, size) @ weights + 500)[inside], atol=2e-2
        )


def by_grid_sample(volume, affine, size, mode):
    """MONAI's resampling of the whole volume."""
    resampler = AffineTransform(
        spatial_size=size, normalized=False, mode=mode, padding_mode="zeros", align_corners=False
    )
    return resampler(volume.float()[None], torch.from_numpy(affine).float()[None])[0]


def turned(angles, scale, centre, size):
    """Voxel index of a grid of this size to voxel index of a volume: turned, scaled, centred on a place in it."""
    affine = np.asarray(create_rotate(3, angles)) @ np.diag([scale, scale, scale, 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


SIZE = (21, 10, 17)
GRIDS = {
    "turned, inside": turned((0.2, -0.3, 0.4), 0.8, (17, 21, 19), SIZE),
    "turned, partly outside": turned((0.2, -0.3, 0.4), 1.7, (10, 35, 19), SIZE),
    "turned, all outside": turned((0.2, -0.3, 0.4), 0.5, (90, 21, 19), SIZE),
    "a quarter turn": turned((0, 0, np.pi / 2), 1.31, (17, 21, 19), SIZE),
    "finer than the voxels": turned((0, 0, 0), 0.61, (17, 21, 19), SIZE),
    "whole box, coarser": index_affine(np.array([[3, 32], [4, 41], [2, 37]]), SIZE),
    "backwards": index_affine(np.array([[3, 32], [41, 4], [37, 2]]), SIZE),
    "half outside": index_affine(np.array([[-12, 17], [20, 51], [-3, 40]]), SIZE),
    "shifted by parts of a voxel": index_affine(np.array([[3.4, 24.4], [4.7, 14.7], [2.1, 19.1]]), SIZE),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shape", [(34, 42, 38), (34, 42, 1)])
def test_samples_are_those_of_grid_sample(name, shape):
    volume = torch.from_numpy(np.random.default_rng(0).random((2, *shape)).astype(np.float32))
    label = (volume[:1] * 5).to(torch.uint8)
    affine = GRIDS[name].copy()
    affine[2, 3] -= 19 if shape[2] == 1 else 0  # so that the grid meets a single slice
    image, found = sample([volume, label], affine, SIZE, ["bilinear", "nearest"])
    torch.testing.assert_close(image, by_grid_sample(volume, affine, SIZE, "bilinear"), atol=1e-4, rtol=0)
    # halfway between two voxels, the one that rounding prefers is taken
    assert (found != by_grid_sample(label, affine, SIZE, "nearest")).float().mean() < 0.02
    assert found.dtype == torch.uint8 and (image.any() or "outside" in name)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float16, torch.float64])
def test_samples_do_not_depend_on_the_type_of_the_volume(name, dtype):
    volume = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (1, 34, 42, 38)))
    found, expected = (sample([volume.to(t)], GRIDS[name], SIZE, ["bilinear"])[0] for t in (dtype, torch.float32))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_bad_input_is_named():
    image, label = scan()
    with pytest.raises(DataError, match="no foreground"):
        RandGlobalLocalCrop(8)(torch.zeros(1, 9, 10, 11))
    with pytest.raises(DataError, match=r"\(34, 42, 38\).*\(34, 42, 37\)"):
        RandGlobalLocalCrop(8)(image, label[..., :-1])
    with pytest.raises(ConfigError, match="scale_range"):
        RandGlobalLocalCrop(8, scale_range=(1.2, 0.8))
    with pytest.raises(ConfigError, match="foreground_fraction is 3"):
        RandGlobalLocalCrop(8, foreground_fraction=3)


def test_rotation_turns_millimetres_not_voxels():
    """In the world a warp without scaling keeps distances and angles, however thick the slices are."""
    spacing = np.array([0.8, 1.0, 4.0])
    crop = RandGlobalLocalCrop(patch_size=8, prob=1.0, rotate_range_deg=40, flip_prob=0.5)
    crop.set_random_state(3)
    image = torch.ones(1, 20, 24, 16)
    crop(MetaTensor(image, affine=torch.diag(torch.tensor([*spacing, 1.0]))))
    world = np.diag(spacing) @ crop.warp[:3, :3] @ np.diag(1 / spacing)
    np.testing.assert_allclose(world @ world.T, np.eye(3), atol=1e-4)
    assert np.abs(world - np.round(world)).max() > 0.1  # it did turn

    cubes = RandGlobalLocalCrop(patch_size=8, prob=1.0, rotate_range_deg=40, flip_prob=0.5)
    cubes.set_random_state(3)
    cubes(MetaTensor(image, affine=torch.diag(torch.tensor([0.8, 0.8, 0.8, 1.0]))))
    turned_cubes = cubes.warp[:3, :3]
    np.testing.assert_allclose(turned_cubes @ turned_cubes.T, np.eye(3), atol=1e-12)


SMALL_GRIDS = {  # of boxes that are clipped as a whole; larger ones are looked up
    "copied": index_affine(np.array([[3, 24], [4, 14], [2, 19]]), SIZE),
    "little coarser": index_affine(np.array([[3, 27], [4, 18], [2, 22]]), SIZE),
    "little coarser, backwards": index_affine(np.array([[27, 3], [4, 18], [22, 2]]), SIZE),
    "little coarser, half outside": index_affine(np.array([[-12, 12], [32, 46], [-3, 17]]), SIZE),
}


@pytest.mark.parametrize("name", [*GRIDS, *SMALL_GRIDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.float64])
def test_sampling_with_limits_is_sampling_the_clipped_volume(name, dtype):
    """Channels with limits of their own, inside and outside of the volume."""
    volume = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 30.0, (2, 34, 42, 38)))
    volume[1] += 200
    volume = volume.to(dtype)
    limits = torch.tensor([[float(volume[0].min()), 70.0], [float(volume[1].min()), 250.0]])
    affine = (GRIDS | SMALL_GRIDS)[name]
    found = sample([volume], affine, SIZE, ["bilinear"], [limits])[0]
    expected = sample([clipped(volume.float(), limits)], affine, SIZE, ["bilinear"])[0]
    assert found.dtype == torch.float32 and 0 <= found.min() and found.max() <= 1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    after = clipped(sample([volume], affine, SIZE, ["bilinear"])[0], limits)  # the other order gives other values
    assert (after - expected).abs().max() > 0.05 or name in ("copied", "turned, all outside")


def test_the_draw_of_a_deferred_clipping_is_that_of_clipping_the_volume_first():
    image, label = scan()
    image = MetaTensor(image.as_tensor() ** 2 + 40, affine=image.affine)  # background is 40
    later = Compose(
        [
            PercentileTabled("image"),
            AxisExtremesd("image", above_minimum=True),
            RandPercentileClipd("image", lower=92, prob=0.5, deferred=True),
            RandGlobalLocalCropd((16, 20, 12), **WARPED, flip_prob=0.5),
        ]
    )
    first = Compose([RandPercentileClipd("image", lower=92, prob=0.5), AxisExtremesd("image"), later.transforms[3]])
    for seed in range(6):
        results = []
        for transform in (later, first):
            for number, step in enumerate(t for t in transform.transforms if hasattr(t, "set_random_state")):
                step.set_random_state(seed + number)
            results.append(transform({"image": image, "label": label}))
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(results[1][key]), atol=1e-5, rtol=0)


def test_without_cached_extremes_the_foreground_is_above_the_limits():
    image = torch.full((1, 12, 14, 16), 5.0)
    image[0, 3:7, 2:11, 5:13] += 1 + torch.rand(4, 9, 8)
    limits = PercentileClip(100).limits(image)
    crop = RandGlobalLocalCrop((4, 9, 8), prob=0.0)
    crop(image, limits=limits)
    assert crop.foreground.tolist() == [[3, 7], [2, 11], [5, 13]]
