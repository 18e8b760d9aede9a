# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What full size costs, counted and not measured: operations, bytes, and the time they would take.

    python -m benchmarks.analytic --docs docs/reference/performance.md

Operations are counted by PyTorch's counter while the package's networks run on the meta device, forward and
backward, where nothing is computed; bytes are those of the tensors that autograd keeps. A multiplication and an
addition are two operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import replace_between
from mapseg_components.networks import GlobalLocalDeepLabV3, MultiScaleMAE

__all__ = ["adaptation_step_flop", "counted", "mae_step_flop", "padding_share", "saved_bytes"]

DILATIONS = (4, 8, 16)
STRIDE = 4
RATE = 790e12
"""Operations a second of bf16 matrix products measured on an H200."""


def counted(call: Callable[[], Any]) -> int:
    """Operations of convolutions and matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def image(batch: int, patch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(batch, 1, patch, patch, patch, device="meta", dtype=dtype)


def mae(width: int, depth: int) -> MultiScaleMAE:
    with torch.device("meta"):
        return MultiScaleMAE(1, width, depth, STRIDE)


def segmenter(width: int, depth: int, classes: int) -> GlobalLocalDeepLabV3:
    with torch.device("meta"):
        return GlobalLocalDeepLabV3(1, classes, width, depth, STRIDE, DILATIONS)


def pair(network: GlobalLocalDeepLabV3, pairs: int, patch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Local and global logits of pairs as one number; context costs next to nothing, so the features stand for it."""
    features = network.encode(image(2 * pairs, patch, dtype))
    return network.decode(features, features).sum()


def mae_step_flop(network: nn.Module, patch: int, batch: int) -> int:
    """Forward and backward of local and global images by a network on the meta device."""
    return counted(lambda: network(image(2 * batch, patch)).sum().backward())


def adaptation_step_flop(network: GlobalLocalDeepLabV3, patch: int, passes: int = 3) -> int:
    """Forward and backward of the student's pairs (source clean, masked; target masked), forward of the teacher's.

    Args:
        network: on the meta device.
        patch: voxels per axis.
        passes: pairs of the student.
    """
    student = counted(lambda: pair(network, passes, patch).backward())
    with torch.no_grad():
        return student + counted(lambda: pair(network, 1, patch))


def window_flop(width: int, depth: int, patch: int, classes: int) -> tuple[int, int]:
    """One window of inference: with the global view encoded for it, as the plain baseline does, and without."""
    network = segmenter(width, depth, classes)
    with torch.no_grad():
        encoder = counted(lambda: network.encode(image(1, patch)))
        features = network.encode(image(1, patch))
        window = encoder + counted(lambda: network.decode(features, features))
    return window + encoder, window


def saved_bytes(call: Callable[[], Any], network: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


def padding_share(grid: int, dilation: int) -> float:
    """Share of the taps of a 3x3x3 convolution that fall outside a grid of ``grid`` voxels per side."""
    inside = sum(0 <= position + tap < grid for position in range(grid) for tap in (-dilation, 0, dilation))
    return 1 - (inside / (3 * grid)) ** 3


def tables(width: int, depth: int, patch: int, batch: int, classes: int) -> str:
    """Markdown tables of one size."""
    network, autoencoder = segmenter(width, depth, classes), mae(width, depth)
    grid = patch // STRIDE
    features = torch.empty(1, width, grid, grid, grid, device="meta")
    joined = torch.empty(1, 2 * width, grid, grid, grid, device="meta")
    dilated = [
        counted(lambda b=branch: b(joined))
        for branch in network.aspp.branches
        if any(isinstance(module, nn.Conv3d) and module.dilation[0] > 1 for module in branch.modules())
    ]
    padded = sum(flop * padding_share(grid, dilation) for flop, dilation in zip(dilated, DILATIONS))
    parts = {
        "encoder": (counted(lambda: network.encode(image(1, patch))), network.encoder),
        "ASPP": (counted(lambda: network.aspp(joined)), network.aspp),
        "segmentation head": (counted(lambda: network.head(features)), network.head),
        "reconstruction decoder": (counted(lambda: autoencoder.decoder(features)), autoencoder.decoder),
    }
    lines = [
        f"Width {width}, depth {depth}, patch {patch}^3, {classes} classes. **Counted, not measured.**",
        "",
        "| part, one image forward | TFLOP | parameters, M |",
        "|---|---|---|",
    ]
    for name, (flop, module) in parts.items():
        millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        lines.append(f"| {name} | {flop / 1e12:.3g} | {millions:.2f} |")
    lines += [
        "",
        f"Of ASPP, {padded / 1e12:.2g} TFLOP ({padded / parts['ASPP'][0]:.0%}) are taps on padding.",
        "",
        "| step, backward and teacher included | TFLOP | ms at 40 % of 790 TFLOP/s | ms at 60 % |",
        "|---|---|---|---|",
    ]
    steps = {
        f"MAE, {batch} pairs": mae_step_flop(autoencoder, patch, batch),
        "adaptation, Eq. 8": adaptation_step_flop(network, patch),
        "adaptation, `target_clean`": adaptation_step_flop(network, patch, passes=4),
    }
    for name, flop in steps.items():
        lines.append(f"| {name} | {flop / 1e12:.4g} | {flop / RATE / 0.4 * 1e3:.0f} | {flop / RATE / 0.6 * 1e3:.0f} |")
    lines += [
        "",
        "| one window of inference | plain, TFLOP | package, TFLOP | times as many |",
        "|---|---|---|---|",
    ]
    for one in sorted({64, 128, width}):
        plain, ours = window_flop(one, depth, patch, classes)
        lines.append(f"| width {one} | {plain / 1e12:.3g} | {ours / 1e12:.3g} | {plain / ours:.2f} |")
    lines += [
        "",
        "| kept for the backward pass | float32, GB | bf16, GB |",
        "|---|---|---|",
    ]
    kept: dict[str, tuple[nn.Module, Callable[[torch.dtype], Any]]] = {
        f"MAE, {batch} pairs, `batched_passes`": (autoencoder, lambda t: autoencoder(image(2 * batch, patch, t))),
        "MAE, one scale at a time": (autoencoder, lambda t: autoencoder(image(batch, patch, t))),
        "adaptation, three passes at once": (network, lambda t: pair(network, 3, patch, t)),
        "adaptation, one pass at a time": (network, lambda t: pair(network, 1, patch, t)),
    }
    sizes: dict[str, list[float]] = {name: [] for name in kept}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (module, call) in kept.items():
            module.to(dtype)
            sizes[name].append(saved_bytes(lambda call=call, dtype=dtype: call(dtype), module) / 1e9)
    lines += [f"| {name} | {full:.1f} | {half:.1f} |" for name, (full, half) in sizes.items()]
    millions = {
        name: sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for name, module in {"MAE": autoencoder, "segmenter": network}.items()
    }
    lines += [
        "",
        "| float32, whatever `amp` | MAE, GB | segmenter, GB |",
        "|---|---|---|",
    ]
    copies = {"weights": (4, 4), "gradients": (4, 4), "AdamW's two moments": (8, 8), "teacher": (0, 4)}
    for name, (first, second) in copies.items():
        lines.append(f"| {name} | {first * millions['MAE'] / 1e3:.2f} | {second * millions['segmenter'] / 1e3:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--classes", type=int, default=8, help="background included")
    parser.add_argument("--docs", type=Path, help="page whose analytic table is replaced")
    arguments = parser.parse_args()
    text = tables(arguments.width, arguments.depth, arguments.patch, arguments.batch_size, arguments.classes)
    if arguments.docs:
        replace_between(arguments.docs, "analytic", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
