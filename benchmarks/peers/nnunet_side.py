# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""nnU-Net v2's side: its preprocessing, its trainer, and ``nnUNetv2_predict``. Needs the extra [nnunet]."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.plan import Plan, dynunet, nnunet_architecture, nnunet_weights, turned
from benchmarks.peers.scans import DATASET
from benchmarks.peers.side import serve

__all__ = ["command"]

CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"


def script(name: str) -> str:
    """One of nnU-Net's commands, of this environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing: pip install '.[nnunet]'")
    return found


def prepare_dataset(folder: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnU-Net's fingerprint and plan, with the sizes of ours in the place of its own; then its preprocessing.

    Returns:
        plans and dataset.
    """
    common = ["-d", "1", "-c", CONFIGURATION]
    planning = [script("nnUNetv2_plan_and_preprocess"), *common, "--no_pp", "-npfp", "1"]
    one = {**os.environ, "nnUNet_n_proc_DA": "1"}  # the planner takes its threads from it
    subprocess.run(planning, check=True, stdout=sys.stderr, env=one)
    home = folder / "nnUNet_preprocessed" / DATASET
    path = home / f"{PLANS}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    sizes = {"patch_size": [plan.patch] * 3, "spacing": [plan.spacing] * 3, "batch_size": plan.batch_size}
    sizes |= {"normalization_schemes": ["RescaleTo01Normalization"], "architecture": nnunet_architecture(plan)}
    plans["configurations"][CONFIGURATION] |= sizes
    path.write_text(json.dumps(plans), encoding="utf-8")
    subprocess.run([script("nnUNetv2_preprocess"), *common, "-np", "1"], check=True, stdout=sys.stderr)
    names = [f"brain_{number}" for number in range(plan.training)]
    (home / "splits_final.json").write_text(json.dumps([{"train": names, "val": names[:1]}]), encoding="utf-8")
    return plans, json.loads((home / "dataset.json").read_text(encoding="utf-8"))


def calls(folder: Path, plan: Plan) -> Mapping[str, Callable[[], Any]]:
    """``prepare``, which returns how far its logits are from those of MONAI's network, ``step`` and
    ``step_with_samples``."""
    done: dict[str, Any] = {}

    def prepare() -> float:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        plans, *rest = prepare_trainer()
        trainer = nnUNetTrainer(plans | {"continue_training": False}, *rest, device=torch.device("cpu"))
        trainer.enable_deep_supervision = False
        trainer.initialize()
        weights = torch.load(folder / "weights.pt", weights_only=True)
        trainer.network.load_state_dict(nnunet_weights(weights, trainer.network))
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        difference = distance(trainer.network, weights)
        loader, _ = trainer.get_dataloaders()
        trainer.network.train()
        done.update(trainer=trainer, loader=loader, batch=next(loader))
        return difference

    def prepare_trainer() -> tuple[Any, ...]:
        plans, dataset = prepare_dataset(folder, plan)
        model = folder / "nnUNet_results" / DATASET / f"nnUNetTrainer__{PLANS}__{CONFIGURATION}"
        model.mkdir(parents=True, exist_ok=True)
        for name, content in (("plans", plans), ("dataset", dataset)):
            (model / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return plans, CONFIGURATION, 0, dataset

    @torch.no_grad()
    def distance(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> float:
        other, image = dynunet(plan), torch.randn(1, 1, *[plan.patch] * 3)
        other.load_state_dict(weights)
        found, expected = turned(network.eval()(turned(image))), other.eval()(image)
        return float((found - expected).abs().max() / expected.abs().max())

    def step_with_samples() -> None:
        done["batch"] = next(done["loader"])
        step()

    def step() -> None:
        done["trainer"].train_step(done["batch"])

    return {"prepare": prepare, "step": step, "step_with_samples": step_with_samples}


def command(folder: Path, scans: Path, output: Path, threads: int, mirrored: bool = False) -> list[str]:
    """The command line that segments a folder; its threads are all processors, whatever is asked for.

    Args:
        mirrored: as it comes, with a mean over eight flips.
    """
    line = [script("nnUNetv2_predict"), "-i", str(scans), "-o", str(output), "-d", "1", "-c", CONFIGURATION]
    return [*line, "-f", "0", "-device", "cpu", *([] if mirrored else ["--disable_tta"])]


if __name__ == "__main__":
    serve(calls)
