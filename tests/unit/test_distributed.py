# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Two processes with a sample each are one process with both samples; masks and samples are given, dropout is off.

The reconstruction loss is a mean over hidden voxels, equally many in each sample: a batch of two. Dice is one
ratio per class over a batch: two processes average two ratios, as ``accumulate_steps: 2`` does.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mapseg_components import masking
from mapseg_components.engines import AdaptationTrainer, MAETrainer
from mapseg_components.handlers import EMATeacher
from mapseg_components.losses import MaskedReconstructionLoss
from mapseg_components.methods import ArgmaxLabels, MAPSeg
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalPass, MultiScaleMAE

STEPS = 3
BLOCKS = {"mask_ratio": 0.5, "local_block_size": 4, "global_block_size": 4}


@pytest.fixture(autouse=True)
def float64():
    """Else the rounding of another order of sums may turn a pseudo label over."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sample(number):
    image = torch.rand(1, 1, 8, 12, 8, generator=torch.Generator().manual_seed(number))
    pair = {"image": image, "global_image": image.flip(2)}
    pair["box"] = torch.tensor([[[0.0, 4.0], [2.0, 8.0], [0.0, 8.0]]])
    return pair | {"label": (image > 0.5).long(), "global_label": (image.flip(2) > 0.5).long()}


def together(first, second):
    return {key: torch.cat([first[key], second[key]]) for key in first}


def same_mask(batch, grid, ratio, generator=None):
    """Every second block, in each sample."""
    blocks = torch.arange(grid[0] * grid[1] * grid[2]) % 2 == 0
    return blocks.view(1, 1, *grid).expand(batch, 1, *grid)


def train(kind, batches, wrap, **options):
    """Losses of each iteration and the final weights, of network and teacher."""
    masking.draw_block_mask = same_mask
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if kind == "mae":
        network = wrap(MultiScaleMAE(1, 8, 1, 4, (8, 4)))
        trainer_type, more = MAETrainer, {"loss_function": MaskedReconstructionLoss(), **BLOCKS}
    else:
        network = wrap(GlobalLocalPass(GlobalLocalDeepLabV3(1, 2, 8, 1, 4, (1, 2), 8, dropout=0.0)))
        teacher = EMATeacher(network, 0, [[None, 0.9]])
        method = MAPSeg(ArgmaxLabels(teacher), **BLOCKS)
        trainer_type, more = AdaptationTrainer, {"method": method, "train_handlers": [teacher]}
        batches = [{"source": batch, "target": batch} for batch in batches]
    trainer = trainer_type(
        device="cpu",
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05),
        **more,
        **options,
    )
    losses = []
    iteration = trainer._iteration
    trainer._process_function = lambda engine, batch: losses.append(iteration(engine, batch)[0]["loss"].item())
    trainer.run()
    state = {f"network.{name.removeprefix('module.')}": value for name, value in network.state_dict().items()}
    if kind == "uda":
        state |= {f"teacher.{name}": value for name, value in teacher.network.state_dict().items()}
    return losses, state


def process(rank, kind, batched, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batches = [sample(10 * step + rank) for step in range(STEPS)]
    torch.save(train(kind, batches, DistributedDataParallel, batched_passes=batched), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "batched"), [("mae", True), ("uda", False)])
def test_two_processes_follow_the_curve_of_one_with_twice_the_batch(tmp_path, monkeypatch, kind, batched):
    mp.start_processes(process, (kind, batched, str(tmp_path)), nprocs=2, start_method="fork")
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in weights.items():  # one teacher and one student
        assert torch.equal(others[name], value), name

    monkeypatch.setattr(masking, "draw_block_mask", masking.draw_block_mask)  # put back afterwards
    samples = [[sample(10 * step + rank) for rank in range(2)] for step in range(STEPS)]
    if kind == "mae":
        losses, single = train(kind, [together(*both) for both in samples], lambda network: network)
    else:
        flat = [one for both in samples for one in both]
        each, single = train(kind, flat, lambda network: network, accumulate_steps=2)
        losses = [sum(each[i : i + 2]) / 2 for i in range(0, len(each), 2)]
    assert [(a + b) / 2 for a, b in zip(first, second)] == pytest.approx(losses, rel=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-4  # it did move
    for name, value in single.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)
