# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What became of each scan of ``mapseg predict``, as its manifest says, and what an earlier run's manifest says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mapseg_components.data.volumes import read_volumes_csv
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import as_written
from mapseg_components.reports import text_table
from mapseg_components.session import exit_code_of

__all__ = ["Earlier", "Prediction", "Predictions", "read_earlier"]

REMEDY = "choose another output folder, or overwrite"


@dataclass
class Prediction:
    """What became of one scan.

    Args:
        case: its id.
        scan: its file; of a DICOM series what it is, without its path.
        status: ``"done"``, ``"failed"`` or ``"not done"`` (the run was interrupted).
        label_map: file, ``None`` if it was not written.
        probabilities: file, ``None`` if it was not written.
        uncertainty: file, ``None`` if it was not written.
        preview: file, ``None`` if it was not written.
        segmentation: DICOM Segmentation, ``None`` if it was not written.
        seconds: of reading, network and writing, without waiting.
        message: why it, or its picture, failed.
        series: number, modality, number of files and the UID's sha256 of a DICOM series.
        stamp: size in bytes and time of change in ns when the run began; of a series, their sum and the latest.
        notes: what was done to the values of a DICOM series beyond rescaling.
        claimed: the files of this scan in the output are, or may be, this command's, whatever became of the scan.
        adaptation: of a scan that the weights were adapted to, whether they were ``used``, the ``gain`` in consistency,
            and the steps; in no file without.
        kind: class of the error; in no file.
        place: folder of a series below the input; in no file.
    """

    case: str
    scan: str
    status: str = "not done"
    label_map: str | None = None
    probabilities: str | None = None
    uncertainty: str | None = None
    preview: str | None = None
    segmentation: str | None = None
    seconds: float | None = None
    message: str = ""
    series: dict[str, Any] | None = None
    stamp: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    claimed: bool = False
    adaptation: dict[str, Any] | None = None
    kind: type[BaseException] = field(default=Exception, repr=False)
    place: str = field(default="", repr=False)

    def record(self) -> dict[str, Any]:
        """As plain values, for the manifest."""
        hidden = ("kind", "place", *(() if self.adaptation else ("adaptation",)))
        return {name: value for name, value in vars(self).items() if name not in hidden}

    @property
    def adapted(self) -> str:
        """What became of its adaptation, for the screen; empty without."""
        if not self.adaptation:
            return ""
        gain = self.adaptation["gain"]
        return self.adaptation["used"] + ("" if gain is None else f" ({gain:+.3f})")


@dataclass
class Predictions:
    """Result of ``mapseg predict``.

    Args:
        output: folder.
        predictions: one per scan.
        volumes: rows of ``volumes.csv``.
        seconds: in all.
        kept: how many were finished by an earlier run.
        left_out: what else lies in the input, for the screen.
    """

    output: str
    predictions: list[Prediction]
    volumes: list[dict[str, Any]]
    seconds: float
    kept: int = 0
    left_out: str = ""

    @property
    def failed(self) -> list[Prediction]:
        """Scans without a label map."""
        return [one for one in self.predictions if one.status != "done"]

    @property
    def exit_code(self) -> int:
        """0 if every scan has its label map; else that of the errors (3 if they are of several kinds)."""
        return exit_code_of([one.kind for one in self.failed])

    def __str__(self) -> str:
        placed = any(one.place for one in self.predictions)
        adapts = any(one.adaptation for one in self.predictions)
        added = (*(("found in",) if placed else ()), *(("adaptation",) if adapts else ()))
        head = ("scan", *added, "status", "seconds", "result")
        rows = [
            (
                one.case,
                *((one.place,) if placed else ()),
                *((one.adapted,) if adapts else ()),
                *(one.status, one.seconds, str(one.label_map) if one.status == "done" else one.message),
            )
            for one in self.predictions
        ]
        done = len(self.predictions) - len(self.failed)
        count = f"{done} of {len(self.predictions)} scans segmented in {self.seconds:.0f} s"
        count += f", {self.kept} of them by an earlier run" if self.kept else ""
        end = f"{count}; tables and manifest in {self.output}"
        return "\n\n".join([text_table(head, rows, wrap_last=True), *filter(None, (self.left_out, end))])


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left.

    Args:
        scans: case id to what became of it.
        volumes: case id to its rows of the table.
    """

    scans: dict[str, Prediction]
    volumes: dict[str, list[dict[str, Any]]]


def read_earlier(
    manifest: Path, table: Path, settings: Mapping[str, Any], weights: Sequence[Mapping[str, Any]]
) -> Earlier:
    """Scans and volumes of an earlier run of the same settings and weights.

    Args:
        manifest: its file.
        table: its volumes; there may be none.
        settings: settings of this run, as its manifest will have them.
        weights: weights of this run, as its manifest will have them. Weights that cannot be read are not compared.

    Raises:
        ConfigError: the earlier run had other settings or weights, or the files are of no such run.
    """
    volumes: dict[str, list[dict[str, Any]]] = {}
    known = {one.name for one in fields(Prediction)}
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        before, members = dict(found["settings"]), [one["sha256"] for one in found["weights"]]
        records = [{key: value for key, value in scan.items() if key in known} for scan in found["scans"]]
        scans = {str(record["case"]): Prediction(**record) for record in records}
        cases = {as_written(case): case for case in scans}
        for row in read_volumes_csv(table) if table.is_file() else []:
            row["case"] = cases.get(row["case"], row["case"])
            volumes.setdefault(row["case"], []).append(row)
    except (DataError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{manifest} or {table.name} is not of an earlier run ({error!r}): {REMEDY}") from error
    changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    now = [one["sha256"] for one in weights]
    changed += ["weights"] if None not in now and members != now else []
    if changed:
        named = ", ".join(changed[:5])
        raise ConfigError(f"{manifest.parent} holds results of other settings ({named}): repeat them, {REMEDY}")
    return Earlier(scans, volumes)
