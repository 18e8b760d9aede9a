# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""BUDA-Seg: draws of the logits, their loss, rounds of pseudo labels, the weights that are kept."""

from __future__ import annotations

import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import nn

from mapseg_components.commands.report import uncertainties
from mapseg_components.contrast import inverted
from mapseg_components.engines import AdaptationTrainer
from mapseg_components.errors import ConfigError
from mapseg_components.handlers import EpochHistory, PseudoLabelRounds, ScoreCheckpoint
from mapseg_components.handlers.checkpointing import put_back_schedule
from mapseg_components.losses import SegmentationLoss, SquaredDiceLoss, sampled_loss
from mapseg_components.methods import ArgmaxLabels, BUDASeg, MAPSeg, PseudoLabel
from mapseg_components.networks import PlainPass, TwoHeadDynUNet
from mapseg_components.plans.bundle import unlearnt
from mapseg_components.reports import uncertainty_section
from mapseg_components.structures import IGNORED
from tests.conftest import ROOT, write_nifti
from tests.unit.test_methods import SIZES, Saying, batch_of, labels_of

DRAWS = (1, 2, 5)


def numpy_squared_dice(logits, label, valid=None):
    """Written out: the mean over classes of 1 - 2 sum(P Y) / (sum P^2 + sum Y^2)."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    counted = np.ones(label.shape) if valid is None else valid.astype(float)
    losses = []
    for number in range(logits.shape[1]):
        probability, truth = p[:, number] * counted[:, 0], (label[:, 0] == number) * counted[:, 0]
        losses.append(1 - 2 * (probability * truth).sum() / ((probability**2).sum() + (truth**2).sum() + 1e-5))
    return np.mean(losses)


def outputs(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(SIZES, generator=generator, requires_grad=True),
        "uncertainty": (scale * torch.randn(SIZES, generator=generator)).requires_grad_(),
    }


def terms_of(method, found, batch=None):
    """Terms of the method's only pass."""
    (one,) = method.passes({"target": batch_of(1, labels=False) if batch is None else batch})
    return one.terms(found)


def said(seed=3):
    return torch.randn(SIZES, generator=torch.Generator().manual_seed(seed))


class TornLabels:
    """Pseudo labels that leave voxels out."""

    active = True

    def __init__(self, label, left_out):
        self.label = label.masked_fill(left_out, IGNORED)

    def __call__(self, image):
        return {"logits": PseudoLabel(self.label, torch.ones(self.label.shape))}


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("samples", DRAWS)
def test_the_loss_is_the_mean_of_the_draws_formula(samples, torn):
    label, found, batch = said().argmax(1, keepdim=True), outputs(5), batch_of(1, labels=False)
    left_out = batch["image"] < (0.3 if torn else 0)
    torch.manual_seed(11)
    loss = terms_of(BUDASeg(TornLabels(label, left_out), samples), found, batch)["target"]
    torch.manual_seed(11)
    expected = []
    for _ in range(samples):
        noise = torch.randn(SIZES)  # of each voxel and class
        drawn = (found["logits"] + noise * found["uncertainty"]).detach().numpy()
        expected.append(numpy_squared_dice(drawn, label.numpy(), ~left_out.numpy()))
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_voxels_that_do_not_count_are_those_of_either_kind():
    label, logits, image = said().argmax(1, keepdim=True), outputs(5)["logits"], batch_of(1)["image"]
    torn = label.masked_fill(image < 0.2, IGNORED)
    found = SquaredDiceLoss()(logits, torn, image < 0.9)
    torch.testing.assert_close(found, SquaredDiceLoss()(logits, label, (image >= 0.2) & (image < 0.9)))


@pytest.mark.parametrize("samples", DRAWS)
def test_without_uncertainty_every_number_of_draws_is_plain_dice(samples):
    teacher, found = said(), outputs(5, scale=0.0)
    plain = terms_of(BUDASeg(labels_of(teacher), samples=0), found)["target"]
    label = teacher.argmax(1, keepdim=True)
    assert plain.item() == pytest.approx(numpy_squared_dice(found["logits"].detach().numpy(), label.numpy()), abs=1e-5)
    torch.testing.assert_close(terms_of(BUDASeg(labels_of(teacher), samples), found)["target"], plain)


