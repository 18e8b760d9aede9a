# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a choice in the code brings on this processor, in turns, one thread; the ratio is the median over turns.

python -m benchmarks.choices slices            a planned 2D U-Net, volumes of one slice against images
python -m benchmarks.choices precision         four layers of a U-Net in float32 against bf16
python -m benchmarks.choices memory_format     a step of a planned U-Net, PyTorch's own format against channels_last_3d
python -m benchmarks.choices memory_format_thick, memory_format_images, memory_format_dynunet, memory_format_mapseg
                                               the same of thick slices, images, and other networks
python -m benchmarks.choices windows, windows_thick, windows_dynunet, windows_mapseg
                                               the same of four windows of inference
python -m benchmarks.choices resampling        eight classes to the scan's grid, along its axes against MONAI's way
python -m benchmarks.choices onnx              windows through a planned U-Net, PyTorch against ONNX Runtime (export)
python -m benchmarks.choices onnx_slices       the same for images
python -m benchmarks.choices int8, int8_slices
                                               ONNX Runtime (export), convolutions in 8-bit integers against float32
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from monai.networks.nets import DynUNet
from monai.networks.utils import convert_to_onnx
from monai.transforms import SpatialResample
from torch import nn

from benchmarks.timing import CLOCKS, interleaved, machine
from mapseg_components.inferers import OnnxInferer
from mapseg_components.memory import keep_freed_memory
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalUNet
from mapseg_components.networks.memory_format import set_memory_format
from mapseg_components.networks.slices import SliceConv3d
from mapseg_components.plans.sizes import plan_unet
from mapseg_components.precision import autocast
from mapseg_components.transforms.resampling import linear_resampling

LAYERS = 4


def as_volumes(network: nn.Module) -> nn.Module:
    """A copy whose convolutions are PyTorch's own."""
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if type(module) is SliceConv3d:
            module.__class__ = nn.Conv3d
    return plain


def step(network: nn.Module, image: torch.Tensor, amp: str | None = None) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        with autocast("cpu", amp):
            output = network(image)
        output.float().square().mean().backward()

    return run


def slices_sides() -> dict[str, Callable[[], None]]:
    image = torch.rand(4, 1, 192, 192, 1)
    sizes = plan_unet(image.shape[2:], [1, 1, 1], reduced=True)  # as of `mapseg adapt` without a GPU
    del sizes["upsample_kernel_size"]
    network = GlobalLocalUNet(1, 4, **sizes)
    return {"volumes of one slice": step(as_volumes(network), image), "images": step(network, image)}


def windows_sides(*shape: int) -> dict[str, Callable[[], None]]:
    image = torch.rand(4, 1, *shape)
    sizes = plan_unet(image.shape[2:], [1, 1, 1], reduced=False)
    del sizes["upsample_kernel_size"]
    network = GlobalLocalUNet(1, 8, **sizes).eval()
    inferer = OnnxInferer(SimpleInferer())

    @torch.no_grad()
    def there() -> None:
        inferer(image, network)

    there()  # the graph is made once
    return {"ONNX Runtime": there, "PyTorch": window(network, image)}


def int8_sides(*shape: int) -> dict[str, Callable[[], None]]:
    """Weights by channel, activations by their range on two windows: the usual static quantization (export)."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_static

    image = torch.rand(4, 1, *shape)
    sizes = plan_unet(image.shape[2:], [1, 1, 1], reduced=False)
    del sizes["upsample_kernel_size"]
    network = GlobalLocalUNet(1, 8, **sizes).eval()
    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        whole, quantized = f"{folder}/float32.onnx", f"{folder}/int8.onnx"
        graph = convert_to_onnx(network, [image], input_names=["image"], output_names=["logits"], opset_version=18)
        onnx.save(graph, whole)
        quantize_static(
            whole, quantized, Windows(image.shape), op_types_to_quantize=["Conv", "ConvTranspose"], per_channel=True
        )
        sessions = [onnxruntime.InferenceSession(path, options, providers) for path in (whole, quantized)]
    exact, rounded = (session.run(None, {"image": image.numpy()})[0].argmax(1) for session in sessions)
    print(f"voxels with another label: {(exact != rounded).mean():.1%}")
    return {
        name: partial(session.run, None, {"image": image.numpy()})
        for name, session in zip(("float32", "int8"), sessions)
    }


class Windows:
    """Two batches of random windows."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.inputs = iter([{"image": torch.rand(*shape).numpy()} for _ in range(2)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, ``None`` after the last one."""
        return next(self.inputs, None)


