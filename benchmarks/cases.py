# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What is compared: samples, steps and inference, each of the plain baseline and of the package, and their equality."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchio as tio
from monai.engines.utils import IterationEvents
from torch import nn

from benchmarks import analytic
from benchmarks.package import AMP, BUNDLES, bundle, inference_of, part, samples_of, step_of
from benchmarks.plain import data as plain_data
from benchmarks.plain import inference as plain_inference
from benchmarks.plain import training as plain_training
from benchmarks.timing import interleaved, ratios, summary
from mapseg_components.memory import keep_freed_memory

__all__ = ["BLOCKS", "Bench", "adaptation_samples", "adaptation_steps", "inference", "mae_samples", "mae_steps"]

SHIPPED_WEIGHTS = BUNDLES / "mapseg_adaptation" / "models" / "model.pt"
SHIPPED_SCAN = BUNDLES.parent / "sample" / "fetal_age" / "target" / "images" / "GA25_notoperated.nii.gz"
BLOCKS = {"local": 8, "global": 4}
LEARNING_RATE = 1e-4
# float32 sums in another order; of bfloat16 inputs with 8 bits each; of a view that is clipped before or after resizing
TOLERANCE = {"loss": 1e-4, "gradient": 1e-3, "logits": 1e-3, "view": 0.01, "labels": 0.999}


@dataclass
class Bench:
    """One benchmark: sizes, data, and how often.

    Args:
        datalist: with ``labels``, from `package.write_datalist`.
        scan: image of its first case.
        label: label map of its first case.
        settings: of the package, from `package.settings_of`.
        batch_size: pairs of an MAE step; adaptation has one of each side.
        sample_repeats: timed samples of each variant.
        repeats: of everything else.
        warmup: calls before.
        clock: one of `timing.CLOCKS`.
        amps: variants of the package by the setting ``amp``.
    """

    width: int
    depth: int
    patch: int
    device: torch.device
    datalist: Path
    labels: dict[str, int]
    scan: Path
    label: Path
    settings: dict[str, Any]
    batch_size: int = 1
    repeats: int = 3
    sample_repeats: int = 9
    warmup: int = 1
    clock: Callable[[], float] = time.perf_counter
    amps: Mapping[str, str | None] = field(default_factory=lambda: dict(AMP))
    keeps: bool = field(default=False, init=False)

    def parser(self, name: str, config: str = "train.json", **settings: Any) -> Any:
        """A bundle's config at this benchmark's size."""
        return bundle(name, self.datalist, {"labels": self.labels, **self.settings, **settings}, config)

    def timed(self, variants: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of steps or of inference."""
        return interleaved(variants, self.repeats, self.device, self.warmup, self.clock, self.set_memory)

    def set_memory(self, variant: str) -> bool:
        """Freed memory is the allocator's default for the baseline, the setting's for the package.

        Returns:
            whether it is kept from now on: in a run only the very first step finds no memory to use again.
        """
        keep = variant != "plain" and bool(self.settings.get("keep_freed_memory", False))
        begins = keep and not self.keeps
        keep_freed_memory(keep)
        self.keeps = keep
        return begins

    def timed_samples(self, variants: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of samples."""
        return interleaved(variants, self.sample_repeats, torch.device("cpu"), self.warmup, self.clock)

    def result(self, name: str, seconds: dict[str, list[float]], equality: list[dict], **more: Any) -> dict[str, Any]:
        """One case as it is written to ``results.json``."""
        return {
            "case": name,
            "width": self.width,
            "seconds": {variant: summary(values) for variant, values in seconds.items()},
            "speed_up": ratios(seconds, "plain"),
            "equality": equality,
            **more,
        }


def check(what: str, value: float, tolerance: float, at_least: bool = False) -> dict[str, Any]:
    """One comparison; NaN is never good."""
    good = value >= tolerance if at_least else value <= tolerance
    return {"what": what, "value": value, "tolerance": tolerance, "at_least": at_least, "ok": bool(good)}


# Samples ---------------------------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """Samples are compared on one core: a loader's worker has no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adaptation_samples(bench: Bench) -> dict[str, Any]:
    """A labelled source sample."""
    parser = bench.parser("adaptation")
    with one_thread():
        draw = samples_of(parser)
        variants = {
            "plain": lambda: plain_data.adaptation_sample(bench.scan, bench.label, bench.patch),
            "package": draw,
        }
        seconds = bench.timed_samples(variants)
        return bench.result("adaptation sample", seconds, same_view(bench), parts=parts_of_plain_sample(bench))


def mae_samples(bench: Bench) -> dict[str, Any]:
    """A pretraining sample."""
    parser = bench.parser("pretraining", batch_size=1)
    with one_thread():
        variants = {"plain": lambda: plain_data.mae_sample(bench.scan, bench.patch), "package": samples_of(parser)}
        return bench.result("MAE sample", bench.timed_samples(variants), [])


def same_view(bench: Bench) -> list[dict[str, Any]]:
    """Without random changes the global view is the same scan at the same place."""
    off = {"affine_prob": 0.0, "percentile_prob": 0.0, "intensity_prob": 0.0}
    ours = samples_of(bench.parser("adaptation", **off))()
    subject = plain_data.decode(bench.scan, bench.label)
    subject.image.set_data(plain_data.clip_at_percentile(subject.image.data, 99.5))
    plain = plain_data.sample_of(subject, bench.patch)
    difference = (ours["global_image"][0].as_subclass(torch.Tensor) - plain.global_image).abs().mean()
    classes = {value: number for number, value in enumerate(bench.labels.values(), start=1)}
    truth = plain.global_label.apply_(lambda value: classes.get(int(value), 0))
    agreement = (ours["global_label"][0].as_subclass(torch.Tensor) == truth).float().mean()
    return [
        check("global view without augmentation: mean difference", float(difference), TOLERANCE["view"]),
        check("its label: share of equal voxels", float(agreement), 0.99, at_least=True),
    ]


def parts_of_plain_sample(bench: Bench) -> dict[str, float]:
    """Seconds of each part of the plain sample, if it is done (three of them only with a probability of 0.35)."""

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        start = bench.clock()
        value = call()
        return bench.clock() - start, value

    found: dict[str, list[float]] = {}
    for _ in range(min(bench.sample_repeats, 3)):
        times = {}
        times["decode"], subject = timed(lambda: plain_data.decode(bench.scan, bench.label))
        image = subject.image.data
        times["percentile"], clipped = timed(lambda image=image: plain_data.clip_at_percentile(image, 99.5))
        subject.image.set_data(clipped)
        for name, transform in {
            "affine": tio.RandomAffine(scales=(0.7, 1.4), degrees=30, isotropic=True),
            "bias field": tio.RandomBiasField(),
            "gamma": tio.RandomGamma(log_gamma=0.4),
        }.items():
            times[name], _ = timed(lambda transform=transform, subject=subject: transform(subject))
        times["box, patch and view"], _ = timed(lambda subject=subject: plain_data.sample_of(subject, bench.patch))
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


# Steps -----------------------------------------------------------------------------------------------------------


def plain_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of a batch on a device."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {key: value.as_subclass(torch.Tensor).to(device) for key, value in tensors.items()}


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)


