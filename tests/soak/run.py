# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Kill training at random moments, start it again with the same command, and count what is lost. The goal is 0.

    python -m tests.soak.run --kills 100            many short runs
    python -m tests.soak.run --minutes 60           one long run

Every run is a real process that SIGKILL ends at a seeded random moment, on the shipped scans with the sizes of
``tiny.yaml``. A loss is: neither ``last.pt`` nor ``previous.pt`` can be read after one of them existed; a save older
than one seen before; or, at the end, weights that are not bit for bit those of a run that nobody interrupted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import torch
from tqdm import tqdm

from mapseg_components.checkpoints import read_checked
from mapseg_components.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
SAMPLE = ROOT / "sample" / "fetal_age"
NAMES = ("last.pt", "model.pt", "source_only.pt")


def train(folder: Path, log: Path, settings: dict[str, Any]) -> None:
    """Train in this process as the command line does, its output to a log."""
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared with the processes forked before: a kill may leave it taken
    files = [str(BUNDLE / "configs" / name) for name in ("train.json", "fetal_age.yaml", "tiny.yaml")]
    places = {"bundle_root": str(BUNDLE), "ckpt_dir": str(folder), "output_dir": str(folder)}
    defaults = {"dataset_dir": str(SAMPLE), "device": "$torch.device('cpu')", "num_workers": 0}
    monai.bundle.run(run_id="training", config_file=files, **{**places, **defaults, **settings})


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process that has everything imported already, so that kills hit training and not imports."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def progress(folder: Path) -> int | None:
    """Iterations that can be resumed from; ``None`` if nothing was saved, -1 if nothing saved can be read."""
    found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).is_file()]
    for path in found:
        try:
            return int(read_checked(path)["run"]["iteration"])
        except CheckpointError:
            continue
    return -1 if found else None


def interrupted(
    folder: Path, settings: dict[str, Any], draw: random.Random, longest_s: float, kills: int | None = None
) -> tuple[int, list[str]]:
    """Train to the end with kills at random moments; returns their number and the losses found.

    Args:
        folder: of the run.
        settings: of the bundle.
        draw: of the moments.
        longest_s: between start and kill.
        kills: kill no more often than that; ``None`` for every start that does not finish before its moment.
    """
    losses, done, furthest = [], 0, 0
    while True:
        process = start(train, folder, folder.with_suffix(".log"), settings)
        process.join(draw.uniform(0, longest_s) if kills is None or done < kills else None)
        if process.exitcode is not None:
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        done += 1
        reached = progress(folder)
        if reached == -1:
            losses.append(f"kill {done}: no save can be read in {folder}")
        elif (reached or 0) < furthest:
            losses.append(f"kill {done}: the save is of iteration {reached}, there was one of {furthest}")
        furthest = max(furthest, reached or 0)
    if process.exitcode != 0:
        losses.append(f"the run ended with exit code {process.exitcode}: see {folder.with_suffix('.log')}")
    return done, losses


def differences(first: Path, second: Path) -> list[str]:
    """Tensors, numbers and lines of the history that two finished runs do not share bit for bit."""
    histories = [
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()] for folder in (first, second)
    ]
    for line in (line for lines in histories for line in lines):
        line.pop("seconds")
    found = [] if histories[0] == histories[1] else ["history.jsonl"]
    for name in NAMES:
        pairs = [flatten(read_checked(folder / name)) for folder in (first, second)]
        keys = sorted({*pairs[0], *pairs[1]})
        found += [
            f"{name}: {key}" for key in keys if not torch.equal(*(pair.get(key, torch.empty(0)) for pair in pairs))
        ]
    return found


def flatten(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Tensors and numbers of a nested state by their path; what a run remembers of itself and its clock is left out."""
    if isinstance(state, (torch.Tensor, int, float)):
        return {path: torch.as_tensor(state)}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {
        key: tensor
        for name, value in items
        if name not in ("run", "history")
        for key, tensor in flatten(value, f"{path}/{name}").items()
    }


def soak(
    folder: Path, settings: dict[str, Any], seed: int, longest_s: float, kills: int | None = None
) -> tuple[int, list[str]]:
    """One uninterrupted and one interrupted run; number of kills and losses."""
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    whole = start(train, folder / "whole", folder / "whole.log", settings)
    done, losses = interrupted(folder / "killed", settings, random.Random(seed), longest_s, kills)
    whole.join()
    if whole.exitcode != 0:
        losses.append(f"the uninterrupted run ended with exit code {whole.exitcode}: see {folder / 'whole.log'}")
    if not losses:
        losses += differences(folder / "whole", folder / "killed")
    return done, losses


def main() -> None:
    """Soak, print the count of losses, exit 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in many short runs")
    parser.add_argument("--minutes", type=float, help="instead: one run of about this length")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, done, losses = time.monotonic(), 0, []
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"runs and logs in {folder}")
    common = {"epoch_length": 6, "save_steps": 1, "source_masked": False}
    if arguments.minutes:
        seconds = epoch_seconds(folder, common)
        epochs = max(int(60 * arguments.minutes / seconds / 2), 2)
        print(f"{epochs} epochs of {common['epoch_length']} iterations, a kill every 0 to 30 s")
        done, losses = soak(folder / "long", {**common, "max_epochs": epochs}, arguments.seed, longest_s=30)
    else:
        number = 0
        while done < arguments.kills and not losses:
            workers = number % 3  # their number changes nothing but the speed
            settings = {**common, "max_epochs": 3, "num_workers": workers}
            more, found = soak(
                folder / f"{number}", settings, arguments.seed + number, 3.0, kills=arguments.kills - done
            )
            done, number, losses = done + more, number + 1, losses + found
            print(f"{done} kills, {len(losses)} losses", flush=True)
    for loss in losses:
        print(loss)
    print(f"{done} kills in {(time.monotonic() - started) / 60:.1f} minutes, losses: {len(losses)}")
    sys.exit(1 if losses else 0)


def epoch_seconds(folder: Path, settings: dict[str, Any]) -> float:
    """Seconds of an epoch, from a run of ten."""
    (folder / "probe").mkdir()
    process = start(train, folder / "probe", folder / "probe.log", {**settings, "max_epochs": 10})
    began = time.monotonic()
    process.join()
    return (time.monotonic() - began) / 10


if __name__ == "__main__":
    main()
