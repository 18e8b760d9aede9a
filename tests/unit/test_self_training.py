# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-training: the loss of two labelled domains, deep supervision, ensembles and flips, axes that may be mirrored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.transforms import Compose
from torch import nn

from mapseg_components.data import DomainBalancedSampler, SeededDataset, SourceTargetLoader
from mapseg_components.engines import AdaptationTrainer
from mapseg_components.errors import ConfigError
from mapseg_components.inferers import AveragingInferer
from mapseg_components.losses import SegmentationLoss
from mapseg_components.methods import SelfTraining, deep_weights
from mapseg_components.networks import PlainPass
from mapseg_components.plans.flips import find_flips, plan_flips
from mapseg_components.plans.sizes import PRESETS
from mapseg_components.transforms import RandGlobalLocalCrop

SIDES = (4, 6, 8)
DICE = DiceCELoss(to_onehot_y=True, softmax=True)


def loader_of(scans, seed, batch_size=2):
    """Batches of random labelled scans of one side."""
    generator = torch.Generator().manual_seed(seed)
    cases = [
        {
            "image": torch.rand(1, *SIDES, generator=generator),
            "label": torch.randint(0, 3, (1, *SIDES), generator=generator),
        }
        for _ in range(scans)
    ]
    sampler = DomainBalancedSampler([""] * scans, num_samples=3 * batch_size)
    return DataLoader(SeededDataset(Dataset(cases, Compose([]))), batch_size=batch_size, sampler=sampler)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kept", [1, 5])
def test_both_domains_have_half_of_the_loss_however_many_scans_are_kept(kept, batched):
    """Eq. 8: the sum of two means, whose batches are of one size."""
    network = PlainPass(nn.Conv3d(1, 3, 1))
    loader, seen = SourceTargetLoader(loader_of(9, 0), loader_of(kept, 1)), []
    trainer = AdaptationTrainer(
        *("cpu", 1, loader, network, torch.optim.SGD(network.parameters(), lr=0.0), SelfTraining(DICE)),
        batched_passes=batched,
    )

    def compare(engine):
        batch = engine.state.batch
        assert batch["source"]["image"].shape == batch["target"]["image"].shape
        means = [DICE(network(side["image"])["logits"], side["label"]) for side in batch.values()]
        assert float(engine.state.output[0]["loss"]) == pytest.approx(float(sum(means)), rel=1e-5)
        seen.append(engine.state.output[0]["target_loss"] == engine.state.output[0]["target"])

    trainer.add_event_handler("ITERATION_COMPLETED", compare)
    trainer.run()
    assert seen == [True] * 3


def test_a_side_without_labels_is_named():
    with pytest.raises(ConfigError, match=r"the target has .*'image'.* and no 'label': self-training"):
        SelfTraining(DICE).passes({"target": {"image": torch.zeros(1, 1, *SIDES)}})
    (only,) = SelfTraining(DICE).passes(
        {"source": {"image": torch.zeros(1, 1, *SIDES), "label": torch.zeros(1, 1, *SIDES)}}
    )
    assert set(only.terms({"logits": torch.zeros(1, 3, *SIDES)})) == {"source"}


def test_pseudo_labels_have_a_loss_of_their_own():
    weighted, plain = SegmentationLoss(class_weights=[1.0, 50.0, 1.0]), SegmentationLoss()
    sample = {"image": torch.rand(1, 1, *SIDES), "label": torch.randint(0, 3, (1, 1, *SIDES))}
    logits = torch.randn(1, 3, *SIDES)
    source, target = SelfTraining(weighted, plain).passes({"source": sample, "target": sample})
    assert source.terms({"logits": logits})["source"] == weighted(logits, sample["label"])
    assert target.terms({"logits": logits})["target"] == plain(logits, sample["label"])


@pytest.mark.parametrize("outputs", range(1, 6))
def test_weights_of_deep_supervision_halve_and_add_up_to_one(outputs):
    weights = deep_weights(outputs)
    assert len(weights) == outputs and sum(weights) == pytest.approx(1.0)
    assert all(after == pytest.approx(before / 2) for before, after in itertools.pairwise(weights))


def test_deep_outputs_of_dynunet_join_the_loss_by_themselves():
    torch.manual_seed(0)
    network = DynUNet(3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, [4] * 4, deep_supervision=True, deep_supr_num=2)
    sample = {"image": torch.rand(2, 1, 16, 16, 24), "label": torch.randint(0, 3, (2, 1, 16, 16, 24))}
    (only,) = SelfTraining(DICE).passes({"source": sample})
    found = only.terms(PlainPass(network)(**only.inputs))["source"]
    outputs = network(sample["image"]).unbind(dim=1)
    expected = sum(weight * DICE(one, sample["label"]) for weight, one in zip((4 / 7, 2 / 7, 1 / 7), outputs))
    assert len(outputs) == 3 and float(found) == pytest.approx(float(expected), rel=1e-6)
    coarse = {"logits": outputs[0], "deep_1": outputs[1][..., ::2, ::2, ::2]}  # of another resolution
    assert torch.isfinite(only.terms(coarse)["source"])


