# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Sliding windows with the global context of the scan (MAPSeg, arXiv 2303.09373, sections 3.4 and 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import dense_patch_slices
from monai.inferers import SlidingWindowInferer
from monai.utils import ensure_tuple_rep, optional_import
from torch import nn

from mapseg_components.boxes import box_of_mask, expand_box, resample_box
from mapseg_components.errors import ConfigError, DataError, NonFiniteError
from mapseg_components.inferers.stitching import Stitching, Window
from mapseg_components.memory import naming_memory_errors, require_memory
from mapseg_components.networks import PlainPass
from mapseg_components.networks.encoder import deepest
from mapseg_components.networks.heads import shows_both
from mapseg_components.networks.passes import collaborates

tqdm, _ = optional_import("tqdm", name="tqdm")  # needed for ``progress`` alone

__all__ = ["GlobalLocalSlidingWindowInferer"]

# a network's output by name; a tensor alone has the name None, parts of a sequence are numbered
Parts = dict[Any, torch.Tensor]


class GlobalLocalSlidingWindowInferer(SlidingWindowInferer):
    """Segment a whole scan by windows, each decoded with its part of the scan's global features.

    Per scan: the box of its foreground (non-zero voxels), grown to the window where the scan is smaller, is resampled
    to the global view, whose features are computed once. Unique windows over the box are encoded in batches, windows
    without foreground are skipped, and the logits of overlapping windows are averaged. Outside the box is background.

    A subclass of MONAI's ``SlidingWindowInferer``, for clients that check the type; arguments of the same name mean the
    same.

    Args:
        roi_size: window, voxels per axis.
        global_size: global view, voxels per axis; by default the window's size.
        stride: steps between windows, voxels per axis (80 for windows of 96 in the paper); by default
            5/6 of the window.
        sw_batch_size: windows per batch.
        mode: ``"constant"`` for a plain mean (the paper), ``"gaussian"`` to weight a window's centre more.
        stitching_device: another name of ``device``.
        background_margin: logit of background minus that of every other class where no window lies. An output of one
            channel, the logit of one structure, is minus this there.
        overlap: share of a window that the next one covers, one number or one per axis; instead of ``stride``, whole
            voxels of which are ``window * (1 - overlap)``, rounded down.
        sigma_scale: of the Gaussian, in windows.
        sw_device: where the network is; by default the input's device.
        device: where logits of the whole scan are kept and returned, e.g. ``"cpu"`` for large scans (4 bytes per class
            and voxel); by default the input's device. A call may name another one.
        progress: show a bar of the windows.
        cpu_thresh: voxels of a scan above which its logits are kept on the CPU, where no ``device`` is given.
        global_view: whether a network that collaborates is shown the whole scan; without, it sees each window alone.

    A network without ``encode``, ``context`` and ``decode`` is called on each window alone.

    Raises:
        ConfigError: a size is not positive, ``stride`` exceeds the window, ``overlap`` is outside [0, 1), or two names
            of one setting disagree.

    Examples:
        >>> import torch
        >>> from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
        >>> from mapseg_components.networks import GlobalLocalDeepLabV3
        >>> network = GlobalLocalDeepLabV3(in_channels=1, num_classes=3, width=8, depth=1, dilations=[1]).eval()
        >>> inferer = GlobalLocalSlidingWindowInferer(roi_size=(8, 8, 8), overlap=0.5)
        >>> inferer(torch.rand(1, 1, 13, 11, 10), network).shape
        torch.Size([1, 3, 13, 11, 10])
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        global_size: Sequence[int] | int | None = None,
        stride: Sequence[int] | int | None = None,
        sw_batch_size: int = 4,
        mode: str = "constant",
        stitching_device: torch.device | str | None = None,
        background_margin: float = 10.0,
        overlap: Sequence[float] | float | None = None,
        sigma_scale: Sequence[float] | float = 0.125,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        cpu_thresh: int | None = None,
        global_view: bool = True,
    ) -> None:
        window = positive_sides("roi_size", roi_size)
        if stride is not None and overlap is not None:
            raise ConfigError(
                f"stride {stride} and overlap {overlap} both set the distance of windows: leave one of them out"
            )
        if None not in (device, stitching_device) and torch.device(device) != torch.device(stitching_device):  # type: ignore[arg-type]
            raise ConfigError(f"device {device} and stitching_device {stitching_device} are one setting: give one")
        if overlap is not None:
            shares = ensure_tuple_rep(overlap, 3)
            if not all(0 <= share < 1 for share in shares):
                raise ConfigError(f"overlap is {overlap}, expected shares of the window from 0 to below 1")
            stride = tuple(max(int(side * (1 - share)), 1) for side, share in zip(window, shares))
        elif stride is None:
            stride = tuple(max(side * 5 // 6, 1) for side in window)
        self.stride = ensure_tuple_rep(stride, 3)
        if any(not 1 <= step <= side for step, side in zip(self.stride, window)):
            raise ConfigError(
                f"window stride {self.stride} must be between 1 and the window {window} on every axis, "
                "or voxels would be left out"
            )
        super().__init__(
            window,
            sw_batch_size,
            overlap=tuple(1 - step / side for step, side in zip(self.stride, window)),
            mode=mode,
            sigma_scale=sigma_scale,
            sw_device=sw_device,
            device=stitching_device if device is None else device,
            progress=progress,
            cpu_thresh=cpu_thresh,
        )
        self.global_size = window if global_size is None else positive_sides("global_size", global_size)
        self.background_margin = background_margin
        self.global_view = global_view

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Logits of whole scans; no gradient is recorded.

        Args:
            inputs: (B, C, X, Y, Z), in [0, 1], background 0.
            network: e.g. ``GlobalLocalDeepLabV3``, or any function of windows (N, C, *roi_size). Its output is a
                tensor, a sequence or a mapping of tensors (N, channels, ...), all of them logits. One of another
                resolution than the window is stitched in its own, windows placed to its nearest voxel.
            args: passed to a network that is called on each window alone; one that collaborates takes none.
            kwargs: likewise, but for MONAI's own: ``device``, instead of the one above; ``condition``, like ``inputs``,
                whose windows are passed beside those of the scan; ``buffer_steps`` and ``buffer_dim``, which change no
                number and have nothing to buffer here.

        Returns:
            (B, classes, X, Y, Z), float32; a tuple or a dict of such where the network's output is one. A
            ``MetaTensor`` gives one with its metadata and applied operations, as a batch if it is one; an output of
            another resolution stays a plain tensor.

        Raises:
            ConfigError: the input is no batch of 3D scans, or arguments are given that the network does not take.
            DataError: a scan has no foreground.
            NonFiniteError: the network's output holds NaN or infinite values.
            ResourceError: the logits of a scan do not fit into memory, which is checked before they are allocated.
        """
        if not isinstance(inputs, torch.Tensor) or inputs.ndim != 5:
            found = f"{type(inputs).__name__} of shape {tuple(getattr(inputs, 'shape', ()))}"
            raise ConfigError(f"input is {found}, expected a tensor of 3D scans, (B, C, X, Y, Z)")
        device = kwargs.pop("device", None) or self._stitcher(inputs)
        conditions = kwargs.pop("condition", None)
        for name in ("buffer_steps", "buffer_dim"):
            kwargs.pop(name, None)
        if conditions is not None and conditions.shape != inputs.shape:
            raise ConfigError(
                f"condition of shape {tuple(conditions.shape)}, expected the input's {tuple(inputs.shape)}"
            )
        scans: list[Parts] = []
        for number, scan in enumerate(scans_of(inputs)):
            if conditions is not None:
                kwargs["condition"] = plain(conditions)[number]
            windows = f"windows of {self.roi_size}, {self.sw_batch_size} at a time, on {scan.device}"
            remedy = "window_batch_size, or set stitching_device or device to cpu, or crop the scan"
            with naming_memory_errors(f"{name_of(scan)}, {windows}", remedy):
                parts, kind = self._segment(scan, network, torch.device(device), *args, **kwargs)
            scans.append(parts)
        whole: Parts = {
            key: scans[0][key][None] if len(scans) == 1 else torch.stack([parts[key] for parts in scans])
            for key in scans[0]
        }
        whole = {key: like(logits, inputs) for key, logits in whole.items()}
        if issubclass(kind, Mapping):
            return whole
        outputs = tuple(whole.values())
        return outputs if len(outputs) > 1 else outputs[0]  # a sequence of one is that one, as MONAI has it

    def _segment(
        self, scan: torch.Tensor, network: Any, device: torch.device, *args: Any, **kwargs: Any
    ) -> tuple[Parts, type]:
        """(C, X, Y, Z) to outputs (channels, X, Y, Z), and the type of the network's output."""
        name, image = name_of(scan), plain(scan)
        foreground = (image != 0).any(dim=0)
        if not foreground.any():
            raise DataError(f"{name}: no voxel above 0, no foreground to segment: check its intensities")
        box = expand_box(box_of_mask(foreground.cpu().numpy()), self.roi_size)
        windows = self._windows(crop_with_zeros(foreground[None], box)[0])
        if "condition" in kwargs:
            kwargs["condition"] = crop_with_zeros(kwargs["condition"], box)
        forward = self._forward(crop_with_zeros(image, box), network, *args, **kwargs)

        outputs: dict[Any, Stitching] = {}
        kind: type = torch.Tensor
        starts: Iterable[int] = range(0, len(windows), self.sw_batch_size)
        for start in tqdm(starts) if self.progress else starts:
            batch = windows[start : start + self.sw_batch_size]
            found = forward(batch)
            kind, parts = type(found), parts_of(found)
            if not outputs:
                classes = sum(part[0].numel() for part in parts.values()) / math.prod(self.roi_size)
                self._require_memory(name, classes, image, device, len(parts))
            if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
                raise NonFiniteError(f"{name}: the network's output is NaN or infinite: check the weights and amp")
            for key, part in parts.items():
                if key not in outputs:
                    outputs[key] = Stitching(
                        part.shape[1:], self.roi_size, box, image.shape[1:], device, self.mode, self.sigma_scale
                    )
                outputs[key].add(batch, part)
        both = shows_both(network)
        return {key: output.mean(self.background_margin, both) for key, output in outputs.items()}, kind

    def _require_memory(
        self, name: str, classes: float, image: torch.Tensor, device: torch.device, outputs: int = 1
    ) -> None:
        """Refuse a scan whose stitching needs more than the device's memory: sums of logits, a count for each of the
        network's outputs and a mask of the whole scan; and the scan itself where it is on the same device but not
        counted as used. An output in another resolution contributes to ``classes`` in proportion to its voxels."""
        voxels = image[0].numel()
        values = (classes + outputs) * voxels + (image.numel() if device.type == "cpu" else 0)
        remedy = "crop the scan or resample it to larger voxels"
        if device.type != "cpu":
            remedy = f"set stitching_device to cpu, or {remedy}"
        shape = tuple(image.shape[1:])
        require_memory(int(4 * values + voxels), device, f"{name}: {classes:g} classes of shape {shape}", remedy)

    def _windows(self, foreground: torch.Tensor) -> list[Window]:
        """Unique windows over a region (X, Y, Z) that hold foreground."""
        windows = dict.fromkeys(
            tuple((s.start, s.stop) for s in window)
            for window in dense_patch_slices(tuple(foreground.shape), self.roi_size, self.stride)
        )
        slices = [tuple(slice(*ends) for ends in window) for window in windows]
        return [window for window in slices if foreground[window].any()]

    def _forward(self, region: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Callable[[list[Window]], Any]:
        """Function from windows of a region (C, X, Y, Z) to the network's output for them (N, C, *roi_size)."""
        where = region.device if self.sw_device is None else torch.device(self.sw_device)

        def stack(windows: list[Window], volume: torch.Tensor = region) -> torch.Tensor:
            return torch.stack([volume[(slice(None), *window)] for window in windows]).to(where)

        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module  # the wrapper hides encode, context and decode
        if isinstance(network, PlainPass):
            network = network.network
        if not (self.global_view and collaborates(network)):
            condition = kwargs.pop("condition", None)

            def alone(windows: list[Window]) -> Any:
                further = {} if condition is None else {"condition": stack(windows, condition)}
                return network(stack(windows), *args, **kwargs, **further)

            return alone
        if args or kwargs:
            raise ConfigError(
                f"{type(network).__name__} collaborates through encode, context and decode, which take no further "
                f"arguments: got {len(args)} and {sorted(kwargs)}; leave them out, or wrap the network in a function"
            )

        sides = torch.tensor(region.shape[1:], dtype=torch.float32, device=region.device)
        whole = torch.stack([torch.zeros_like(sides), sides], dim=1)[None]
        global_features = deepest(network.encode(resample_box(region[None], whole, list(self.global_size)).to(where)))
        scale = torch.tensor(self.global_size, dtype=torch.float32, device=region.device) / sides

        def collaborate(windows: list[Window]) -> torch.Tensor:
            features = network.encode(stack(windows))
            ends = torch.tensor([[[s.start, s.stop] for s in window] for window in windows], dtype=torch.float32)
            context = network.context(
                global_features.expand(len(windows), *[-1] * 4),
                (ends.to(region.device) * scale[:, None]).to(where),
                list(self.global_size),
                list(deepest(features).shape[2:]),
            )
            return network.decode(features, context)

        return collaborate

    def _stitcher(self, inputs: torch.Tensor) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        large = self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh
        return torch.device("cpu") if large else inputs.device


def positive_sides(name: str, sides: Sequence[int] | int) -> tuple[int, ...]:
    """Three sides. Raises `ConfigError` unless they are positive."""
    try:
        result = ensure_tuple_rep(sides, 3)
    except ValueError:
        raise ConfigError(f"{name} is {sides}, expected one number of voxels or one for each of three axes") from None
    if not all(side is not None and side >= 1 for side in result):
        raise ConfigError(f"{name} is {sides}, expected voxels per axis, 1 or more")
    return result


def parts_of(output: Any) -> Parts:
    """Tensors of a network's output by name, float32; a tensor alone has the name ``None``.

    Raises:
        ConfigError: it holds anything else, or a tensor that is no batch of volumes.
    """
    if isinstance(output, torch.Tensor):
        parts = {None: output}
    else:
        parts = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
    for key, part in parts.items():
        if not isinstance(part, torch.Tensor) or part.ndim != 5:
            found = f"a tensor of shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
            what = "the network's output" if key is None else f"the network's output {key!r}"
            raise ConfigError(
                f"{what} is {found}, expected a tensor (N, channels, X, Y, Z): leave it out of the output"
            )
    return {key: plain(part).float() for key, part in parts.items()}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without metadata."""
    return tensor.as_subclass(torch.Tensor)


def like(logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Logits (B, ...) with the metadata of a ``MetaTensor`` (B, ...), if they are on its grid."""
    same = isinstance(inputs, MetaTensor) and logits.shape[2:] == inputs.shape[2:]
    return MetaTensor(logits).copy_meta_from(inputs) if same else logits


def scans_of(inputs: torch.Tensor) -> list[torch.Tensor]:
    """The scans (C, X, Y, Z) of a batch, each with the name of its file where that is known."""
    scans = list(plain(inputs))
    known = inputs.meta.get("filename_or_obj") if isinstance(inputs, MetaTensor) else None
    if known is None:
        return scans
    names = known if isinstance(known, (list, tuple)) and len(known) == len(scans) else [known] * len(scans)
    return [MetaTensor(scan, meta={"filename_or_obj": name}) for scan, name in zip(scans, names)]


def name_of(scan: torch.Tensor) -> str:
    """File of a scan, for messages."""
    return str(scan.meta.get("filename_or_obj", "the scan")) if isinstance(scan, MetaTensor) else "the scan"


def crop_with_zeros(volume: torch.Tensor, box: np.ndarray) -> torch.Tensor:
    """Part of a volume (C, X, Y, Z) inside an integer box, with 0 where the box leaves the volume."""
    shape = volume.shape[1:]
    padding = [[max(-int(start), 0), max(int(stop) - side, 0)] for (start, stop), side in zip(box, shape)]
    inner = tuple(slice(max(int(start), 0), min(int(stop), side)) for (start, stop), side in zip(box, shape))
    return F.pad(volume[(slice(None), *inner)], [size for pair in reversed(padding) for size in pair])
