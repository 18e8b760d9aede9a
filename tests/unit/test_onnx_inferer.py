# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime in the place of PyTorch: the same logits, or a refusal; `mapseg predict --backend onnx`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.utils import optional_import
from torch import nn

from mapseg_components.commands import predict
from mapseg_components.errors import ConfigError
from mapseg_components.inferers import AutocastInferer, GlobalLocalSlidingWindowInferer, OnnxInferer, onnx_runtime
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalUNet
from mapseg_components.plans.sizes import plan_unet
from mapseg_components.scans.nifti import read_nifti
from tests.conftest import make_scan, write_nifti

needs_runtime = pytest.mark.skipif(
    not all(optional_import(name)[1] for name in ("onnx", "onnxruntime")), reason="needs the extra [export]"
)
VOLUMES, IMAGES = (16, 12, 20), (32, 24, 1)


def unet(shape):
    sizes = plan_unet(shape, [1, 1, 1], reduced=False)
    del sizes["upsample_kernel_size"]
    torch.manual_seed(0)
    return GlobalLocalUNet(1, 3, **sizes).eval()


def windows(shape, number=2):
    return GlobalLocalSlidingWindowInferer(shape, sw_batch_size=number, global_view=False)


@needs_runtime
@pytest.mark.parametrize("shape", [VOLUMES, IMAGES])
@pytest.mark.parametrize("number", [1, 3])
@torch.no_grad()
def test_the_logits_are_pytorch_s_in_batches_of_any_number(shape, number):
    network, inner = unet(shape), windows(shape, number)
    scan = torch.rand(1, 1, *(2 * side - 3 if side > 1 else 1 for side in shape))
    inferer = OnnxInferer(AutocastInferer(inner, None))
    found = inferer(scan, network)
    torch.testing.assert_close(found, inner(scan, network), rtol=0, atol=1e-4)
    assert len(inferer.sessions) == 1 and "forward" not in vars(network)
    torch.testing.assert_close(inferer(scan.flip(2), network), inner(scan.flip(2), network), rtol=0, atol=1e-4)


@needs_runtime
@torch.no_grad()
def test_it_is_onnx_runtime_that_computes(monkeypatch):
    network, scan = unet(VOLUMES), torch.rand(1, 1, 20, 20, 20)
    inferer = OnnxInferer(windows(VOLUMES))
    inferer(scan, network)
    calls = []
    monkeypatch.setattr(GlobalLocalUNet, "forward", lambda *a: calls.append(a))
    inferer(scan, network)
    assert not calls


@needs_runtime
@torch.no_grad()
def test_other_weights_have_another_graph():
    network, scan = unet(VOLUMES), torch.rand(1, 1, *VOLUMES)
    inferer = OnnxInferer(windows(VOLUMES))
    before = inferer(scan, network)
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()})
    after = inferer(scan, network)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, windows(VOLUMES)(scan, network), rtol=0, atol=1e-3)


class Two(nn.Module):
    def forward(self, image):
        return image, image


@needs_runtime
@torch.no_grad()
def test_what_it_cannot_compute_is_refused_and_the_network_stays_as_it_was(monkeypatch):
    scan = torch.rand(1, 1, 16, 16, 16)
    with pytest.raises(ConfigError, match=r"networks of one output here, and Two gives tuple"):
        OnnxInferer(SlidingWindowInferer((16, 16, 16)))(scan, Two())
    seeing = GlobalLocalDeepLabV3(1, 3, width=8, depth=1, dilations=[1]).eval()
    with pytest.raises(ConfigError, match="sees a whole scan as well"):
        OnnxInferer(AutocastInferer(GlobalLocalSlidingWindowInferer((16, 16, 16)), None))(scan, seeing)
    with pytest.raises(ConfigError, match="the network is on a GPU"):
        OnnxInferer(windows(VOLUMES))(scan, nn.Conv3d(1, 2, 1, device="meta"))
    network = unet(VOLUMES)
    monkeypatch.setattr(onnx_runtime, "TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match=r"logits differ by .* expected at most"):
        OnnxInferer(windows(VOLUMES))(scan, network)
    assert "forward" not in vars(network)


def test_without_onnx_runtime_it_says_what_to_install(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_runtime, "optional_import", lambda name: (None, False))
    message = r"ONNX Runtime is not installed: pip install 'mapseg-monai\[export\]'"
    with pytest.raises(ConfigError, match=message), torch.no_grad():
        OnnxInferer(windows(VOLUMES))(torch.rand(1, 1, *VOLUMES), unet(VOLUMES))
    with pytest.raises(ConfigError, match=message):
        predict(str(scans), str(tmp_path / "out"), bundle="brain_any_contrast", backend="onnx")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def scans(tmp_path):
    for seed in (7, 9):
        write_nifti(tmp_path / "scans" / f"{seed}.nii.gz", make_scan((20, 18, 22), seed=seed)[0], np.diag([2, 2, 2, 1]))
    return tmp_path / "scans"


@needs_runtime
def test_predict_gives_the_same_label_maps(scans, tmp_path):
    for backend in ("pytorch", "onnx"):
        options = {"bundle": "brain_any_contrast", "no_preview": True, "quiet": True, "num_threads": 1}
        predict(str(scans), str(tmp_path / backend), backend=backend, **options)
    for scan in ("7_seg.nii.gz", "9_seg.nii.gz"):
        first, second = (read_nifti(tmp_path / backend / scan).voxels for backend in ("pytorch", "onnx"))
        assert (first != second).mean() < 1e-3 and len(np.unique(first)) > 1
    settings = json.loads((tmp_path / "onnx" / "manifest.json").read_text())["settings"]
    assert settings["inferer"]["_target_"].endswith("OnnxInferer"), "a run does not go on by another backend"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "tensorrt"}, "expected pytorch or onnx"),
        ({"bundle": "mapseg_adaptation"}, "shown a global view as well"),
        ({"weights": "a.pt,b.pt"}, "2 weights are given"),
        ({"adapt_each": 2}, "not with adapt_each"),
        ({"device": "cuda:0"}, "not with device cuda:0"),
    ],
)
def test_predict_refuses_it_before_any_scan_is_read(scans, tmp_path, options, message):
    options = {"bundle": "brain_any_contrast", "backend": "onnx", **options}
    with pytest.raises(ConfigError, match=message):
        predict(str(scans), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@needs_runtime
def test_it_computes_in_float32_whatever_precision_the_bundle_names(scans, tmp_path):
    options = {"bundle": "brain_any_contrast", "backend": "onnx", "no_preview": True, "quiet": True, "num_threads": 1}
    predict(str(scans / "7.nii.gz"), str(tmp_path / "out"), settings={"amp": "bf16"}, **options)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["amp"] is None
