# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's model on single scans: which scans are shown how, and what a mask leaves out."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.commands.order import confidence
from mapseg_components.data.volumes import voxel_ml
from mapseg_components.inferers.trial import TRANSLATED, LabelLoader, Trial
from mapseg_components.keys import SOURCE
from mapseg_components.shipped_files import bundle_of
from mapseg_components.transforms.inputs import outside_tissue
from tests.pictures import cells, write_picture

READING = [
    {"_target_": "LoadImaged", "keys": ["image"], "image_only": True, "ensure_channel_first": True},
    {"_target_": "mapseg_components.transforms.RaiseTissued", "keys": ["image"]},
    {"_target_": "mapseg_components.transforms.NegativeValuesd", "keys": ["image"], "policy": "@negative_values"},
    {
        "_target_": "Lambdad",
        "_disabled_": "$not @target_inverted",
        "keys": ["image"],
        "func": "$lambda image: 3000 - image",
    },
]


@pytest.fixture
def bundle(tmp_path):
    """A bundle that says how scans are read, and whose network sees a structure in every voxel."""
    (tmp_path / "configs").mkdir()
    content = {
        "bundle_root": ".",
        "negative_values": "keep",
        "target_inverted": True,
        "device": "$torch.device('cpu')",
        "network": "$lambda image: torch.cat([image * 0, image * 0 + 2], dim=1)",
        "preprocessing": {"_target_": "Compose", "transforms": READING},
        "inferer": {"_target_": "SimpleInferer"},
    }
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def case(tmp_path):
    """A scan from -1000 to 999, the mask of its middle and its label map."""
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("image", "mask", "label")}
    mask = np.zeros((10, 10, 20))
    mask[2:8, 3:9] = 1
    for name, voxels in (
        ("image", np.arange(-1000.0, 1000.0).reshape(10, 10, 20)),
        ("mask", mask),
        ("label", mask + 1),
    ):
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), paths[name])
    return {name: str(path) for name, path in paths.items()}


def test_each_side_has_its_own_negative_values_and_the_target_alone_its_order(bundle, case):
    scan = {"image": case["image"]}
    voxels = torch.arange(-1000.0, 1000.0).reshape(1, 10, 10, 20)
    for written, source in ((None, voxels), ("shift", voxels + 1024), ("clip", voxels.clamp(min=0))):
        if written is not None:
            (bundle / "configs" / "train.json").write_text(json.dumps({"source_negative_values": written}))
        trial = Trial(bundle)
        torch.testing.assert_close(trial.scan(scan, SOURCE).as_subclass(torch.Tensor), source, check_dtype=False)
        torch.testing.assert_close(trial.scan(scan).as_subclass(torch.Tensor), 3000 - voxels, check_dtype=False)
        translated = trial.scan(scan, TRANSLATED).as_subclass(torch.Tensor)
        torch.testing.assert_close(translated, 3000 - voxels.clamp(min=0), check_dtype=False)


def test_what_a_mask_leaves_out_is_background_in_all_that_is_found_and_known(bundle, case):
    trial, mask = Trial(bundle, target_inverted=False), nib.load(case["mask"]).get_fdata() > 0
    scan = trial.scan(case)
    outside = outside_tissue(scan)
    np.testing.assert_array_equal(outside.numpy(), ~mask)
    image = scan.as_subclass(torch.Tensor)
    found = trial.probabilities(image, outside)
    np.testing.assert_array_equal(found.argmax(dim=0).numpy(), mask)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(mask.shape))
    assert (trial.probabilities(image)[1] > 0.5).all()
    labels, _ = LabelLoader({"rim": 1, "middle": 2}, trial.preprocessing)(case, scan)
    np.testing.assert_array_equal(labels.numpy(), np.where(mask, 2, 0))
    whole = trial.scan({"image": case["image"]})
    assert outside_tissue(whole) is None
    assert (LabelLoader({"rim": 1, "middle": 2}, trial.preprocessing)(case, whole)[0] > 0).all()


def test_the_label_map_of_an_image_lies_on_the_image_s_grid(tmp_path):
    image, label = cells(0)
    for folder, pixels in (("images", image), ("labels", label)):
        write_picture(tmp_path / folder / "a.png", pixels)
    (tmp_path / "images" / "pixel_size.json").write_text(json.dumps({"PixelSize": 2, "PixelSizeUnits": "um"}))
    parser = ConfigParser()
    parser.read_config(str(bundle_of("mapseg_adaptation") / "configs" / "inference.json"))
    parser["working_spacing"] = [4.0, 4.0, 0.0]
    preprocessing = parser.get_parsed_content("preprocessing")
    case = {name: str(tmp_path / f"{name}s" / "a.png") for name in ("image", "label")}
    scan = preprocessing({"image": case["image"]})["image"]
    found, ml = LabelLoader({"ring": 1, "core": 2}, preprocessing)(case, scan)
    assert found.shape == scan.shape[1:] == (28, 20, 1)
    assert ml == pytest.approx(voxel_ml(scan)) and set(found.unique().tolist()) == {0, 1, 2}


def test_confidence_is_that_of_structures_in_the_tissue(bundle, case):
    trial = Trial(bundle, target_inverted=False)
    trial.network = lambda image: torch.cat([image * 0, torch.where(image > 0, 1.0, 9.0)], dim=1)  # surer outside
    inside = float(torch.tensor([0.0, 1.0]).softmax(0)[1])
    assert confidence(trial, trial.scan(case)) == pytest.approx(inside, abs=1e-4)
    assert confidence(trial, trial.scan(case), turned=True) >= inside
