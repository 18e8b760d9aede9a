# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What became of each scan of a run, written after each one: ``volumes.csv`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mapseg_components import __version__
from mapseg_components.data.volumes import write_volumes_csv
from mapseg_components.errors import MAPSegError
from mapseg_components.files import write_json
from mapseg_components.prediction.bundle import InferenceBundle
from mapseg_components.prediction.places import MANIFEST, TABLE
from mapseg_components.prediction.records import Prediction
from mapseg_components.prediction.series import without_path
from mapseg_components.scans.findings import findings_of
from mapseg_components.session import versions

__all__ = ["Call", "Journal"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """The call of a command.

    Args:
        source: its input.
        folder: its output.
        began: when; and ``started`` by a clock that nobody sets.
    """

    source: Path
    folder: Path
    began: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    started: float = field(default_factory=time.monotonic)

    @property
    def words(self) -> list[str]:
        """The command line; of a call from Python what it would be, without options."""
        from_shell = Path(sys.argv[0]).name in ("mapseg", "__main__.py")
        return list(sys.argv) if from_shell else ["predict", str(self.source), str(self.folder)]

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started


@dataclass
class Journal:
    """The scans of one call, in their order, and what became of each.

    Args:
        call: where the scans are, where results go, and when it began.
        bundle: what runs.
        predictions: one per scan.
        kept: ids of the cases that an earlier run finished.
        volumes: their rows of the table.
        left_out: what else is in the input.
        nameless: the input has DICOM, readable or not: its path may name a person, and is written to no file.
        staging: folder of unfinished files; it is gone after the run, and no message in a file names it.
    """

    call: Call
    bundle: InferenceBundle
    predictions: list[Prediction]
    kept: Sequence[str]
    volumes: list[dict[str, Any]]
    left_out: Sequence[dict[str, Any]]
    nameless: bool
    staging: Path

    def failed(self, one: Prediction, error: BaseException, path: str) -> None:
        """Note why a scan has no result, without the path that it was read from if the input has DICOM."""
        found = findings_of(error) if isinstance(error, MAPSegError) else ()
        message = "; ".join(map(str, found)) or repr(error)
        logger.error(f"{one.place or one.scan} failed: {message}")
        if self.nameless:
            message = "; ".join(f"{finding.what}: {finding.remedy}" for finding in found) or type(error).__name__
            message = message.replace(path, one.scan).replace(f"{self.staging}{os.sep}", "")
        one.status, one.message, one.kind = "failed", message, type(error)

    def rows(self) -> list[dict[str, Any]]:
        """Volumes in the order of the scans."""
        order = {one.case: number for number, one in enumerate(self.predictions)}
        return sorted(self.volumes, key=lambda row: order[row["case"]])

    def save(self) -> None:
        """Write table and manifest, the manifest last: what it calls done has its rows."""
        write_volumes_csv(self.rows(), self.call.folder / TABLE)
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write ``manifest.json``."""
        bundle, words = self.bundle, self.call.words
        content = {
            "mapseg": __version__,
            "command": without_path(words, self.call.source) if self.nameless else words,
            "started": self.call.began.isoformat(timespec="seconds"),
            "seconds": round(self.call.seconds, 2),
            "versions": versions(),
            "platform": platform.platform(),
            "device": str(bundle["device"]),
            "bundle": str(bundle["bundle_root"]),
            "bundle_version": bundle.version,
            "settings_sha256": hashlib.sha256(json.dumps(bundle.recipe, sort_keys=True).encode()).hexdigest(),
            "settings": bundle.recipe,
            "weights": bundle.weights,
            "labels": {name: index for index, name in enumerate(bundle.names, start=1)},
            "scans": [one.record() for one in self.predictions],
            "left_out": list(self.left_out),
        }
        write_json(content, self.call.folder / MANIFEST)
