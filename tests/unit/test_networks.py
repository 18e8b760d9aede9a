# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from mapseg_components.boxes import resample_box
from mapseg_components.networks import (
    ASPP,
    GlobalLocalDeepLabV3,
    GlobalLocalPass,
    MultiScaleMAE,
    ResidualEncoder,
)

BOX = torch.tensor([[[1.0, 9.0], [2.0, 14.0], [3.0, 19.0]]])


def test_full_size_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        network = GlobalLocalDeepLabV3(in_channels=1, num_classes=8, width=512, depth=8)
        image = torch.empty(1, 1, 96, 96, 96)
        assert network.encode(image).shape == (1, 512, 24, 24, 24)
        assert network(image).shape == (1, 8, 96, 96, 96)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(209.9e6, abs=0.05e6)


@pytest.mark.parametrize("stride, shape", [(4, (16, 24, 20)), ((4, 4, 1), (16, 24, 5)), ((2, 4, 1), (6, 12, 3))])
def test_any_size_that_the_stride_divides(stride, shape):
    network = GlobalLocalDeepLabV3(2, 5, 8, 2, stride=stride, dilations=(1, (2, 2, 1)), head_channels=8).eval()
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    image = torch.rand(1, 2, *shape)
    assert network.encode(image).shape == (1, 8, *(s // k for s, k in zip(shape, strides)))
    assert network(image).shape == (1, 5, *shape)
    assert MultiScaleMAE(2, 8, 1, stride, (8, 4))(image).shape == image.shape


def test_size_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible by the encoder's stride"):
        ResidualEncoder(1, 8, 1, stride=4)(torch.rand(1, 1, 8, 8, 10))


def test_one_image_call_duplicates_the_feature(tiny_network):
    image = torch.rand(2, 1, 16, 12, 20)
    features = tiny_network.encode(image)
    torch.testing.assert_close(tiny_network(image), tiny_network.decode(features), rtol=0, atol=0)
    twice = tiny_network.decode(features, features)
    torch.testing.assert_close(tiny_network(image), twice, rtol=1e-4, atol=1e-5)


def test_whole_box_of_the_same_image_is_the_one_image_call(tiny_network):
    image = torch.rand(1, 1, 16, 12, 20)
    box = torch.tensor([[[0.0, 16.0], [0.0, 12.0], [0.0, 20.0]]])
    torch.testing.assert_close(tiny_network(image, image, box), tiny_network(image), rtol=0, atol=1e-5)


def test_context_is_the_box_of_the_global_features(tiny_network):
    features = torch.rand(1, 8, 4, 6, 5)
    box = torch.tensor([[[4.0, 12.0], [8.0, 24.0], [0.0, 12.0]]])
    context = tiny_network.context(features, box, [16, 24, 20], [2, 4, 3])
    torch.testing.assert_close(context, features[:, :, 1:3, 2:6, 0:3])


def test_global_view_changes_the_local_result(tiny_network):
    image, view = torch.rand(1, 1, 16, 12, 20), torch.rand(1, 1, 16, 16, 20)
    assert not torch.allclose(tiny_network(image, view, BOX), tiny_network(image, 1 - view, BOX))


def test_half_a_collaboration_is_refused(tiny_network):
    with pytest.raises(ValueError, match="belong together"):
        tiny_network(torch.rand(1, 1, 16, 12, 20), torch.rand(1, 1, 16, 12, 20))


def test_batch_of_two_equals_two_batches_of_one(tiny_network):
    image, view = torch.rand(2, 1, 16, 12, 20), torch.rand(2, 1, 20, 16, 12)
    boxes = torch.cat([BOX, BOX * 0.5])
    both = tiny_network(image, view, boxes)
    single = torch.cat([tiny_network(image[i : i + 1], view[i : i + 1], boxes[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view_shape", [(16, 12, 20), (12, 16, 8)])
def test_training_pass_agrees_with_separate_calls(tiny_network, view_shape):
    image, view = torch.rand(2, 1, 16, 12, 20), torch.rand(2, 1, *view_shape)
    box = torch.tensor([[[1.0, 9.0], [2.0, 10.0], [0.0, 8.0]]] * 2)
    output = GlobalLocalPass(tiny_network)(image, view, box)
    torch.testing.assert_close(output["logits"], tiny_network(image, view, box), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["global_logits"], tiny_network(view), rtol=1e-4, atol=1e-5)
    assert output["local_features"].shape == output["context_features"].shape == (2, 8, 4, 3, 5)


def test_gradients_reach_every_parameter(tiny_network):
    network = tiny_network.train()
    output = GlobalLocalPass(network)(torch.rand(1, 1, 16, 12, 20), torch.rand(1, 1, 16, 12, 20), BOX)
    sum(tensor.square().mean() for tensor in output.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    autoencoder = MultiScaleMAE(1, 8, 2, 4, (8, 4))
    autoencoder(torch.rand(1, 1, 8, 12, 16)).square().mean().backward()
    dead = [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_reconstruction_is_an_image():
    out = MultiScaleMAE(1, 8, 1)(torch.rand(1, 1, 8, 8, 12))
    assert out.min() >= 0 and out.max() <= 1


def test_aspp_has_a_branch_per_dilation():
    aspp = ASPP(6, 8, dilations=(1, 2, 3, 4))
    assert aspp(torch.rand(1, 6, 4, 5, 6)).shape == (1, 8, 4, 5, 6)
    assert len(aspp.branches) == 5


def test_network_scripts_and_agrees(tiny_network):
    scripted = torch.jit.script(tiny_network)
    image = torch.rand(1, 1, 16, 12, 20)
    torch.testing.assert_close(scripted(image, image, BOX), tiny_network(image, image, BOX))
    torch.testing.assert_close(scripted(image), tiny_network(image))


def test_class_logits_are_not_rounded_to_bfloat16(tiny_network):
    image, hidden = torch.rand(1, 1, 16, 12, 20), {}
    tiny_network.head.layers[-1].register_forward_hook(lambda module, given, logits: hidden.update(given=given[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny_network(image)
    assert logits.dtype == torch.float32
    last = tiny_network.head.layers[-1]
    expected = torch.nn.functional.conv3d(hidden["given"].float(), last.weight, last.bias)
    torch.testing.assert_close(logits, expected)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_resample_box_equals_grid_sample():
    volume, box = torch.rand(2, 3, 7, 9, 11), torch.tensor([[[1.2, 6.0], [0.5, 8.0], [2.0, 9.7]]] * 2)
    size = [4, 5, 6]
    axes = [box[0, a, 0] + (torch.arange(n) + 0.5) / n * (box[0, a, 1] - box[0, a, 0]) for a, n in enumerate(size)]
    normal = [2 * axis / side - 1 for axis, side in zip(axes, volume.shape[2:])]
    grid = torch.stack(torch.meshgrid(*normal, indexing="ij"), -1).flip(-1)[None].expand(2, -1, -1, -1, -1)
    expected = torch.nn.functional.grid_sample(volume, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(resample_box(volume, box, size), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within another module"])
def test_the_training_pass_has_the_segmenters_names_and_takes_them(tiny_network, wrapped):
    """So weights of the segmenter load into whatever a client trains, none of them left out; older names load, too."""
    one = GlobalLocalPass(tiny_network)
    module, prefix = (torch.nn.Sequential(one), "0.") if wrapped else (one, "")
    before = {name: value.clone() for name, value in tiny_network.state_dict().items()}
    assert list(module.state_dict()) == [prefix + name for name in before]
    for inner in ("", "network."):
        for parameter in tiny_network.parameters():
            torch.nn.init.zeros_(parameter)
        module.load_state_dict({f"{prefix}{inner}{name}": value for name, value in before.items()})
        assert all(torch.equal(value, before[name]) for name, value in tiny_network.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(dict(list(module.state_dict().items())[1:]))