@pytest.mark.parametrize("samples", [0, *DRAWS])
def test_the_gradient_reaches_both_heads(samples):
    found = outputs(5)
    terms_of(BUDASeg(labels_of(said()), samples), found)["target"].backward()
    assert (found["logits"].grad != 0).float().mean() > 0.99
    if samples:
        assert (found["uncertainty"].grad != 0).float().mean() > 0.99
    else:
        assert found["uncertainty"].grad is None  # plain pseudo labels


def test_voxels_left_out_get_no_gradient_and_are_no_background():
    found, batch = outputs(5), batch_of(1, labels=False)
    left_out = batch["image"] < 0.3
    found_terms = terms_of(BUDASeg(TornLabels(said().argmax(1, keepdim=True), left_out), 3), found, batch)
    found_terms["target"].backward()
    for value in found.values():
        assert (value.grad.movedim(1, -1)[left_out[:, 0]] == 0).all() and (value.grad != 0).any()
    counted = found["uncertainty"].abs().mean(1)[~left_out[:, 0]].mean()
    torch.testing.assert_close(found_terms["target_uncertainty"], counted)


def test_uncertainty_grows_where_labels_are_wrong_and_shrinks_where_they_are_right():
    """What the head is for: the loss falls if V is large at wrong labels, and small at right ones."""
    label = torch.zeros(1, 1, 12, 10, 8, dtype=torch.long)
    label[:, :, 6:] = 1
    logits = 4.0 * nn.functional.one_hot(label[:, 0], 2).movedim(-1, 1)
    wrong = torch.zeros_like(label, dtype=torch.bool)
    wrong[:, :, :2] = True
    label[wrong] = 1
    uncertainty = torch.ones_like(logits, dtype=torch.float, requires_grad=True)
    torch.manual_seed(0)
    sampled_loss(SquaredDiceLoss(), logits, uncertainty, 64, label).backward()
    slope = uncertainty.grad.mean(1, keepdim=True)
    assert slope[wrong].mean() < 0 < slope[~wrong].mean()


def test_one_slice_of_a_volume_is_an_image():
    logits, uncertainty, label = *outputs(5).values(), said().argmax(1, keepdim=True)
    losses = []
    for slices in (slice(0, 1), 0):
        torch.manual_seed(2)
        volumes = (logits[..., slices], uncertainty[..., slices], 4, label[..., slices])
        losses.append(sampled_loss(SquaredDiceLoss(), *volumes))
    torch.testing.assert_close(*losses)


def test_more_draws_cost_the_outputs_memory_alone():
    """What autograd keeps grows by the same number of bytes a draw, however large the network is."""

    def kept(samples, width):
        network = PlainPass(TwoHeadDynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[width] * 3, variance="free"))
        calls, bytes_kept = [], {}
        network.network.register_forward_hook(lambda *_: calls.append(1))
        image = torch.rand(1, 1, 8, 12, 16)
        says = Saying({"logits": torch.rand(1, 3, 8, 12, 16)})
        method = BUDASeg(ArgmaxLabels(SimpleNamespace(active=True, network=says)), samples)

        def keep(tensor):
            bytes_kept[tensor.data_ptr(), tensor.shape] = tensor.nelement() * tensor.element_size()
            return tensor

        (one,) = method.passes({"target": {"image": image}})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = one.terms(PlainPass.forward(network, **one.inputs))
        terms["target"].backward()
        assert len(calls) == 1
        return sum(bytes_kept.values())

    growth = {width: [kept(k, width) for k in (1, 3, 5)] for width in (4, 16)}
    for first, second, third in growth.values():
        assert third - second == second - first
    assert growth[16][2] - growth[16][1] == growth[4][2] - growth[4][1] and growth[16][0] > 2 * growth[4][0]


def test_the_network_runs_once_whatever_the_number_of_draws():
    runs = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 3, 1)

        def forward(self, image):
            runs.append(1)
            return {"logits": self.layer(image), "uncertainty": self.layer(image)}

    network = Counting()
    labels = labels_of(torch.rand(2, 3, *SIZES[2:]))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    AdaptationTrainer("cpu", 1, [{"target": batch_of(1, labels=False)}], network, optimizer, BUDASeg(labels, 7)).run()
    assert len(runs) == 1


