#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a planned U-Net for one with more channels, which computes the same and learns on.

    python tools/widen_network.py bundles/brain_any_contrast/models/model.pt WIDE.pt \\
        --bundle bundles/brain_any_contrast --filters 12 24 48 96 --wider 12 24 96 192

--filters are those of the weights, --wider those of the network to be; everything else of both is as in the bundle's
train.json. Each channel is copied, and what reads it is dealt out over the copies by random shares, so that they learn
different things (Net2WiderNet: Chen et al. 2016, arXiv 1511.05641). Channels must be multiples, and normalization must
have as many groups as before; both networks are run on a random image and refused where they differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.checkpoints import load_weights, weights_of, write_atomic
from mapseg_components.errors import ConfigError, MAPSegError

TOLERANCE = 1e-4  # of the largest logit
SHARES = 0.25, 0.75  # of a copy, lowest and highest, before they are made to sum to one


def network_of(bundle: Path, filters: Sequence[int]) -> nn.Module:
    """The network of a bundle's training with other channels."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    parser["network_def#filters"] = [*filters]
    return parser.get_parsed_content("network_def")


def widened(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights with copied channels.

    Args:
        weights: by name.
        shapes: of the wider network's, by name.
        seed: of the shares.

    Raises:
        ConfigError: a number of channels is no multiple.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, own in weights.items():
        reads = {} if own.dim() < 2 else {0} if "transp_conv" in name else {1}
        value = own
        for axis, (before, after) in enumerate(zip(own.shape, shapes[name])):
            if after % before:
                raise ConfigError(
                    f"{name} has {before} channels, {after} are no multiple of them: choose other filters"
                )
            copies = after // before
            value = value.repeat_interleave(copies, dim=axis)
            if copies > 1 and axis in reads:
                low, high = SHARES
                share = low + (high - low) * torch.rand(before, copies, generator=generator)
                share = (share / share.sum(dim=1, keepdim=True)).flatten()
                value = value * share.reshape([-1 if one == axis else 1 for one in range(own.dim())])
        found[name] = value.contiguous()
    return found


def main(line: Sequence[str] | None = None) -> None:
    """Widen, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--filters", type=int, nargs="+", required=True)
    parser.add_argument("--wider", type=int, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(line)
    own, wide = (network_of(given.bundle, filters).eval() for filters in (given.filters, given.wider))
    load_weights(own, given.weights)
    shapes = {name: value.shape for name, value in wide.state_dict().items()}
    wide.load_state_dict(widened(own.state_dict(), shapes, given.seed))
    image = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(given.seed))
    with torch.no_grad():
        expected, found = own(image), wide(image)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > TOLERANCE:
        raise ConfigError(
            f"the wider network's logits differ by {difference:.2g} of the largest: normalization has other groups, "
            "choose filters whose levels have as many groups as before"
        )
    write_atomic(weights_of(wide), given.output)
    sys.stdout.write(f"{given.output}: {sum(value.numel() for value in wide.parameters()):,} parameters\n")


if __name__ == "__main__":
    try:
        main()
    except MAPSegError as error:
        sys.exit(f"{type(error).__name__}: {error}")
