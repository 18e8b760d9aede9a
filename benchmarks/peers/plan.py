# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The work that all sides do: one network, its weights by the names of each side, patches, windows and scans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from monai.networks.nets import DynUNet
from torch import nn

__all__ = ["Plan", "dynunet", "dynunet_options", "nnunet_architecture", "nnunet_weights", "turned"]

FILE = "plan.json"
KERNEL = 3


@dataclass(frozen=True)
class Plan:
    """Sizes of the work.

    Args:
        patch: voxels per side of a patch and of a window; windows overlap by half.
        filters: channels of each level of the network.
        batch_size: patches of a step.
        spacing: mm per side of a working voxel.
        shape: voxels of 1 mm of each scan.
        scans: that are segmented.
        training: labelled scans.
        steps: that the weights are trained for.
    """

    patch: int = 48
    filters: tuple[int, ...] = (12, 24, 48, 96)
    batch_size: int = 2
    spacing: float = 1.5
    shape: tuple[int, int, int] = (120, 144, 120)
    scans: int = 20
    training: int = 4
    steps: int = 400

    classes: ClassVar[int] = 8
    labels: ClassVar[dict[str, int]] = {f"structure {value}": value for value in range(1, 8)}

    def write(self, folder: Path) -> None:
        """As JSON, for the other processes."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """What `write` wrote."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})

    @property
    def strides(self) -> list[int]:
        """Of each level; the first keeps the resolution."""
        return [1] + [2] * (len(self.filters) - 1)


def dynunet_options(plan: Plan) -> dict[str, Any]:
    """Arguments of MONAI's ``DynUNet``, as a config has them too; one input channel."""
    levels = len(plan.filters)
    return {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": plan.classes,
        "kernel_size": [KERNEL] * levels,
        "strides": plan.strides,
        "upsample_kernel_size": [2] * (levels - 1),
        "filters": list(plan.filters),
        "norm_name": ["INSTANCE", {"affine": True}],
    }


def dynunet(plan: Plan) -> nn.Module:
    """MONAI's network of the plan."""
    return DynUNet(**dynunet_options(plan))


def nnunet_architecture(plan: Plan) -> dict[str, Any]:
    """The same network as a plan of nnU-Net names it, in ``architecture``."""
    levels = len(plan.filters)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": list(plan.filters),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[KERNEL] * 3] * levels,
            "strides": [[step] * 3 for step in plan.strides],
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": False,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
            "deep_supervision": False,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def nnunet_weights(weights: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of `dynunet` under the names that nnU-Net's network of the same plan has, for its arrays (Z, Y, X).

    Args:
        weights: of `dynunet`.
        network: nnU-Net's; its shared layers have several names, and its upper levels of segmentation are left alone.

    Raises:
        ValueError: the networks differ.
    """
    levels = sum(name.endswith("transp_conv.conv.weight") and name.startswith("upsamples") for name in weights) + 1
    blocks = ["input_block", *[f"downsamples.{level}" for level in range(levels - 2)], "bottleneck"]
    renamed = {}
    for level, block in enumerate(blocks):
        renamed |= convolutions(block, f"encoder.stages.{level}.0")
    for level in range(levels - 1):
        renamed |= convolutions(f"upsamples.{level}.conv_block", f"decoder.stages.{level}")
        renamed[f"upsamples.{level}.transp_conv.conv.weight"] = f"decoder.transpconvs.{level}.weight"
    last = f"decoder.seg_layers.{levels - 2}"
    renamed |= {f"output_block.conv.conv.{name}": f"{last}.{name}" for name in ("weight", "bias")}
    result = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    used = {theirs: turned(weights[ours]) for ours, theirs in renamed.items()}
    left = {name for name in weights if not name.startswith("skip_layers")} - set(renamed)
    if left or any(name not in result or result[name].shape != value.shape for name, value in used.items()):
        raise ValueError(f"nnU-Net's network is another one than MONAI's: {sorted(left)[:5]} are left over")
    result |= used
    for name in result:  # a block's layers are in a list of all its layers too, the encoder's in the decoder as well
        twin = name.replace("all_modules.0.", "conv.").replace("all_modules.1.", "norm.")
        twin = twin.removeprefix("decoder.") if twin.startswith("decoder.encoder.") else twin
        result[name] = result[twin]
    return result


def convolutions(ours: str, theirs: str) -> dict[str, str]:
    """Names of a block of two convolutions, each with its norm."""
    return {
        f"{ours}.{'conv' if part == 'conv' else 'norm'}{number}.{'conv.' if part == 'conv' else ''}{name}": (
            f"{theirs}.convs.{number - 1}.{part}.{name}"
        )
        for number in (1, 2)
        for part, names in (("conv", ["weight"]), ("norm", ["weight", "bias"]))
        for name in names
    }


def turned(volume: torch.Tensor) -> torch.Tensor:
    """Kernels and images (A, B, X, Y, Z) as (A, B, Z, Y, X), which is how nnU-Net lays a scan; others as they are."""
    return volume.permute(0, 1, 4, 3, 2) if volume.ndim == 5 else volume
