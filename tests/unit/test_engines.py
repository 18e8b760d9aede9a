# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import warnings

import pytest
import torch
from monai.handlers import from_engine
from monai.utils import set_determinism

from mapseg_components.engines import AdaptationTrainer, MAETrainer
from mapseg_components.errors import ConfigError, NonFiniteError
from mapseg_components.handlers import EMATeacher
from mapseg_components.losses import MaskedReconstructionLoss
from mapseg_components.methods import ArgmaxLabels, MAPSeg, Pass
from mapseg_components.networks import GlobalLocalPass, MultiScaleMAE, PlainPass
from mapseg_components.precision import _warn_of_emulation, bf16_instructions, resolved_amp

BLOCKS = {"mask_ratio": 0.5, "local_block_size": 4, "global_block_size": 4}


def pair(labels=True, batch=1, value=None):
    torch.manual_seed(1)
    image = torch.rand(batch, 1, 8, 8, 12) if value is None else torch.full((batch, 1, 8, 8, 12), value)
    result = {
        "image": image,
        "global_image": image.flip(2),
        "box": torch.tensor([[[0.0, 4.0], [2.0, 8.0], [0.0, 12.0]]] * batch),
        "case_id": ["case 7"] * batch,
    }
    if labels:
        result["label"] = (image > 0.5).long() + (image > 0.8)
        result["global_label"] = result["label"].flip(2)
    return result


def twice_as_large(batch):
    larger = {
        key: value.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        for key, value in batch.items()
        if torch.is_tensor(value) and value.dim() == 5
    }
    return {**batch, **larger, "box": 2 * batch["box"]}


def adaptation(network, data, epochs=1, warmup=0, teacher=True, lr=0.01, optimizer=torch.optim.AdamW, **options):
    set_determinism(0)
    network = GlobalLocalPass(copy.deepcopy(network) if options.pop("copied", True) else network)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    teacher = EMATeacher(network, warmup, [[None, 0.9]]) if teacher else None
    trainer = trainer_of(network, data, teacher, optimizer(network.parameters(), lr=lr), max_epochs=epochs, **options)
    trainer.run()
    return trainer


def trainer_of(network, data, teacher, optimizer, method=None, max_epochs=1, **options):
    """A trainer of MAPSeg; ``method`` holds settings of it."""
    labels = None if teacher is None else ArgmaxLabels(teacher)
    return AdaptationTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=data,
        network=network,
        optimizer=optimizer,
        method=MAPSeg(labels, **{**BLOCKS, **(method or {})}),
        train_handlers=[] if teacher is None else [teacher],
        **options,
    )


def same_weights(first, second, **tolerance):
    for a, b in zip(first.network.parameters(), second.network.parameters()):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("clean", [False, True])
def test_separate_passes_give_the_gradients_of_batched_ones(tiny_network, clean):
    data = [{"source": pair(), "target": pair(labels=False)}]
    options = {
        "method": {"target_clean": clean},
        "optimizer": torch.optim.SGD,
    }  # SGD: the step is the gradient
    runs = [adaptation(tiny_network, data, batched_passes=batched, **options) for batched in (True, False)]
    for name, value in runs[0].state.output[0].items():
        torch.testing.assert_close(runs[1].state.output[0][name], value, rtol=1e-4, atol=1e-5)
    same_weights(*runs, rtol=1e-4, atol=1e-6)


def test_output_names_every_term(tiny_network):
    run = adaptation(tiny_network, [{"source": pair(), "target": pair(False)}], method={"target_clean": True})
    output, weights = run.state.output[0], run.method.weights
    assert set(output) == {*weights, "loss", "target_loss"}
    assert output["loss"].item() == pytest.approx(sum(w * output[n].item() for n, w in weights.items()), rel=1e-5)


@pytest.mark.parametrize("clean", [False, True])
def test_the_score_reads_the_masked_target_term_alone(tiny_network, clean):
    """Section 3.7: clean terms fall as pseudo labels repeat themselves."""
    sides = {"source": pair(), "target": pair(False)}
    output = adaptation(tiny_network, [sides], method={"target_clean": clean}).state.output[0]
    assert ("target_local" in output) == clean
    assert output["target_loss"] == output["target_local_masked"] != output.get("target_local")


def test_target_is_not_touched_in_warmup(tiny_network):
    class Untouchable(dict):
        def items(self):
            raise AssertionError("the target was read in warm-up")

    run = adaptation(tiny_network, [{"source": pair(), "target": Untouchable()}], warmup=1)
    assert not any(name.startswith("target") for name in run.state.output[0])


def test_target_alone_trains_when_the_teacher_exists(tiny_network):
    output = adaptation(tiny_network, [{"target": pair(False)}]).state.output[0]
    assert all(name.startswith("target") or name == "loss" for name in output)


def test_nothing_to_train_on_is_an_error(tiny_network):
    with pytest.raises(ConfigError, match=r"nothing to train on.*warmup_epochs"):
        adaptation(tiny_network, [{"target": pair(False)}], warmup=1)


def test_accumulated_steps_go_along_the_mean_gradient(tiny_network):
    """SGD: the way that the weights take is the gradient. No larger batch: Dice is a ratio over one."""
    options = {"method": {"source_masked": False}, "teacher": False, "optimizer": torch.optim.SGD}
    first, second = (pair(batch=2) for _ in range(2))
    second["image"] = second["image"].flip(3) ** 2

    def way(batches, steps=1):
        run = adaptation(tiny_network, [{"source": one} for one in batches], accumulate_steps=steps, **options)
        return [a.detach() - b for a, b in zip(run.network.parameters(), tiny_network.parameters())]

    halves = [way([first]), way([second])]
    for both, one, other in zip(way([first, second], 2), *halves):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-3, atol=1e-6)
    assert max(float((one - other).abs().max()) for one, other in zip(*halves)) > 1e-4  # two gradients, not one twice


