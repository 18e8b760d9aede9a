# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The mean of a network and of another bundle's model, against the same sum written out."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SimpleInferer
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Spacing
from scipy.ndimage import map_coordinates

from mapseg_components.errors import ConfigError
from mapseg_components.inferers import SecondModelInferer

LABELS = {"putamen": 12, "caudate": 11}
READING = [
    {"_target_": "LoadImaged", "keys": ["image"], "image_only": True, "ensure_channel_first": True},
    {"_target_": "Orientationd", "keys": ["image"], "axcodes": "RAS"},
    {"_target_": "Spacingd", "keys": ["image"], "pixdim": "@working_spacing", "mode": ["bilinear"]},
]


@pytest.fixture()
def bundle(tmp_path):
    """A bundle of three structures, whose network is one convolution of one voxel."""
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    content = {
        "bundle_root": ".",
        "labels": {"caudate": 1, "thalamus": 2, "putamen": 3},
        "working_spacing": [3.0, 3.0, 3.0],
        "device": "$torch.device('cpu')",
        "weights": "$@bundle_root + '/model.pt'",
        "network": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 4, "kernel_size": 1},
        "preprocessing": {"_target_": "Compose", "transforms": READING},
        "inferer": {"_target_": "SimpleInferer"},
    }
    (tmp_path / "bundle" / "configs" / "inference.json").write_text(json.dumps(content))
    network = torch.nn.Conv3d(1, 4, 1)
    torch.save(network.state_dict(), tmp_path / "bundle" / "model.pt")
    return tmp_path / "bundle", network


@pytest.fixture()
def scan(tmp_path):
    """An oblique scan whose axes are in another order, as a batch on a grid of its own."""
    turn = np.deg2rad(12)
    affine = np.array([[0, -1.5, 0, 20], [2 * np.cos(turn), 0, -2 * np.sin(turn), -9], [2 * np.sin(turn), 0, 2, 4]])
    values = np.random.default_rng(0).random((20, 22, 18)).astype(np.float32)
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(values, np.vstack([affine, [0, 0, 0, 1]])), path)
    loaded = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS"), Spacing((2.0, 2.0, 2.5))])
    return list_data_collate([loaded(str(path))])


def own(image):
    return torch.cat([image, 2 * image, 1 - image], dim=1)


@pytest.mark.parametrize("spacing", [3.0, 2.0])
def test_the_mean_of_both_on_the_own_grid(bundle, scan, spacing):
    folder, network = bundle
    settings = {"working_spacing": [spacing] * 3}
    found = SecondModelInferer(SimpleInferer(), folder, LABELS, settings)(scan, own).softmax(dim=1)[0].numpy()

    path = scan.meta["filename_or_obj"][0]
    other = Compose(
        [LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS"), Spacing((spacing,) * 3, mode="bilinear")]
    )(path)
    with torch.no_grad():
        probabilities = network(other.as_tensor()[None]).softmax(dim=1)[0].numpy()
    grid = np.stack([*np.meshgrid(*map(np.arange, scan.shape[2:]), indexing="ij"), np.ones(scan.shape[2:])])
    places = np.linalg.inv(other.affine.numpy()) @ scan.affine[0].numpy().reshape(4, 4) @ grid.reshape(4, -1)
    moved = [map_coordinates(p, places[:3], order=1, mode="grid-constant") for p in probabilities]
    putamen, caudate = moved[3], moved[1]
    expected = np.stack([1 - putamen - caudate, putamen, caudate]).reshape(3, *scan.shape[2:])
    expected = (expected + own(scan.as_tensor()).softmax(dim=1)[0].numpy()) / 2
    inside = np.all([(places[i] > 0) & (places[i] < n - 1) for i, n in enumerate(other.shape[1:])], axis=0)
    inside = inside.reshape(scan.shape[2:])
    assert inside.mean() > 0.4
    np.testing.assert_allclose(found[:, inside], expected[:, inside], atol=1e-4)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


def test_a_model_that_lacks_a_structure_or_a_folder_that_is_no_bundle(bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"does not segment \['pallidum'\]"):
        SecondModelInferer(SimpleInferer(), bundle[0], {"caudate": 1, "pallidum": 2})
    with pytest.raises(ConfigError, match=r"no configs/inference\.json"):
        SecondModelInferer(SimpleInferer(), tmp_path, LABELS)


def test_a_scan_without_a_file_is_refused(bundle):
    inferer = SecondModelInferer(SimpleInferer(), bundle[0], LABELS)
    for scan in (torch.rand(1, 1, 4, 5, 6), MetaTensor(torch.rand(1, 1, 4, 5, 6))):
        with pytest.raises(ConfigError, match="does not name its file"):
            inferer(scan, own)
