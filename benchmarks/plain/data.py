# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Samples, made from the whole volume each time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio

__all__ = ["PlainSample", "adaptation_sample", "decode", "foreground_box", "mae_sample", "sample_of"]

PROB = 0.35


@dataclass
class PlainSample:
    """One pair; images and labels (1, P, P, P), box (3, 2) of the patch in voxels of the global view."""

    image: torch.Tensor
    global_image: torch.Tensor
    box: torch.Tensor
    label: torch.Tensor | None = None
    global_label: torch.Tensor | None = None


def decode(scan: Path, label: Path | None = None) -> tio.Subject:
    """Read a scan, and its label, from the disk, in RAS."""
    images = {"image": tio.ScalarImage(scan)}
    if label is not None:
        images["label"] = tio.LabelMap(label)
    subject = tio.Subject(**images)
    subject.load()
    return tio.ToCanonical()(subject)


def clip_at_percentile(image: torch.Tensor, percentile: float) -> torch.Tensor:
    """Clip a whole volume at a percentile and scale it to [0, 1]."""
    values = image.numpy().astype(np.float32)
    lowest, highest = values.min(), np.percentile(values, percentile)
    return torch.from_numpy((values.clip(lowest, highest) - lowest) / (highest - lowest))


def random_percentile() -> float:
    """99.5, or with probability 0.35 a random one."""
    return float(torch.empty(1).uniform_(99, 100)) if torch.rand(1) < PROB else 99.5


def foreground_box(image: torch.Tensor) -> torch.Tensor:
    """Half-open box (3, 2) around the voxels of (C, X, Y, Z) that are not 0."""
    mask = (image > 0).any(dim=0)
    planes = [torch.nonzero(mask.amax(dim=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return torch.tensor([[int(found.min()), int(found.max()) + 1] for found in planes])


def pad_to(volume: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros around (C, X, Y, Z), so that no side is shorter than ``size``."""
    missing = [max(size - side, 0) for side in volume.shape[1:]]
    return F.pad(volume, [pad for m in reversed(missing) for pad in (m // 2, m - m // 2)])


def sample_of(subject: tio.Subject, patch: int) -> PlainSample:
    """Cut a random patch inside the foreground's box, and resize the box to the global view."""
    (x0, x1), (y0, y1), (z0, z1) = foreground_box(subject.image.data).tolist()
    volumes = {"image": subject.image.data.float()}
    if "label" in subject:
        volumes["label"] = subject.label.data.float()
    regions = {key: pad_to(volume[:, x0:x1, y0:y1, z0:z1], patch) for key, volume in volumes.items()}
    sides = torch.tensor(regions["image"].shape[1:])
    start = torch.stack([torch.randint(int(side) - patch + 1, ()) for side in sides])
    x, y, z = start.tolist()
    pieces: dict[str, torch.Tensor] = {}
    for key, region in regions.items():
        how = {"mode": "nearest-exact"} if key == "label" else {"mode": "trilinear", "align_corners": False}
        pieces[key] = region[:, x : x + patch, y : y + patch, z : z + patch].clone()
        pieces[f"global_{key}"] = F.interpolate(region[None], (patch, patch, patch), **how)[0]
    return PlainSample(box=torch.stack([start, start + patch], dim=1) * (patch / sides)[:, None], **pieces)


def adaptation_sample(scan: Path, label: Path, patch: int) -> PlainSample:
    """A labelled source sample: affine, bias field and gamma, each with probability 0.35 (section 4.1)."""
    subject = decode(scan, label)
    subject.image.set_data(clip_at_percentile(subject.image.data, random_percentile()))
    augmentation = tio.Compose(
        [
            tio.RandomAffine(scales=(0.7, 1.4), degrees=30, isotropic=True, p=PROB),
            tio.RandomBiasField(p=PROB),
            tio.RandomGamma(log_gamma=0.4, p=PROB),
        ]
    )
    return sample_of(augmentation(subject), patch)


def mae_sample(scan: Path, patch: int) -> PlainSample:
    """A pretraining sample: affine with probability 0.35, a flip of each axis with 0.5 (section 4.1)."""
    subject = decode(scan)
    subject.image.set_data(clip_at_percentile(subject.image.data, random_percentile()))
    augmentation = tio.Compose(
        [
            tio.RandomAffine(scales=(0.75, 1.5), degrees=40, isotropic=True, p=PROB),
            *(tio.RandomFlip(axes=axis, flip_probability=0.5) for axis in range(3)),
        ]
    )
    return sample_of(augmentation(subject), patch)