def test_the_last_iterations_of_an_epoch_step_without_waiting_for_more(tiny_network):
    options = {"method": {"source_masked": False}, "teacher": False}
    run = adaptation(tiny_network, [{"source": pair()}] * 3, accumulate_steps=2, **options)
    assert run.optimizer.state_dict()["state"][0]["step"] == 2 and not run.optimization.pending


def test_a_network_without_its_training_pass_is_refused(tiny_network):
    with pytest.raises(ConfigError, match=r"GlobalLocalDeepLabV3 returns Tensor.*training_pass"):
        trainer_of(tiny_network, [{"source": pair()}], None, torch.optim.SGD(tiny_network.parameters(), 0.1)).run()


def test_nan_names_term_and_case(tiny_network):
    bad = pair()
    bad["image"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"source_local.*iteration 1.*case 7"):
        adaptation(tiny_network, [{"source": bad}], teacher=False)


@pytest.mark.parametrize("amp", ["bf16", None])
def test_mixed_precision_keeps_float32_weights(tiny_network, amp):
    # of features of 2x2x3 voxels PyTorch 2.13's weight gradient in bfloat16 is NaN by chance, on a CPU
    sides = {"source": twice_as_large(pair()), "target": twice_as_large(pair(False))}
    run = adaptation(tiny_network, [sides], amp=amp, max_grad_norm=1.0)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in run.network.parameters())


def test_unknown_amp_is_refused(tiny_network):
    with pytest.raises(ConfigError, match="amp is 'half'"):
        adaptation(tiny_network, [], amp="half")


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True, "amx_bf16": False}, None),
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, None),
    ],
)
def test_auto_is_the_precision_that_a_processor_multiplies_fast(tiny_network, monkeypatch, facts, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
    bf16_instructions.cache_clear()
    _warn_of_emulation.cache_clear()
    try:
        run = adaptation(tiny_network, [], amp="auto", teacher=False)  # a pretended AMX computes nothing right
        assert run.optimization.amp == expected and not run.optimization.scaler.is_enabled()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert resolved_amp("cpu", "bf16") == "bf16"  # what is asked for by name is done
        emulated = not any(found for name, found in facts.items() if "bf16" in name)
        assert ["Set amp to auto" in str(one.message) for one in warned] == [True] * emulated
    finally:
        bf16_instructions.cache_clear()
        _warn_of_emulation.cache_clear()


def test_sixty_steps_fit_one_pair(tiny_network):
    """Overfit: the loss above its floor of -1 falls to a quarter at most."""
    options = {"teacher": False, "method": {"source_masked": False}}
    data = [{"source": pair()}] * 60
    start = adaptation(tiny_network, data[:1], **options).state.output[0]["source_local"].item()
    end = adaptation(tiny_network, data, lr=0.02, **options).state.output[0]["source_local"].item()
    assert (end + 1) <= 0.25 * (start + 1)


def autoencoding(steps, seed=0, **options):
    set_determinism(seed)
    network = MultiScaleMAE(1, 16, 1, 4, (8, 8))
    x = torch.linspace(0, 1, 8)
    image = (x[:, None, None] + x[:, None] ** 2 + x)[None, None] / 3
    batch = {"image": image, "global_image": image.flip(2), "case_id": ["case 9"]}
    trainer = MAETrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch] * steps,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.01),
        loss_function=MaskedReconstructionLoss(),
        **BLOCKS,
        **options,
    )
    trainer.run()
    return trainer


def test_autoencoder_fits_one_pair():
    first, last = (autoencoding(steps).state.output[0]["loss"].item() for steps in (1, 60))
    assert last <= 0.25 * first


def test_autoencoder_passes_agree():
    runs = [autoencoding(1, batched_passes=batched) for batched in (True, False)]
    for name, value in runs[0].state.output[0].items():
        torch.testing.assert_close(runs[1].state.output[0][name], value, rtol=1e-4, atol=1e-5)


def test_same_seed_gives_the_same_weights(tiny_network):
    data = [{"source": pair(), "target": pair(False)}] * 3
    same_weights(adaptation(tiny_network, data), adaptation(tiny_network, data), rtol=0, atol=0)


def test_output_is_what_monai_handlers_take(tiny_network):
    """MLflow, TensorBoard and StatsHandler are given ``from_engine(['loss'], first=True)`` by MONAI's own settings."""
    loss = from_engine(["loss"], first=True)
    for trainer in (adaptation(tiny_network, [{"source": pair()}], teacher=False), autoencoding(1)):
        assert float(loss(trainer.state.output)) == trainer.state.output[0]["loss"].item()


@pytest.mark.parametrize("batched", [True, False])
def test_terms_without_a_weight_and_names_that_two_passes_have_are_refused(tiny_network, batched):
    class Twice:
        selection, weights = (), {"same": 1.0}

        def __init__(self, names):
            self.names = names

        def passes(self, batch):
            images = batch["source"]["image"], batch["source"]["image"][..., :8]  # as one batch or apart
            return [
                Pass({"image": image}, lambda out, name=name: {name: out["logits"].mean()})
                for name, image in zip(self.names, images)
            ]

    network = PlainPass(tiny_network)
    for names, words in (
        (("same", "same"), r"the term \['same'\] in two passes"),
        (("other",), r"no weight for \['other'\]"),
    ):
        trainer = AdaptationTrainer(
            device="cpu",
            max_epochs=1,
            train_data_loader=[{"source": pair()}],
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            method=Twice(names),
            batched_passes=batched,
        )
        with pytest.raises(ConfigError, match=words):
            trainer.run()
