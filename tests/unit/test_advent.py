# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""AdvEnt: two networks that learn in turns, each from its own losses, as a plain loop has them."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from monai.losses import DiceCELoss, PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mapseg_components.engines import AdaptationTrainer, AdversarialTrainer
from mapseg_components.errors import ConfigError, NonFiniteError
from mapseg_components.methods import AdvEnt, EntropyMinimization, Supervised, self_information
from mapseg_components.networks import PatchScores, PlainPass

SIDES = (6, 8, 9)
LOSS = DiceCELoss(to_onehot_y=True, softmax=True)


def parts(batches=3, batch=2):
    """Segmenter of three classes, discriminator, and batches of both sides."""
    torch.manual_seed(0)
    network = PlainPass(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 1)))
    judge = PatchScores(3, SIDES, channels=2)
    data = []
    for _ in range(batches):
        image = torch.rand(batch, 1, *SIDES)
        source = {"image": image, "label": (image > 0.5).long() + (image > 0.8), "case_id": ["case 7"] * batch}
        data.append({"source": source, "target": {"image": 0.3 * torch.rand(batch, 1, *SIDES)}})
    return network, judge, data


def trained(network, judge, data, weight=0.5, adversarial_loss=None, lr=0.05, **options):
    network, judge = copy.deepcopy(network), copy.deepcopy(judge)
    trainer = AdversarialTrainer(
        "cpu",
        1,
        data,
        network,
        torch.optim.SGD(network.parameters(), lr=lr),
        AdvEnt(LOSS, judge, weight, adversarial_loss),
        discriminator=judge,
        discriminator_optimizer=torch.optim.SGD(judge.parameters(), lr=2 * lr),
        **options,
    )
    trainer.run()
    return trainer


def same(first, second, **tolerance):
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], msg=name, **tolerance)


def test_self_information_is_the_entropy_shared_by_classes():
    logits = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    exponents = np.exp(logits.numpy().astype(np.float64))
    shares = exponents / exponents.sum(1, keepdims=True)
    expected = -shares * np.log2(shares) / np.log2(4)
    torch.testing.assert_close(self_information(logits), torch.tensor(expected).float())
    method = EntropyMinimization()
    entropy = method.passes({"target": {"image": logits}})[0].terms({"logits": logits})["target_entropy"]
    torch.testing.assert_close(self_information(logits).sum(1).mean() * np.log(4), entropy)
    extreme = self_information(torch.tensor([200.0, -200.0, 0.0]).view(1, 3, 1, 1, 1))
    assert extreme.isfinite().all() and extreme.sum() == 0


