#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Export a bundle's segmenter to ONNX: python tools/export_onnx.py bundles/mapseg_adaptation --output DIR.

Two graphs, because ONNX has no optional input that changes what is computed: ``one_image.onnx`` (image) and
``collaborative.onnx`` (image, global_image, box). Batch size is free; the image is a window of the bundle's inference,
the global view has the size of its patches. Each graph is run by ONNX Runtime on inputs that the export did not see,
and refused where its logits leave the tolerance. (TorchScript needs no tool of ours: ``python -m monai.bundle
ckpt_export`` makes one file that takes both calls.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from monai.bundle import ConfigParser
from monai.networks.utils import convert_to_onnx
from torch import nn

from mapseg_components.checkpoints import load_weights
from mapseg_components.errors import CheckpointError, MAPSegError
from mapseg_components.files import replacing
from mapseg_components.networks.passes import collaborates

GRAPHS = {"one_image": ["image"], "collaborative": ["image", "global_image", "box"]}
# largest difference of a logit from PyTorch's, in float32, as a share of the largest logit
TOLERANCE = 1e-4


def examples(
    names: Sequence[str], channels: int, window: Sequence[int], view: Sequence[int], batch: int, seed: int
) -> list[torch.Tensor]:
    """Random inputs of a graph: images (batch, channels, X, Y, Z) in [0, 1], boxes (batch, 3, 2) inside the view."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(view, dtype=torch.float32)
    ends = torch.rand(batch, 3, 2, generator=generator).sort(dim=2).values * size[:, None]
    images = [torch.rand(batch, channels, *sides, generator=generator) for sides in (window, view)]
    known = {"image": images[0], "global_image": images[1], "box": ends}
    return [known[name] for name in names]


def export(
    network: nn.Module, channels: int, window: Sequence[int], view: Sequence[int] | None, folder: Path
) -> dict[str, float]:
    """Write the graphs of a segmenter, each verified before it takes its name.

    Args:
        network: a `GlobalLocalDeepLabV3`, or any segmenter of one image, which has the first graph alone.
        channels: of its image.
        window: voxels per axis of the image.
        view: voxels per axis of the global view; ``None`` without one, and then without its graph.
        folder: where the graphs go.

    Returns:
        by graph, the largest difference of a logit between ONNX Runtime and PyTorch, both in float32 on the CPU, as a
        share of the largest logit.

    Raises:
        CheckpointError: a difference is above ``TOLERANCE``, or not a number.
    """
    network = network.float().cpu().eval()
    batch, differences = torch.export.Dim("batch"), {}
    for graph, names in GRAPHS.items():
        if len(names) > 1 and (view is None or not collaborates(network)):
            continue
        with replacing(folder / f"{graph}.onnx") as temporary:
            convert_to_onnx(
                network,
                examples(names, channels, window, view or window, batch=2, seed=0),
                input_names=names,
                output_names=["logits"],
                filename=str(temporary),
                dynamic_shapes=tuple({0: batch} for _ in names),
                external_data=False,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            inputs = examples(names, channels, window, view or window, batch=3, seed=1)
            with torch.no_grad():
                expected = network(*inputs)
            found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs)})[0]
            difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
            if not difference <= TOLERANCE:
                raise CheckpointError(
                    f"{graph}.onnx differs from the network by {difference:.2g} of the largest logit, at most "
                    f"{TOLERANCE} is accepted: nothing was written; try another version of onnx or onnxruntime"
                )
            differences[graph] = difference
    return differences


def main() -> None:
    """Export the bundle that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--output", type=Path, default=Path("runs/export"), help="folder for the graphs")
    parser.add_argument("--overlay", action="append", default=[], help="overlay of the bundle that the weights need")
    parser.add_argument("--weights", type=Path, help="default: models/model.pt of the bundle")
    arguments = parser.parse_args()
    configs = arguments.bundle / "configs"
    config = ConfigParser()
    config.read_config([str(configs / name) for name in ("inference.json", *arguments.overlay)])
    names = ("network_def", "in_channels", "window_size", "patch_size", "global_view")
    network, channels, window, view, seen = map(config.get_parsed_content, names)
    try:
        load_weights(network, arguments.weights or arguments.bundle / "models" / "model.pt")
        for graph, difference in export(network, channels, window, view if seen else None, arguments.output).items():
            print(f"{arguments.output / graph}.onnx  differs by {difference:.1e} of the largest logit")
    except MAPSegError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
