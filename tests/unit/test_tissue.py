# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Tissue above 0, and what is torn or missing counts nowhere: not in a loss, not in a crop, not in the result."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.transforms import Compose, LoadImaged

from mapseg_components.data import NiftiReader, tissue_is_known
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.losses import ClassShareLoss, LeavingOut, SegmentationLoss
from mapseg_components.methods import ArgmaxLabels, ViewLabels
from mapseg_components.networks import PlainPass
from mapseg_components.structures import IGNORED
from mapseg_components.transforms import (
    AxisExtremesd,
    ClassVoxelsd,
    ClearOutsided,
    IgnoreOutsided,
    PercentileClipd,
    RaiseTissued,
    SelectLabelsd,
    WithoutIgnoredd,
)
from tests.pictures import cells, write_picture
from tests.scans import make_scan, write_nifti

LOADING = [
    LoadImaged(["image", "label"], reader=NiftiReader, ensure_channel_first=True, allow_missing_keys=True),
    RaiseTissued("image"),
    SelectLabelsd("label", {"ring": 1, "core": 2}, allow_missing_keys=True),
    IgnoreOutsided("label", allow_missing_keys=True),
]


@pytest.fixture
def case(tmp_path):
    """An image with a torn right part, and its label map, which goes on there and names a pixel size."""
    image, label = cells(0)
    mask = np.ones(image.shape, np.uint8)
    mask[:, 40:] = 0
    return {
        "image": write_picture(tmp_path / "a.png", image),
        "label": write_picture(tmp_path / "labels" / "a.png", label, dpi=(254000, 254000)),
        "mask": write_picture(tmp_path / "a_mask.png", mask * 255),
    }


def test_all_tissue_is_above_0_in_its_order_and_the_rest_is_0_and_ignored(case):
    image, label = cells(0)
    found = Compose(LOADING)(case)
    assert "mask" not in found and found["label"].affine.tolist() == found["image"].affine.tolist()
    values, classes = found["image"][0, ..., 0].numpy().T, found["label"][0, ..., 0].numpy().T
    assert (values[:, :40] > 0).all() and (values[:, 40:] == 0).all()
    order = np.argsort(image[:, :40].ravel(), kind="stable")
    assert (np.diff(values[:, :40].ravel()[order]) >= 0).all()
    assert (classes[:, 40:] == IGNORED).all() and np.array_equal(classes[:, :40], label[:, :40])
    scaled = PercentileClipd("image")(found)["image"][0, ..., 0].numpy().T
    assert (scaled[:, :40] > 0).all() and (scaled[:, 40:] == 0).all() and scaled.max() == 1
    known = AxisExtremesd("image", above_minimum=True)(ClassVoxelsd("label")(found))
    assert set(known["label_voxels"][:, 0].tolist()) == {1, 2} and known["label_voxels"][:, 1].max() < 40
    assert known["image_extremes"][:, 0].max() == 39


def test_a_dark_image_without_a_mask_keeps_its_foreground_whole(tmp_path):
    image = np.zeros((9, 11), np.uint8)
    image[4, 5] = 200
    found = AxisExtremesd("image", above_minimum=True)(
        Compose(LOADING)({"image": write_picture(tmp_path / "a.tif", image)})
    )
    assert found["image_extremes"].amax(dim=0).tolist() == [10, 8, 0]


def test_volumes_without_a_mask_stay_as_they_are_and_with_one_they_have_an_outside(tmp_path):
    image, _ = make_scan()
    path = write_nifti(tmp_path / "a.nii.gz", image)
    plain = Compose(LOADING)({"image": path})["image"]
    assert np.array_equal(plain[0], image) and "mask_file" not in plain.meta
    mask = np.ones(image.shape, np.uint8)
    mask[:5] = 0
    masked = Compose(LOADING)({"image": path, "mask": write_nifti(tmp_path / "m.nii.gz", mask)})["image"][0]
    assert (masked[:5] == 0).all() and (masked[5:] > 0).all()
    other = {"image": plain, "mask": write_nifti(tmp_path / "n.nii.gz", mask[1:])}
    with pytest.raises(DataError, match="its mask"):
        RaiseTissued("image")(other)


