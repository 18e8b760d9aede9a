#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The picture of the domain gap of the shipped sample: python tools/domain_gap.py FOLDER PNG. Needs the extra ``fl``.

Two sites, ``older`` with the sample's source scans and ``younger`` with its target scans, answer NVFlare's statistics
job in its simulator, as real sites do; FOLDER is new and keeps their settings, summaries and logs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["train.json", "federated.json"]
SITES = ["--sites", "younger", "--source-site", "older"]


def main() -> None:
    """Parties, job, picture."""
    folder, picture = (Path(each).absolute() for each in sys.argv[1:])
    (folder / "parties").mkdir(parents=True)
    for name in ("older", "younger"):
        settings = {
            "datalist": str(ROOT / "sample" / "fetal_age" / "datalist.json"),
            "output_dir": str(folder / name),
            "share_statistics": True,
            "statistics_min_scans": 4,
        }
        content = {"bundle_root": str(ROOT / "bundles" / "mapseg_adaptation"), "config_files": FILES}
        (folder / "parties" / f"{name}.json").write_text(json.dumps({**content, "settings": settings}))
    environment = {
        **os.environ,
        "MAPSEG_PARTY_DIR": str(folder / "parties"),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "mapseg_components.federated.flare.job", *SITES]
    with (folder / "log.txt").open("w") as log:
        for options in (
            ["--statistics", "--simulate", str(folder / "work")],
            ["--draw", str(folder / "domain_gap.json"), str(picture)],
        ):
            subprocess.run([*command, *options], env=environment, check=True, stdout=log, stderr=log)
            for result in folder.glob("work/**/domain_gap.json"):
                result.replace(folder / "domain_gap.json")


if __name__ == "__main__":
    main()
