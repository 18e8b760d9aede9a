# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a check found, as records: severity, file, what, remedy. Errors are raised together, warnings are logged."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError
from mapseg_components.files import readable

__all__ = ["Finding", "fault", "findings_of", "raise_findings"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Args:
        severity: ``"error"``, ``"warning"``, or ``"note"`` for what is no fault.
        file: what it is about, a file in most cases.
        what: found and expected.
        remedy: what to do; empty if ``what`` says it.
        kind: class of the error.
    """

    severity: str
    file: str
    what: str
    remedy: str = ""
    kind: type[MAPSegError] = DataError

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.file, self.what, self.remedy) if part)
        return readable(text)  # a file name may hold a line break, or bytes that are no text

    def error(self) -> MAPSegError:
        """The error to raise, with this record in its ``findings``."""
        error = self.kind(str(self))
        error.findings = (self,)
        return error


def fault(file: str | Path, what: str, remedy: str, kind: type[MAPSegError] = DataError) -> MAPSegError:
    """Error of one finding; ``str`` of it is one line."""
    return Finding("error", str(file), what, remedy, kind).error()


def findings_of(error: MAPSegError) -> tuple[Finding, ...]:
    """The records of an error; an error without any becomes one."""
    return error.findings or (Finding("error", "", str(error), "", type(error)),)


def raise_findings(findings: Iterable[Finding]) -> None:
    """Log each warning once, then raise one error with all errors, one a line.

    Raises:
        ConfigError, DataError or ResourceError: all findings are of that class; `DataError` if they differ.
    """
    listed = list(dict.fromkeys(findings))
    for finding in listed:
        if finding.severity == "warning":
            logger.warning(str(finding))
    errors = [finding for finding in listed if finding.severity == "error"]
    if not errors:
        return
    kinds = {next((k for k in (ConfigError, ResourceError) if issubclass(f.kind, k)), DataError) for f in errors}
    error = (kinds.pop() if len(kinds) == 1 else DataError)("\n".join(map(str, errors)))
    error.findings = tuple(errors)
    raise error
