# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainers are equal to the method written plainly in examples/mapseg_plain.py, which shares no code with them.

Batches of two, unequal blocks along every axis and at both scales, strides that differ by axis, masks drawn by the
trainer and handed to the plain file. SGD, so that the step is the gradient; float64, so that no rounding turns a ReLU.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools

import pytest
import torch
from monai.utils import set_determinism

from mapseg_components import masking
from mapseg_components.engines import AdaptationTrainer, MAETrainer
from mapseg_components.handlers import EMATeacher
from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.losses import MaskedReconstructionLoss
from mapseg_components.methods import ArgmaxLabels, MAPSeg
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalPass, MultiScaleMAE
from tests.conftest import ROOT

STRIDE, LOCAL_BLOCK, GLOBAL_BLOCK = (2, 4, 1), (4, 8, 2), (2, 4, 3)
SIZE, STEPS, DECAY = (8, 16, 6), 2, 0.8
LR = 0.05
LABELS = ("label", "global_label")


@pytest.fixture(scope="module")
def plain():
    spec = importlib.util.spec_from_file_location("mapseg_plain", ROOT / "examples" / "mapseg_plain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of_two(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 2, 1, *SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (2, 2, 1, *SIZE), generator=generator)
    start = torch.rand(2, 3, generator=generator) * torch.tensor(SIZE) / 2
    box = torch.stack([start, start + torch.tensor(SIZE) / torch.tensor([2, 3, 4])], dim=2)
    return {
        "image": images[0],
        "global_image": images[1],
        "box": box,
        "label": labels[0],
        "global_label": labels[1],
        "case_id": ["a", "b"],
    }


def as_plain(batch):
    names = {"image": "local", "global_image": "view", "box": "box"}
    labels = {key: batch[key][:, 0] for key in LABELS if key in batch}
    return {**{plain: batch[ours] for ours, plain in names.items()}, **labels}


@pytest.fixture
def drawn(monkeypatch):
    """Masks that a trainer draws, in order, as voxels."""
    masks = []

    def record(original):
        def draw(batch, grid, ratio, *args):
            assert ratio == 0.7
            masks.append(original(batch, grid, ratio, *args))
            return masks[-1]

        return draw

    monkeypatch.setattr(masking, "draw_block_mask", record(masking.draw_block_mask))
    return masks


def voxels(mask, block):
    """(2, 1, blocks...) to (2, 1, *SIZE): of each sample of its own."""
    assert mask.shape == (2, 1, *(side // b for side, b in zip(SIZE, block)))
    assert not torch.equal(mask[0], mask[1])
    return torch.kron(mask.float(), torch.ones(1, 1, *block)).bool()


def pairs_of_masks(drawn):
    blocks = itertools.cycle((LOCAL_BLOCK, GLOBAL_BLOCK))
    found = [voxels(mask, block) for mask, block in zip(drawn, blocks)]
    return list(zip(found[::2], found[1::2]))


def segmenters(plain):
    """The same weights in the package's network and in the plain one, no dropout."""
    set_determinism(0)
    sizes = {"width": 16, "depth": 2, "stride": STRIDE, "dilations": (1, 2), "dropout": 0.0}
    ours = GlobalLocalDeepLabV3(in_channels=1, num_classes=3, head_channels=16, **sizes).double()
    other = plain.Segmenter(classes=3, head=16, **sizes).double()
    other.load_state_dict(ours.state_dict())
    return ours, other


def step(network, loss):
    network.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= LR * parameter.grad


def same(ours, other):
    for (name, one), two in zip(ours.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def train(network, data, **options):
    student = GlobalLocalPass(network)
    teacher = EMATeacher(student, 0, [[None, DECAY]])
    trainer = AdaptationTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=data,
        network=student,
        optimizer=torch.optim.SGD(student.parameters(), LR),
        method=MAPSeg(ArgmaxLabels(teacher), 0.7, LOCAL_BLOCK, GLOBAL_BLOCK),
        train_handlers=[teacher],
        **options,
    )
    trainer.run()
    return teacher.network.network


@pytest.mark.parametrize("batched", [True, False])
def test_adaptation_equals_the_plain_file(plain, drawn, batched):
    ours, other = segmenters(plain)
    start = copy.deepcopy(other)
    teacher = copy.deepcopy(other).eval()
    data = [{"source": batch_of_two(2 * n), "target": batch_of_two(2 * n + 1)} for n in range(STEPS)]
    for sides, label in itertools.product(data, LABELS):
        del sides["target"][label]
    our_teacher = train(ours, data, batched_passes=batched)
    masks = iter(pairs_of_masks(drawn))
    for sides in data:
        of_source, of_target = next(masks), next(masks)
        loss = plain.source_loss(other, as_plain(sides["source"]), of_source)
        step(other, loss + plain.target_loss(other, teacher, as_plain(sides["target"]), of_target))
        plain.follow(teacher, other, DECAY)
    assert next(masks, None) is None
    same(ours, other)
    same(our_teacher, teacher)
    pairs = zip(start.state_dict().items(), other.state_dict().values())
    assert not [name for (name, one), two in pairs if torch.equal(one, two)]  # each tensor has learnt


def test_accumulated_steps_equal_the_mean_of_plain_ones(plain, drawn):
    ours, other = segmenters(plain)
    data = [{"source": batch_of_two(n)} for n in range(2)]
    train(ours, data, accumulate_steps=2)
    losses = [
        plain.source_loss(other, as_plain(sides["source"]), masks) for sides, masks in zip(data, pairs_of_masks(drawn))
    ]
    step(other, sum(losses) / 2)
    same(ours, other)


@pytest.mark.parametrize("batched", [True, False])
def test_pretraining_equals_the_plain_file(plain, drawn, batched):
    set_determinism(0)
    ours = MultiScaleMAE(1, 16, 2, STRIDE, (8, 8)).double()
    other = plain.make_autoencoder(16, 2, STRIDE, (8, 8)).double()
    other.load_state_dict(ours.state_dict())
    data = [batch_of_two(n) for n in range(STEPS)]
    MAETrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=data,
        network=ours,
        optimizer=torch.optim.SGD(ours.parameters(), LR),
        loss_function=MaskedReconstructionLoss(),
        mask_ratio=0.7,
        local_block_size=LOCAL_BLOCK,
        global_block_size=GLOBAL_BLOCK,
        batched_passes=batched,
    ).run()
    for batch, masks in zip(data, pairs_of_masks(drawn)):
        step(other, plain.reconstruction_loss(other, as_plain(batch), masks))
    same(ours, other)


def test_inference_equals_the_plain_file(plain):
    torch.manual_seed(0)
    sizes = {"width": 8, "depth": 1, "stride": (2, 2, 2), "dilations": (1, 2), "dropout": 0.0}
    ours = GlobalLocalDeepLabV3(in_channels=1, num_classes=3, head_channels=16, **sizes).eval()
    other = plain.Segmenter(classes=3, head=16, **sizes)
    other.load_state_dict(ours.state_dict())
    scan = torch.rand(1, 1, 17, 20, 25) + 0.1  # no background: the foreground's box is the whole scan
    logits = GlobalLocalSlidingWindowInferer(12, stride=8)(scan, ours)
    torch.testing.assert_close(logits, plain.segment(other, scan, 12, 8), rtol=1e-4, atol=1e-5)


def test_the_plain_file_is_short_and_runs(plain, capsys):
    assert len((ROOT / "examples" / "mapseg_plain.py").read_text().splitlines()) <= 250
    before, after = plain.main(steps=(2, 2, 2))
    assert 0 <= before <= 1 and 0 <= after <= 1
    assert capsys.readouterr().out.count("after 2 steps") == 3
