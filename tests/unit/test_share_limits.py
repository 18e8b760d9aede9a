# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Structures that vanish while adapting: the prior on shares, and the guard that keeps earlier weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from mapseg_components.data import share_ranges
from mapseg_components.errors import ConfigError
from mapseg_components.handlers import ScoreCheckpoint, ShareLimits, TargetDiagnostics
from mapseg_components.losses import ClassShareLoss
from mapseg_components.methods import MAPSeg
from tests.conftest import write_nifti
from tests.unit.test_methods import batch_of, labels_of, output_of

NAMES = ["first", "second"]


class Growing(nn.Module):
    """A segmenter of two structures; so many voxels of each as its weights say."""

    def __init__(self, *voxels):
        super().__init__()
        self.voxels = nn.Parameter(torch.tensor(voxels, dtype=torch.float))

    def label_map(self):
        found = torch.zeros(100, dtype=torch.long)
        first, second = (int(count) for count in self.voxels)
        found[:first], found[first : first + second] = 1, 2
        return found.view(4, 5, 5)


def run(folder, teachers, students=None, factor=2.0, interval=1, resume=None, dice=True):
    """An adaptation in which teacher and student have so many voxels of each structure in each epoch."""
    students = teachers if students is None else students
    student, teacher, active = Growing(0, 0), Growing(0, 0), SimpleNamespace(active=True)

    def logits(image, network):
        return 10.0 * nn.functional.one_hot(network.label_map(), 3).movedim(-1, 0)[None].float()

    def evaluator():
        return SimpleNamespace(state=SimpleNamespace(epoch=0, key_metric_name="dice", metrics={}))

    limits = ShareLimits({"first": (0.6, 0.7), "second": (0.3, 0.4)}, factor)
    scans = [{"image": torch.rand(1, 4, 5, 5)}] * 2
    diagnostics = TargetDiagnostics(
        scans, NAMES, logits, active, teacher, student, interval=interval, device="cpu", limits=limits
    )
    evaluators = [evaluator() if dice else None for _ in range(2)]
    candidates = {"student": (student, evaluators[0]), "teacher": (teacher, evaluators[1])}
    score = ScoreCheckpoint(str(folder), candidates, active, limits=limits)
    if resume is not None:
        diagnostics.load_state_dict(resume)
    engine = Engine(lambda engine, batch: {} if dice else {"target_loss": -engine.state.epoch})

    @engine.on(Events.EPOCH_STARTED)
    def train(engine):
        number = engine.state.epoch - 1
        student.voxels.data, teacher.voxels.data = (
            torch.tensor(side[number], dtype=torch.float) for side in (students, teachers)
        )
        for gain, one in enumerate(evaluators):
            if one is not None:
                one.state.epoch, one.state.metrics = engine.state.epoch, {"dice": 0.5 + 0.01 * number + 0.001 * gain}

    diagnostics.attach(engine)
    score.attach(engine)
    engine.run([0], max_epochs=len(teachers))
    record, model = folder / "model_selection.json", folder / "model.pt"
    return SimpleNamespace(
        epochs=engine.state.epoch,
        limits=limits,
        state=diagnostics.state_dict(),
        record=json.loads(record.read_text()) if record.is_file() else {},
        kept=torch.load(model, weights_only=True)["voxels"].tolist() if model.is_file() else None,
    )


@pytest.mark.parametrize("dice", [True, False])
@pytest.mark.parametrize("gone, name", [([50, 2], "second"), ([10, 60], "first"), ([0, 0], "first")])
def test_a_structure_that_leaves_its_limits_ends_the_training_with_the_weights_before(
    gone, name, dice, tmp_path, caplog
):
    seen = run(tmp_path, [[20, 10], [22, 10], gone, [50, 0]], dice=dice)
    assert seen.epochs == 3 and seen.kept == [22, 10]
    assert f"{name} is " in seen.limits.reason and "the source has 0." in seen.limits.reason
    assert seen.record["stopped"]["epoch"] == 3 and seen.record["stopped"]["reason"] == seen.limits.reason
    assert seen.record["model.pt"]["epoch"] < 3 and seen.limits.reason in caplog.text


def test_an_epoch_that_ends_the_training_has_no_score(tmp_path):
    seen = run(tmp_path, [[20, 10], [50, 1]], students=[[20, 10], [21, 10]])  # the student is within limits
    assert seen.record["stopped"]["epoch"] == 2 and seen.kept == [20, 10]


def test_shares_within_the_factor_of_the_sources_go_on(tmp_path):
    seen = run(tmp_path, [[20, 10], [40, 10], [20, 21]])  # 0.2 and 0.51 of 0.3 to 0.4
    assert seen.epochs == 3 and seen.limits.reason is None and seen.kept == [20, 21]
    assert run(tmp_path / "strict", [[20, 10], [40, 10]], factor=1.2).limits.reason is not None


def test_what_the_source_model_never_found_is_told_and_does_not_end_the_training(tmp_path, caplog):
    seen = run(tmp_path, [[50, 0], [50, 1], [40, 15], [50, 0]])
    assert seen.epochs == 4 and seen.kept == [40, 15]  # found in epoch 3, lost again in epoch 4
    assert "second is 0 of all structures" in caplog.text
    assert run(tmp_path / "never", [[50, 0], [50, 0]]).kept == [50, 0]


