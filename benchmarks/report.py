# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of a results file in Markdown, and their place in docs/reference/performance.md.

python -m benchmarks.report runs/bench/results.json --docs docs/reference/performance.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["replace_between", "tables"]

# times as fast as the plain baseline
GOALS = {
    ("adaptation sample", "package"): 20.0,
    ("MAE sample", "package"): 10.0,
    ("MAE step", "package"): 1.3,
    ("MAE step", "package_bf16"): 2.5,
    ("adaptation step", "package"): 1.3,
    ("adaptation step", "package_bf16"): 2.5,
    ("inference", "package"): 4.0,
    ("inference", "package_bf16"): 8.0,
}
CLOCKS = {"wall": "Seconds that passed", "cpu": "Seconds of processor time, for others used the machine as well"}
KINDS = {"package": "float32", "package_bf16": "bf16"}
NAMES = {"plain": "plain", "package": "package, float32", "package_bf16": "package, bf16"}


def seconds(value: float) -> str:
    """Three digits, in ms below a second."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def place_of(machine: Mapping[str, Any]) -> str:
    """What the figures of a page were measured on."""
    return f"{machine['device']}, {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"


def operations(case: Mapping[str, Any], variant: str, rates: Mapping[str, float]) -> str:
    """Operations a second, beside the rate of matrix products of the same precision; empty where none are counted."""
    if "flop" not in case:
        return ""
    done = case["flop"] / case["seconds"][variant]["median"]
    return f"{done / 1e12:.3g} TFLOP/s, {done / rates['package' if variant == 'plain' else variant]:.0%}"


def tables(results: Mapping[str, Any]) -> str:
    """All tables of a results file."""
    machine, settings = results["machine"], results["settings"]
    size = f"depth {settings['depth']}, patch {settings['patch']}^3, scan {'x'.join(map(str, settings['scan_shape']))}"
    changed = ", ".join(f"`{key}: {value}`" for key, value in settings["set"].items())
    load = f"Load of the machine: {machine['load']:.1f} processes."
    lines = [
        f"{place_of(machine)}; {size}; samples on one thread. {CLOCKS[settings['clock']]}. {load}"
        + (f" Settings of the package: {changed}." if changed else "")
    ]
    return "\n".join([*lines, *(case_lines(results) if results["cases"] else []), *other_lines(results)])


def case_lines(results: Mapping[str, Any]) -> list[str]:
    """Tables of what was compared, by speed and by result."""
    lines = [
        "",
        "| case | width | variant | median | min..max | n | times as fast | goal | operations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        for variant, found in case["seconds"].items():
            ratio = case["speed_up"].get(variant)
            goal = GOALS.get((case["case"], variant))
            cells = [
                *(case["case"], str(case["width"]), NAMES[variant], seconds(found["median"])),
                f"{seconds(found['min'])} .. {seconds(found['max'])}",
                str(found["n"]),
                "1" if ratio is None else f"**{ratio:.3g}**",
                "" if goal is None else f"{goal:g}",
                operations(case, variant, results["rates"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    rates = " and ".join(f"{rate / 1e12:.3g} TFLOP/s in {KINDS[kind]}" for kind, rate in results["rates"].items())
    lines += [
        "",
        f"Operations: of a step, a second, and as a share of what products of large matrices reach here: {rates}.",
    ]
    missing = list(dict.fromkeys(name for name, _ in GOALS if name not in {case["case"] for case in results["cases"]}))
    if missing:
        lines += ["", f"Not measured in this run: {', '.join(missing)}."]
    if not any("package_bf16" in case["seconds"] for case in results["cases"]):
        lines += ["", "bf16 is not measured: this processor has no instructions for it and would emulate it."]
    lines += ["", "| the same results? | width | difference | allowed | |", "|---|---|---|---|---|"]
    for case in results["cases"]:
        for one in case["equality"]:
            sign = ">=" if one["at_least"] else "<="
            good = "equal" if one["ok"] else "**differs**"
            value = f"{one['value']:.5f}" if one["at_least"] else f"{one['value']:.1e}"
            lines.append(
                f"| {case['case']}, {one['what']} | {case['width']} | {value} | {sign} {one['tolerance']:g} | {good} |"
            )
    for case in results["cases"]:
        for variant, share in case.get("agreement", {}).items():
            what = f"{case['case']}, {NAMES[variant]}: labels as plain, random weights"
            lines.append(f"| {what} | {case['width']} | {share:.5f} | | |")
        for variant, share in case.get("trained", {}).items():
            lines.append(
                f"| {case['case']}, {NAMES[variant]}: labels as float32, shipped weights | | {share:.5f} | | |"
            )
    for case in results["cases"]:
        if "parts" in case:
            done = ", ".join(f"{name} {seconds(value)}" for name, value in case["parts"].items())
            lines += ["", f"Parts of the plain {case['case']}, where they are done: {done}."]
    return lines


def other_lines(results: Mapping[str, Any]) -> list[str]:
    """Tables of memory and of start-up."""
    lines: list[str] = []
    if results.get("memory"):
        lines += [
            *("", "| memory of an adaptation step | width | before the first step | peak | the step's share |"),
            "|---|---|---|---|---|",
        ]
        for one in results["memory"]:
            cells = [one["variant"], str(one["width"]), gigabytes(one["before"]), gigabytes(one["peak"])]
            lines.append(f"| {' | '.join([*cells, gigabytes(one['peak'] - one['before'])])} |")
    if results.get("startup"):
        lines += ["", "| start-up | median | min..max | n |", "|---|---|---|---|"]
        for name, found in results["startup"].items():
            spread = f"{seconds(found['min'])} .. {seconds(found['max'])}"
            lines.append(f"| {name} | {seconds(found['median'])} | {spread} | {found['n']} |")
    return lines


def replace_between(page: Path, name: str, text: str) -> None:
    """Put text between the two markers of a name in a page.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r}: put them where the table belongs")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    parser.add_argument("--marker", default="bench", help="name in the page's markers")
    arguments = parser.parse_args()
    text = tables(json.loads(arguments.results.read_text(encoding="utf-8")))
    if arguments.docs:
        replace_between(arguments.docs, arguments.marker, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