def precision_sides() -> dict[str, Callable[[], None]]:
    layers = [(nn.Conv3d(16, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU())] * LAYERS
    network, image = (
        nn.Sequential(*(one for layer in layers for one in copy.deepcopy(layer))),
        torch.rand(2, 16, *[48] * 3),
    )
    return {"bf16": step(network, image, "bf16"), "float32": step(network, image)}


def formats_sides(network: nn.Module, shape: Sequence[int], trained: bool) -> dict[str, Callable[[], None]]:
    keep_freed_memory()  # as a training does
    other = set_memory_format(copy.deepcopy(network), "channels_last_3d")
    image = torch.rand(2 if trained else 4, 1, *shape)
    side = step if trained else window
    return {"PyTorch's own": side(network, image), "channels_last_3d": side(other, image)}


def window(network: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """A forward pass."""
    network.eval()

    @torch.no_grad()
    def run() -> None:
        network(image)

    return run


def planned_formats(
    shape: Sequence[int], spacing: Sequence[float], reduced: bool, trained: bool = True
) -> dict[str, Callable[[], None]]:
    sizes = plan_unet(shape, spacing, reduced)
    del sizes["upsample_kernel_size"]
    return formats_sides(GlobalLocalUNet(1, 8, **sizes), shape, trained)


def dynunet_formats(trained: bool = True) -> dict[str, Callable[[], None]]:
    sizes, norm = plan_unet([48] * 3, [1, 1, 1]), ("INSTANCE", {"affine": True})
    return formats_sides(DynUNet(3, 1, 8, **sizes, norm_name=norm), [48] * 3, trained)


def mapseg_formats(trained: bool = True) -> dict[str, Callable[[], None]]:
    sizes = {"width": 32, "depth": 6, "stride": 2, "dilations": [2, 4, 6], "head_channels": 16}  # small_data.yaml
    return formats_sides(GlobalLocalDeepLabV3(in_channels=1, num_classes=8, **sizes), [48] * 3, trained)


def resampling_sides() -> dict[str, Callable[[], None]]:
    old, new = torch.diag(torch.tensor([1.5, 1.5, 1.5, 1])), torch.eye(4)
    scores, shape = torch.rand(8, 80, 96, 80), (120, 144, 120)
    move = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)
    by_axes = linear_resampling(old, scores.shape[1:], new, shape)

    def anyhow() -> None:
        for score in scores:
            move(MetaTensor(score[None], affine=old), dst_affine=new, spatial_size=shape)

    def along_axes() -> None:
        for score in scores:
            by_axes(score)

    return {"MONAI's SpatialResample": anyhow, "along axes": along_axes}


SIDES: Mapping[str, Callable[[], dict[str, Callable[[], None]]]] = {
    "slices": slices_sides,
    "precision": precision_sides,
    "memory_format": lambda: planned_formats([48, 48, 48], [1, 1, 1], False),
    "memory_format_thick": lambda: planned_formats([80, 80, 8], [1.6, 1.6, 8], True),
    "memory_format_images": lambda: planned_formats([192, 192, 1], [1, 1, 1], True),
    "memory_format_dynunet": dynunet_formats,
    "memory_format_mapseg": mapseg_formats,
    "windows": lambda: planned_formats([48, 48, 48], [1, 1, 1], False, trained=False),
    "windows_thick": lambda: planned_formats([80, 80, 8], [1.6, 1.6, 8], True, trained=False),
    "windows_dynunet": lambda: dynunet_formats(trained=False),
    "windows_mapseg": lambda: mapseg_formats(trained=False),
    "resampling": resampling_sides,
    "onnx": lambda: windows_sides(48, 48, 48),
    "onnx_slices": lambda: windows_sides(192, 192, 1),
    "int8": lambda: int8_sides(48, 48, 48),
    "int8_slices": lambda: int8_sides(192, 192, 1),
}


def main() -> None:
    """Print a line of Markdown for each side, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SIDES)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = SIDES[arguments.what]()
    seconds = interleaved(sides, arguments.repeats, torch.device("cpu"), clock=CLOCKS["cpu"])
    first, second = seconds.values()
    print(machine(torch.device("cpu"))["processor"])
    for name, times in seconds.items():
        print(f"| {name} | {arguments.repeats} | {median(times):.2f} s | {min(times):.2f} s .. {max(times):.2f} s |")
    print(f"times as fast: {median(a / b for a, b in zip(first, second)):.2f}")


if __name__ == "__main__":
    main()
