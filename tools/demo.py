#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The whole method on the shipped scans, by the same commands that a user types.

Pretraining on all images, source-only training on older fetuses, adaptation to younger ones without their labels,
then both models on held-out young fetuses whose labels only the evaluation reads. Prints a table; writes label maps
on the scans' own grids, ``metrics.json`` and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np

from mapseg_components.colours import structure_colours
from mapseg_components.data import load_datalist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.stages import ADAPTATION, PRETRAINING, ROOT, run_bundle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAMPLE = ROOT / "sample" / "fetal_age"
COLOURS = ["#00000000", *structure_colours(8)]  # background is transparent


def table(results: dict[str, dict]) -> str:
    """Dice per structure, source-only beside adapted."""
    names = list(results["source-only"]["structures"])
    width = max(map(len, names)) + 2
    lines = [f"{'Dice on the held-out target':<{width}}  source-only  adapted"]
    for name in [*names, "mean"]:
        row = [r["mean"] if name == "mean" else r["structures"][name] for r in results.values()]
        lines.append(f"{name:<{width}}  {row[0]:11.3f}  {row[1]:7.3f}")
    return "\n".join(lines)


def picture(folders: dict[str, Path], path: Path, names: list[str]) -> None:
    """Scan, truth, source-only and adapted, one row a held-out scan, axial slice with the most structures.

    The right side of the body is on the left; a bar shows 20 mm.
    """
    cases = load_datalist(SAMPLE, "target_test")
    colours = matplotlib.colors.ListedColormap(COLOURS)
    figure, axes = plt.subplots(len(cases), 4, figsize=(11, 3.2 * len(cases)), squeeze=False)
    for number, (row, case) in enumerate(zip(axes, cases)):
        scan, truth = (nib.as_closest_canonical(nib.load(case[key])) for key in ("image", "label"))
        maps = [np.asarray(truth.dataobj)]
        for folder in folders.values():
            maps.append(
                np.asarray(nib.as_closest_canonical(nib.load(folder / f"{case['case_id']}_seg.nii.gz")).dataobj)
            )
        grey, spacing = np.asarray(scan.dataobj), scan.header.get_zooms()[:3]
        aspect = spacing[1] / spacing[0]
        slices = [maps[0][..., z] for z in range(grey.shape[2])]
        level = max(range(len(slices)), key=lambda z: (len(np.unique(slices[z])), np.count_nonzero(slices[z])))
        for column, (axis, title) in enumerate(zip(row, ["scan", "truth", *folders])):
            axis.imshow(grey[::-1, :, level].T, cmap="gray", origin="lower", aspect=aspect)
            if column:
                overlay = {"cmap": colours, "vmin": 0, "vmax": len(COLOURS) - 1, "interpolation": "nearest"}
                shown = maps[column - 1][::-1, :, level].T
                axis.imshow(shown, origin="lower", alpha=0.7, aspect=aspect, **overlay)
            axis.set_title("" if number else title, fontsize=12)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{case['case_id'].replace('_', ' ')}\nslice {level + 1} of {grey.shape[2]}", fontsize=11)
        ends = row[0].get_xlim()
        row[0].plot([ends[0] + 2, ends[0] + 2 + 20 / spacing[0]], [2, 2], color="white", linewidth=3)
        row[0].text(ends[0] + 2, 3, "20 mm", color="white", va="bottom", fontsize=10)
        for text, place, side in (("R", 0.03, "left"), ("L", 0.97, "right")):
            row[0].text(place, 0.5, text, transform=row[0].transAxes, color="white", ha=side, va="center", fontsize=10)
    handles = [matplotlib.patches.Patch(color=colour, label=name) for colour, name in zip(COLOURS[1:], names)]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every stage and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="folder of results (runs/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="put the resulting weights into the bundles")
    arguments = parser.parse_args()
    output = (arguments.output or ROOT / "runs" / "demo").absolute()
    if output.exists():
        print(f"Removing the results of an earlier run in {output}")
        shutil.rmtree(output)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")

    train = ["train.json", "small_data.yaml", "fetal_age.yaml"]
    common = {"seed": arguments.seed, "dataset_dir": SAMPLE}
    folders = {name: output / name for name in ("pretraining", "source_only", "adaptation")}
    seconds = {
        "pretraining": run_bundle("1/5 pretraining, all images", PRETRAINING, train, folders["pretraining"], **common),
        "source_only": run_bundle(
            "2/5 source-only training",
            ADAPTATION,
            [*train, "source_only.yaml"],
            folders["source_only"],
            encoder_weights=folders["pretraining"] / "model.pt",
            **common,
        ),
        "adaptation": run_bundle(
            "3/5 adaptation without target labels",
            ADAPTATION,
            [*train, "from_source.yaml"],
            folders["adaptation"],
            initial_weights=folders["source_only"] / "source_only.pt",
            # gentler than the preset: on this sample faster teachers drift (docs/results.md)
            learning_rate=0.0001,
            ema_schedule=[[None, 0.999]],
            target_scale_range=[0.9, 1.1],
            max_epochs=10,
            **common,
        ),
    }
    weights = {
        "source-only": folders["source_only"] / "source_only.pt",
        "adapted": folders["adaptation"] / "model.pt",
    }
    predictions = {name: output / "predictions" / name for name in weights}
    results = {}
    for number, (name, file) in enumerate(weights.items(), start=4):
        configs = ["inference.json", "evaluate.json"]
        title = f"{number}/5 inference and evaluation, {name}"
        run_bundle(title, ADAPTATION, configs, predictions[name], dataset_dir=SAMPLE, weights=file)
        results[name] = json.loads((predictions[name] / "metrics.json").read_text())

    selection = json.loads((folders["adaptation"] / "model_selection.json").read_text())["model.pt"]
    report = {"seed": arguments.seed, "seconds": seconds, "selection": selection, **results}
    (output / "metrics.json").write_text(json.dumps(report, indent=4) + "\n")
    picture(predictions, output / "comparison.png", list(results["adapted"]["structures"]))
    gain = results["adapted"]["mean"] - results["source-only"]["mean"]
    verdict = "Adaptation helped" if gain > 0.005 else "Adaptation made it worse" if gain < -0.005 else "No difference"
    print(f"\n{table(results)}\n\n{verdict}: {gain:+.3f} mean Dice (seed {arguments.seed}).")
    print(f"Chosen without target labels: the {selection['weights']} of epoch {selection['epoch']}.")
    print(f"\nLabel maps, volumes.csv  {predictions['adapted']}")
    print(f"Figures                  {output / 'metrics.json'}\nPicture                  {output / 'comparison.png'}")
    if arguments.ship:
        shutil.copyfile(folders["pretraining"] / "model.pt", PRETRAINING / "models" / "model.pt")
        shutil.copyfile(weights["adapted"], ADAPTATION / "models" / "model.pt")
        print(f"Weights put into {PRETRAINING / 'models'} and {ADAPTATION / 'models'}.")


if __name__ == "__main__":
    main()
