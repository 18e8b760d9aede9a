# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, and the peak memory of a process."""

from __future__ import annotations

import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["CLOCKS", "interleaved", "machine", "peak_bytes", "product_rates", "ratios", "summary"]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or seconds that the process computes: the latter when others use the machine as well."""


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], bool] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each variant, in turns (A, B, C, A, B, C, ...), so that a busy machine is busy for all.

    Args:
        variants: what to call, by name.
        repeats: timed calls of each.
        device: waited for before each reading of the clock.
        warmup: calls of each before the timed ones.
        clock: one of `CLOCKS`.
        before: called with the variant's name before each call, untimed; where it returns that what lasts over calls
            begins anew, one untimed call comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, call in variants.items():
            gc.collect()
            if before is not None and before(name):
                call()
            wait(device)
            start = clock()
            call()
            wait(device)
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, mean, extremes and count."""
    return {
        "median": statistics.median(seconds),
        "mean": statistics.fmean(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "n": len(seconds),
    }


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """How many times faster than the baseline each other variant is: the median over turns."""
    return {
        name: statistics.median(slow / fast for slow, fast in zip(seconds[baseline], values))
        for name, values in seconds.items()
        if name != baseline
    }


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    Read from the kernel's status file: ``getrusage`` of a process started by ``vfork`` begins with its parent's peak.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: memory is measured on Linux only")


PRECISIONS = {"package": torch.float32, "package_bf16": torch.bfloat16}


def product_rates(
    device: torch.device,
    clock: Callable[[], float],
    side: int,
    repeats: int = 5,
    precisions: Mapping[str, torch.dtype] = PRECISIONS,
) -> dict[str, float]:
    """Operations a second of products of two square matrices, which no step exceeds by much: float32 and bf16.

    Args:
        side: rows and columns of the matrices.
        precisions: by the names in the result.
    """
    calls = {}
    for name, dtype in precisions.items():
        one, other = torch.randn(2, side, side, device=device).to(dtype)
        calls[name] = functools.partial(torch.matmul, one, other)
    seconds = interleaved(calls, repeats, device, clock=clock)
    return {name: 2 * side**3 / statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = f"{len(names)} x {names[0]}" if names else model
    return {
        "processor": model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
