# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a finished run of `mapseg adapt`, made without any training: scans, label maps, histories, figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mapseg_components.commands.verdict import verdict_of
from tests.conftest import write_nifti

NAMES = (
    "left ventricle myocardium",
    "cerebrospinal fluid",
    "white matter",
    "hippocampus",
    "extra-ventricular cerebrospinal fluid",
    "Kidney_Left",
    "brainstem",
    "corpus callosum",
)
ML = (0.21, 1.4, 6.1, 0.9, 38.0, 142.0, 3.2, 0.6)  # small structures beside large ones


def ball(shape, centre, radius):
    """Mask of a ball, in shares of the sides."""
    grid = np.stack(np.meshgrid(*(np.arange(side) / side for side in shape), indexing="ij"))
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2


def scan_and_labels(seed, structures, shape=(40, 52, 44)):
    """A bright ball with structures in it, and a second label map with each of them smaller and moved."""
    generator = np.random.default_rng(seed)
    head = ball(shape, (0.5, 0.5, 0.5), 0.46)
    image = (head * (0.5 + 0.05 * generator.standard_normal(shape))).clip(0).astype(np.float32) * 900
    maps = [np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)]
    for value in range(1, structures + 1):
        angle = 2 * np.pi * value / structures
        centre = (0.5 + 0.24 * np.cos(angle), 0.5 + 0.24 * np.sin(angle), 0.42 + 0.02 * value)
        for label_map, radius, moved in zip(maps, (0.07, 0.1), (0.03, 0.0)):
            label_map[ball(shape, np.add(centre, moved), radius) & head] = value
        image[maps[1] == value] += 40 * value
    return image, maps


def make_run(folder: Path, structures: int = 8, scans: int = 4, epochs: int = 12, sure: bool = False) -> Path:
    """Write the run.

    Args:
        folder: to write.
        structures: up to 8.
        scans: of the target.
        epochs: of each history.
        sure: no estimate is a guess, no structure is misplaced, no finding has a remedy.
    """
    generator = np.random.default_rng(structures)
    names, ml = NAMES[:structures], ML[:structures]
    cases = []
    for number in range(scans):
        case = f"sub-{number + 101}_ses-baseline_acq-highres_run-01_T2w"
        image, maps = scan_and_labels(number, structures)
        affine = np.diag([1.6, 1.5, 1.7, 1.0])
        path = write_nifti(folder / "scans" / f"{case}.nii.gz", image, affine)
        for model, label_map in zip(("source_only", "adapted"), maps):
            write_nifti(folder / "predictions" / model / f"{case}_seg.nii.gz", label_map, affine)
        cases.append({"image": path, "case_id": case})
    labels = {name: value for value, name in enumerate(names, start=1)}
    models = {}
    for model, level in (("source_only", 0.58), ("adapted", 0.71)):
        figures = []
        for number, case in enumerate(cases):
            figures.append(
                {
                    "case": case["case_id"],
                    "consistency": 0.9,
                    "estimated_dice": round(float(level + 0.06 * generator.standard_normal()), 4),
                    "misplaced": [] if sure or number % 4 else list(names[-2:]),
                    "within_calibration": sure or number % 5 > 0,
                    "confident_share": round(float(generator.uniform(0.6, 0.95)), 4),
                    "volumes_ml": {n: round(float(v * generator.uniform(0.7, 1.2)), 4) for n, v in zip(names, ml)},
                }
            )
        dice = {name: round(float(generator.uniform(0.7, 0.93)), 4) for name in names}
        models[model] = {
            "validation_dice": {"structures": dice, "mean": round(float(np.mean(list(dice.values()))), 4)},
            "calibration": {
                "lines": {"consistency": [0.8, 0.1]},
                "points": 40,
                "error": 0.064,
                "lowest": 0.5,
                "highest": 1,
            },
            "cases": figures,
        }
    findings = [
        ["note", "target", "12 of 12 scans are skull-stripped or masked (one value all around)", ""],
        *(
            [
                "warning",
                f"{case['image']}",
                "its content fits the set better when flipped back-front: its orientation may be wrong",
                "" if sure else "compare it with another scan of the set in a viewer, and correct its header",
            ]
            for case in cases[::3]
        ),
    ]
    record = {
        "request": {"source": "older", "target": "younger", "preset": "auto", "seed": 3},
        "versions": {"mapseg": "0.1.0", "monai": "1.6.1"},
        "seconds": {"pretraining": 3210.5, "source": 4210.0, "adaptation": 5120.1},
        "done": ["pretraining", "source", "adaptation"],
        "plan": {
            "preset": "single-gpu",
            "source_training": 24,
            "source_validation": 6,
            "target": scans,
            "labels": labels,
            "settings": {"patch_size": [96, 96, 96]},
        },
        "check": {"verdict": f"{scans} files read; 0 errors. No blocking finding.", "findings": findings},
        "assessment": {
            "models": models,
            "prior_ml": {n: sorted(round(float(v * s), 4) for s in (0.8, 1.0, 1.5)) for n, v in zip(names, ml)},
            "between": {case["case_id"]: 0.81 for case in cases},
            "verdict": verdict_of(models["source_only"], models["adapted"]),
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "datalist.json").write_text(json.dumps({"labels": {"0": "background"}, "target_training": cases}))
    histories: dict[str, list] = {"source": [], "adaptation": []}
    for epoch in range(1, epochs + 1):
        grown = 1 - np.exp(-epoch / 4)
        student = 0.5 + 0.35 * grown
        histories["source"].append({"epoch": epoch, "source_dice_student": student})
        line = {
            "epoch": epoch,
            "source_dice_student": student,
            "source_dice_teacher": student + 0.02,
            "target_loss": 0.9 - 0.3 * grown,
            "score": student - 0.3,
            "target_agreement_teacher_student": 0.7 + 0.2 * grown,
            "target_confident_share": 0.4 + 0.4 * grown,
        }
        if epoch > 1:
            line["target_agreement_previous"] = 0.8 + 0.18 * grown
        line |= {f"target_ml_{n}": v * (0.7 + 0.3 * grown + 0.02 * np.sin(epoch)) for n, v in zip(names, ml)}
        histories["adaptation"].append(line)
    for stage, lines in histories.items():
        (folder / "stages" / stage).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "stages" / stage / "history.jsonl").write_text(text)
    return folder
