# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The check of many scans that leaves out those that cannot be used, and lets a run go on with the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data.audit import Audit, names_of
from mapseg_components.keys import IMAGE
from mapseg_components.scans.findings import Finding, raise_findings

__all__ = ["ScanAudit"]

logger = logging.getLogger(__name__)


class ScanAudit:
    """The usable ones of many scans, for batch inference: the bad ones are named at once, and again by `finish`.

    Args:
        cases: see `load_scans`.
        negative_values: see `NegativeValues`; ``None`` refuses scans with negative voxels.
        assume_orientation: see `Audit`.
        record: see `Audit`.
        audit: see `Audit`.
        non_finite: see `Audit`.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        negative_values: str | None = None,
        assume_orientation: str | None = None,
        record: str | Path | None = None,
        audit: str = "full",
        non_finite: str | None = None,
    ) -> None:
        self.cases = list(cases)
        self.negative_values = negative_values
        self.audit = Audit(record, audit, assume_orientation, non_finite)
        self.progress: Callable[[Iterable[Any]], Iterable[Any]] = iter  # a progress bar may be put around the reading
        self._usable: list[Mapping[str, Any]] | None = None

    @property
    def findings(self) -> list[Finding]:
        """All findings so far."""
        return self.audit.findings

    def start(self) -> None:
        """First step of a run: read the scans.

        Raises:
            ConfigError: there is no scan.
            DataError: two would write the same file. Else as `usable`.
        """
        raise_findings(names_of(self.cases))
        logger.info(f"{len(self.usable)} of {len(self.cases)} scans are usable.")

    @property
    def usable(self) -> list[Mapping[str, Any]]:
        """Cases without an error, none without cases; the scans are read at the first use.

        Raises:
            ConfigError, DataError or ResourceError: there are scans and none is usable.
        """
        if self._usable is None:
            usable = []
            for case in self.progress(self.cases):
                before = len(self.findings)
                facts = self.audit.scan(case[IMAGE], self.negative_values, "negative_values")
                self.audit.mask(case, facts)
                errors = [f for f in self.findings[before:] if f.severity == "error"]
                for finding in self.findings[before:]:
                    if finding.severity == "warning":
                        logger.warning(str(finding))
                if not errors:
                    usable.append(case)
                for finding in errors:
                    logger.error(f"left out: {finding}")
            if not usable:
                self.audit.close()
            self.audit.record.save()
            self._usable = usable
        return self._usable

    def finish(self) -> None:
        """Last step of a run: nothing if all scans were usable.

        Raises:
            ConfigError, DataError or ResourceError: the scans that were left out, one finding a line.
        """
        self.audit.record.save()
        raise_findings(finding for finding in self.findings if finding.severity == "error")