def test_sizes_of_the_uncertainty_are_logged_and_have_no_weight(tmp_path):
    found, teacher = outputs(5), said()
    agree = found["logits"].argmax(1) == teacher.argmax(1)
    size = found["uncertainty"].detach().abs().mean(1)
    method = BUDASeg(labels_of(teacher), 2)
    terms = terms_of(method, found)
    for name, expected in {"": size, "_agree": size[agree], "_differ": size[~agree]}.items():
        assert terms[f"target_uncertainty{name}"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
        assert method.weights[f"target_uncertainty{name}"] == 0
    assert BUDASeg(labels_of(teacher), 2, variance_penalty=0.3).weights["target_uncertainty"] == 0.3
    found["logits"] = teacher.clone().requires_grad_()
    assert "target_uncertainty_differ" not in terms_of(method, found)  # nowhere, so that it has no mean
    trainer = Engine(lambda engine, batch: {"loss": 1.0, **(terms if batch else {"target": 0.0})})
    EpochHistory(str(tmp_path), torch.optim.SGD([torch.zeros(1)], lr=1.0)).attach(trainer)
    trainer.run([0, 1, 0])
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert line["target_uncertainty_differ"] == pytest.approx(terms["target_uncertainty_differ"].item())


def test_the_student_sees_the_change_and_the_teacher_the_scan():
    method = BUDASeg(labels_of(said()), change=inverted)
    batch = batch_of(1, labels=False)
    (one,) = method.passes({"target": batch, "source": batch_of(0)})  # a source is left alone
    assert torch.equal(one.inputs["image"], inverted(batch["image"]))
    assert torch.equal(method.labels.teacher.network.shown[0], batch["image"])
    assert method.passes({"source": batch_of(0)}) == []
    assert BUDASeg(labels_of(said(), active=False)).passes({"target": batch}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "samples is -1, expected a whole number"),
        ({"samples": 2.5}, "samples is 2.5"),
        ({"samples": True}, "samples is True"),
        ({"variance_penalty": -0.1}, "variance_penalty is -0.1"),
        ({"variance_penalty": math.nan}, "variance_penalty is nan"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BUDASeg(labels_of(said()), **options)


def test_a_network_without_uncertainty_can_only_do_plain_pseudo_labels():
    alone = {"logits": outputs(5)["logits"]}
    assert set(terms_of(BUDASeg(labels_of(said()), samples=0), alone)) == {"target"}
    with pytest.raises(ConfigError, match="samples is 4, and the network has no uncertainty head: set uncertainty to"):
        terms_of(BUDASeg(labels_of(said())), alone)


@pytest.mark.parametrize("ignored", [None, 0.5])
def test_mapseg_draws_samples_for_its_pseudo_labels_alone(ignored):
    teacher, batch = said(), {"source": batch_of(0), "target": batch_of(1, labels=False)}
    found = outputs(5) | {f"global_{name}": value.flip(0) for name, value in outputs(6).items()}
    found |= {"local_features": said(8), "context_features": said(9)}
    losses = {}
    for samples in (0, 3):
        method = MAPSeg(labels_of(teacher), local_block_size=4, samples=samples, ignore_unsure=ignored)
        source, *target = (one.terms for one in method.passes(batch))
        torch.manual_seed(4)
        losses[samples] = [source(found), target[-1](found)]
    assert losses[0][0] == losses[3][0]  # the source's labels are right: no samples
    confidence, label = teacher.softmax(1).max(1, keepdim=True)
    counted = () if ignored is None else (confidence > ignored,)
    torch.manual_seed(4)
    local = sampled_loss(SegmentationLoss(), found["logits"], found["uncertainty"], 3, label, *counted)
    torch.testing.assert_close(losses[3][1]["target_local_masked"], local)
    assert losses[0][1]["target_global_masked"] != losses[3][1]["target_global_masked"]
    del found["global_uncertainty"]
    with pytest.raises(ConfigError, match="no uncertainty head"):
        target[-1](found)


class Weight(nn.Module):
    """A weight and a buffer that count the optimizer's steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))


def rounds(epochs, steps=2, before=None, until=None, **options):
    """What labels each step: the teacher's weight; and the teacher, whose run ends after ``until`` steps."""
    student = Weight()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0, momentum=0.5)
    teacher = PseudoLabelRounds(student, optimizer=optimizer, **options)
    labelled_by: list[float] = []

    def step(engine, batch):
        labelled_by.append(teacher.network.weight.item())
        assert teacher.network.count.item() == teacher.network.weight.item() or options.get("reinitialise")
        student.weight.grad = -torch.ones(1)
        optimizer.step()
        student.count.copy_(student.weight.detach())
        if engine.state.iteration == until:
            engine.terminate()

    engine = Engine(step)
    teacher.attach(engine)
    if before is not None:
        student.load_state_dict(before["student"])
        optimizer.load_state_dict(before["optimizer"])
        teacher.load_state_dict(before["teacher"])
        engine.load_state_dict({"iteration": before["iteration"], "epoch_length": steps, "max_epochs": epochs})
    engine.run(range(steps), max_epochs=epochs, epoch_length=steps)
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "teacher": teacher.state_dict()}
    return labelled_by, student, saved(state) | {"iteration": engine.state.iteration}