class Ramp(nn.Module):
    """Logits of three classes that depend on the place along each axis, and on the image."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, image):
        places = torch.meshgrid(*(torch.linspace(0, 1, side) for side in image.shape[2:]), indexing="ij")
        ramp = sum((axis + 1) * place for axis, place in enumerate(places))
        return torch.cat([torch.zeros_like(image), self.weight * image * ramp, image - ramp], dim=1)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_all_combinations_of_flips_are_equivariant(axes):
    """What is said of a mirrored scan is the mirror image of what is said of the scan."""
    image, shown = torch.rand(1, 1, *SIDES, generator=torch.Generator().manual_seed(0)), []
    network = Ramp().requires_grad_(False)
    network.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0]))
    inferer = AveragingInferer(SimpleInferer(), flip_axes=axes, every_flip=True)
    found = inferer(image, network)
    assert len(shown) == 2 ** len(axes) and torch.equal(shown[0], image)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(shown, 2))
    for number in range(1, len(axes) + 1):
        for flipped in itertools.combinations([axis + 2 for axis in axes], number):
            torch.testing.assert_close(inferer(image.flip(flipped), network).flip(flipped), found)
    if len(axes) > 1:  # two passes are not
        twice = AveragingInferer(SimpleInferer(), flip_axes=axes)
        assert not torch.allclose(twice(image.flip(axes[0] + 2), network).flip(axes[0] + 2), twice(image, network))


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_an_ensemble_of_one_model_is_the_model(copies, tmp_path):
    network = Ramp(1.7).requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "one.pt")
    image = torch.rand(1, 1, *SIDES)
    found = AveragingInferer(SimpleInferer(), [tmp_path / "one.pt"] * copies, every_flip=True)(image, network)
    torch.testing.assert_close(found.softmax(dim=1), network(image).softmax(dim=1))
    assert torch.equal(found.argmax(dim=1), network(image).argmax(dim=1))


OBLIQUE = [[0.5, 0.8, 0.33], [-0.86, 0.5, 0.1], [0.06, -0.33, 0.94]]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("directions", [None, OBLIQUE, [[0, 1, 0], [1, 0, 0], [0, 0, 1]]])
@pytest.mark.parametrize("patch", [(64, 64, 48), (64, 64, 1)])
def test_no_flip_exchanges_structures_that_have_a_side(preset, directions, patch):
    frame = np.eye(3) if directions is None else np.array(directions)
    for names in (["Kidney_L", "Kidney_R"], ["cochlea", "tumour"]):
        axes = plan_flips(names, directions, patch, preset)
        assert all(patch[axis] > 1 for axis in axes), "one slice is its own mirror image"
        if "Kidney_L" in names:
            assert all(abs(frame[axis, 0]) < 0.3 for axis in axes)
        elif preset == "paper":
            assert axes == [axis for axis in range(3) if patch[axis] > 1]
        elif preset == "small-data-cpu" and patch[2] > 1:
            assert all(abs(frame[axis, 0]) > 0.7 for axis in axes), "few steps: what a body mirrors by itself"


def test_axes_that_a_user_asks_for_are_taken_unless_sides_forbid_them():
    planned = {"working_directions": None, "patch_size": [32, 32, 32]}
    assert find_flips({"tumour": 1}, planned, "paper", {"flip_axes": [2, 0]}) == [2, 0]
    assert find_flips({"Kidney_L": 1}, planned, "paper", {"flip_axes": [1]}) == [1]
    with pytest.raises(ConfigError, match=r"flip_axes mirrors left and right, but .*Kidney_L"):
        find_flips({"Kidney_L": 1}, planned, "paper", {"flip_axes": [0, 1]})
    for wrong in (3, [3], "x", [True]):
        with pytest.raises(ConfigError, match=r"flip_axes is .*, expected a list of axes from 0 to 2"):
            find_flips({"tumour": 1}, planned, "paper", {"flip_axes": wrong})


def test_axes_are_flipped_with_their_own_probability():
    image = torch.rand(1, *SIDES) + 1
    crop = RandGlobalLocalCrop(SIDES, prob=0.0, flip_prob=[1.0, 0.0, 1.0], global_view=False).set_random_state(0)
    assert torch.equal(torch.as_tensor(crop(image)["image"]), image.flip(1, 3))
    with pytest.raises(ConfigError, match="flip_prob is 2"):
        RandGlobalLocalCrop(SIDES, flip_prob=[0.0, 0.0, 2.0])
