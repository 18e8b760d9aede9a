# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""This package's side: the configs of mapseg_adaptation with MONAI's DynUNet, and ``mapseg predict``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.package import BUNDLES, part, step_of
from benchmarks.peers.plan import Plan, dynunet_options
from benchmarks.peers.scans import datalist
from benchmarks.peers.side import serve
from mapseg_components.memory import keep_freed_memory

__all__ = ["command"]

HOME = BUNDLES / "mapseg_adaptation"
TRAINING = ["train.json", "small_data.yaml", "dynunet.yaml", "dice_ce.yaml", "supervised.yaml", "source_only.yaml"]


def sizes(plan: Plan) -> dict[str, Any]:
    """Settings of training and inference."""
    return {
        "labels": plan.labels,
        "patch_size": [plan.patch] * 3,
        "window_stride": [plan.patch // 2] * 3,
        "window_weighting": "gaussian",
        "working_spacing": [plan.spacing] * 3,
        **{f"network_def#{name}": value for name, value in dynunet_options(plan).items()},
        "keep_freed_memory": True,
    }


def bundle(folder: Path, plan: Plan) -> None:
    """A bundle of the weights of ``weights.pt``, as ``mapseg adapt`` would have written it."""
    home = folder / "bundle"
    shutil.copytree(HOME, home, ignore=shutil.ignore_patterns("models", "data", "recipes"))
    (home / "models").mkdir()
    shutil.copyfile(folder / "weights.pt", home / "models" / "model.pt")
    files = [str(home / "configs" / name) for name in ("inference.json", "dynunet.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update(sizes(plan) | {"amp": "auto"})
    (home / "configs" / "inference.json").write_text(json.dumps(parser.get(), indent=4), encoding="utf-8")


def calls(folder: Path, plan: Plan) -> Mapping[str, Callable[[], Any]]:
    """``prepare``, ``step`` (a batch that is there) and ``step_with_samples`` (the next batch)."""
    content = ConfigParser.load_config_files([str(HOME / "configs" / name) for name in TRAINING])
    parser = ConfigParser(content)
    parser.update({
        **sizes(plan), "bundle_root": str(HOME), "datalist": str(datalist(folder)), "batch_size": plan.batch_size,
        "device": "$torch.device('cpu')", "num_workers": 0, "epoch_length": 100_000, "train#handlers": [],
        "encoder_weights": None,
    })  # fmt: skip
    parser.parse()
    done: dict[str, Any] = {}

    def prepare() -> None:
        bundle(folder, plan)
        keep_freed_memory(True)
        part(parser, "network_def").load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        done["batches"] = iter(part(parser, "train#dataloader"))
        done["batch"] = {}
        done["batch"] |= next(done["batches"])
        done["step"] = step_of(parser, done["batch"])

    def step_with_samples() -> None:
        done["batch"] |= next(done["batches"])
        done["step"]()

    return {"prepare": prepare, "step": lambda: done["step"](), "step_with_samples": step_with_samples}


def command(folder: Path, scans: Path, output: Path, threads: int) -> list[str]:
    """The command line that segments a folder."""
    line = [sys.executable, "-m", "mapseg_components.commands", "predict", str(scans), str(output)]
    return [*line, "--bundle", str(folder / "bundle"), "--device", "cpu", "--num_threads", str(threads), "--quiet"]


if __name__ == "__main__":
    serve(calls)
