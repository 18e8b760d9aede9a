# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference gives back what went in: same grid, same place, whatever the orientation, size or spacing."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    AsDiscreted,
    Compose,
    Invertd,
    LoadImaged,
    Orientationd,
)

from mapseg_components.errors import ConfigError, DataError, NonFiniteError
from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.transforms import PercentileClipd, SaveLabelMapd
from tests.conftest import make_scan

ROI = (16, 12, 20)


def image(shape=(30, 34, 26), seed=0):
    return torch.from_numpy(make_scan(shape, seed)[0])[None, None] / 300


def plain_loop(scan, network, roi, stride):
    """Every window recomputes everything, the global view is resampled by grid_sample; sums and counts in float64."""
    voxels = scan[0]
    points = voxels[0].nonzero()
    start, stop = points.min(0).values.tolist(), (points.max(0).values + 1).tolist()
    for axis, side in enumerate(roi):
        missing = max(side - (stop[axis] - start[axis]), 0)
        start[axis], stop[axis] = start[axis] - missing // 2, stop[axis] + missing - missing // 2
    padded = torch.nn.functional.pad(voxels, [40] * 6)
    region = padded[(slice(None), *(slice(a + 40, b + 40) for a, b in zip(start, stop)))]
    lines = [torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in roi]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flip(-1)[None]
    view = torch.nn.functional.grid_sample(region[None], grid, padding_mode="border", align_corners=False)
    sides = region.shape[1:]
    starts = [
        sorted({min(s, side - r) for s in range(0, max(side - r, 0) + step, step)})
        for side, r, step in zip(sides, roi, stride)
    ]
    total, count = None, torch.zeros(sides, dtype=torch.float64)
    for corner in itertools.product(*starts):
        window = tuple(slice(c, c + r) for c, r in zip(corner, roi))
        box = torch.tensor([[[c * r / s, (c + r) * r / s] for c, r, s in zip(corner, roi, sides)]])
        if not (region[(0, *window)] != 0).any():
            continue
        with torch.no_grad():
            logits = network(region[(slice(None), *window)][None], view, box)[0].double()
        total = torch.zeros(len(logits), *sides, dtype=torch.float64) if total is None else total
        total[(slice(None), *window)] += logits
        count[window] += 1
    result = torch.zeros(len(total), *voxels.shape[1:], dtype=torch.float64)
    result[0] = 10
    canvas = torch.nn.functional.pad(result, [40] * 6)
    place = tuple(slice(a + 40, b + 40) for a, b in zip(start, stop))
    mean = total / count.clamp(min=1)
    canvas[(slice(None), *place)] = torch.where(count > 0, mean, canvas[(slice(None), *place)])
    return canvas[:, 40:-40, 40:-40, 40:-40]


