# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Copy-paste as a method of the bundle: trained, resumed, and of images with one slice."""

from __future__ import annotations

import pytest
import torch

from mapseg_components.plans.recipes import read_recipe
from tests.bundles.test_guests import FLAT, FLAT_UNET, PLAIN, UNET, cause, train, weights
from tests.conftest import make_flat_dataset

OVERLAYS = ["dynunet.yaml", "copy_paste.yaml"]
TERMS = {"source", "source_box", "source_around", "target_box", "target_around", "target_loss", "score"}


def test_it_trains_and_resumes_bit_for_bit(dataset, tmp_path):
    whole = train(tmp_path / "whole", dataset, *OVERLAYS, **UNET, max_epochs=3)
    assert TERMS <= set(whole[-1]) and "target_box" not in whole[0]  # the teacher starts with the second epoch
    for epochs in (2, 3):
        train(tmp_path / "parts", dataset, *OVERLAYS, **UNET, max_epochs=epochs)
    first, second = (weights(tmp_path / name / "last.pt")["network"] for name in ("whole", "parts"))
    assert any("upsamples" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_its_recipe_runs_what_its_stages_name(dataset, tmp_path):
    recipe = read_recipe("copy_paste").without_contrasts()
    source, adaptation = recipe.stages
    train(tmp_path / "source", dataset, "dynunet.yaml", *recipe.overlays, *source.overlays, **UNET)
    start = {"initial_weights": str(tmp_path / "source" / "source_only.pt"), "max_epochs": 1}
    changed = ["dynunet.yaml", *recipe.overlays, *adaptation.overlays, "contrast_consistency.yaml"]
    assert TERMS <= set(train(tmp_path / "adaptation", dataset, *changed, **UNET, **start)[-1])


def test_a_loss_that_leaves_no_voxel_out_is_refused(dataset, tmp_path):
    with pytest.raises(Exception) as caught:
        train(tmp_path, dataset, *PLAIN, "copy_paste.yaml", **UNET)
    assert "DiceCELoss cannot leave voxels out" in str(cause(caught.value))


def test_images_of_one_slice_are_mixed(tmp_path):
    make_flat_dataset(tmp_path)
    assert TERMS <= set(train(tmp_path / "run", tmp_path, *OVERLAYS, **FLAT, **FLAT_UNET)[-1])
