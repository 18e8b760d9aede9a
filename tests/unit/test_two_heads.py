# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks with two heads: logits alone for everyone else, both for those that ask."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import nn

from mapseg_components.checkpoints import load_weights, weights_of, write_atomic
from mapseg_components.errors import CheckpointError, ConfigError
from mapseg_components.handover.fragments import faults_of_fragment, network_of
from mapseg_components.inferers import AveragingInferer, GlobalLocalSlidingWindowInferer
from mapseg_components.networks import (
    GlobalLocalDeepLabV3,
    GlobalLocalPass,
    GlobalLocalUNet,
    PlainPass,
    TwoHeadDynUNet,
    both_heads,
    has_uncertainty,
    training_pass,
)
from mapseg_components.transforms import Uncertaintyd

SIDES = (8, 16, 12)
DYNUNET = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 8],
}
MAKERS = {
    "dynunet": lambda variance: TwoHeadDynUNet(**DYNUNET, variance=variance),
    "unet": lambda variance: GlobalLocalUNet(1, 3, [4, 8], [3, 3], [2, 2], norm_groups=2, variance=variance),
    "unet_at_full_resolution": lambda variance: GlobalLocalUNet(1, 3, [4, 8], [3, 3], [1, 2], 2, variance),
    "deeplab": lambda variance: GlobalLocalDeepLabV3(1, 3, 8, 1, dilations=[1], head_channels=4, variance=variance),
}


def made(name, variance="free", seed=0):
    torch.manual_seed(seed)
    return MAKERS[name](variance)


def image(seed=1, sides=SIDES):
    return torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(seed))


def teach(network, rate=0.5):
    """Let V depend on the image, as after training."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += rate * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    return network


def without_second_head(network, plain):
    """The weights of a network with two heads as those of one without: half of the last layer's channels."""
    state, expected = network.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    found = {}
    for name, value in state.items():
        axes = [axis for axis, side in enumerate(value.shape) if side != expected[name].shape[axis]]
        assert len(axes) <= 1
        found[name] = value.chunk(2, dim=axes[0])[0] if axes else value
    return found


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("variance", ["free", "softplus"])
def test_logits_are_those_of_the_plain_network_and_v_starts_as_one(name, variance):
    network, plain = made(name, variance).eval(), made(name, None, seed=5).eval()
    plain.load_state_dict(without_second_head(network, plain))
    assert not has_uncertainty(plain) and has_uncertainty(network)
    torch.testing.assert_close(network(image()), plain(image()), rtol=0, atol=1e-6)
    logits, uncertainty = both_heads(network)(image()).chunk(2, dim=1)
    assert torch.equal(logits, network(image()))  # the network itself goes on giving logits alone
    torch.testing.assert_close(uncertainty, torch.ones_like(uncertainty))