def test_class_255_beside_a_mask_is_refused():
    image = MetaTensor(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), meta={"mask_file": ""})
    with pytest.raises(ConfigError, match="class 255 beside a mask"):
        IgnoreOutsided("label")({"image": image, "label": torch.full((1, 2, 1, 1), 255)})


LOSSES = {
    "MAPSeg": SegmentationLoss(),
    "MAPSeg, weighted": SegmentationLoss(class_weights=[1.0, 2.0, 3.0]),
    "Dice and cross-entropy": LeavingOut(DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_loss_and_no_gradient_comes_from_ignored_voxels(loss):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 1, requires_grad=True)
    label = torch.randint(0, 3, (2, 1, 4, 5, 1))
    label[:, :, :2] = IGNORED
    value = loss(logits, label)
    value.backward()
    assert (logits.grad[:, :, :2] == 0).all() and (logits.grad[:, :, 2:] != 0).any()
    changed = logits.detach().clone()
    changed[:, :, :2] = torch.randn(2, 3, 2, 5, 1)
    assert loss(changed, label).item() == pytest.approx(value.item(), abs=1e-6)
    as_background = torch.where(label == IGNORED, 0, label)
    assert loss(logits, as_background).item() != pytest.approx(value.item(), abs=1e-3)


def test_the_segmentation_loss_is_that_of_the_voxels_that_count():
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 6, 5, 1), torch.randint(0, 3, (1, 1, 6, 5, 1))
    part = SegmentationLoss()(logits[:, :, 2:], label[:, :, 2:])
    label[:, :, :2] = IGNORED
    torch.testing.assert_close(SegmentationLoss()(logits, label), part)
    shares = ClassShareLoss()
    torch.testing.assert_close(shares(logits, label), shares(logits, label[:, :, 2:]))


@pytest.mark.parametrize("kind", [ArgmaxLabels, ViewLabels])
def test_pseudo_labels_outside_are_ignored_where_tissue_is_known(kind):
    teacher = SimpleNamespace(active=True, network=PlainPass(torch.nn.Conv3d(1, 3, 1)))
    image = torch.rand(1, 1, 4, 5, 1) + 0.1
    image[:, :, :2] = 0
    label = kind(teacher, ignore_outside=True)(image=image)["logits"].label
    assert (label[:, :, :2] == IGNORED).all() and (label[:, :, 2:] < 3).all()
    assert (kind(teacher)(image=image)["logits"].label < 3).all()


def test_tissue_is_known_if_it_is_in_all_target_scans():
    images, masked, volume = {"image": "a.png"}, {"image": "b.nii", "mask": "m.nii"}, {"image": "c.nii.gz"}
    assert tissue_is_known("", {"target_training": [images, masked]})
    assert not tissue_is_known("", {"target_training": [images, volume]}) and not tissue_is_known("", {})


def test_a_metric_sees_no_difference_where_the_label_is_ignored():
    label = torch.tensor([IGNORED, 1, 2, 0]).view(1, 4, 1, 1)
    logits = torch.eye(3)[[2, 1, 2, 1]].T.reshape(3, 4, 1, 1)
    found = WithoutIgnoredd("pred")({"pred": logits, "label": label})
    assert found["pred"].argmax(dim=0).flatten().tolist() == [0, 1, 2, 1]
    assert found["label"].flatten().tolist() == [0, 1, 2, 0] and label.flatten()[0] == IGNORED


def test_results_are_0_outside_on_the_grid_of_the_file(case):
    image = Compose(LOADING)(case)["image"]
    found = ClearOutsided("pred")({"image": image, "pred": torch.ones(1, 56, 40, 1)})["pred"]
    assert (found[:, 40:] == 0).all() and (found[:, :40] == 1).all()
    with pytest.raises(DataError, match="its mask"):
        ClearOutsided("pred")({"image": image, "pred": torch.ones(1, 9, 9, 1)})
