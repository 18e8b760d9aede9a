# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""GroupNorm in both memory formats against float64."""

import pytest
import torch

from mapseg_components.networks.normalization import GroupNorm, group_norm


def features(shape, dtype=torch.float32, mean=2.0):
    """Of one spread and a mean of several: what a ReLU and a bias leave."""
    generator = torch.Generator().manual_seed(0)
    level = mean * (1 + torch.rand(1, shape[1], 1, 1, 1, generator=generator))
    return (level + torch.randn(shape, generator=generator)).to(dtype)


def gradients(norm, image, memory_format):
    """Output and all gradients, float64."""
    image = image.contiguous(memory_format=memory_format).requires_grad_()
    output = norm(image)
    slopes = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    found = torch.autograd.grad(output, [image, norm.weight, norm.bias], slopes)
    return [tensor.detach().double() for tensor in (output, *found)]


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def normalization(channels, groups, kind=GroupNorm):
    norm = kind(groups, channels)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_group_norm_is_exact_in_both_memory_formats(groups, memory_format):
    image = features((2, 16, 40, 41, 42))
    exact = gradients(normalization(16, groups, torch.nn.GroupNorm).double(), image.double(), torch.contiguous_format)
    found = gradients(normalization(16, groups), image, memory_format)
    # PyTorch's own format is PyTorch's own code, whose gradients of weight and bias round more
    allowed = 2e-6 if memory_format == torch.channels_last_3d else 1e-4
    assert max(distance(*pair) for pair in zip(found, exact)) < allowed


def test_pytorchs_own_is_not_and_is_still_why_ours_exists():
    # once this fails, PyTorch's own will do: then GroupNorm can go
    image = features((1, 16, 96, 96, 96), mean=20.0)
    exact = gradients(normalization(16, 16, torch.nn.GroupNorm).double(), image.double(), torch.contiguous_format)
    own = gradients(normalization(16, 16, torch.nn.GroupNorm), image, torch.channels_last_3d)
    ours = gradients(normalization(16, 16), image, torch.channels_last_3d)
    for theirs, mine, truth in zip(own[:2], ours[:2], exact[:2]):
        assert distance(mine, truth) < 1e-5 < 1e-3 < distance(theirs, truth)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_derivatives_are_those_of_the_function(memory_format):
    norm = normalization(4, 2).double()
    image = features((2, 4, 2, 3, 2), torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(norm, (image,))


def test_half_precision_keeps_its_type_and_its_format():
    image = features((2, 8, 6, 6, 6), torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    norm = normalization(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = norm(image.requires_grad_())
        output.float().sum().backward()
    assert output.dtype == image.grad.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
    assert image.grad.is_contiguous(memory_format=torch.channels_last_3d)
    exact = torch.nn.functional.group_norm(image.double(), 4, norm.weight.double(), norm.bias.double())
    assert distance(output.detach().double(), exact.detach()) < 0.01


def test_half_precision_is_summed_in_single():
    image = features((2, 8, 20, 20, 20), torch.bfloat16, mean=20.0)
    exact = gradients(normalization(8, 4, torch.nn.GroupNorm).double(), image.double(), torch.contiguous_format)
    found = gradients(normalization(8, 4), image, torch.channels_last_3d)
    # what remains is the rounding of output, slopes and the input's gradient to 8 bits
    assert max(distance(*pair) for pair in zip(found, exact)) < 0.01


def test_without_weight_or_bias_it_is_pytorchs_own():
    image = features((2, 8, 6, 6, 6)).contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(GroupNorm(4, 8, affine=False)(image), torch.nn.functional.group_norm(image, 4))


@pytest.mark.parametrize("channels, groups", [(1, 1), (24, 8)])
def test_groups_divide_the_channels(channels, groups):
    assert group_norm(channels, 32).num_groups == groups


def test_scripted_and_compiled_networks_take_pytorchs_own():
    norm, image = normalization(8, 4), features((1, 8, 5, 5, 5))
    last = image.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(torch.jit.script(norm)(last), norm(image))
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(last), norm(image))
