# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/widen_network.py: a network with more channels that computes the same."""

from __future__ import annotations

import pytest
import torch

from mapseg_components.errors import ConfigError
from mapseg_components.shipped_files import bundle_of
from tools.widen_network import main, network_of, widened

BUNDLE = bundle_of("brain_any_contrast")


def call(tmp_path, filters, wider):
    network = network_of(BUNDLE, filters)
    torch.save(network.state_dict(), tmp_path / "own.pt")
    words = ["--filters", *map(str, filters), "--wider", *map(str, wider)]
    main([str(tmp_path / "own.pt"), str(tmp_path / "wide.pt"), "--bundle", str(BUNDLE), *words])
    wide = network_of(BUNDLE, wider)
    wide.load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True))
    return network.eval(), wide.eval()


def test_the_wider_network_computes_the_same_and_its_copies_learn_different_things(tmp_path):
    torch.manual_seed(0)
    own, wide = call(tmp_path, [8, 16, 24, 32], [8, 16, 48, 96])
    image = torch.rand(2, 1, 16, 24, 16)
    torch.testing.assert_close(wide(image), own(image), rtol=1e-4, atol=1e-4)
    wide(image).square().mean().backward()
    gradient = wide.encoder.levels[2].conv1.conv.weight.grad
    assert (gradient[0] - gradient[1]).abs().max() > 0.01 * gradient[0].abs().max()


def test_channels_are_multiples_and_groups_stay(tmp_path):
    weights = network_of(BUNDLE, [8, 16, 24, 32]).state_dict()
    shapes = {name: value.shape for name, value in network_of(BUNDLE, [8, 16, 24, 40]).state_dict().items()}
    with pytest.raises(ConfigError, match="has 32 channels, 40 are no multiple of them"):
        widened(weights, shapes)
    with pytest.raises(ConfigError, match="normalization has other groups"):
        call(tmp_path, [12, 24, 48, 96], [24, 24, 48, 96])  # 4 groups of 3 channels, then 8
    assert not (tmp_path / "wide.pt").exists()
