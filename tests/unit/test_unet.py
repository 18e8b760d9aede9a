# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The planned U-Net with the view's context at its bottleneck, and its masked autoencoder."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer

from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.networks import GlobalLocalPass, GlobalLocalUNet, UNetMAE, training_pass
from mapseg_components.networks.slices import SliceConv3d, as_slices
from tests.conftest import ROOT

CONFIGS = ROOT / "bundles" / "mapseg_adaptation" / "configs"
SIZES = {"filters": [8, 16, 16], "kernel_size": [[3, 3, 1], 3, 3], "strides": [[2, 2, 1], 2, [2, 2, 1]]}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return GlobalLocalUNet(1, 3, **SIZES).eval()


def test_an_image_alone_is_its_own_context(network):
    image = torch.rand(2, 1, 16, 24, 4)
    features = network.encode(image)
    whole = torch.tensor([[[0.0, 16.0], [0.0, 24.0], [0.0, 4.0]]] * 2)
    torch.testing.assert_close(network(image), network.decode(features, features[0]))
    torch.testing.assert_close(network(image), network(image, image, whole), atol=1e-5, rtol=1e-4)


def test_context_changes_the_patch_and_gets_gradients(network):
    patch, box = torch.rand(1, 1, 16, 16, 4), torch.tensor([[[2.0, 10.0], [1.0, 9.0], [0.0, 2.0]]])
    view = torch.rand(1, 1, 16, 16, 4, requires_grad=True)
    other = network(patch, torch.rand(1, 1, 16, 16, 4), box)
    logits = network(patch, view, box)
    assert not torch.allclose(logits, other)
    logits.sum().backward()
    assert view.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [16, 24])
def test_the_training_pass_is_the_network_on_patch_and_view(network, side):
    """Patches and views of one size are one batch, of two sizes two."""
    patch, view = torch.rand(2, 1, 16, 16, 4), torch.rand(2, 1, side, 16, 4)
    box = torch.tensor([[[0.0, 8.0], [4.0, 12.0], [0.0, 4.0]]] * 2)
    model = training_pass(network)
    assert isinstance(model, GlobalLocalPass)
    outputs = model(image=patch, global_image=view, box=box)
    torch.testing.assert_close(outputs["logits"], network(patch, view, box))
    torch.testing.assert_close(outputs["global_logits"], network(view))
    assert outputs["local_features"].shape == outputs["context_features"].shape == (2, 16, 2, 2, 2)


def test_windows_collaborate_with_the_whole_scan(network):
    scan = torch.rand(1, 1, 24, 20, 8) + 0.1
    with torch.no_grad():
        inferer = GlobalLocalSlidingWindowInferer(roi_size=(16, 16, 4), stride=(8, 8, 2))
        together = inferer(scan, network)
        alone = SlidingWindowInferer(roi_size=(16, 16, 4), overlap=0.5)(scan, network)
    assert together.shape == alone.shape == (1, 3, 24, 20, 8) and not torch.allclose(together, alone)


def test_images_that_the_strides_do_not_divide_are_refused(network):
    with pytest.raises(ValueError, match=r"not divisible by the network's strides, together \[8, 8, 2\]"):
        network(torch.rand(1, 1, 12, 16, 4))


@pytest.mark.parametrize(
    "kernel, stride, dilation", [((3, 3, 1), 1, 1), (3, (2, 2, 1), 2), (1, 1, 1), ((3, 3, 5), 2, 1)]
)
@pytest.mark.parametrize("slices", [1, 4])
def test_a_single_slice_is_convolved_as_the_volume_it_is(kernel, stride, dilation, slices):
    torch.manual_seed(0)
    sides = [kernel] * 3 if isinstance(kernel, int) else kernel
    plain = torch.nn.Conv3d(2, 3, kernel, stride, [side // 2 * dilation for side in sides], dilation)
    own = as_slices(torch.nn.Sequential(copy.deepcopy(plain)))
    assert type(own[0]) is SliceConv3d
    image = torch.rand(2, 2, 12, 10, slices, requires_grad=True)
    expected, found = (one(image) for one in (plain, own))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.jit.script(own)(image), expected)
    weights = torch.rand_like(expected)
    for one, other in zip(
        *(
            torch.autograd.grad((y * weights).sum(), [image, *layer.parameters()], retain_graph=True)
            for y, layer in ((expected, plain), (found, own))
        )
    ):
        torch.testing.assert_close(other, one)


def test_convolutions_that_would_not_keep_a_slice_stay_as_they_are():
    layers = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 3), torch.nn.Conv3d(1, 1, 2, padding=1))
    assert all(type(layer) is torch.nn.Conv3d for layer in as_slices(layers))


def test_half_of_the_collaboration_is_refused(network):
    with pytest.raises(ValueError, match="global_image and box belong together"):
        network(torch.rand(1, 1, 16, 16, 4), torch.rand(1, 1, 16, 16, 4))


def test_the_autoencoders_encoder_is_the_networks(network):
    autoencoder = UNetMAE(1, **SIZES)
    image = torch.rand(1, 1, 16, 16, 4)
    found = autoencoder(image)
    assert found.shape == image.shape and 0 <= found.min() and found.max() <= 1
    network.encoder.load_state_dict(autoencoder.encoder.state_dict())
    torch.testing.assert_close(network.encode(image)[0], autoencoder.encode(image)[0])


@pytest.mark.parametrize("epochs", range(1, 11))
def test_the_schedule_fits_any_number_of_epochs(epochs):
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "unet.yaml"))
    parser["schedule_epochs"] = epochs
    parser["optimizer"] = optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, rates = parser.get_parsed_content("lr_scheduler"), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < epochs:
            schedule.step()
    assert 1e-5 < rates[-1] < 0.0014, "the last epoch learns as well, slowly"
    assert epochs < 5 or max(rates) > 0.0015
