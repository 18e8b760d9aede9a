# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI alone: transforms, loader, trainer and inference bundle of the kind that the Model Zoo has.

It trains the weights that all sides segment with. All sides scale a scan to [0, 1].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)

from benchmarks.peers.plan import Plan, dynunet, dynunet_options
from benchmarks.peers.scans import CHANNEL, cases
from benchmarks.peers.side import serve
from mapseg_components.checkpoints import weights_of

__all__ = ["command"]

LEARNING_RATE = 2e-3


def reading(plan: Plan, *keys: str) -> list[Any]:
    """Transforms that training and inference begin with."""
    return [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=[plan.spacing] * 3, mode=["bilinear", "nearest"][: len(keys)]),
        ScaleIntensityRangePercentilesd("image", lower=0, upper=99.5, b_min=0, b_max=1, clip=True),
    ]


def calls(folder: Path, plan: Plan) -> Mapping[str, Callable[[], Any]]:
    """``prepare``, which trains the weights first, ``step`` and ``step_with_samples``."""
    patch = [plan.patch] * 3
    sampling = [
        RandCropByPosNegLabeld(("image", "label"), "label", patch, pos=1, neg=1, num_samples=1, allow_smaller=False),
        RandAffined(
            ("image", "label"), prob=0.35, rotate_range=[0.5] * 3, scale_range=[0.3] * 3, mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
    ]  # fmt: skip
    network, done = dynunet(plan), {}
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)

    def batches(loader: DataLoader) -> Any:
        while True:
            yield from loader

    def prepare() -> None:
        dataset = CacheDataset(
            cases(folder) * plan.batch_size, Compose([*reading(plan, "image", "label"), *sampling]), progress=False
        )
        trainer = SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=1, train_data_loader=DataLoader(dataset, batch_size=plan.batch_size),
            network=network, optimizer=optimizer, loss_function=DiceCELoss(to_onehot_y=True, softmax=True, batch=True),
            inferer=SimpleInferer(),
        )  # fmt: skip
        done["batches"] = batches(DataLoader(dataset, batch_size=plan.batch_size, shuffle=True))
        done["step"] = lambda: trainer._iteration(trainer, done["batch"])
        for number in range(plan.steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - number / plan.steps)
            step_with_samples()
        torch.save(weights_of(network), folder / "weights.pt")
        write_config(folder, plan)
        done["batch"] = next(done["batches"])

    def step_with_samples() -> None:
        done["batch"] = next(done["batches"])
        done["step"]()

    return {"prepare": prepare, "step": lambda: done["step"](), "step_with_samples": step_with_samples}


def write_config(folder: Path, plan: Plan) -> None:
    """``inference.json`` of MONAI's parts alone."""
    content = {
        "imports": ["$import glob", "$import torch"],
        "scans": "",
        "output": "",
        "network": {"_target_": "DynUNet", **dynunet_options(plan)},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [plan.spacing] * 3, "mode": "bilinear"},
                {
                    "_target_": "ScaleIntensityRangePercentilesd", "keys": "image", "lower": 0, "upper": 99.5,
                    "b_min": 0, "b_max": 1, "clip": True,
                },
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": f"$[{{'image': one}} for one in sorted(glob.glob(@scans + '/*{CHANNEL}'))]",
            "transform": "@preprocessing",
        },
        "loader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                    "nearest_interp": False, "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged", "keys": "pred", "output_dir": "@output", "output_postfix": "seg",
                    "separate_folder": False, "output_dtype": "$torch.uint8", "print_log": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "$torch.device('cpu')", "val_data_loader": "@loader", "network": "@network",
            "inferer": {
                "_target_": "SlidingWindowInferer", "roi_size": [plan.patch] * 3, "sw_batch_size": 4, "overlap": 0.5,
                "mode": "gaussian",
            },
            "postprocessing": "@postprocessing",
        },
        "run": [
            f"$@network.load_state_dict(torch.load({str(folder / 'weights.pt')!r}, weights_only=True))",
            "$@evaluator.run()",
        ],
    }  # fmt: skip
    (folder / "inference.json").write_text(json.dumps(content, indent=4), encoding="utf-8")


def command(folder: Path, scans: Path, output: Path, threads: int) -> list[str]:
    """The command line that segments a folder."""
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(folder / "inference.json")]
    return [*line, "--scans", str(scans), "--output", str(output)]


if __name__ == "__main__":
    serve(calls)
