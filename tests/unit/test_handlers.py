# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Resume file, weights loader, history and Dice report, on small engines."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import StatsHandler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ExponentialLR, OneCycleLR, PolynomialLR

from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.errors import CheckpointError
from mapseg_components.handlers import DiceReport, EpochHistory, HandlerChain, TrainingCheckpoint, WeightsLoader
from mapseg_components.handlers.checkpointing import put_back_schedule


def counting_engine(network, epochs=1):
    def iteration(engine, batch):
        with torch.no_grad():
            network.weight += 1
        return [{"loss": network.weight.detach().sum()}]

    return Engine(iteration), {"data": range(3), "max_epochs": epochs}


def test_weights_are_loaded_when_the_engine_starts(tmp_path, caplog):
    caplog.set_level("INFO")
    source, target = nn.Linear(1, 1), nn.Linear(1, 1)
    write_atomic(source.state_dict(), tmp_path / "w.pt")
    engine, run = counting_engine(target)
    WeightsLoader(str(tmp_path / "w.pt"), target).attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: torch.testing.assert_close(target.weight, source.weight))
    engine.run(**run)
    assert "2 of 2 tensors (100 % coverage)" in caplog.text


def test_resume_goes_on_after_the_last_whole_epoch(tmp_path):
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    engine, run = counting_engine(network, epochs=2)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": network}).attach(engine)
    engine.run(**run)
    assert network.weight.item() == 6

    other = nn.Linear(1, 1)
    engine, run = counting_engine(other, epochs=3)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": other}).attach(engine)
    seen = []
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: seen.append((e.state.epoch, other.weight.item())))
    engine.run(**run)
    assert seen == [(3, 6.0)] and other.weight.item() == 9


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("run"), r"last\.pt is no resume file of this run"),
        (lambda state: state["run"].update(epoch_length=7), "7 iterations an epoch, this run has 3"),
        (lambda state: state["run"].update(format=9), r"has format 9, this version reads 1: finish"),
        (lambda state: state["run"].update(fingerprint="00"), r"of another network: fingerprint 00, expected \w{16}"),
        (lambda state: state["network"].update(weight=torch.zeros(5, 5)), "its 'network' does not fit this run"),
    ],
)
def test_resume_file_of_another_run_is_refused(tmp_path, change, message):
    network = nn.Linear(1, 1)
    engine, run = counting_engine(network)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": network}).attach(engine)
    engine.run(**run)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    change(state)
    write_atomic(state, tmp_path / "last.pt")
    engine, run = counting_engine(network, epochs=2)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": network}).attach(engine)
    engine.logger.disabled = True
    with pytest.raises(CheckpointError, match=message):
        engine.run(**run)


def test_weights_are_written_before_the_state_that_says_so(tmp_path, monkeypatch):
    """Stopped in between, the run repeats the epoch and writes both."""
    network = nn.Linear(1, 1)
    engine, run = counting_engine(network)
    saved = {"weights_path": str(tmp_path / "model.pt"), "weights": network}
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": network}, **saved).attach(engine)
    monkeypatch.setattr(TrainingCheckpoint, "_save", lambda self, engine, epoch: 1 / 0)
    engine.logger.disabled = True
    with pytest.raises(ZeroDivisionError):
        engine.run(**run)
    assert read_checked(tmp_path / "model.pt")["weight"].item() == network.weight.item()


def test_starting_anew_sets_aside_what_an_earlier_run_left(tmp_path, caplog):
    for name in ("last.pt", "model.pt", "model_selection.json", "mine.pt"):
        (tmp_path / name).write_text("old")
    engine, run = counting_engine(nn.Linear(1, 1))
    TrainingCheckpoint(str(tmp_path / "last.pt"), {}, resume=False).attach(engine)
    engine.run(**run)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.pt", "mine.pt", "last.pt.earlier", "model.pt.earlier", "model_selection.json.earlier"}
    assert "renamed ['last.pt', 'model.pt', 'model_selection.json']" in caplog.text


def test_a_signal_after_the_run_has_its_usual_effect(tmp_path):
    """Also after an error that a handler before this one raises again, as MONAI's StatsHandler does."""
    engine, run = counting_engine(nn.Linear(1, 1))
    engine.logger.disabled = True
    engine.add_event_handler(Events.EXCEPTION_RAISED, StatsHandler().exception_raised)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: 1 / 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(ZeroDivisionError):
            engine.run(**run)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_ends_the_run_once_and_insisting_ends_the_process(tmp_path, monkeypatch):
    engine, run = counting_engine(nn.Linear(1, 1))
    TrainingCheckpoint(str(tmp_path / "last.pt"), {}).attach(engine)
    clock = [100.0]
    monkeypatch.setattr("mapseg_components.handlers.signals.time", SimpleNamespace(monotonic=lambda: clock[0]))
    seen = []

    def insist(_):
        for seconds in (0, 1.5, 1.5):
            clock[0] += seconds
            seen.append(seconds)
            signal.raise_signal(signal.SIGINT)

    engine.add_event_handler(Events.ITERATION_STARTED, insist)
    engine.logger.disabled = True
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.run(**run)
        assert seen == [0, 1.5, 1.5] and not (tmp_path / "last.pt").exists()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_weights_are_not_loaded_for_a_run_that_resumes(tmp_path):
    engine, run = counting_engine(nn.Linear(1, 1))
    (tmp_path / "last.pt").write_text("")
    WeightsLoader("moved away.pt", nn.Linear(1, 1), resume_path=str(tmp_path / "last.pt")).attach(engine)
    engine.run(**run)


