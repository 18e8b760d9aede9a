# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Norms of features in channels_last_3d are PyTorch's, to the last digits; other features are left to PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mapseg_components.networks import norms
from mapseg_components.networks.memory_format import set_memory_format
from mapseg_components.networks.norms import ChannelsLastGroupNorm, ChannelsLastInstanceNorm, set_norms

LAYERS = {
    "two groups": lambda: nn.GroupNorm(2, 6),
    "one group": lambda: nn.GroupNorm(1, 6),
    "a group a channel": lambda: nn.GroupNorm(6, 6),
    "instances": lambda: nn.InstanceNorm3d(6, affine=True),
}
SHAPE = (3, 6, 5, 4, 7)


def features(dtype=torch.float32, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def layer(name, dtype=torch.float32):
    torch.manual_seed(1)
    made = LAYERS[name]().to(dtype)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def found(norm, values):
    """Result and all gradients."""
    values = values.clone().requires_grad_()
    result = norm(values)
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
    (result * weights.sin()).sum().backward()
    return result.detach(), values.grad, norm.weight.grad, norm.bias.grad


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(norms, "SMALLEST", 0)


@pytest.fixture
def used(monkeypatch):
    """Shapes that this module's own way was taken for."""
    shapes, apply = [], norms._Normalise.apply
    monkeypatch.setattr(norms._Normalise, "apply", lambda *given: shapes.append(given[0].shape) or apply(*given))
    return shapes


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_pytorchs(name, used):
    plain, values = layer(name, torch.float64), features(torch.float64, mean=3.0)
    ours = set_norms(copy.deepcopy(plain))
    for one, other in zip(found(ours, values), found(plain, values)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    assert used == [SHAPE]


def test_instances_are_faster_without_gradients_as_well(used):
    plain, values = layer("instances"), features(mean=3.0)
    with torch.no_grad():
        torch.testing.assert_close(set_norms(copy.deepcopy(plain))(values), plain(values), rtol=1e-4, atol=1e-4)
    assert used == [SHAPE]


def test_a_traced_network_has_pytorchs_norm(used):
    with torch.no_grad():
        traced = torch.jit.trace(set_norms(layer("instances")), features(), check_trace=False)
    assert "instance_norm" in str(traced.graph) and used == []


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name, used):
    ours = set_norms(layer(name, torch.float64))
    values = features(torch.float64)[:2, :, :3, :2, :3].contiguous(memory_format=torch.channels_last_3d)
    assert torch.autograd.gradcheck(ours, (values.requires_grad_(),))
    assert used


def test_features_far_from_zero_keep_their_digits():
    values = features(mean=1000.0)
    exact = found(layer("two groups", torch.float64), values.double())
    ours = found(set_norms(layer("two groups")), values)
    theirs = found(layer("two groups"), values)
    error, plain = (float((each[0] - exact[0]).abs().max()) for each in (ours, theirs))
    assert error < 1e-3 and error < plain


def test_the_memory_format_stays_and_an_activation_may_work_in_place(used):
    network = nn.Sequential(layer("two groups"), nn.LeakyReLU(inplace=True))
    result = set_norms(network)(features().requires_grad_())
    assert result.is_contiguous(memory_format=torch.channels_last_3d) and used
    result.sum().backward()
    assert network[0].weight.grad.abs().sum() > 0


def test_what_does_not_gain_is_left_to_pytorch(used, monkeypatch):
    norm, values = set_norms(layer("two groups")), features()
    with torch.no_grad():
        norm(values)  # PyTorch's forward pass is as fast
    norm(values.contiguous())
    norm(values.bfloat16().float()[:, :, 0].contiguous())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(values.bfloat16())
    set_norms(nn.GroupNorm(2, 6, affine=False))(values)
    monkeypatch.setattr(norms, "SMALLEST", values.numel() + 1)
    norm(values)
    assert used == []


def test_twice_the_same_bits():
    first, second = (found(set_norms(layer("two groups")), features()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_a_network_in_channels_last_has_them_by_the_same_names():
    network = nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.GroupNorm(2, 6), nn.InstanceNorm3d(6, affine=True),
        nn.InstanceNorm3d(6, track_running_stats=True), nn.BatchNorm3d(6),
    )  # fmt: skip
    names = list(network.state_dict())
    assert [type(one) for one in set_memory_format(network, None)][1:3] == [nn.GroupNorm, nn.InstanceNorm3d]
    kinds = [type(one) for one in set_memory_format(network, "channels_last_3d")]
    assert kinds[1:] == [ChannelsLastGroupNorm, ChannelsLastInstanceNorm, nn.InstanceNorm3d, nn.BatchNorm3d]
    assert list(network.state_dict()) == names


def test_norms_without_a_bias_and_of_half_precision_are_left_to_pytorch():
    norm = ChannelsLastGroupNorm(2, 8, bias=False)
    features = torch.rand(1, 8, 32, 32, 40).to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(norm(features), nn.functional.group_norm(features, 2, norm.weight))
    half = features.half()
    assert ChannelsLastInstanceNorm(8, affine=True).half()(half).isfinite().all()
