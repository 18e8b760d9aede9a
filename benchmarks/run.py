# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure the package against the plain baseline and write results.json and a table (docs/reference/performance.md).

make bench                                          width 64, some 15 minutes on two cores
python -m benchmarks.run --width 64 128             two widths
python -m benchmarks.run --quick                    a minute at tiny size: does everything work?
python -m benchmarks.run --device cuda --width 512 --batch_size 4 --repeats 20
python -m benchmarks.run --set compile=true --set cache_rate=0.5     further settings of the package
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import SimpleITK
import torch

from benchmarks import cases
from benchmarks.memory import measure
from benchmarks.package import require_known, settings_of, variants_on, write_datalist
from benchmarks.report import tables
from benchmarks.startup import startup
from benchmarks.timing import CLOCKS, machine, product_rates
from benchmarks.volume import SHAPE, write_brain

__all__ = ["run"]

logger = logging.getLogger("benchmarks")
CASES = {
    "adaptation_sample": ("adaptation sample", cases.adaptation_samples),
    "mae_sample": ("MAE sample", cases.mae_samples),
    "mae_step": ("MAE step", cases.mae_steps),
    "adaptation_step": ("adaptation step", cases.adaptation_steps),
    "inference": ("inference", cases.inference),
}
OTHERS = ("memory", "startup")
# the baseline without the clean target loss, as its authors had to run it, and the package with it
MEMORY = {
    "plain, without target_clean": {"side": "plain", "target_clean": "false"},
    "package, with target_clean": {"side": "package", "target_clean": "true", "set": {"batched_passes": True}},
    "package, with target_clean, one pass at a time": {
        "side": "package",
        "target_clean": "true",
        "set": {"batched_passes": False},
    },
}
QUICK = {"width": [8], "depth": 1, "patch": 16, "repeats": 1, "sample_repeats": 1, "warmup": 0}
QUICK_SHAPE = (36, 44, 42)


def arguments_of(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[64])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of steps and inference, per variant")
    parser.add_argument("--sample_repeats", type=int, default=15, help="timed samples, per variant")
    parser.add_argument("--warmup", type=int, default=1, help="calls before the timed ones")
    parser.add_argument("--batch_size", type=int, default=1, help="pairs of an MAE step; the paper has 4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of steps and inference")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="cpu: on a machine that others use too")
    parser.add_argument("--scan", type=Path, help="a scan of yours instead of the synthetic brain")
    parser.add_argument("--label", type=Path, help="its label map")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the package")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *OTHERS], default=[*CASES, *OTHERS])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: nothing that is measured means anything")
    parser.add_argument("--resume", action="store_true", help="measure only what the output's results.json lacks")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args(line)
    if (arguments.scan is None) != (arguments.label is None):
        parser.error("--scan and --label belong together")
    if arguments.clock == "cpu" and arguments.device != "cpu":
        parser.error("--clock cpu does not see what a GPU does")
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def settings_from(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` with values as in JSON, or as text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    require_known(settings)
    return settings


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for; returns what ``results.json`` holds."""
    device, chosen = torch.device(arguments.device), settings_from(arguments.set)
    torch.set_num_threads(arguments.threads)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sizes = ("depth", "patch", "batch_size", "repeats", "sample_repeats", "clock", "quick")
    results: dict[str, Any] = {
        "machine": {**machine(device), "date": datetime.date.today().isoformat()},
        "settings": {**{key: getattr(arguments, key) for key in sizes}, "set": chosen},
        **{"rates": {}, "cases": [], "memory": [], "startup": {}},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan, label = arguments.scan, arguments.label
        if scan is None:
            scan, label = write_brain(folder / "scans", QUICK_SHAPE if arguments.quick else SHAPE)
        results["settings"]["scan_shape"] = list(nib.load(scan).shape)
        if arguments.resume:
            go_on(results, arguments.output / "results.json")
        done = {(case["case"], case["width"]) for case in results["cases"]}
        side = side_of_products(device, arguments.quick)
        labels = write_datalist(folder / "datalist.json", [(scan.absolute(), label.absolute())])
        for width in arguments.width:
            torch.manual_seed(0)
            settings = settings_of(width, arguments.depth, arguments.patch, device, chosen)
            bench = cases.Bench(
                *(width, arguments.depth, arguments.patch, device, folder / "datalist.json", labels, scan, label),
                settings=settings,
                batch_size=arguments.batch_size,
                repeats=arguments.repeats,
                sample_repeats=arguments.sample_repeats,
                warmup=arguments.warmup,
                clock=CLOCKS[arguments.clock],
                amps=variants_on(device),
            )
            for key, (case, call) in CASES.items():
                again = key.endswith("sample") and width != arguments.width[0]  # samples have no width
                if key in arguments.only and not again and (case, width) not in done:
                    logger.info(f"{case}, width {width} ...")
                    raise_rates(results["rates"], product_rates(device, CLOCKS[arguments.clock], side))
                    results["cases"].append(call(bench))
                    write(results, arguments.output)
            if "memory" in arguments.only and not any(row["width"] == width for row in results["memory"]):
                logger.info(f"memory, width {width} ...")
                results["memory"] += memory(width, arguments, chosen)
        if "startup" in arguments.only and not results["startup"]:
            logger.info("start-up ...")
            results["startup"] = startup(folder / "startup", arguments.repeats, arguments.clock)
    write(results, arguments.output)
    return results


def side_of_products(device: torch.device, quick: bool) -> int:
    """Rows of the matrices that show what a device can do, in a second or so."""
    if quick:
        return 64
    return 2048 if device.type == "cpu" else 8192


def raise_rates(rates: dict[str, float], found: dict[str, float]) -> None:
    """Keep the highest: a moment in which others used the machine is not what it can do."""
    rates.update({name: max(rate, rates.get(name, 0.0)) for name, rate in found.items()})


def go_on(results: dict[str, Any], path: Path) -> None:
    """Take over what an interrupted run of the same settings has measured on the same machine."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    varying = {"load", "date", "repeats", "sample_repeats"}  # each figure has its own n

    def fixed(content: dict[str, Any]) -> dict[str, Any]:
        both = {**content["machine"], **content["settings"]}
        return {key: value for key, value in both.items() if key not in varying}

    if fixed(before) == fixed(results):
        logger.info(f"going on with {path}")
        results.update({key: before[key] for key in ("rates", "cases", "memory", "startup")})


def write(results: dict[str, Any], output: Path) -> None:
    """Write ``results.json`` and ``results.md``: what there is so far."""
    results["machine"]["load"] = os.getloadavg()[2]
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    (output / "results.md").write_text(tables(results) + "\n", encoding="utf-8")


def memory(width: int, arguments: argparse.Namespace, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Peak memory of each variant of `MEMORY`."""
    sizes = {"width": width, "depth": arguments.depth, "patch": arguments.patch, "device": arguments.device}
    rows = []
    for name, options in MEMORY.items():
        more = {**chosen, **options.get("set", {})}
        found = measure("step", **{**sizes, **options, "set": json.dumps(more)})
        rows.append({"variant": name, "width": width, **found})
    return rows


def main(line: Sequence[str] | None = None) -> int:
    """Measure, write, print the tables; 1 if a result of the package differs from the plain one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = arguments_of(line)
    results = run(arguments)
    print(tables(results))
    differing = [f"{c['case']}: {one['what']}" for c in results["cases"] for one in c["equality"] if not one["ok"]]
    for name in differing:
        logger.error(f"not equal: {name}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