def test_history_has_a_line_per_epoch(tmp_path):
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    engine, run = counting_engine(network, epochs=2)
    EpochHistory(str(tmp_path), torch.optim.SGD(network.parameters(), lr=0.5)).attach(engine)
    engine.run(**run)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["iteration"], line["loss"]) for line in lines] == [(1, 3, 2.0), (2, 6, 5.0)]
    assert lines[0]["learning_rate"] == 0.5


def test_history_names_the_learning_rate_that_an_epoch_was_trained_at(tmp_path):
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    engine, run = counting_engine(network, epochs=2)
    optimizer.step()
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
    EpochHistory(str(tmp_path), optimizer).attach(engine)
    schedule.step()

    def begins_again():  # as a round of pseudo labels does, after the history looked
        optimizer.param_groups[0]["lr"] = 0.5 if engine.state.epoch == 2 else 0.05

    engine.add_event_handler(Events.EPOCH_STARTED, begins_again)
    engine.run(**run)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.05, 0.5])


SCHEDULES = {
    "OneCycleLR": lambda optimizer, epochs: OneCycleLR(optimizer, 0.1, total_steps=epochs + 1),
    "PolynomialLR": lambda optimizer, epochs: PolynomialLR(optimizer, total_iters=epochs, power=0.9),
    "CosineAnnealingWarmRestarts": lambda optimizer, epochs: CosineAnnealingWarmRestarts(optimizer, T_0=epochs),
    "ExponentialLR": lambda optimizer, epochs: ExponentialLR(optimizer, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_is_made_longer_goes_on_at_the_rates_of_the_longer_one(tmp_path, name):
    def rates(folder, epochs):
        network = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        schedule, seen = SCHEDULES[name](optimizer, epochs), []
        engine, run = counting_engine(network, epochs=epochs)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
        parts = {"network": network, "lr_scheduler": schedule, "optimizer": optimizer}
        TrainingCheckpoint(str(tmp_path / folder / "last.pt"), parts).attach(engine)
        engine.run(**run)
        return seen

    whole = rates("whole", 7)
    rates("parts", 4)
    assert rates("parts", 7) == pytest.approx(whole[4:]) and whole[5] > 0


def test_a_run_that_is_made_too_short_for_its_schedule_is_told_so(tmp_path):
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    state = {"last_epoch": 9, "total_steps": 20}
    with pytest.raises(CheckpointError, match=r"its schedule does not fit this run .*: raise max_epochs"):
        put_back_schedule(OneCycleLR(optimizer, 0.1, total_steps=5), state, "its schedule")


def test_dice_by_hand(tmp_path):
    truth = torch.tensor([0, 1, 1, 1, 2, 0]).view(1, 6, 1, 1)
    pred = torch.tensor([0, 1, 1, 0, 0, 0]).view(1, 6, 1, 1)
    engine = Engine(lambda engine, batch: [{"pred": MetaTensor(pred), "label": MetaTensor(truth)}])
    DiceReport(str(tmp_path), ["one", "two", "three"], {"weights": "w.pt"}).attach(engine)
    engine.run([[{"case_id": "a"}]])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["cases"]["a"] == {"one": pytest.approx(0.8), "two": 0.0, "three": None}
    assert metrics["mean"] == pytest.approx(0.4) and metrics["weights"] == "w.pt"


def test_a_second_run_in_the_process_goes_on_with_what_is_in_memory(tmp_path):
    """A client that trains round by round puts other weights in between; the file of the first round is older."""
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    engine, run = counting_engine(network)
    TrainingCheckpoint(str(tmp_path / "last.pt"), {"network": network}).attach(engine)
    engine.run(**run)
    nn.init.constant_(network.weight, 100.0)
    engine.run(run["data"], max_epochs=2)
    assert network.weight.item() == 103 and engine.state.epoch == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["network"]["weight"].item() == 103


def test_a_chain_attaches_its_handlers_in_order_and_leaves_out_disabled_ones():
    seen = []

    class Named:
        def __init__(self, name):
            self.name = name

        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, lambda: seen.append(self.name))

    engine, run = counting_engine(nn.Linear(1, 1))
    HandlerChain([Named("first"), None, Named("second"), Named("third")]).attach(engine)
    engine.run(**run)
    assert seen == ["first", "second", "third"]