def on_meta(parser: Any) -> nn.Module:
    """A copy of a bundle's network whose operations can be counted."""
    return copy.deepcopy(part(parser, "network_def")).to("meta").train()


def mae_steps(bench: Bench) -> dict[str, Any]:
    """One step of pretraining."""
    parsers = {name: bench.parser("pretraining", amp=amp) for name, amp in bench.amps.items()}
    batch = samples_of(bench.parser("pretraining", batch_size=bench.batch_size))()
    networks = {name: part(parser, "network_def") for name, parser in parsers.items()}
    plain = plain_training.plain_network(networks["package"])
    optimizer, on_device = optimizer_of(plain), plain_batch(batch, bench.device)
    steps: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_training.mae_step(plain, optimizer, on_device, BLOCKS),
        **{name: step_of(parser, batch) for name, parser in parsers.items()},
    }
    equality = same_step(
        bench,
        "pretraining",
        {"": batch},
        lambda network, batches, masks: plain_training.mae_losses(network, batches[""], BLOCKS, masks),
    )
    seconds = bench.timed(steps)
    flop = analytic.mae_step_flop(on_meta(parsers["package"]), bench.patch, bench.batch_size)
    return bench.result("MAE step", seconds, equality, flop=flop, batch_size=bench.batch_size)