@pytest.mark.parametrize("batched", [True, False])
def test_the_trainer_is_a_plain_loop_over_two_networks(batched):
    network, judge, data = parts()
    trainer = trained(network, judge, data, batched_passes=batched)
    optimizers = [torch.optim.SGD(one.parameters(), lr=lr) for one, lr in ((network, 0.05), (judge, 0.1))]
    for batch in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        judge.requires_grad_(False)
        logits = {side: network(batch[side]["image"])["logits"] for side in ("source", "target")}
        maps = {side: -(p := one.softmax(1)) * p.log2() / np.log2(3) for side, one in logits.items()}
        score = judge(maps["target"])
        adversarial = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
        (LOSS(logits["source"], batch["source"]["label"]) + 0.5 * adversarial).backward()
        judge.requires_grad_(True)
        for side, real in (("source", 1.0), ("target", 0.0)):
            score = judge(maps[side].detach())
            (F.binary_cross_entropy_with_logits(score, torch.full_like(score, real)) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    same(trainer.network, network)
    same(trainer.discriminator, judge)
    output = trainer.state.output[0]
    assert output["loss"].item() == pytest.approx((output["source"] + 0.5 * output["target_adversarial"]).item())
    assert output["target_loss"] == output["target_entropy"] and output["target_adversarial"] == pytest.approx(
        adversarial.item(), rel=1e-5
    )


def test_each_networks_losses_give_the_other_no_gradient():
    network, judge, data = parts()
    method = AdvEnt(LOSS, judge, 1.0)
    source, target = method.passes(data[0])
    source.terms(network(**source.inputs))
    target.terms(network(**target.inputs))["target_adversarial"].backward()
    assert all(one.grad is None and one.requires_grad for one in judge.parameters())
    assert all(one.grad.abs().sum() > 0 for one in network.parameters())
    network.zero_grad()
    sum(method.discriminator_losses(judge).values()).backward()
    assert all(one.grad is None for one in network.parameters())
    assert all(one.grad.abs().sum() > 0 for one in judge.parameters())
    assert method.discriminator_losses(judge) == {}  # the same maps are not learnt twice


def test_without_weight_the_segmenter_is_the_supervised_one_and_the_discriminator_learns_all_the_same():
    network, judge, data = parts()
    trainer = trained(network, judge, data, weight=0.0, batched_passes=False)
    alone = copy.deepcopy(network)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    AdaptationTrainer("cpu", 1, data, alone, optimizer, Supervised(LOSS), batched_passes=False).run()
    same(trainer.network, alone, rtol=0, atol=0)
    assert not torch.equal(*(next(one.parameters()) for one in (trainer.discriminator, judge)))


def test_a_batch_without_a_target_leaves_the_discriminator():
    network, judge, data = parts()
    trainer = trained(network, judge, [{"source": one["source"]} for one in data])
    same(trainer.discriminator, judge, rtol=0, atol=0)
    assert set(trainer.state.output[0]) == {"loss", "source"}


def test_steps_of_both_are_clipped_and_accumulated():
    network, judge, data = parts(4)
    trainer = trained(network, judge, data[:1], weight=50.0, max_grad_norm=2e-4, lr=1.0)
    for after, before, length in ((trainer.network, network, 2e-4), (trainer.discriminator, judge, 4e-4)):
        way = torch.cat([(a - b).flatten() for a, b in zip(after.parameters(), before.parameters())])
        assert way.norm().item() == pytest.approx(length, rel=1e-2)
    both = trained(network, judge, data[:2], accumulate_steps=2)
    halves = [trained(network, judge, [one]) for one in data[:2]]
    for name in ("network", "discriminator"):
        for a, b, c in zip(*(getattr(one, name).parameters() for one in (both, *halves))):
            torch.testing.assert_close(a, (b + c) / 2)
    assert not both.opponent.pending and not both.optimization.pending


def test_the_discriminator_runs_in_float32_beside_mixed_precision():
    network, judge, data = parts()
    seen = []
    judge.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    trainer = trained(network, judge, data, amp="bf16")
    assert len(seen) == 6 and set(seen) == {(torch.float32, torch.float32)}
    assert all(value.isfinite() for value in trainer.state.output[0].values())


class Faulty(nn.Module):
    """An adversarial loss with a loss, or the gradient alone, that is no number; of the discriminator or against it."""

    def __init__(self, of_discriminator, gradient):
        super().__init__()
        self.of_discriminator, self.gradient = of_discriminator, gradient

    def forward(self, scores, real, for_discriminator):
        loss = scores.square().mean()
        if for_discriminator != self.of_discriminator:
            return loss
        return loss + (0 * scores.sum()).sqrt() if self.gradient else loss + float("nan")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("of_discriminator", [True, False])
def test_a_number_that_is_none_stops_the_game_before_either_network_moves(of_discriminator, gradient):
    network, judge, data = parts()
    loss = Faulty(of_discriminator, gradient)
    names = ["discriminator_source", "discriminator_target"] if of_discriminator else ["target_adversarial"]
    expected = "gradient's norm is nan" if gradient else ".*".join(names)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (network, judge)]
    before = copy.deepcopy([network, judge])
    trainer = AdversarialTrainer(
        *("cpu", 1, data, network, optimizers[0], AdvEnt(LOSS, judge, 1.0, loss)),
        discriminator=judge,
        discriminator_optimizer=optimizers[1],
    )
    with pytest.raises(NonFiniteError, match=rf"{expected}.*iteration 1.*case 7.*lower the learning rate"):
        trainer.run()
    same(before[0], network, rtol=0, atol=0)
    same(before[1], judge, rtol=0, atol=0)


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network, judge, data = parts()
    judge.apply(lambda module: hasattr(module, "reset_parameters") and rank and module.reset_parameters())
    halves = [
        {side: {key: v[rank : rank + 1] for key, v in entries.items()} for side, entries in one.items()} for one in data
    ]
    trainer = trained(DistributedDataParallel(network), judge, halves)
    torch.save([trainer.network.module.state_dict(), trainer.discriminator.module.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_one_discriminator_which_is_that_of_one_with_both_samples(tmp_path, monkeypatch):
    """Cross-entropy, a mean over voxels; that of Dice would be a ratio over each process's sample."""
    monkeypatch.setattr(sys.modules[__name__], "LOSS", DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.0))
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="fork")
    network, judge, data = parts()
    one = trained(network, judge, data)
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), (one.network, one.discriminator)):
            for name, value in expected.state_dict().items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_named():
    network, judge, data = parts()
    method = AdvEnt(LOSS, judge)
    with pytest.raises(ConfigError, match="there is no source"):
        method.passes({"target": data[0]["target"]})
    with pytest.raises(ConfigError, match=r"target patches \(1, 1, 6, 8, 9\), expected equal sizes"):
        method.passes({**data[0], "target": {"image": data[0]["target"]["image"][:1]}})
    with pytest.raises(ConfigError, match="weight of the adversarial term is -1"):
        AdvEnt(LOSS, judge, -1)
    with pytest.raises(ConfigError, match="batch normalization"):
        AdvEnt(LOSS, PatchDiscriminator(spatial_dims=3, channels=2, in_channels=3))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (network, judge)]
    common = ("cpu", 1, data, network, optimizers[0])
    with pytest.raises(ConfigError, match="Supervised has no discriminator"):
        AdversarialTrainer(*common, Supervised(LOSS), discriminator=judge, discriminator_optimizer=optimizers[1])
    with pytest.raises(ConfigError, match="share parameters"):
        AdversarialTrainer(*common, method, discriminator=judge, discriminator_optimizer=optimizers[0])