@pytest.mark.parametrize("name", MAKERS)
def test_supervised_steps_are_those_of_the_plain_network(name):
    """The first stage learns O as if there were no V, and V stays what it is."""
    network, plain = made(name), made(name, None)
    plain.load_state_dict(without_second_head(network, plain))
    label, loss = (image(2) > 0.5).long(), DiceCELoss(to_onehot_y=True, softmax=True)
    for one in (network, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(3)  # dropout
            loss(PlainPass(one)(image())["logits"], label).backward()
            assert all(parameter.grad is not None for parameter in one.parameters())  # as distributed training needs
            optimizer.step()
    expected = plain.state_dict()
    for key, value in without_second_head(network, plain).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    uncertainty = both_heads(network.eval())(image())[:, 3:]
    assert torch.equal(uncertainty, torch.ones_like(uncertainty))


def test_softplus_keeps_v_above_0_and_free_does_not():
    values = {v: both_heads(teach(made("dynunet", v)).eval())(image())[:, 3:] for v in ("free", "softplus")}
    assert values["softplus"].min() > 0 > values["free"].min()
    torch.testing.assert_close(nn.functional.softplus(values["free"]), values["softplus"], atol=0.6, rtol=10)


def test_an_unknown_variance_and_a_network_without_v_are_refused():
    with pytest.raises(ConfigError, match="variance is 'positive', expected 'free', 'softplus', or null"):
        made("unet", "positive")
    with pytest.raises(ConfigError, match="GlobalLocalUNet has no uncertainty head"):
        both_heads(made("unet", None))
    with pytest.raises(ConfigError, match="has no bias"):
        made_without_bias = nn.Conv3d(4, 6, 1, bias=False)
        made("unet").set_heads("free", made_without_bias)


def test_the_view_shares_weights_that_are_loaded_later(tmp_path):
    network, other = made("unet").eval(), teach(made("unet", seed=4)).eval()
    view = both_heads(network)
    write_atomic(weights_of(other), tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")
    assert torch.equal(view(image()), both_heads(other)(image()))
    with pytest.raises(CheckpointError, match="expected"):  # a file of both heads is not one of a plain network
        load_weights(made("unet", None), tmp_path / "w.pt")


@pytest.mark.parametrize("deep", [False, True])
def test_one_slice_of_a_volume_is_an_image(deep):
    """2D and 3D with kernels and strides of 1 along the slices are one network."""
    options = {**DYNUNET, "deep_supervision": deep, "deep_supr_num": 1, "filters": [4, 8, 8]}
    flat = TwoHeadDynUNet(**{**options, "spatial_dims": 2}, variance="free")
    sides = {"kernel_size": [[3, 3, 1]] * 3, "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 1]]}
    volume = TwoHeadDynUNet(**{**options, **sides, "upsample_kernel_size": [[2, 2, 1]] * 2}, variance="free")
    teach(flat)
    volume.load_state_dict({k: v[..., None] if v.ndim == 4 else v for k, v in flat.state_dict().items()})
    x = image(sides=(8, 16, 1))
    expected, found = PlainPass(flat)(x[..., 0]), PlainPass(volume)(x)
    assert set(found) == {"logits", "uncertainty", *(["deep_1"] if deep else [])}
    for name, value in found.items():
        torch.testing.assert_close(value[..., 0], expected[name], rtol=1e-4, atol=1e-4)


def test_dynunet_without_v_is_monais():
    network = made("dynunet", None)
    monai = DynUNet(**DYNUNET)
    monai.load_state_dict(network.state_dict())
    assert torch.equal(network(image()), monai(image()))
    deep = {**DYNUNET, "deep_supervision": True}
    network, monai = TwoHeadDynUNet(**deep), DynUNet(**deep)
    monai.load_state_dict(network.state_dict())
    assert torch.equal(network(image()), monai(image())) and torch.equal(network.eval()(image()), monai.eval()(image()))


@pytest.mark.parametrize("name", ["unet", "deeplab"])
def test_a_pass_with_a_view_names_both_heads_of_both(name):
    network = teach(made(name)).eval()
    box = torch.tensor([[[0.0, side / 2] for side in SIDES]] * 2)
    found = training_pass(network)(image=image(), global_image=image(2), box=box)
    expected = GlobalLocalPass(both_heads(network))
    assert {"logits", "uncertainty", "global_logits", "global_uncertainty"} < set(found)
    assert torch.equal(found["logits"], network(image(), image(2), box))
    assert torch.equal(found["global_uncertainty"], expected.network(image(2))[:, 3:])
    assert found["uncertainty"].shape == found["logits"].shape == (2, 3, *SIDES)


@pytest.mark.parametrize("global_view", [True, False])
def test_windows_give_both_and_no_uncertainty_where_there_is_no_window(global_view):
    network = teach(made("unet")).eval()
    scan = torch.zeros(1, 1, 30, 12, 20)
    scan[:, :, 2:10, 2:10, 3:18] = image(3, (8, 8, 15))[:1]
    inferer = GlobalLocalSlidingWindowInferer((8, 8, 8), stride=(6, 8, 4), global_view=global_view)
    logits, uncertainty = inferer(scan, both_heads(network)).chunk(2, dim=1)
    assert torch.equal(logits, inferer(scan, network))
    assert torch.equal(uncertainty[:, :, 20:], torch.zeros(1, 3, 10, 12, 20))
    assert (uncertainty[:, :, 2:10, 2:10, 3:18] != 0).all() and (logits[:, 1:, 20:] == -10).all()
    if not global_view:  # MONAI's own inferer takes the same network
        whole = SlidingWindowInferer((8, 12, 20))(torch.rand(1, 1, 28, 12, 20), both_heads(made("unet").eval()))
        assert whole.shape[1] == 6


def test_members_and_mirror_images_average_probabilities_and_absolute_uncertainty(tmp_path):
    network, other = (teach(made("unet", seed=seed), rate).eval() for seed, rate in ((0, 0.5), (4, 0.2)))
    write_atomic(weights_of(other), tmp_path / "w.pt")
    windows = GlobalLocalSlidingWindowInferer((8, 8, 8), global_view=False)
    scan = image()[:1]
    inferer = AveragingInferer(windows, [tmp_path / "w.pt"], flip_axes=[0])
    logits, uncertainty = inferer(scan, both_heads(network)).chunk(2, dim=1)
    torch.testing.assert_close(logits, AveragingInferer(windows, [tmp_path / "w.pt"], [0])(scan, network))
    parts = []
    for one in (network, other):
        for axes in ([], [2]):
            parts.append(windows(scan.flip(axes), both_heads(one))[:, 3:].abs().flip(axes))
    torch.testing.assert_close(uncertainty, torch.stack(parts).mean(0))


def test_a_map_of_other_classes_is_refused_and_logits_alone_are_left():
    alone = {"pred": torch.rand(3, *SIDES)}
    assert set(Uncertaintyd("pred", num_classes=3)(dict(alone))) == {"pred"}
    with pytest.raises(ConfigError, match="has 3 channels, expected logits and uncertainty of 2 classes"):
        Uncertaintyd("pred", num_classes=2)(alone)


def test_a_package_makes_both_heads():
    fragment = {"_target_": "mapseg_components.networks.TwoHeadDynUNet", **DYNUNET, "variance": "softplus"}
    assert not list(faults_of_fragment(fragment))
    assert has_uncertainty(network_of(fragment)) and has_uncertainty(copy.deepcopy(network_of(fragment)))
    named = network_of(fragment, "meta").state_dict()  # as a package is checked, without memory for the weights
    assert {key: value.shape for key, value in named.items()} == {
        key: value.shape for key, value in network_of(fragment).state_dict().items()
    }


def test_a_scripted_network_gives_its_logits():
    network = teach(made("dynunet", "softplus")).eval()
    torch.testing.assert_close(torch.jit.script(network)(image()), network(image()), rtol=0, atol=1e-4)
