# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from mapseg_components.errors import ConfigError
from mapseg_components.masking import block_grid, check_mask_value, draw_block_mask, expand_block_mask, hide
from mapseg_components.transforms import RandBlockMask, RandBlockMaskd


@pytest.mark.parametrize("block, hidden", [(8, 1210), (4, 9677)])
def test_paper_masks_hide_an_exact_count(block, hidden):
    mask = draw_block_mask(3, block_grid((96, 96, 96), block), 0.7)
    assert mask.flatten(1).sum(1).tolist() == [hidden] * 3
    assert mask.shape == (3, 1, *(96 // block,) * 3)


def test_samples_are_independent_and_seeded():
    draws = [draw_block_mask(2, (3, 4, 5), 0.5, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("ratio, hidden", [(0.0, 0), (1.0, 60)])
def test_extreme_ratios(ratio, hidden):
    assert draw_block_mask(1, (3, 4, 5), ratio).sum() == hidden


def test_mask_grows_to_voxels_blockwise_and_true_is_hidden():
    mask = torch.zeros(1, 1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1, 2] = True
    grown = expand_block_mask(mask, (2, 4, 9))
    assert grown.sum() == 2 * 2 * 3 and grown[..., 2:, 6:].all()
    image = hide(torch.ones(1, 2, 2, 4, 9), grown)
    assert image[:, :, :, 2:, 6:].sum() == 0 and image.sum() == 2 * (72 - 12)


def test_block_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"\(8, 8, 8\) does not divide the image \(16, 24, 20\)"):
        block_grid((16, 24, 20), 8)
    with pytest.raises(ConfigError, match=r"mask_ratio is 1\.2"):
        draw_block_mask(1, (2, 2, 2), 1.2)


def test_transform_hides_and_tells():
    image = torch.rand(2, 8, 12, 16) + 1
    transform = RandBlockMaskd(keys=["a", "b"], block_size=(4, 4, 2), mask_ratio=0.25).set_random_state(3)
    out = transform({"a": image, "b": image, "other": 1})
    assert out["other"] == 1
    for key in "ab":
        assert out[f"{key}_mask"].shape == (1, 8, 12, 16) and out[f"{key}_mask"].float().mean() == 0.25
        assert torch.equal(out[key] == 0, out[f"{key}_mask"].expand(2, -1, -1, -1))
    assert not torch.equal(out["a_mask"], out["b_mask"])
    again = RandBlockMaskd(keys=["a", "b"], block_size=(4, 4, 2), mask_ratio=0.25).set_random_state(3)
    assert torch.equal(again({"a": image, "b": image})["b_mask"], out["b_mask"])
    single = RandBlockMask(4, 0.5).set_random_state(0)
    assert torch.equal(single(image), single(image, randomize=False))


@pytest.mark.parametrize("value", [0.0, 0, -1.0, 0.37, "mean"])
def test_a_hidden_voxel_shows_the_mask_value_and_the_others_themselves(value):
    image = torch.rand(2, 3, 8, 12, 16) + torch.arange(2).view(2, 1, 1, 1, 1)
    mask = expand_block_mask(draw_block_mask(2, (2, 3, 4), 0.5), (8, 12, 16)).expand_as(image)
    means = image.double().mean(dim=(2, 3, 4), keepdim=True).float().expand_as(image)
    shown = means if value == "mean" else torch.full_like(image, value)
    found = hide(image, mask, value)
    torch.testing.assert_close(found[mask], shown[mask])
    assert torch.equal(found[~mask], image[~mask])
    transform = RandBlockMaskd("a", block_size=4, mask_ratio=0.5, mask_value=value).set_random_state(0)
    out = transform({"a": image[0]})
    torch.testing.assert_close(out["a"], hide(image[0], out["a_mask"], value))


@pytest.mark.parametrize("value", ["median", "noise", None, float("nan"), float("inf"), True, [0.5], ""])
def test_an_unknown_mask_value_is_refused(value):
    for make in (check_mask_value, lambda v: RandBlockMask(4, 0.5, v)):
        with pytest.raises(ConfigError, match=r"mask_value is .*expected a number .*or 'mean'"):
            make(value)
