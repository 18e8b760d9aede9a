# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Random contrasts on the device: ranges, background, and the generator that checkpoints keep."""

from __future__ import annotations

import pytest
import torch

from mapseg_components.contrast import RandomContrast, inverted
from mapseg_components.errors import ConfigError


def images(batch=4):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, 6, 7, 8, generator=generator)
    return torch.where(image < 0.3, torch.zeros_like(image), image)


def test_background_stays_and_values_keep_their_range():
    image = images()
    for contrast in (RandomContrast(), RandomContrast(invert_prob=1.0), RandomContrast(noise=0.5)):
        changed = contrast(image)
        assert torch.equal(changed[image == 0], torch.zeros_like(changed[image == 0]))
        assert changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, image)
    assert torch.equal(inverted(image) == 0, (image == 0) | (image == 1))
    assert torch.allclose(inverted(image)[image > 0], 1 - image[image > 0])


def test_each_image_has_a_draw_of_its_own_from_the_generator_of_checkpoints():
    image = images(1).expand(4, -1, -1, -1, -1)
    torch.manual_seed(3)
    first = RandomContrast()(image)
    torch.manual_seed(3)
    assert torch.equal(RandomContrast()(image), first)
    assert not torch.equal(first[0], first[1])
    seen = {bool((RandomContrast((1, 1), invert_prob=0.5)(image[:1]) == image[:1]).all()) for _ in range(20)}
    assert seen == {True, False}


@pytest.mark.parametrize(
    "settings, words",
    [({"gamma": (0, 1)}, "gamma is"), ({"invert_prob": 2}, "invert_prob is 2"), ({"noise": -1}, "noise is -1")],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        RandomContrast(**settings)
