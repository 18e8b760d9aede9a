#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the guards cost: their share of a training step, of a save, and of the start of a run.

    python tools/measure_guards.py

Guards on and off in turn within one process; the sizes are those of ``small_data.yaml``. Prints medians and shares.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from mapseg_components.checkpoints import write_atomic  # noqa: E402
from mapseg_components.configs import begin_run, check_settings, end_run  # noqa: E402
from mapseg_components.data import check_training_data  # noqa: E402
from mapseg_components.engines import UDATrainer  # noqa: E402
from mapseg_components.engines.optimization import OptimizationStep  # noqa: E402
from mapseg_components.handlers import EMATeacher, TrainingCheckpoint  # noqa: E402
from mapseg_components.losses import AdaptationLoss  # noqa: E402
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalPass  # noqa: E402

BUNDLE, SAMPLE = ROOT / "bundles" / "mapseg_adaptation", ROOT / "sample" / "fetal_age"


class WithoutGuards(OptimizationStep):
    """The same step, trusting every number."""

    def finish(self, terms: Mapping[str, torch.Tensor], ends: bool) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm or 0.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = False


def training_steps(folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of adaptation steps, with and without guards in turn."""
    torch.manual_seed(0)
    network = GlobalLocalPass(GlobalLocalDeepLabV3(1, 8, 32, 6, 4, (2, 4, 6), 16))
    image = torch.rand(1, 1, 48, 48, 48)
    batch = {"image": image, "global_image": image.flip(2), "box": torch.tensor([[[8.0, 40.0]] * 3])}
    labels = {"label": (image > 0.5).long(), "global_label": (image.flip(2) > 0.5).long()}
    trainer = UDATrainer(
        device="cpu",
        max_epochs=1,
        epoch_length=2 * pairs + 3,
        train_data_loader=[{"source": {**batch, **labels}, "target": batch}] * (2 * pairs + 3),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-4),
        loss_function=AdaptationLoss(source_masked=False),
        teacher=EMATeacher(network, 0, [[None, 0.99]]),
        mask_ratio=0.7,
        local_block_size=8,
        global_block_size=4,
        amp="bf16",
        max_grad_norm=1.0,
    )
    handler = TrainingCheckpoint(str(folder / "last.pt"), {"network": network})
    handler.attach(trainer)
    guarded = trainer.optimization
    plain = WithoutGuards(network, trainer.optimizer, torch.device("cpu"), "bf16", 1.0, 1)
    end_of_iteration, seconds, started = handler._end_of_iteration, {"with": [], "without": []}, [0.0]

    def begin(engine: Any) -> None:
        on = engine.state.iteration % 2 == 0
        engine.optimization = guarded if on else plain
        started[0] = time.perf_counter()

    def end(engine: Any) -> None:
        on = engine.state.iteration % 2 == 0
        if on:
            end_of_iteration(engine)
        if engine.state.iteration > 2:
            seconds["with" if on else "without"].append(time.perf_counter() - started[0])

    handler._end_of_iteration = lambda engine: None  # type: ignore[method-assign]  # called by `end` in its turn
    trainer.add_event_handler(Events.ITERATION_STARTED, begin)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    trainer.logger.disabled = True
    trainer.run()
    return seconds


def saves(folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds to write 50 MB whole and verified, and with ``torch.save`` in place."""
    content = {str(number): torch.rand(1_250_000) for number in range(10)}
    writers: dict[str, Callable[[], None]] = {
        "with": lambda: write_atomic(content, folder / "a.pt", keep_previous=folder / "b.pt"),
        "without": lambda: torch.save(content, folder / "c.pt"),
    }
    return {name: [timed(write) for _ in range(pairs)] for name, write in writers.items()}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def start_of_a_run(folder: Path) -> None:
    """Print what the checks before the first step take of a whole run of one step on the shipped scans."""
    files = [f"configs/{name}" for name in ("train.json", "fetal_age.yaml", "tiny.yaml")]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(files)]
    command += ["--dataset_dir", str(SAMPLE), "--ckpt_dir", str(folder / "run"), "--output_dir", str(folder / "run")]
    command += ["--max_epochs", "1", "--epoch_length", "1", "--resume", "False"]
    whole = statistics.median(
        timed(lambda: subprocess.run(command, cwd=BUNDLE, check=True, capture_output=True)) for _ in range(3)
    )
    settings = ConfigParser.load_config_files([str(BUNDLE / name) for name in files])
    record = folder / "audit.json"
    parts = {
        "settings": lambda: check_settings(settings, BUNDLE / "configs"),
        "folders": lambda: (begin_run([folder / "claimed"]), end_run()),
        "audit": lambda: check_training_data(SAMPLE / "datalist.json", settings["labels"]),
        "audit, known": lambda: check_training_data(SAMPLE / "datalist.json", settings["labels"], record=record),
    }
    parts["audit, known"]()
    print(f"run of one step on the shipped scans: {whole:.2f} s (n 3)")
    for name, call in parts.items():
        seconds = statistics.median(timed(call) for _ in range(5))
        print(f"  {name}: {seconds:.3f} s, {100 * seconds / whole:.1f} % (n 5)")


def report(what: str, seconds: dict[str, list[float]]) -> None:
    """Medians, and what the guards add."""
    on, off = (statistics.median(seconds[name]) for name in ("with", "without"))
    count = len(seconds["with"])
    print(f"{what}: {on:.4f} s with guards, {off:.4f} s without, {100 * (on / off - 1):+.1f} % (n {count} each)")


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        report("adaptation step", training_steps(Path(folder), 30))
        report("save of 50 MB", saves(Path(folder), 10))
        start_of_a_run(Path(folder))


if __name__ == "__main__":
    main()
