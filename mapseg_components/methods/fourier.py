# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Source patches with the target's low-frequency amplitudes (FDA, Yang and Soatto, CVPR 2020, arXiv 2004.05498)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.keys import IMAGE, SOURCE, TARGET
from mapseg_components.methods.base import Pass, Tensors
from mapseg_components.methods.consistency import Supervised

__all__ = ["FourierMixing", "low_frequencies_from"]


class FourierMixing(Supervised):
    """The source's labels, for source patches whose low frequencies have the amplitudes of a target patch.

    The phase, which holds the shapes, stays the source's; nothing is learnt from predictions of the target. Values are
    cut to [0, 1], and background, 0, stays 0. A batch without a target is the source as it is.

    Of the paper's terms, those on the target's predictions (entropy, and a second training on labels of an average of
    three models) are left out.

    Args:
        loss: of the source, see `Supervised`.
        beta: half the side of the exchanged box in shares of all frequencies, along each axis: of a patch of 64 voxels
            0.05 exchanges the mean and the three lowest frequencies of either sign (0.01 to 0.09 in the paper, of
            images of 512 x 1024). 0 exchanges nothing.

    Raises:
        ConfigError: beta is not from 0 to 0.5; in a call, patches of both sides differ in size, or there is a target
            and no source.

    Examples:
        >>> import torch
        >>> from mapseg_components.methods import FourierMixing
        >>> side = {"image": torch.rand(1, 1, 8, 9, 10), "label": torch.ones(1, 1, 8, 9, 10)}
        >>> target = {"image": torch.rand(1, 1, 8, 9, 10)}
        >>> seen = FourierMixing(loss=None, beta=0.1).passes({"source": side, "target": target})[0].inputs["image"]
        >>> seen.shape, bool((seen == side["image"]).all())
        (torch.Size([1, 1, 8, 9, 10]), False)
    """

    alone = (SOURCE,)

    def __init__(self, loss: nn.Module, beta: float = 0.05) -> None:
        super().__init__(loss)
        if not 0.0 <= beta <= 0.5:
            raise ConfigError(f"beta is {beta}, expected 0 (nothing is exchanged) to 0.5 (all amplitudes)")
        self.beta = beta

    def passes(self, batch: Mapping[str, Tensors]) -> list[Pass]:
        """One pass over the source's images, with amplitudes of the target's."""
        passes = super().passes(batch)
        if TARGET not in batch:
            return passes
        if SOURCE not in batch:
            raise ConfigError(
                "Fourier mixing trains on source patches, and there is no source (test-time, or a site of a "
                "federation): choose MAPSeg there"
            )
        source, target = passes[0].inputs[IMAGE], batch[TARGET][IMAGE]
        if source.shape != target.shape:
            raise ConfigError(
                f"source patches are {tuple(source.shape)}, target patches {tuple(target.shape)}, expected equal "
                "sizes: give both one batch_size and patch_size"
            )
        mixed = low_frequencies_from(target, source, self.beta).clamp(0.0, 1.0) * (source > 0)
        return [Pass({IMAGE: mixed}, passes[0].terms)]


def low_frequencies_from(style: torch.Tensor, image: torch.Tensor, beta: float) -> torch.Tensor:
    """Images with their own phases, and amplitudes of other images at low frequencies.

    Args:
        style: (B, C, X, Y, Z), whose amplitudes are taken.
        image: of the same shape.
        beta: frequencies of at most so many cycles per voxel along each axis are exchanged; the mean is one of them. 0
            exchanges nothing.

    Returns:
        float32 of the same shape, of any values.

    Examples:
        >>> import torch
        >>> from mapseg_components.methods import low_frequencies_from
        >>> image = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1, 1)
        >>> low_frequencies_from(image + 2, image, beta=0.1).flatten().tolist()  # the mean of the other
        [2.0, 3.0, 2.0, 3.0]
    """
    if beta == 0:
        return image.float()
    axes, sides = (-3, -2, -1), image.shape[-3:]
    spectrum, other = (torch.fft.rfftn(one.float(), dim=axes) for one in (image, style))
    low = torch.ones((), dtype=torch.bool, device=image.device)
    for axis, side in zip(axes, sides):
        frequencies = (torch.fft.rfftfreq if axis == -1 else torch.fft.fftfreq)(side, device=image.device)
        low = low & (frequencies.abs() <= beta + 1e-6).view([-1 if one == axis else 1 for one in axes])
    phase = torch.where(spectrum == 0, 1.0, spectrum.sgn())
    return torch.fft.irfftn(torch.where(low, other.abs() * phase, spectrum), s=sides, dim=axes)