def adaptation_steps(bench: Bench) -> dict[str, Any]:
    """One step of adaptation: source clean and masked, target masked, the teacher's labels and its update."""
    parsers = {name: bench.parser("adaptation", amp=amp) for name, amp in bench.amps.items()}
    batch = next(iter(part(bench.parser("adaptation"), "train#dataloader")))
    plain = plain_training.plain_network(part(parsers["package"], "network_def"))
    teacher, optimizer = copy.deepcopy(plain).requires_grad_(False), optimizer_of(plain)
    sides = {side: plain_batch(batch[side], bench.device) for side in ("source", "target")}
    steps: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_training.adaptation_step(
            plain, teacher, optimizer, sides["source"], sides["target"], BLOCKS
        ),
        **{name: step_of(parser, batch) for name, parser in parsers.items()},
    }

    def losses(network: Any, batches: Mapping[str, Any], masks: Mapping[str, Any]) -> torch.Tensor:
        labelling = copy.deepcopy(network).eval()
        return plain_training.adaptation_losses(network, labelling, batches["source"], batches["target"], BLOCKS, masks)

    equality = same_step(bench, "adaptation", batch, losses)
    seconds = bench.timed(steps)
    flop = analytic.adaptation_step_flop(on_meta(parsers["package"]), bench.patch)
    return bench.result("adaptation step", seconds, equality, flop=flop, batch_size=1)


def same_step(
    bench: Bench, name: str, batches: Mapping[str, Mapping[str, Any]], plain_losses: Callable[..., torch.Tensor]
) -> list[dict[str, Any]]:
    """Loss and gradients of one step of a bundle against the plain ones: same weights, images and masks, no dropout.

    Where float32 leaves more of the gradient open than the tolerance, networks and images in float64 decide; the
    package's losses and boxes stay float32.

    Args:
        name: "pretraining" or "adaptation".
        batches: by side; ``""`` for pretraining.
        plain_losses: called with a network, the batches and the masks.
    """
    loss, gradient = differences(bench, name, batches, plain_losses, torch.float32)
    equality = [check("loss: relative difference", loss, TOLERANCE["loss"])]
    if gradient <= TOLERANCE["gradient"]:
        return [*equality, check("gradient: length of the difference / length", gradient, TOLERANCE["gradient"])]
    loss, gradient = differences(bench, name, batches, plain_losses, torch.float64)
    return [
        *equality,
        check("loss in float64: relative difference", loss, TOLERANCE["loss"]),
        check("gradient in float64: length of the difference / length", gradient, TOLERANCE["gradient"]),
    ]


