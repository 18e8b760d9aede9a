# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What became of each scan of ``mapseg prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mapseg_components.errors import DataError
from mapseg_components.files import readable

__all__ = ["Outcome", "PrepareResult"]


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Args:
        name: of the result, relative to the output folder, without ending; of a file that is no scan, its path.
        status: ``"done"``, ``"skipped"`` (it was there, unchanged) or ``"failed"``.
        image: the prepared scan, if there is one.
        message: of a failure, one line or more.
        notes: what a person should know about a scan that was prepared.
        no_room: the failure is the output folder's, so it would meet every scan.
    """

    name: str
    status: str
    image: Path | None = None
    message: str = ""
    notes: tuple[str, ...] = ()
    no_room: bool = False


@dataclass(frozen=True)
class PrepareResult:
    """What became of each scan, by name; ``left_out`` is what else lies in the input, for the screen."""

    outcomes: tuple[Outcome, ...]
    left_out: str = ""

    @property
    def exit_code(self) -> int:
        """0 if every result exists and was verified, else `DataError.exit_code`."""
        return DataError.exit_code if self.named("failed") else 0

    def named(self, status: str) -> list[Outcome]:
        """Outcomes of one status."""
        return [outcome for outcome in self.outcomes if outcome.status == status]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.named(status))} {status}" for status in ("done", "skipped", "failed"))
        failures = [readable(o.message) for o in self.named("failed")]
        return "\n".join([f"{len(self.outcomes)} scans: {counts}", *failures, *filter(None, [self.left_out])])
