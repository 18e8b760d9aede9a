# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The package's side of the benchmark: parts of the shipped configs, made by MONAI's parser as in a user's run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from mapseg_components.errors import ConfigError
from mapseg_components.precision import bf16_instructions

__all__ = ["AMP", "bundle", "inference_of", "samples_of", "settings_of", "step_of", "variants_on", "write_datalist"]

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
AMP = {"package": None, "package_bf16": "bf16"}
"""Variants of the package by the setting ``amp``."""


def variants_on(device: torch.device) -> dict[str, str | None]:
    """Those of `AMP` that people use on a device: a processor that emulates bf16 takes 25 times as long in it."""
    emulated = device.type == "cpu" and not bf16_instructions()
    return {name: amp for name, amp in AMP.items() if not (emulated and amp == "bf16")}


def settings_of(
    width: int, depth: int, patch: int, device: torch.device, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of both bundles at the benchmark's size; ``more`` are those of ``--set``."""
    return {
        "device": f"$torch.device('{device}')",
        "width": width,
        "depth": depth,
        "patch_size": [patch] * 3,
        "window_stride": [patch * 5 // 6] * 3,
        "num_workers": 0,
        "batch_size": 1,
        "epoch_length": 100_000,
        "encoder_weights": None,
        "train#handlers": [],
        **(more or {}),
    }


def write_datalist(
    path: Path, source: Sequence[tuple[Path, Path]], others: Sequence[tuple[Path, Path]] = ()
) -> dict[str, int]:
    """Write a datalist; returns the table of the first label map's values.

    Args:
        path: of the datalist.
        source: scans and their labels.
        others: one scan for validation and one as target; by default those of the source.
    """
    validation, target = others or (source[0], source[0])
    cases = [{"image": str(scan), "label": str(label)} for scan, label in (*source, validation)]
    content = {"source_training": cases[:-1], "source_validation": cases[-1:]}
    path.write_text(json.dumps({**content, "target_training": [{"image": str(target[0])}]}, indent=4))
    values = np.unique(np.asarray(nib.load(source[0][1]).dataobj).astype(int))
    return {f"structure {value}": int(value) for value in values if value != 0}


def bundle(name: str, datalist: Path, settings: Mapping[str, Any], config: str = "train.json") -> ConfigParser:
    """A shipped config with other settings, a training's on top of ``paper.yaml``; those that it has not are left out.

    Args:
        name: "adaptation" or "pretraining".
        datalist: from `write_datalist`.
        settings: by their name in the config, ``a#b`` for one within.
        config: file name.
    """
    folder = BUNDLES / f"mapseg_{name}"
    files = [config, "paper.yaml"] if config == "train.json" else [config]
    content = ConfigParser.load_config_files([str(folder / "configs" / file) for file in files])
    parser = ConfigParser(content)
    known = {key: value for key, value in settings.items() if key.partition("#")[0] in content}
    parser.update({"bundle_root": str(folder), "datalist": str(datalist), **known})
    parser.parse()
    return parser


def part(parser: ConfigParser, name: str) -> Any:
    """What a config makes of an entry, without progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        return parser.get_parsed_content(name)


def samples_of(parser: ConfigParser, loader: str = "train#source_dataloader") -> Callable[[], dict[str, Any]]:
    """Function that makes the next batch; the cache is filled first, as it is in every epoch but the first."""
    batches: Iterator[dict[str, Any]] = iter(part(parser, loader))
    return lambda: next(batches)


def step_of(parser: ConfigParser, batch: Mapping[str, Any]) -> Callable[[], float]:
    """Function that does one iteration of the config's trainer, optimizer step and teacher included."""
    trainer = part(parser, "train#trainer")
    if "teacher" in parser.config:
        part(parser, "teacher").start()
    trainer.state.epoch, trainer.state.iteration = 1, 0
    trainer.state.epoch_length = trainer.state.epoch_length or 100_000

    def step() -> float:
        trainer.state.iteration += 1
        output = trainer._iteration(trainer, batch)
        return float(output[0]["loss"])

    return step


def inference_of(parser: ConfigParser, network: torch.nn.Module, scan: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Function that segments a scan (1, X, Y, Z) as the evaluator of the config does; logits (classes, X, Y, Z)."""
    inferer = part(parser, "evaluator").inferer
    network.eval()
    return lambda: inferer(scan[None], network)[0]


def require_known(settings: Mapping[str, Any]) -> None:
    """Refuse a setting of ``--set`` that no config has, for it would be ignored.

    Raises:
        ConfigError: names it.
    """
    files = [
        BUNDLES / "mapseg_adaptation" / "configs" / "train.json",
        BUNDLES / "mapseg_pretraining" / "configs" / "train.json",
        BUNDLES / "mapseg_adaptation" / "configs" / "inference.json",
    ]
    known = {key for path in files for key in ConfigParser.load_config_file(path)}
    for key in settings:
        if key.partition("#")[0] not in known:
            raise ConfigError(f"--set {key}: no config has this setting: see the first lines of train.json")
