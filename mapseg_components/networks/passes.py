# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks as trainers call them: named outputs, and gradients that distributed training can synchronise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks.encoder import Features, deepest
from mapseg_components.networks.heads import both_heads, has_uncertainty
from mapseg_components.networks.recomputation import prepare_network

__all__ = ["GlobalLocalPass", "PlainPass", "training_pass"]


class PlainPass(nn.Module):
    """The training pass of any segmenter of one image: its output by name.

    It owns no weights: its ``state_dict`` is the segmenter's, by the same names, and loads the segmenter's.

    Args:
        network: from an image (B, C, X, Y, Z) to logits (B, classes, X, Y, Z), or to a mapping of outputs that has
            ``logits``. Of several outputs (a sequence, or stacked along a further axis as by MONAI's ``DynUNet`` with
            deep supervision) the first is ``logits`` and the others ``deep_1``, ``deep_2``, ... One with two heads (see
            `TwoHeads`) gives ``uncertainty``, of the logits' shape, as well.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import PlainPass
        >>> outputs = PlainPass(torch.nn.Conv3d(1, 4, 3, padding=1))(image=torch.zeros(2, 1, 8, 8, 8))
        >>> {name: tuple(value.shape) for name, value in outputs.items()}
        {'logits': (2, 4, 8, 8, 8)}
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The segmenter's; arguments as in PyTorch."""
        return self.network.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the segmenter's own names as well as those of this module's tree."""
        inner = f"{prefix}network."
        names = [name for name in state_dict if name.startswith(prefix)]
        own = {name[len(prefix) :] for name in names} <= set(self.network.state_dict())
        for name in names if own else [name for name in names if not name.startswith(inner)]:
            state_dict[inner + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name for an image (B, C, X, Y, Z)."""
        output = self.shown_network(image)
        if isinstance(output, Mapping):
            return dict(output)
        if isinstance(output, torch.Tensor):
            output = output.unbind(dim=1) if output.ndim == image.ndim + 1 else [output]
        first, *others = (one.float() for one in output)  # under amp: sums over many voxels
        if not has_uncertainty(self.network):
            return {"logits": first, **{f"deep_{number}": one for number, one in enumerate(others, start=1)}}
        deep = {f"deep_{number}": one.chunk(2, dim=1)[0] for number, one in enumerate(others, start=1)}
        return split_heads({"logits": first}) | deep

    @property
    def shown_network(self) -> nn.Module:
        """The segmenter, with both of its heads if it has two."""
        return both_heads(self.network) if has_uncertainty(self.network) else self.network


class GlobalLocalPass(PlainPass):
    """The training pass of a segmenter with a global view: all that MAPSeg compares, from one encoding of each image.

    Args:
        network: a `GlobalLocalDeepLabV3` or any module with its ``encode``, ``context`` and ``decode``.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalPass
        >>> network = GlobalLocalDeepLabV3(1, 3, width=8, depth=1, dilations=(1,), head_channels=8)
        >>> patch = torch.rand(1, 1, 16, 16, 16)
        >>> box = torch.tensor([[[0.0, 8.0]] * 3])
        >>> outputs = GlobalLocalPass(network)(image=patch, global_image=patch, box=box)
        >>> {name: tuple(value.shape) for name, value in outputs.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'logits': (1, 3, 16, 16, 16), 'global_logits': (1, 3, 16, 16, 16),
         'local_features': (1, 8, 4, 4, 4), 'context_features': (1, 8, 4, 4, 4)}
    """

    def forward(  # type: ignore[override]
        self, image: torch.Tensor, global_image: torch.Tensor, box: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Encode and decode a pair (B samples, C classes, W features, stride s).

        Args:
            image: (B, channels, X, Y, Z), the local patch.
            global_image: (B, channels, X', Y', Z'). Patches and views of equal size are encoded as one batch.
            box: (B, 3, 2), the patch in voxels of the view, see `GlobalLocalDeepLabV3.forward`.

        Returns:
            ``logits`` (B, C, X, Y, Z), decoded with the global context; ``global_logits`` (B, C, X', Y', Z'), the view
            decoded on its own; ``local_features`` (B, W, X/s, Y/s, Z/s); ``context_features``, of the same shape: the
            part of the view's features that covers the patch. Of a network with two heads ``uncertainty`` and
            ``global_uncertainty`` as well, of the shapes of the logits.
        """
        network = self.shown_network
        if image.shape == global_image.shape:
            local_features, global_features = halves(network.encode(torch.cat([image, global_image])))
        else:
            local_features, global_features = network.encode(image), network.encode(global_image)
        deep = deepest(local_features)
        context = network.context(deepest(global_features), box, list(global_image.shape[2:]), list(deep.shape[2:]))
        logits = {
            "logits": network.decode(local_features, context),
            "global_logits": network.decode(global_features),
        }
        if has_uncertainty(network):
            logits = split_heads(logits)
        return {**logits, "local_features": deep, "context_features": context}


def split_heads(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of each output (B, 2 classes, ...) by its name, and the uncertainty by ``uncertainty`` in its place."""
    parts = {name: value.chunk(2, dim=1) for name, value in outputs.items()}
    uncertainty = {name.replace("logits", "uncertainty"): second for name, (_, second) in parts.items()}
    return {name: first for name, (first, _) in parts.items()} | uncertainty


def halves(features: Features) -> Sequence[Features]:
    """Features of a batch as those of its first and of its second half."""
    if isinstance(features, torch.Tensor):
        return features.chunk(2)
    return tuple(zip(*(level.chunk(2) for level in features)))


def collaborates(network: nn.Module) -> bool:
    """Whether a network has the parts of a segmenter with a global view."""
    return all(hasattr(network, part) for part in ("encode", "context", "decode"))


def named_outputs(network: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What a network gives for named inputs.

    Raises:
        ConfigError: it does not take these names, or returns no outputs by name.
    """
    remedy = "wrap it by mapseg_components.networks.training_pass"
    try:
        inspect.signature(network.forward).bind(**inputs)
    except TypeError as error:
        raise ConfigError(
            f"network {type(network).__name__} does not take {sorted(inputs)}, which the method shows it ({error}): "
            f"{remedy}, or choose a method and a network that fit"
        ) from None
    outputs = network(**inputs)
    if not isinstance(outputs, Mapping):
        raise ConfigError(
            f"network {type(network).__name__} returns {type(outputs).__name__}, expected outputs by name: {remedy}"
        )
    return outputs


def training_pass(
    network: nn.Module,
    device: torch.device | str | None = None,
    activation_checkpointing: bool = False,
    global_view: bool = True,
    memory_format: str | None = None,
    amp: str | None = None,
) -> PlainPass:
    """The training pass that fits a network: `GlobalLocalPass` if it has the parts for it, otherwise `PlainPass`.

    Args:
        network: a segmenter.
        device: where it will run; by default where it is.
        activation_checkpointing: see `prepare_network`.
        global_view: whether samples have one; without it `PlainPass` fits every network.
        memory_format: see `prepare_network`.
        amp: see `prepare_network`.

    Raises:
        ConfigError: ``memory_format`` or ``amp`` is unknown.

    Examples:
        >>> import torch
        >>> from mapseg_components.networks import training_pass
        >>> type(training_pass(torch.nn.Conv3d(1, 4, 3))).__name__
        'PlainPass'
    """
    if device is not None:
        prepare_network(network, device, activation_checkpointing, memory_format, amp)
    return GlobalLocalPass(network) if global_view and collaborates(network) else PlainPass(network)
