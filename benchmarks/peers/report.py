# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The comparison with nnU-Net and MONAI alone as a table, and its place in docs/reference/performance.md.

python -m benchmarks.peers.report runs/bench-peers/results.json --docs docs/reference/performance.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.side import SIDES
from benchmarks.report import gigabytes, place_of, replace_between, seconds

__all__ = ["table"]

GOALS = {"training step": 1.3, "command, 20 scans": 1.5}  # times as fast as nnU-Net


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    plan, sides = results["plan"], [*SIDES]
    heads = [f"{SIDES[side]}: median (min..max)" for side in sides]
    lines = [
        f"{place_of(results['machine'])}; MONAI's `DynUNet` of filters {', '.join(map(str, plan['filters']))}, patches "
        f"of {plan['patch']}^3, {plan['batch_size']} a step; scans of {'x'.join(map(str, plan['shape']))} at 1 mm, "
        f"worked on at {plan['spacing']:g} mm, windows that overlap by half. Seconds that passed.",
        "",
        f"| case | n | {' | '.join(heads)} | times as fast as nnU-Net | goal | as MONAI alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        times = [cell(case["seconds"][side]) for side in sides]
        faster = case["faster_than"]
        goal = f"{GOALS[name]:g}" if name in GOALS else ""
        found = [f"**{faster['nnunet']:.3g}**", goal, f"{faster['monai']:.3g}"]
        lines.append(f"| {' | '.join([name, str(case['seconds']['package']['n']), *times, *found])} |")
    if plan["scans"] > 1:
        one, many = (results["cases"][f"command, {text}"]["seconds"] for text in ("1 scan", f"{plan['scans']} scans"))
        each = {side: (many[side]["median"] - one[side]["median"]) / (plan["scans"] - 1) for side in sides}
        start = {side: one[side]["median"] - each[side] for side in sides}
        for name, found in (("a further scan", each), ("start-up", start)):
            ratio = [f"{found[other] / found['package']:.3g}" for other in ("nnunet", "monai")]
            lines.append(f"| {name} | | {' | '.join(seconds(found[s]) for s in sides)} | {ratio[0]} | | {ratio[1]} |")
        peaks = results["cases"][f"command, {plan['scans']} scans"]["memory"]
        lines.append(memory_line("memory of the command, all processes", peaks))
    lines.append(memory_line("memory of training", results["training_memory"]))
    done = results["operations"]
    steps = results["cases"]["training step"]["seconds"]
    each_second = {side: done["step"] / steps[side]["median"] for side in sides}
    shares = ", ".join(f"{SIDES[side]} {rate / done['products']:.0%}" for side, rate in each_second.items())
    scored = ", ".join(f"{SIDES[side]} {results['dice'][side]:.3f}" for side in sides)
    return "\n".join([
        *lines,
        "",
        f"The same network: with the same weights nnU-Net's logits of a patch differ by {results['logits']:.0e} of the "
        f"largest. The same result: mean Dice of the {plan['scans']} scans, {scored}. nnU-Net as it comes averages "
        f"eight flips: {seconds(results['nnunet_as_it_comes'])} for one scan.",
        "",
        f"A training step has {done['step'] / 1e9:.1f} GFLOP of convolutions. Products of large float32 matrices reach "
        f"{done['products'] / 1e9:.0f} GFLOP/s here; of that rate, steps reach: {shares}.",
    ])  # fmt: skip


def cell(found: Mapping[str, float]) -> str:
    """Median and extremes."""
    return f"{seconds(found['median'])} ({seconds(found['min'])}..{seconds(found['max'])})"


def memory_line(name: str, peaks: Mapping[str, float]) -> str:
    """A row of gigabytes."""
    return f"| {name} | | {' | '.join(gigabytes(peaks[side]) for side in SIDES)} | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    text = table(json.loads(options.results.read_text(encoding="utf-8")))
    if options.docs is None:
        print(text)
    else:
        replace_between(options.docs, "bench-peers", text)


if __name__ == "__main__":
    main()