def saved(state):
    """A copy, as of a file of training state."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=True)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_labels_change_between_rounds_alone_and_are_the_students_of_the_last_end(number):
    labelled_by, _, _ = rounds(epochs=5, rounds=number)
    student = [0.0]
    velocity = 0.0
    for _ in range(10):
        velocity = 0.5 * velocity + 1
        student.append(student[-1] + velocity)
    begins = sorted({1 + e for e in range(5) if e * number // 5 > (e - 1) * number // 5})
    assert len(begins) == number and begins[0] == 1
    expected = [student[2 * (max(b for b in begins if b <= 1 + step // 2) - 1)] for step in range(10)]
    assert labelled_by == pytest.approx(expected)


def test_fewer_epochs_than_rounds_are_rounds_of_one_epoch():
    assert len({*rounds(epochs=3, rounds=9)[0]}) == 3


def test_the_warm_up_is_before_the_first_round():
    teacher = PseudoLabelRounds(Weight(), rounds=2, warmup_epochs=3)
    assert [teacher.round_of(epoch, 7) for epoch in range(1, 8)] == [0, 0, 0, 1, 1, 2, 2]
    assert PseudoLabelRounds(Weight(), rounds=2, warmup_epochs=math.inf).round_of(9, 10) == 0


@pytest.mark.parametrize("reinitialise", [False, True])
@pytest.mark.parametrize("until", [1, 3, 4, 5, 7])  # within and between epochs and rounds
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(until, reinitialise):
    options = {"rounds": 2, "reinitialise": reinitialise}
    whole, student, _ = rounds(4, **options)
    first, _, state = rounds(4, until=until, **options)
    second, resumed, _ = rounds(4, before=state, **options)
    assert first + second == whole and torch.equal(resumed.weight, student.weight)


def test_weights_begin_again_only_if_asked():
    options = {"rounds": 2, "epochs": 2}
    assert rounds(**options, reinitialise=False)[1].weight.item() > rounds(epochs=1, rounds=1)[1].weight.item()
    again = rounds(**options, reinitialise=True)
    assert again[1].weight.item() == rounds(epochs=1, rounds=1)[1].weight.item()  # the optimizer has no momentum left
    assert again[0] == [0.0, 0.0, 2.5, 2.5]  # while the labels are of the round before


@pytest.mark.parametrize("preset", ["small_data.yaml", "paper.yaml"])
def test_each_round_that_begins_again_learns_at_the_same_rates(preset):
    configs = ROOT / "bundles" / "mapseg_adaptation" / "configs"
    unet = ["unet.yaml"] if preset == "small_data.yaml" else []
    parser = ConfigParser()
    parser.read_config([str(configs / name) for name in ("train.json", preset, *unet, "buda_seg.yaml")])
    student = Weight()
    parser["network"], parser["optimizer"] = student, torch.optim.SGD(student.parameters(), lr=0.1)
    for name, value in {"reinitialise": True, "label_rounds": 3, "max_epochs": 11, "warmup_epochs": 0}.items():
        parser[name] = value
    schedule, teacher = (parser.get_parsed_content(name) for name in ("lr_scheduler", "teacher"))
    rates = []

    def step(engine, batch):
        parser["optimizer"].step()
        rates.append((teacher.round, parser["optimizer"].param_groups[0]["lr"]))

    engine = Engine(step)
    teacher.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
    engine.run([0], max_epochs=11)
    of_rounds = [[rate for number, rate in rates if number == which] for which in (1, 2, 3)]
    assert [len(one) for one in of_rounds] == [4, 4, 3]
    assert of_rounds[1] == pytest.approx(of_rounds[0]) and of_rounds[2] == pytest.approx(of_rounds[0][:3])
    assert all(one[-1] < 0.75 * max(one) for one in of_rounds), "each round ends slowly"


def test_rounds_of_a_run_that_is_made_longer_begin_again_at_its_own_rates():
    def part(epochs, until=None, before=None):
        """As of 3 rounds in so many epochs."""
        student, rates = Weight(), []
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=epochs // 3)
        teacher = PseudoLabelRounds(student, 3, reinitialise=True, optimizer=optimizer, lr_scheduler=schedule)
        engine = Engine(lambda engine, batch: (optimizer.step(), rates.append(optimizer.param_groups[0]["lr"])))
        teacher.attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
        if before is not None:
            optimizer.load_state_dict(before["optimizer"])
            teacher.load_state_dict(before["teacher"])
            put_back_schedule(schedule, before["schedule"], "schedule")
            engine.load_state_dict({"iteration": before["epoch"], "epoch_length": 1, "max_epochs": epochs})
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: engine.state.epoch == until and engine.terminate())
        engine.run([0], max_epochs=epochs, epoch_length=1)
        parts = {"optimizer": optimizer, "teacher": teacher, "schedule": schedule}
        return rates, saved({name: one.state_dict() for name, one in parts.items()}) | {"epoch": engine.state.epoch}

    whole, _ = part(18)
    first, state = part(9, until=2)
    second, _ = part(18, before=state)
    assert second == pytest.approx(whole[2:]) and first != pytest.approx(whole[:2])


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_no_number_of_rounds_is_refused(number):
    with pytest.raises(ConfigError, match="label_rounds is"):
        PseudoLabelRounds(Weight(), rounds=number)
    with pytest.raises(ConfigError, match="reinitialise needs the student's optimizer"):
        PseudoLabelRounds(Weight(), rounds=2, reinitialise=True)


@pytest.mark.parametrize("latest", [False, True])
def test_the_last_weights_are_kept_where_losses_do_not_compare(tmp_path, latest):
    losses = [0.9, 0.2, 0.5, math.nan]
    trainer = Engine(lambda engine, batch: {"loss": 1.0, "target_loss": losses[engine.state.epoch - 1]})
    network = nn.Linear(1, 1)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: network.bias.data.fill_(engine.state.epoch))
    ScoreCheckpoint(str(tmp_path), {"student": (network, None)}, latest=latest, patience=1).attach(trainer)
    trainer.run([0], max_epochs=4)
    record = json.loads((tmp_path / "model_selection.json").read_text())["model.pt"]
    assert record["epoch"] == (3 if latest else 2)
    assert torch.load(tmp_path / "model.pt")["bias"].item() == record["epoch"]


def test_the_report_tells_a_structures_uncertainty_by_what_the_other_model_says(tmp_path):
    sides = (5, 6, 4)
    cases, found = [], []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        size = generator.random(sides).astype(np.float32)
        adapted, other = (generator.integers(0, 3, sides).astype(np.uint8) for _ in range(2))
        cases.append({"image": write_nifti(tmp_path / "scans" / f"{seed}.nii.gz", size), "case_id": str(seed)})
        for model, postfix, volume in (
            ("adapted", "seg", adapted),
            ("adapted", "uncertainty", size),
            ("source_only", "seg", other),
        ):
            write_nifti(tmp_path / "predictions" / model / f"{seed}_{postfix}.nii.gz", volume)
        found.append((size, adapted, other))
    cases.append({"image": str(tmp_path / "scans" / "without_a_map.nii.gz"), "case_id": "2"})
    (tmp_path / "datalist.json").write_text(json.dumps({"target_training": cases}))
    html = uncertainty_section(uncertainties(tmp_path), ["core", "oedema"])
    size, adapted, other = (np.stack(volumes) for volumes in zip(*found))
    for number, name in enumerate(("core", "oedema"), start=1):
        row = html[html.index(f">{name}<") :].split("</tr>")[0]
        expected = [size[(adapted == number) & where].mean() for where in (True, adapted == other, adapted != other)]
        assert re.findall(r">(\d\.\d{3})<", row) == [f"{value:.3f}" for value in expected]
    assert uncertainty_section([], ["core"]) == ""


def test_a_map_of_what_was_not_learnt_is_not_written(tmp_path):
    (tmp_path / "configs").mkdir()
    for content, expected in (({"uncertainty_map": "@uncertainty"}, {"uncertainty_map": False}), ({}, {})):
        (tmp_path / "configs" / "inference.json").write_text(json.dumps(content))  # {}: of an earlier version
        assert unlearnt(tmp_path, "source_only") == expected and unlearnt(tmp_path, "adapted") == {}
