# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What makes a run cheaper changes neither results nor gradients."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from monai.networks.nets import DynUNet
from torch.utils._python_dispatch import TorchDispatchMode

from mapseg_components import losses
from mapseg_components.engines import AdaptationTrainer, MAETrainer
from mapseg_components.errors import ConfigError, NonFiniteError
from mapseg_components.handlers import EMATeacher
from mapseg_components.losses import MaskedReconstructionLoss
from mapseg_components.methods import ArgmaxLabels, MAPSeg
from mapseg_components.networks import (
    ASPP,
    GlobalLocalDeepLabV3,
    GlobalLocalPass,
    GlobalLocalUNet,
    MultiScaleMAE,
    TwoHeadDynUNet,
    UNetMAE,
    prepare_network,
)
from mapseg_components.networks.decoders import PatchUpsample, pointwise_conv
from mapseg_components.networks.memory_format import resolved_memory_format

BLOCKS = {"mask_ratio": 0.5, "local_block_size": 4, "global_block_size": 4}


def pair(labels=True):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 8, 12, 16, generator=generator)
    box = torch.tensor([[[0.0, 4.0], [2.0, 8.0], [0.0, 12.0]]])
    result = {"image": image, "global_image": image.flip(2), "box": box}
    if labels:
        result["label"] = (image > 0.5).long() + (image > 0.8)
        result["global_label"] = result["label"].flip(2)
    return result


def adaptation(network, steps=1, **options):
    torch.manual_seed(0)
    network = GlobalLocalPass(network)
    teacher = EMATeacher(network, 0, [[None, 0.9]])
    trainer = AdaptationTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"source": pair(), "target": pair(labels=False)}] * steps,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.01),
        method=MAPSeg(ArgmaxLabels(teacher), target_clean=True, **BLOCKS),
        train_handlers=[teacher],
        **options,
    )
    trainer.run()
    return trainer


def autoencoding(network, **options):
    torch.manual_seed(0)
    trainer = MAETrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[pair(labels=False)],
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.01),
        loss_function=MaskedReconstructionLoss(),
        **BLOCKS,
        **options,
    )
    trainer.run()
    return trainer


def autoencoder():
    torch.manual_seed(0)
    return MultiScaleMAE(1, 8, 2, 4, (8, 4))


