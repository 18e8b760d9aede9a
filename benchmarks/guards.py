# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What the guards cost: their share of an adaptation step, of a save, and of the start of a run.

    OMP_NUM_THREADS=1 python -m benchmarks.guards

Guards on and off in turn within one process, on the shipped scans with the sizes of ``small_data.yaml``, in seconds of
processor time. Prints medians and shares.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.package import BUNDLES, part, step_of
from benchmarks.timing import interleaved
from mapseg_components.checkpoints import write_atomic
from mapseg_components.configs import begin_run, check_settings, end_run
from mapseg_components.data import check_training_data
from mapseg_components.engines.optimization import OptimizationStep

BUNDLE = BUNDLES / "mapseg_adaptation"
SAMPLE = BUNDLES.parent / "sample" / "fetal_age"
CPU = torch.device("cpu")


class WithoutGuards(OptimizationStep):
    """The same step, trusting every number."""

    def finish(self, terms: Mapping[str, torch.Tensor], ends: bool) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm or 0.0)
        self.step()


def training_steps(repeats: int, sizes: str = "small_data.yaml") -> dict[str, list[float]]:
    """Seconds of adaptation steps; ``sizes`` is an overlay of the bundle."""
    parser = ConfigParser(config_of("train.json", "fetal_age.yaml", sizes))
    settings = {"bundle_root": str(BUNDLE), "dataset_dir": str(SAMPLE), "device": "$torch.device('cpu')"}
    parser.update({**settings, "cache_rate": 0.0, "train#handlers": []})
    batch = next(iter(part(parser, "train#dataloader")))
    step, trainer = step_of(parser, batch), part(parser, "train#trainer")
    guarded = trainer.optimization
    trusting = WithoutGuards(trainer.network, guarded.optimizer, CPU, guarded.amp, guarded.max_grad_norm, 1)

    def with_(optimization: OptimizationStep) -> Callable[[], float]:
        def run() -> float:
            trainer.optimization = optimization
            return step()

        return run

    variants = {"with": with_(guarded), "without": with_(trusting)}
    return interleaved(variants, repeats, CPU, clock=time.process_time)


def saves(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds to write 50 MB whole and verified, and with ``torch.save`` in place."""
    content = {str(number): torch.rand(1_250_000) for number in range(10)}
    writers: dict[str, Callable[[], None]] = {
        "with": lambda: write_atomic(content, folder / "a.pt", keep_previous=folder / "b.pt"),
        "without": lambda: torch.save(content, folder / "c.pt"),
    }
    return interleaved(writers, repeats, CPU, clock=time.process_time)


def start_of_a_run(folder: Path) -> None:
    """Print what the checks before the first step take of a whole run of one step on the shipped scans."""
    files = ("train.json", "fetal_age.yaml", "tiny.yaml")
    names = [f"configs/{name}" for name in files]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(names)]
    command += ["--dataset_dir", str(SAMPLE), "--ckpt_dir", str(folder / "run"), "--output_dir", str(folder / "run")]
    command += ["--max_epochs", "1", "--epoch_length", "1", "--resume", "False"]
    whole = median_of(
        lambda: subprocess.run(command, cwd=BUNDLE, check=True, capture_output=True), 3, resource.RUSAGE_CHILDREN
    )
    settings, record = config_of(*files), folder / "audit.json"
    parts: dict[str, Callable[[], Any]] = {
        "settings": lambda: check_settings(settings, BUNDLE / "configs"),
        "folders": lambda: (begin_run([folder / "claimed"]), end_run()),
        "audit": lambda: check_training_data(SAMPLE / "datalist.json", settings["labels"]),
        "audit, known": lambda: check_training_data(SAMPLE / "datalist.json", settings["labels"], record=record),
    }
    parts["audit, known"]()
    print(f"run of one step on the shipped scans: {whole:.2f} s (n 3)")
    for name, call in parts.items():
        seconds = median_of(call, 5)
        print(f"  {name}: {seconds:.3f} s, {100 * seconds / whole:.1f} % (n 5)")


def config_of(*names: str) -> dict[str, Any]:
    """Merged configs of the bundle."""
    return dict(ConfigParser.load_config_files([str(BUNDLE / "configs" / name) for name in names]))


def median_of(call: Callable[[], Any], repeats: int, whose: int = resource.RUSAGE_SELF) -> float:
    """Median processor time of a call, of this process or of its children."""
    seconds = []
    for _ in range(repeats):
        before = resource.getrusage(whose)
        call()
        after = resource.getrusage(whose)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


def report(what: str, seconds: dict[str, list[float]]) -> None:
    """Medians, and what the guards add."""
    on, off = (statistics.median(seconds[name]) for name in ("with", "without"))
    count = len(seconds["with"])
    print(f"{what}: {on:.4f} s with guards, {off:.4f} s without, {100 * (on / off - 1):+.1f} % (n {count} each)")


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        report("adaptation step", training_steps(30))
        report("save of 50 MB", saves(Path(folder), 10))
        start_of_a_run(Path(folder))


if __name__ == "__main__":
    main()
