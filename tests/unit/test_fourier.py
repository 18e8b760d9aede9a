# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Fourier amplitude mixing: the target's amplitudes at low frequencies, the source's phases, labels and background."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from mapseg_components.errors import ConfigError
from mapseg_components.methods import FourierMixing, low_frequencies_from

SIDES = [(8, 9, 11), (12, 10, 6), (16, 15, 1)]
LOSS = DiceCELoss(to_onehot_y=True, softmax=True)


def two(sides, batch=2):
    generator = torch.Generator().manual_seed(sum(sides))
    return [torch.rand(batch, 1, *sides, generator=generator) for _ in range(2)]


def amplitudes(image):
    return np.abs(np.fft.fftn(image.numpy().astype(np.float64), axes=(2, 3, 4)))


def inner_box(sides, beta):
    """Where each frequency is of at most beta * side cycles over the patch."""
    near = [np.abs(np.fft.fftfreq(side) * side) <= beta * side + 1e-6 for side in sides]
    return np.logical_and.reduce(np.meshgrid(*near, indexing="ij"))


def mixed_plainly(style, image, beta):
    """The paper's steps on a shifted spectrum, one volume."""
    own, other = (np.fft.fftshift(np.fft.fftn(one)) for one in (image, style))
    amplitude, phase = np.abs(own), np.angle(own)
    box = tuple(
        slice(side // 2 - int(beta * side + 1e-6), side // 2 + int(beta * side + 1e-6) + 1) for side in image.shape
    )
    amplitude[box] = np.abs(other)[box]
    return np.fft.ifftn(np.fft.ifftshift(amplitude * np.exp(1j * phase))).real


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.25, 0.4])
@pytest.mark.parametrize("sides", SIDES)
def test_it_is_what_the_paper_does_to_each_sample(sides, beta):
    style, image = two(sides)
    found = low_frequencies_from(style, image, beta)
    for number in range(2):
        expected = mixed_plainly(style[number, 0].double().numpy(), image[number, 0].double().numpy(), beta)
        np.testing.assert_allclose(found[number, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("sides", SIDES)
def test_amplitudes_are_the_targets_in_the_inner_box_and_the_sources_outside(sides, beta):
    style, image = two(sides)
    found, box = amplitudes(low_frequencies_from(style, image, beta)), inner_box(sides, beta)
    np.testing.assert_allclose(found[..., box], amplitudes(style)[..., box], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[..., ~box], amplitudes(image)[..., ~box], rtol=1e-4, atol=1e-4)
    assert box.all() == (beta == 0.5) and box[0, 0, 0]


@pytest.mark.parametrize("sides", SIDES)
def test_beta_0_is_the_identity_and_so_is_a_scan_mixed_with_itself(sides):
    style, image = two(sides)
    assert torch.equal(low_frequencies_from(style, image, 0), image)
    for beta in (0.05, 0.3, 0.5):
        torch.testing.assert_close(low_frequencies_from(image, image, beta), image, rtol=0, atol=1e-5)
    mixed = low_frequencies_from(style, image, 0.2)
    torch.testing.assert_close(low_frequencies_from(style, mixed, 0.2), mixed, rtol=0, atol=1e-4)  # twice is once
    nothing = torch.zeros_like(image)
    assert low_frequencies_from(image, nothing, 0.2).isfinite().all()


def batch_of(sides=SIDES[0]):
    target, source = two(sides)
    source[:, :, :3] = 0.0
    return {"source": {"image": source, "label": (source > 0.6).long()}, "target": {"image": target}}


def test_background_stays_0_values_stay_in_range_and_labels_are_the_sources():
    batch = batch_of()
    before = {side: {key: value.clone() for key, value in entries.items()} for side, entries in batch.items()}
    (only,) = FourierMixing(LOSS, beta=0.3).passes(batch)
    seen, source = only.inputs["image"], batch["source"]["image"]
    assert (seen[source == 0] == 0).all() and 0 <= seen.min() and seen.max() <= 1
    inside = low_frequencies_from(batch["target"]["image"], source, 0.3).clamp(0, 1)
    assert torch.equal(seen[source > 0], inside[source > 0]) and not torch.equal(seen, source)
    logits = torch.randn(2, 2, *SIDES[0], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(only.terms({"logits": logits}), {"source": LOSS(logits, batch["source"]["label"])})
    for side, entries in before.items():
        assert all(torch.equal(batch[side][key], value) for key, value in entries.items())


def test_each_sample_has_the_style_of_its_own_target_and_none_without_one():
    batch, method = batch_of(), FourierMixing(LOSS, beta=0.3)
    whole = method.passes(batch)[0].inputs["image"]
    for number in (0, 1):
        one = {side: {key: v[number : number + 1] for key, v in entries.items()} for side, entries in batch.items()}
        torch.testing.assert_close(method.passes(one)[0].inputs["image"], whole[number : number + 1])
    alone = method.passes({"source": batch["source"]})
    assert torch.equal(alone[0].inputs["image"], batch["source"]["image"])
    same = {**batch, "target": {"image": batch["source"]["image"]}}
    torch.testing.assert_close(method.passes(same)[0].inputs["image"], same["target"]["image"], rtol=0, atol=1e-5)


def test_faults_are_named():
    for beta in (-0.1, 0.6, float("nan")):
        with pytest.raises(ConfigError, match="beta is"):
            FourierMixing(LOSS, beta)
    batch, method = batch_of(), FourierMixing(LOSS)
    with pytest.raises(ConfigError, match="there is no source"):
        method.passes({"target": batch["target"]})
    with pytest.raises(ConfigError, match=r"target patches \(1, 1, 8, 9, 11\), expected equal sizes"):
        method.passes({**batch, "target": {"image": batch["target"]["image"][:1]}})