def assert_same_weights(first, second, **tolerance):
    weights = second.network.state_dict()
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_folded_weights_give_output_and_gradients_of_duplicated_features():
    torch.manual_seed(0)
    aspp = ASPP(12, 8, dilations=(1, (2, 1, 3)), dropout=0.0).double()
    results = []
    for duplicate in (False, True):
        features = torch.rand(2, 6, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        features.requires_grad_()
        output = aspp(torch.cat([features, features], dim=1) if duplicate else features)
        results.append([output, *torch.autograd.grad(output.square().sum(), [features, *aspp.parameters()])])
    for folded, duplicated in zip(*results):
        torch.testing.assert_close(folded, duplicated, rtol=1e-9, atol=1e-9)


def test_torchscript_folds_too(tiny_network):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(tiny_network), file)
    file.seek(0)
    image = torch.rand(1, 1, 8, 12, 16)
    torch.testing.assert_close(torch.jit.load(file)(image), tiny_network(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_checkpointed_activations_leave_weights_and_random_state_as_they_are(tiny_network, batched):
    runs, states = [], []
    for recompute in (False, True):
        network = prepare_network(copy.deepcopy(tiny_network), "cpu", activation_checkpointing=recompute)
        runs.append(adaptation(network, steps=2, batched_passes=batched))  # with dropout
        states.append(torch.get_rng_state())
    assert_same_weights(*runs, rtol=0, atol=0)
    assert torch.equal(*states)


def test_checkpointing_forgets_activations():
    kept = []
    for recompute in (False, True):
        network = prepare_network(autoencoder(), "cpu", activation_checkpointing=recompute).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            network(torch.rand(1, 1, 16, 16, 16))
        kept.append(sum(saved))
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_training_passes_compile_without_a_graph_break(tiny_network, recompute):
    torch._dynamo.reset()
    network = GlobalLocalPass(prepare_network(tiny_network.train(), "cpu", activation_checkpointing=recompute))
    batch = [pair()[key] for key in ("image", "global_image", "box")]
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = network(*batch)
    torch.manual_seed(0)
    for ours, theirs in zip(compiled(*batch).values(), expected.values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    encoder = prepare_network(autoencoder().train(), "cpu", activation_checkpointing=recompute)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch[0]), encoder(batch[0]), rtol=1e-4, atol=1e-5)


def test_compile_setting_compiles_the_network_in_place(tiny_network, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    adaptation(tiny_network, compile=True)
    autoencoding(autoencoder(), compile=True)
    autoencoding(autoencoder())
    assert compiled == ["GlobalLocalPass", "MultiScaleMAE"]


class Waits(TorchDispatchMode):
    """Count the operations for whose result a GPU would be waited for."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "_unique2", "masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [True, False])
def test_an_iteration_waits_for_the_device_once(tiny_network, batched, monkeypatch):
    monkeypatch.setattr(losses, "answers_at_once", lambda values: False)  # as on a GPU
    trainers = [
        (adaptation(tiny_network, batched_passes=batched), {"source": pair(), "target": pair(labels=False)}),
        (autoencoding(autoencoder(), batched_passes=batched), pair(labels=False)),
    ]
    for trainer, batch in trainers:
        # the step counts of AdamW lie on the CPU: reading them waits for nothing
        trainer.optimization.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=0.0)
        with Waits() as waits:
            trainer._step(trainer, batch)
        assert waits.found == ["_local_scalar_dense"]


def test_a_bad_term_is_named_and_reaches_no_weight(tiny_network):
    trainer = adaptation(tiny_network)
    before = copy.deepcopy(trainer.network.state_dict())
    batch = pair()
    batch["image"][0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"loss terms \['source_local', .*are NaN or infinite"):
        trainer._step(trainer, {"source": batch})
    torch.testing.assert_close(trainer.network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_a_convolution(bias):
    conv = torch.nn.Conv3d(3, 5, 1, bias=bias).double()
    image = torch.rand(2, 3, 4, 5, 6, dtype=torch.float64).requires_grad_()
    found, expected = pointwise_conv(image, conv.weight, conv.bias), conv(image)
    torch.testing.assert_close(found, expected)
    slopes = torch.rand_like(expected)
    both = [torch.autograd.grad(output, [image, *conv.parameters()], slopes) for output in (found, expected)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("stride", [(4, 4, 1), (2, 2, 2)])
def test_upsampling_is_the_transposed_convolution(stride):
    ours, plain = PatchUpsample(3, 5, stride).double(), torch.nn.ConvTranspose3d(3, 5, stride, stride).double()
    plain.load_state_dict(ours.state_dict())
    image = torch.rand(2, 3, 4, 5, 6, dtype=torch.float64).requires_grad_()
    found, expected = ours(image), plain(image)
    torch.testing.assert_close(found, expected)
    slopes = torch.rand_like(expected)
    both = [torch.autograd.grad(o, [image, *n.parameters()], slopes) for o, n in ((found, ours), (expected, plain))]
    torch.testing.assert_close(*both)


RESIDENT = """
import sys
from pathlib import Path

import torch

from mapseg_components.memory import keep_freed_memory

if not keep_freed_memory():
    sys.exit(77)
if sys.argv[1] == "return":
    assert keep_freed_memory(False)
pages = []
for _ in range(2):
    pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    activations = torch.ones(2**25)  # 128 MB
    del activations
print((pages[1] - pages[0]) * 4096)
"""


@pytest.mark.parametrize("way", ["keep", "return"])
def test_freed_memory_is_kept_or_returned(way):
    done = subprocess.run([sys.executable, "-c", RESIDENT, way], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout)
    assert (kept > 100e6) if way == "keep" else (kept < 30e6)


def volumes():
    """Networks of every kind that is trained, by name."""
    levels = {"filters": [8, 12, 16], "kernel_size": [3, 3, 3], "strides": [1, 2, 2]}
    dynunet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "upsample_kernel_size": [2, 2], **levels}
    return {
        "MAPSeg": GlobalLocalDeepLabV3(
            in_channels=1, num_classes=3, width=8, depth=1, stride=4, dilations=(1, 2), head_channels=8, dropout=0.0
        ),
        "planned U-Net": GlobalLocalUNet(1, 3, **levels),
        "autoencoder": autoencoder(),
        "U-Net's autoencoder": UNetMAE(1, **levels),
        "DynUNet": DynUNet(norm_name=("INSTANCE", {"affine": True}), **dynunet),
        "two heads": TwoHeadDynUNet(norm_name=("INSTANCE", {"affine": True}), variance="softplus", **dynunet),
    }


@pytest.mark.parametrize("name", volumes())
def test_the_memory_format_changes_a_step_by_rounding_alone(name):
    torch.manual_seed(0)
    first = volumes()[name].double().train()
    second = copy.deepcopy(first)
    prepare_network(first, "cpu", memory_format=None)
    prepare_network(second, "cpu", memory_format="auto")
    assert any(
        not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last_3d)
        for weight in second.parameters()
        if weight.dim() == 5
    )
    image = torch.rand(2, 1, 16, 16, 16, dtype=torch.float64)
    for network in (first, second):
        torch.manual_seed(1)
        output = network(image)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    for ours, theirs in zip(second.parameters(), first.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "device", "amp", "expected"),
    [
        (3, "cpu", None, "channels_last_3d"),
        ((3, 3, 1), "cpu", None, None),  # images of one slice
        (3, "cpu", "bf16", None),
        (3, "meta", None, None),
    ],
)
def test_auto_is_channels_last_for_volumes_in_float32_on_a_cpu(monkeypatch, kernel, device, amp, expected):
    monkeypatch.setattr("mapseg_components.precision.bf16_instructions", lambda: frozenset({"amx_bf16"}))
    network = torch.nn.Conv3d(2, 4, kernel)
    assert resolved_memory_format(network, device, "auto", amp) == expected
    assert resolved_memory_format(network, "cpu", "auto", "auto") is None  # which is bf16 there
    assert resolved_memory_format(network, device, "channels_last_3d", amp) == "channels_last_3d"
    assert resolved_memory_format(network, device, None, amp) is None


def test_an_unknown_memory_format_is_named():
    with pytest.raises(ConfigError, match=r"memory_format is 'last'.*'channels_last_3d' or null"):
        prepare_network(torch.nn.Conv3d(1, 1, 3), "cpu", memory_format="last")
