# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference with ONNX Runtime in the place of PyTorch, on a CPU."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.utils import convert_to_onnx
from monai.utils import optional_import
from torch import nn

from mapseg_components.errors import ConfigError
from mapseg_components.networks.passes import collaborates

__all__ = ["OnnxInferer", "require_onnxruntime"]

TOLERANCE = 1e-3  # largest difference of a logit from PyTorch's, as a share of the largest; 2e-4 is seen in float32
OPSET = 18
LEAVE_OUT = "take PyTorch (leave out backend)"


class OnnxInferer(Inferer):
    """Another inferer, whose windows go through a graph of the network in ONNX Runtime, in float32 on a CPU.

    The graph is made of the network and its weights when the first windows come, once for each of their shapes, and
    anew when the weights change; it is used only if its logits of these windows agree with PyTorch's.

    Args:
        inferer: any inferer that calls the network on images alone, such as MONAI's ``SlidingWindowInferer``.

    Examples:
        >>> from monai.inferers import SlidingWindowInferer
        >>> from mapseg_components.inferers import OnnxInferer
        >>> inferer = OnnxInferer(SlidingWindowInferer((48, 48, 48)))  # logits = inferer(image, network)
        >>> inferer.sessions
        {}
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self.sessions: dict[torch.Size, Any] = {}
        self.weights: list[tuple[int, int]] = []  # of the graphs: parameters and the number of their changes

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of the inferer for ``inputs`` (B, C, X, Y, Z); errors as of it.

        Raises:
            ConfigError: ONNX Runtime is not installed, or the network is not on the CPU, is shown a global view, gives
                no single tensor, or its graph gives other logits.
        """
        parameters = [*network.parameters()]
        if any(parameter.device.type != "cpu" for parameter in parameters):
            raise ConfigError(f"ONNX Runtime computes on the CPU here, and the network is on a GPU: {LEAVE_OUT}")
        if shows_view(self.inferer) and collaborates(network):
            raise ConfigError(
                f"ONNX Runtime computes networks of one image here, and this one sees a whole scan as well: {LEAVE_OUT}"
            )
        weights = [(id(parameter), parameter._version) for parameter in parameters]
        if weights != self.weights:
            self.sessions, self.weights = {}, weights
        by_pytorch = network.forward

        def by_onnx(image: torch.Tensor) -> torch.Tensor:
            image = image.as_subclass(torch.Tensor).contiguous()
            if image.shape[1:] not in self.sessions:
                self.sessions[image.shape[1:]] = self.session_of(by_pytorch, network, image)
            return torch.from_numpy(self.sessions[image.shape[1:]].run(None, {"image": image.numpy()})[0])

        network.forward = by_onnx  # what asks for the network's class and parts finds them
        try:
            return self.inferer(inputs, network, *args, **kwargs)
        finally:
            del network.forward

    def session_of(self, forward: Callable[[torch.Tensor], Any], network: nn.Module, image: torch.Tensor) -> Any:
        """A session for any number of images of a shape."""
        onnxruntime = require_onnxruntime()
        with torch.no_grad():
            expected = forward(image)
        if not isinstance(expected, torch.Tensor):
            raise ConfigError(
                f"ONNX Runtime computes networks of one output here, and {type(network).__name__} gives "
                f"{type(expected).__name__}: {LEAVE_OUT}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: sizes are those of this shape
            path = os.path.join(folder, "network.onnx")
            convert_to_onnx(
                Graph(network, forward).eval(),
                [image],
                filename=path,
                input_names=["image"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
                dynamo=False,
            )
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"ONNX Runtime's logits differ by {difference:.1e} of the largest from PyTorch's, expected at most "
                f"{TOLERANCE:.0e}: {LEAVE_OUT}"
            )
        return session


def require_onnxruntime() -> Any:
    """The module of ONNX Runtime. Raises `ConfigError` if it is not installed."""
    onnxruntime, known = optional_import("onnxruntime")
    if not known:
        raise ConfigError(f"ONNX Runtime is not installed: pip install 'mapseg-monai[export]', or {LEAVE_OUT}")
    return onnxruntime


class Graph(nn.Module):
    """A network as its own forward computes it, whatever stands in its place."""

    def __init__(self, network: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.of_network = network, forward

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.of_network(image)


def shows_view(inferer: Any) -> bool:
    """Whether an inferer, or one within it, shows a network the whole scan."""
    if bool(getattr(inferer, "global_view", False)):
        return True
    inner = getattr(inferer, "inferer", None)
    return inner is not None and shows_view(inner)
