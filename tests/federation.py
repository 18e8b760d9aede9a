# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A small federation: a labelled server, sites with a few unlabelled scans each, and the bundle's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.federated import Plan
from tests.scans import ROOT, make_dataset, make_scan, write_nifti

CONFIGS = ROOT / "bundles" / "mapseg_adaptation" / "configs"
LABELS = {"first": 1, "second": 2}
SMALL = {
    "labels": LABELS,
    "device": "$torch.device('cpu')",
    "rounds": 2,
    "learning_rate": 0.01,
    "last_learning_rate": 0.001,
    "ema_schedule": [[None, 0.5]],
}
FILES = ("train.json", "tiny.yaml", "federated.json")


def make_site(folder: Path, scans: int, seed: int, shape=(20, 24, 28)) -> str:
    """A datalist with unlabelled scans alone; returns its path."""
    entries = []
    for number in range(scans):
        image, _ = make_scan(shape, seed + number, contrast=-0.7)
        write_nifti(folder / f"{number}.nii.gz", image)
        entries.append({"image": f"{number}.nii.gz", "case_id": f"scan-{number}"})
    (folder / "datalist.json").write_text(json.dumps({"target_training": entries}))
    return str(folder / "datalist.json")


def make_federation(folder: Path, sites: int = 3) -> tuple[str, dict[str, str]]:
    """The server's datalist, and those of sites with 1, 2, 3, ... scans."""
    datalist = make_dataset(folder / "server")
    return str(datalist), {f"site-{k}": make_site(folder / f"site-{k}", k, 10 * k) for k in range(1, sites + 1)}


def small_settings(**changes: Any) -> dict[str, Any]:
    """Merged config of the bundle at test size, with changes on top."""
    config = ConfigParser.load_config_files([CONFIGS / name for name in FILES])
    return config | SMALL | {"bundle_root": str(CONFIGS.parent)} | changes


def small_plan(**changes: Any) -> Plan:
    """The plan of `small_settings`."""
    values = {
        "rounds": 2,
        "server_steps": 2,
        "client_steps": 2,
        "first_learning_rate": 0.01,
        "last_learning_rate": 0.001,
        "min_sites": 2,
    }
    return Plan(**(values | changes))


def write_parties(folder: Path, own: Path, datalist: str, sites: dict[str, str], **changes: Any) -> None:
    """``<name>.json`` of the server and of each site, see `mapseg_components.federated.flare.party`."""
    folder.mkdir(parents=True)
    for name, path in {"server": datalist, **sites}.items():
        places = {"datalist": path, "ckpt_dir": str(own / name / "models"), "output_dir": str(own / name / "eval")}
        content = {
            "bundle_root": str(CONFIGS.parent),
            "config_files": list(FILES),
            "settings": {**SMALL, **places, **changes},
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