@pytest.mark.parametrize("shape", [(30, 34, 26), (9, 34, 11), (10, 9, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_a_plain_loop(tiny_network, shape, batch):
    inferer = GlobalLocalSlidingWindowInferer(ROI, stride=(10, 12, 14), sw_batch_size=batch)
    scan = image(shape)
    logits, expected = inferer(scan, tiny_network)[0], plain_loop(scan, tiny_network, ROI, (10, 12, 14))
    inside = expected[0] != 10
    torch.testing.assert_close(logits[:, inside].double(), expected[:, inside], rtol=1e-4, atol=1e-4)
    assert logits.shape[1:] == scan.shape[2:]
    assert (logits.argmax(0)[~inside] == 0).all()


def test_scans_of_a_batch_do_not_mix(tiny_network):
    inferer = GlobalLocalSlidingWindowInferer(ROI)
    scans = torch.cat([image(seed=1), image(seed=2)])
    both = inferer(scans, tiny_network)
    torch.testing.assert_close(both[1], inferer(scans[1:], tiny_network)[0])


def test_a_wrapped_network_collaborates_too(tiny_network):
    inferer = GlobalLocalSlidingWindowInferer(ROI)
    torch.testing.assert_close(inferer(image(), torch.nn.DataParallel(tiny_network)), inferer(image(), tiny_network))


class Counting(torch.nn.Module):
    """A network without encode and decode that remembers its windows."""

    def __init__(self):
        super().__init__()
        self.windows = []

    def forward(self, window):
        self.windows += [w.clone() for w in window]
        return torch.cat([1 - window, window], dim=1)


def test_windows_are_unique_and_hold_foreground():
    scan = torch.zeros(1, 1, 40, 40, 40)
    scan[0, 0, 2:6, 2:6, 2:6] = torch.rand(4, 4, 4) + 0.1
    scan[0, 0, 34:38, 34:38, 34:38] = torch.rand(4, 4, 4) + 0.1
    network = Counting()
    logits = GlobalLocalSlidingWindowInferer(8, stride=7)(scan, network)
    assert 2 <= len(network.windows) <= 16  # of the 125 windows of the box
    assert all(window.any() for window in network.windows)
    unique = {window.numpy().tobytes() for window in network.windows}
    assert len(unique) == len(network.windows)
    assert ((logits.argmax(1) == 1) <= (scan[:, 0] > 0)).all()


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_constant_logits_stay_constant(mode):
    scan = image()
    logits = GlobalLocalSlidingWindowInferer(ROI, stride=6, mode=mode)(scan, lambda w: torch.full_like(w, 3.0))
    box = scan[0, 0].nonzero()
    inside = tuple(slice(int(a), int(b) + 1) for a, b in zip(box.min(0).values, box.max(0).values))
    torch.testing.assert_close(logits[0, 0][inside], torch.full_like(logits[0, 0][inside], 3.0))


def test_bad_input_is_named():
    scan = MetaTensor(torch.zeros(1, 1, 9, 10, 11), meta={"filename_or_obj": "x.nii.gz"})
    with pytest.raises(DataError, match="no foreground to segment"):
        GlobalLocalSlidingWindowInferer(8)(scan, Counting())
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        GlobalLocalSlidingWindowInferer(8)(image(), lambda w: w * float("nan"))
    with pytest.raises(ConfigError, match="window stride"):
        GlobalLocalSlidingWindowInferer(8, stride=9)


def threshold(window):
    return torch.cat([0.5 - window, window - 0.5], dim=1)


def round_trip(folder, voxels, affine):
    path = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(voxels, affine), path)
    before = Compose(
        [
            LoadImaged(keys="image", ensure_channel_first=True),
            Orientationd(keys="image", axcodes="RAS", labels=None),
            PercentileClipd(keys="image", percentile=100),
        ]
    )
    after = Compose(
        [
            AsDiscreted(keys="pred", argmax=True),
            Invertd(keys="pred", transform=before, orig_keys="image", nearest_interp=True),
            SaveLabelMapd(keys="pred", output_dir=folder),
        ]
    )
    data = before({"image": str(path)})
    data["pred"] = GlobalLocalSlidingWindowInferer(8, stride=6)(data["image"][None], threshold)[0]
    after(data)
    return nib.load(folder / "scan_seg.nii.gz")


ORIENTATIONS = [
    "".join(code) for axes in itertools.permutations(["RL", "AP", "SI"]) for code in itertools.product(*axes)
]


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_orientation_comes_back(tmp_path, axcodes):
    voxels = make_scan((9, 11, 13), contrast=1.0)[0]
    source = nib.Nifti1Image(voxels, np.array([[0.9, 0, 0, -3], [0, 1.1, 0, 5], [0, 0, 3.0, 7], [0, 0, 0, 1.0]]))
    to = nib.orientations.axcodes2ornt(axcodes)
    turned = source.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(source.affine), to))
    found = round_trip(tmp_path, np.asarray(turned.dataobj), turned.affine)
    expected = (np.asarray(turned.dataobj) > np.asarray(turned.dataobj).max() / 2).astype(np.uint8)
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, turned.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)


def test_oblique_anisotropic_scan_comes_back(tmp_path):
    angle = np.deg2rad(17)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.7, 5.0])
    voxels = make_scan((19, 21, 6))[0]
    found = round_trip(tmp_path, voxels, affine)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.dataobj), (voxels > voxels.max() / 2).astype(np.uint8))
