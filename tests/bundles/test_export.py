# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Exported networks give PyTorch's logits, alone and with global-local collaboration."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ckpt_export

from mapseg_components.checkpoints import load_weights
from mapseg_components.inferers import GlobalLocalSlidingWindowInferer
from mapseg_components.networks import GlobalLocalDeepLabV3, GlobalLocalUNet
from tests.conftest import ROOT, make_scan

ADAPTATION = ROOT / "bundles" / "mapseg_adaptation"


def shipped_network():
    network = GlobalLocalDeepLabV3(1, 9, width=32, depth=4, stride=4, dilations=(1, 2, 4), head_channels=16)
    load_weights(network, ADAPTATION / "models" / "model.pt")
    return network.eval()


def test_torchscript_of_the_bundle_takes_both_calls_and_the_inferer(tmp_path):
    configs = ADAPTATION / "configs"
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(ADAPTATION / "models" / "model.pt"),
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
    )
    scripted, network = torch.jit.load(tmp_path / "model.ts").eval(), shipped_network()
    torch.manual_seed(0)
    image, view = torch.rand(2, 1, 16, 12, 20), torch.rand(2, 1, 20, 16, 12)
    box = torch.tensor([[[1.0, 9.0], [2.0, 14.5], [3.0, 11.0]], [[0.0, 20.0], [3.0, 7.0], [0.5, 9.5]]])
    with torch.no_grad():
        for call in ((image,), (image, view, box)):
            torch.testing.assert_close(scripted(*call), network(*call), rtol=0, atol=1e-4)
    # the scripted network keeps encode, context and decode, so that windows collaborate as well
    scan = torch.from_numpy(make_scan((20, 24, 28))[0] / 200)[None, None]
    inferer = GlobalLocalSlidingWindowInferer(roi_size=(16, 12, 20))
    torch.testing.assert_close(inferer(scan, scripted), inferer(scan, network), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variance", [None, "free"])
def test_torchscript_of_a_planned_network_is_the_same_function(variance):
    kernels, strides = (
        [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
        [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
    )  # as mapseg adapt plans them
    network = GlobalLocalUNet(1, 3, [4, 8, 16], kernels, strides, variance=variance).eval()
    scripted, scan = torch.jit.script(network), torch.rand(1, 1, 20, 24, 12)
    for sides in ((16, 16, 8), (16, 16, 4)):
        inferer = GlobalLocalSlidingWindowInferer(roi_size=sides, global_size=(16, 16, 8))
        torch.testing.assert_close(inferer(scan, scripted), inferer(scan, network), rtol=0, atol=1e-5)
    flat = torch.rand(1, 1, 16, 16, 8)
    torch.testing.assert_close(scripted(flat), network(flat), rtol=0, atol=1e-5)


def test_onnx_graphs_agree_with_the_network_or_are_not_written(tiny_network, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs the extra [export]")
    from tools import export_onnx

    for parameter in tiny_network.parameters():  # logits of order 1, so that the tolerance means something
        torch.nn.init.normal_(parameter, std=0.3)
    differences = export_onnx.export(tiny_network, 1, (16, 12, 20), (8, 16, 12), tmp_path)
    assert set(differences) == {"one_image", "collaborative"}
    assert max(differences.values()) <= export_onnx.TOLERANCE
    assert {path.name for path in tmp_path.iterdir()} == {"one_image.onnx", "collaborative.onnx"}
    # independent of the tool's own check, at another batch size
    import onnxruntime

    image, view = torch.rand(1, 1, 16, 12, 20), torch.rand(1, 1, 8, 16, 12)
    box = torch.tensor([[[1.0, 5.0], [2.0, 10.5], [3.0, 11.0]]])
    session = onnxruntime.InferenceSession(str(tmp_path / "collaborative.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"image": image.numpy(), "global_image": view.numpy(), "box": box.numpy()}
    found = torch.from_numpy(session.run(None, inputs)[0])
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_network(image, view, box), rtol=0, atol=1e-4)
        assert (found - tiny_network(image)).abs().max() > 0.01  # the box matters

    from monai.networks.nets import DynUNet

    unet = DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])
    assert set(export_onnx.export(unet, 1, (16, 16, 16), (8, 8, 8), tmp_path / "unet")) == {"one_image"}

    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)
    with pytest.raises(export_onnx.CheckpointError, match=r"one_image.onnx differs from the network by"):
        export_onnx.export(tiny_network, 1, (16, 12, 20), None, tmp_path / "refused")
    assert not list((tmp_path / "refused").iterdir())