def test_a_student_outside_is_no_candidate(tmp_path):
    seen = run(tmp_path, [[20, 10], [22, 10], [22, 11]], students=[[21, 10], [50, 1], [23, 11]], dice=False)
    assert seen.epochs == 3 and seen.limits.refused == frozenset() and seen.kept == [22, 11]
    seen = run(tmp_path / "b", [[20, 10], [22, 10]], students=[[21, 10], [50, 1]])
    assert seen.limits.refused == {"student"} and seen.kept == [22, 10] and "stopped" not in seen.record


def test_weights_that_were_not_looked_at_are_not_selected(tmp_path):
    seen = run(tmp_path, [[20, 10], [21, 10], [22, 10], [50, 0]], interval=2)
    assert seen.epochs == 4 and seen.kept == [21, 10]


def test_an_ended_run_stays_ended(tmp_path):
    ended = run(tmp_path, [[20, 10], [50, 0]])
    again = run(tmp_path / "again", [[20, 10], [20, 10], [20, 10]], resume=ended.state)
    assert again.epochs <= 1 and again.limits.reason == ended.limits.reason and again.kept is None


def test_limits_need_scans_and_a_factor_above_one():
    with pytest.raises(ConfigError, match="set diagnostics_scans to 2"):
        TargetDiagnostics([], NAMES, None, None, None, None, 1, "cpu", limits=ShareLimits({}, 2.0))
    for factor in (1.0, -2, float("nan")):
        with pytest.raises(ConfigError, match="factor of the limits"):
            ShareLimits({}, factor)
    with pytest.raises(ConfigError, match="lowest <= highest"):
        ShareLimits({"liver": (0.5, 0.2)}, 2.0)


def test_ranges_are_those_of_the_label_maps(tmp_path):
    cases = []
    for number, counts in enumerate([(30, 10), (10, 10), (0, 0), (5, 0)]):
        volume = np.zeros(60, np.int16)
        volume[: counts[0]], volume[counts[0] : sum(counts)] = 4, 7
        cases.append({"label": str(write_nifti(tmp_path / f"{number}.nii.gz", volume.reshape(3, 4, 5)))})
    found = share_ranges(cases, {"first": 4, "second": 7})
    assert found == {"first": (0.5, 1.0), "second": (0.0, 0.5)}
    assert share_ranges(cases[2:3], {"first": 4}) == {} == share_ranges([], {"first": 4})


def test_the_divergence_of_shares_equals_its_formula_and_is_lowest_at_the_labels_shares():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 3, 4, 5), generator=generator)
    label[:, :, :2] = 0
    logits = torch.randn(1, 3, 6, 5, 4, generator=generator, dtype=torch.float64)
    found = logits.softmax(1).mean((0, 2, 3, 4)).numpy()
    expected = np.array([(label == number).double().mean().item() for number in range(3)])
    whole = np.sum([p * np.log(p / q) for p, q in ((expected[0], found[0]), (expected[1:].sum(), found[1:].sum()))])
    among = [one[1:] / one[1:].sum() for one in (expected, found)]
    whole += np.sum(among[0] * np.log(among[0] / among[1]))
    assert ClassShareLoss()(logits, label).item() == pytest.approx(whole, rel=1e-4) and whole > 0
    logits = nn.Parameter(torch.zeros(1, 3, 6, 5, 4))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        ClassShareLoss()(logits, label).backward()
        optimizer.step()
    assert logits.softmax(1).mean((0, 2, 3, 4)).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_vanished_structure_costs_and_labels_without_structures_ask_nothing():
    label = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]).view(1, 1, 2, 2, 2)
    gone = torch.tensor([0.0, 0.0, -40.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6).clone().requires_grad_()
    loss = ClassShareLoss()(gone, label)
    loss.backward()
    assert torch.isfinite(loss) and loss > 1 and torch.isfinite(gone.grad).all()
    assert ClassShareLoss()(gone, torch.zeros_like(label)).item() == 0.0


def test_a_prior_is_a_term_of_each_target_pass_and_needs_the_source():
    said = torch.randn(2, 3, 4, 8, 12)
    batch = {"source": batch_of(0), "target": batch_of(1, labels=False)}
    method = MAPSeg(labels_of(said), local_block_size=4, target_clean=True, prior_weight=0.4)
    passes = method.passes(batch)
    terms = [one.terms(output_of(number)) for number, one in enumerate(passes)]
    names = [{name for name in found if "prior" in name} for found in terms]
    assert names == [set(), set(), {"target_prior"}, {"target_prior_masked"}]
    assert method.weights["target_prior"] == method.weights["target_prior_masked"] == 0.2
    expected = ClassShareLoss()(output_of(3)["global_logits"], batch["source"]["global_label"])
    assert terms[3]["target_prior_masked"].item() == pytest.approx(expected.item())
    assert not any("prior" in name for name in MAPSeg(None).weights)
    with pytest.raises(ConfigError, match="prior_weight is set, and there is no source"):
        method.passes({"target": batch["target"]})
    with pytest.raises(ConfigError, match="prior_weight is -1"):
        MAPSeg(None, prior_weight=-1)