def differences(
    bench: Bench,
    name: str,
    batches: Mapping[str, Mapping[str, Any]],
    plain_losses: Callable[..., torch.Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Of loss and gradient, relative, of a network and images of ``dtype``; other arguments as `same_step`.

    The masks are those that the package drew: its encoder is watched, and the images are made positive first, so that
    what is 0 was hidden.
    """
    parser = bench.parser(name, amp=None, dropout=0.0)
    network, trainer = part(parser, "network_def").to(dtype), part(parser, "train#trainer")
    if "teacher_network" in parser.config:
        part(parser, "teacher_network").to(dtype)
    plain = plain_training.plain_network(network).train()
    positive = {side: in_precision(plain_batch(batch, bench.device), dtype) for side, batch in batches.items()}
    for batch in positive.values():
        for scale in BLOCKS:
            batch[f"{plain_training.PREFIX[scale]}image"] = batch[f"{plain_training.PREFIX[scale]}image"].clamp(
                min=0.01
            )

    seen: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.extend(inputs[0].detach().clone())

    def keep(engine: Any) -> None:
        gradients.update({name: gradient.detach().clone() for name, gradient in gradients_of(network).items()})

    network.encoder.register_forward_pre_hook(watch)
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, keep)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the mean and the order of sums are compared, not the rounding of inputs
    try:
        loss = step_of(parser, positive[""] if "" in positive else positive)()
        plain_loss = plain_losses(plain, positive, masks_of(seen, positive))
        plain_loss.backward()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    distance, length = 0.0, 0.0
    for name, gradient in gradients_of(plain).items():
        distance += float((gradients[name] - gradient).double().square().sum())
        length += float(gradient.double().square().sum())
    return abs(loss - plain_loss.item()) / abs(plain_loss.item()), (distance / length) ** 0.5


def in_precision(batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch with its images and boxes, not its labels, in a floating type."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def gradients_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the name of their parameter."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def masks_of(
    seen: list[torch.Tensor], batches: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, list[torch.Tensor]]:
    """The block masks of what an encoder saw, by ``<side>_<scale>`` (``<scale>`` for pretraining), sample by sample.

    Raises:
        RuntimeError: an image was not seen with hidden blocks although one of its side should be.
    """
    masks: dict[str, dict[int, torch.Tensor]] = {}
    for image in seen:
        hidden = image == 0
        if not hidden.any():
            continue
        candidates = {
            (side, scale, number): float((one - image)[~hidden].abs().mean())
            for side, batch in batches.items()
            for scale in BLOCKS
            for number, one in enumerate(batch[f"{plain_training.PREFIX[scale]}image"])
        }
        side, scale, number = min(candidates, key=candidates.__getitem__)
        name = f"{side}_{scale}" if side else scale
        masks.setdefault(name, {})[number] = plain_training.patchify(hidden.float(), BLOCKS[scale]).mean(dim=1)
    for side, batch in batches.items():
        for scale in BLOCKS:
            name = f"{side}_{scale}" if side else scale
            if len(masks.get(name, {})) != len(batch[f"{plain_training.PREFIX[scale]}image"]):
                raise RuntimeError(f"the package's encoder did not see every {name} image with hidden blocks")
    return {name: [found[number] for number in sorted(found)] for name, found in masks.items()}


# Inference -------------------------------------------------------------------------------------------------------


def inference(bench: Bench) -> dict[str, Any]:
    """Logits of a whole scan that is in memory."""
    network = part(bench.parser("adaptation"), "network_def").to(bench.device).eval()
    subject = plain_data.decode(bench.scan)
    scan = plain_data.clip_at_percentile(subject.image.data, 99.5).to(bench.device)
    stride = int(bench.settings["window_stride"][0])
    ours = {}
    for name, amp in bench.amps.items():
        settings = {"amp": amp, "handlers": [], "cases": [], "dataset#data": [{}]}
        ours[name] = inference_of(bench.parser("adaptation", "inference.json", **settings), network, scan)
    kept: dict[str, torch.Tensor] = {}
    plain = plain_training.plain_network(network)

    def keeping(name: str, call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            kept[name] = call().detach()

        return run

    variants = {"plain": lambda: plain_inference.segment(plain, scan, bench.patch, stride), **ours}
    seconds = bench.timed({name: keeping(name, call) for name, call in variants.items()})
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    exact = plain_inference.segment(plain, scan, bench.patch, stride, skip_duplicates=True)
    logits = ours["package"]().float()
    torch.backends.cudnn.allow_tf32 = allowed
    equality = same_logits(exact, logits, scan)
    return bench.result("inference", seconds, equality, agreement=agreements(kept, scan), trained=trained(bench))


def trained(bench: Bench) -> dict[str, float]:
    """Share of equal labels, bf16 against float32, of the weights that the bundle ships on a scan that it ships."""
    subject = plain_data.decode(SHIPPED_SCAN)
    scan = plain_data.clip_at_percentile(subject.image.data, 99.5).to(bench.device)
    logits = {}
    for name, amp in bench.amps.items():
        settings = {"device": bench.settings["device"], "handlers": [], "cases": [], "dataset#data": [{}], "amp": amp}
        parser = bundle("adaptation", bench.datalist, settings, "inference.json")
        network = part(parser, "network")
        network.load_state_dict(torch.load(SHIPPED_WEIGHTS, weights_only=True, map_location=bench.device))
        logits[name] = inference_of(parser, network, scan)()
    return agreements(logits, scan, "package")


def same_logits(plain: torch.Tensor, package: torch.Tensor, scan: torch.Tensor) -> list[dict[str, Any]]:
    """Logits of the foreground's voxels (windows without foreground are skipped by the package), and labels."""
    foreground = scan[0] > 0
    difference = (plain - package)[:, foreground].abs().max() / plain[:, foreground].abs().max()
    equal = (plain.argmax(0) == package.argmax(0))[foreground].float().mean()
    return [
        check("logits: largest difference / largest logit", float(difference), TOLERANCE["logits"]),
        check("share of equal labels", float(equal), TOLERANCE["labels"], at_least=True),
    ]


def agreements(logits: Mapping[str, torch.Tensor], scan: torch.Tensor, like: str = "plain") -> dict[str, float]:
    """Share of the foreground's voxels with the label of one variant, the plain one's duplicate windows and all."""
    foreground = scan[0] > 0
    labels = {name: values.float().argmax(0)[foreground] for name, values in logits.items()}
    return {name: float((found == labels[like]).float().mean()) for name, found in labels.items() if name != like}