def test_a_discriminator_learns_to_tell_sure_maps_from_unsure_ones_and_misleading_it_makes_maps_sure():
    torch.manual_seed(0)
    judge = PatchScores(3, (12, 12, 12), channels=4)
    optimizer, loss = torch.optim.Adam(judge.parameters(), lr=0.01), PatchAdversarialLoss(criterion="bce")
    sure, unsure = (self_information(scale * torch.randn(2, 3, 12, 12, 12)) for scale in (9, 0.1))
    for _ in range(20):
        optimizer.zero_grad()
        (loss(judge(sure), True, True) + loss(judge(unsure), False, True)).backward()
        optimizer.step()
    logits = (0.1 * torch.randn(1, 3, 12, 12, 12)).requires_grad_()
    before = self_information(logits).sum(1).mean()
    loss(judge(self_information(logits)), True, False).backward()
    after = self_information(logits - 2000 * logits.grad).sum(1).mean()
    assert loss(judge(unsure), False, True) < 0.1 and after < before


@pytest.mark.parametrize("sides, spatial", [((24, 26, 32), 3), ((12, 13, 14), 3), ((8, 8, 6), 3)])
def test_scores_are_the_last_map_of_monais_network(sides, spatial):
    judge = PatchScores(2, sides, channels=2)
    maps = torch.rand(2, 2, *sides)
    assert isinstance(judge.network, PatchDiscriminator)
    assert torch.equal(judge(maps), judge.network(maps)[-1]) and judge(maps).shape[:2] == (2, 1)
    assert not list(judge.buffers()) and judge(maps).ndim == spatial + 2
    assert torch.equal(judge(maps)[:1], judge(maps[:1]))  # no sample changes the scores of another


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 8])
def test_a_flat_patch_is_judged_slice_by_slice(axis, slices):
    sides = [14, 12]
    sides.insert(axis, slices)
    judge = PatchScores(2, sides, channels=2)
    maps = torch.rand(2, 2, *sides)
    scores = judge(maps)
    assert len(scores) == 2 * slices and scores.ndim == 4
    turned = judge(maps.flip(2 + axis)).unflatten(0, (2, slices)).flip(1).flatten(0, 1)
    torch.testing.assert_close(turned, scores)
    torch.testing.assert_close(judge.network(maps.select(2 + axis, 0))[-1], scores.unflatten(0, (2, slices))[:, 0])


def test_a_patch_that_is_too_small_is_named():
    with pytest.raises(ConfigError, match=r"patch_size is \[16, 4, 4\].*6 voxels or more along two axes"):
        PatchScores(2, (16, 4, 4))
    with pytest.raises(ConfigError, match="halvings of the discriminator is 0"):
        PatchScores(2, (16, 16, 16), halvings=0)
    with pytest.raises(ConfigError, match=r"shown \(1, 3, 12, 12, 12\), expected \(B, 2, X, Y, Z\)"):
        PatchScores(2, (12, 12, 12))(torch.zeros(1, 3, 12, 12, 12))
