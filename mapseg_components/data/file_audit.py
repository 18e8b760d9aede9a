# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks of one scan and its label map, whose findings are collected."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.data.layouts import misplaced
from mapseg_components.errors import ConfigError, DataError, MAPSegError
from mapseg_components.keys import IMAGE, MASK
from mapseg_components.scans.facts import AuditRecord, Facts
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.findings import Finding, findings_of, raise_findings
from mapseg_components.scans.pictures import LOSSY
from mapseg_components.structures import unknown_values, value_fault

__all__ = ["GEOMETRY_TOLERANCE_MM", "LABEL_LIKE", "FileAudit"]

logger = logging.getLogger(__name__)

GEOMETRY_TOLERANCE_MM = 1e-3  # between a scan and its label map
FORMS_TOLERANCE_MM = 1.0  # between a header's sform and qform
FIELD_OF_VIEW_MM = 10.0, 3000.0  # the longest side of a scan is rarely shorter, never longer
CT_SHIFT = 1024.0
MOST_MASK_VALUES = 2
MANY = 64  # values of a label map that nobody would name
LABEL_LIKE = "its voxels have few values, all whole and alike in neighbours: looks like a label map"
SMOOTH = (
    f"more than {MANY} values: a picture that was resized with interpolation, smoothed or saved as JPEG, no label map",
    "save the label map as it was annotated, as PNG or TIFF; resize by the nearest pixel",
)
MOST_TISSUES = 255  # values of a label map that an image is made from


class FileAudit:
    """Checks that collect their findings; nothing is raised before `close`, except for settings that make no sense.

    Args:
        record: file that keeps what was found, see `AuditRecord`; ``None`` for none.
        audit: ``"full"`` reads every file; ``"skip"`` opens no scan and says so.
        assume_orientation: three letters such as ``"RAS"`` for scans whose header names no orientation; ``None``
            refuses them.
        non_finite: ``"background"`` allows NaN and infinite voxels in images (`FillNonFinite`); ``None`` refuses them.

    Raises:
        ConfigError: ``audit`` is unknown.
    """

    def __init__(
        self,
        record: str | Path | None = None,
        audit: str = "full",
        assume_orientation: str | None = None,
        non_finite: str | None = None,
    ) -> None:
        if audit not in ("full", "skip"):
            raise ConfigError(f"audit is {audit!r}, expected 'full' or 'skip'")
        self.skip = audit == "skip"
        self.non_finite = non_finite
        self.record = AuditRecord(None if self.skip else record)
        self.assume_orientation = assume_orientation
        self.findings: list[Finding] = []
        if self.skip:
            logger.warning("audit is 'skip': no scan was checked; damaged or mismatched files go into the run.")

    def add(self, file: Any, what: str, remedy: str, kind: type[MAPSegError] = DataError) -> None:
        """Add an error."""
        self.findings.append(Finding("error", str(file), what, remedy, kind))

    def warn(self, file: Any, what: str, remedy: str) -> None:
        """Add a warning."""
        self.findings.append(Finding("warning", str(file), what, remedy))

    def close(self) -> None:
        """Write the record, then raise one error with all findings. Raises as `raise_findings`."""
        self.record.save()
        raise_findings(self.findings)

    def facts(self, path: str, with_values: bool = False) -> Facts | None:
        """Facts of a file; ``None`` after a finding, and if the audit is skipped."""
        if self.skip:
            return None
        try:
            facts = self.record.facts(path, with_values)
        except MAPSegError as error:
            self.findings += findings_of(error)
            return None
        self.geometry(path, facts)
        if with_values:
            self.finite(path, facts)
        elif self.non_finite is None:
            self.finite(path, facts, ", or set non_finite to 'background'")
        return facts

    def finite(self, path: str, facts: Facts, more: str = "") -> bool:
        """Whether all voxels are finite, or else an error, with another remedy added to that of repairing the scan."""
        if facts.not_finite:
            what = f"{facts.not_finite} voxels are NaN or infinite, the first at {facts.first_not_finite}"
            self.add(path, what, f"repair it or leave the scan out{more}")
        return not facts.not_finite

    def contrast(self, path: str, facts: Facts) -> bool:
        """Whether the voxels differ, or else an error."""
        if facts.lowest == facts.highest:
            self.add(path, f"all voxels are {facts.lowest:g}, no contrast to segment", "leave the scan out")
        return facts.lowest != facts.highest

    def geometry(self, path: str, facts: Facts) -> None:
        """An orientation must be known, the header's two ways to say it must agree, and the size be a body's."""
        self.findings += [Finding(severity, str(path), what, remedy) for severity, what, remedy in facts.remarks]
        extent = np.linalg.norm(np.array(facts.affine)[:3, :3], axis=0) * facts.shape
        if not is_picture(path) and not FIELD_OF_VIEW_MM[0] <= extent.max() <= FIELD_OF_VIEW_MM[1]:
            text = f"its field of view is {' x '.join(f'{side:.3g}' for side in extent)} mm"
            self.warn(path, text, "if that is wrong, correct the voxel sides, or their unit (xyzt_units of NIfTI)")
        if not facts.has_orientation and self.assume_orientation is None:
            self.add(
                path,
                "its header names no orientation (sform and qform codes are 0)",
                "repair the header, or set assume_orientation, such as 'RAS', if you know it",
            )
        if facts.disagreement is not None:
            distance, angle = facts.disagreement
            text = f"sform and qform differ by {angle:.2f} degrees and {distance:.3f} mm at a corner"
            if distance > FORMS_TOLERANCE_MM:
                remedy = "remove the wrong one (set its code to 0), or copy the right one over it"
                self.add(path, f"{text} (tolerance {FORMS_TOLERANCE_MM:g} mm)", remedy)
            elif distance > GEOMETRY_TOLERANCE_MM:
                self.warn(path, text, "the sform is used")

    def negative(self, path: str, facts: Facts, policy: str | None, knob: str) -> None:
        """Report negative voxels without a policy for them, and a scan of which the policy leaves nothing."""
        span = f"values from {facts.lowest:g} to {facts.highest:g}"
        if facts.negative and policy is None:
            self.add(
                path,
                f"{facts.negative} voxels are negative ({span}), and {knob} is null: there must be none",
                f"set {knob} to 'clip' (MR), 'shift' (CT: adds {CT_SHIFT:g} first) or 'keep'",
                ConfigError,
            )
        elif facts.highest + (CT_SHIFT if policy == "shift" else 0) <= 0 and policy != "keep":
            self.add(path, f"no voxel is above 0 under {knob} {policy!r} ({span})", "correct it, or leave the scan out")

    def scan(self, path: str, policy: str | None, knob: str) -> Facts | None:
        """Facts of an image that can be segmented under a policy for negative values; ``None`` if it was not read."""
        reason = misplaced(path)
        if reason is not None:
            self.add(path, *reason)
        facts = self.facts(path)
        if facts is None or (facts.not_finite and self.non_finite is None):
            return facts
        if self.contrast(path, facts):
            self.negative(path, facts, policy, knob)
        if facts.label_like and reason is None:
            self.warn(path, LABEL_LIKE, "name the folder of the scans instead, or take it out")
        return facts

    def tissues(self, path: str) -> Facts | None:
        """Facts of a label map that an image can be made from; ``None`` if it was not read."""
        facts = self.facts(path, with_values=True)
        if facts is None or facts.values is None or facts.not_finite:
            return facts
        wrong, number = value_fault(facts.values, more_values=facts.more_values), len(facts.values) + facts.more_values
        if number > MOST_TISSUES:
            what = f"{number} different values, no label map"
            self.add(path, what, "name a label map; images with label maps are an ordinary source")
        elif wrong is not None:
            self.add(path, *wrong)
        elif number < 2:
            self.add(path, f"all voxels are {facts.lowest:g}, no tissue to make an image from", "leave it out")
        return facts

    def label(self, path: str, known: Iterable[int] | None, scan: str, image: Facts | None) -> Facts | None:
        """Facts of a label map on the grid of its scan, and with known values; ``None`` if it was not read.

        Args:
            path: of the label map.
            known: values; without them any may occur.
            scan: file of its scan.
            image: facts of the scan; ``None`` if it was not read.
        """
        facts = self.facts(path, with_values=True)
        if facts is None or facts.values is None:
            return facts
        if image is not None:
            self.pair(path, facts, image, scan)
        if any(what == LOSSY for _, what, _ in facts.remarks):
            self.add(path, f"label map: {LOSSY}", "save it as it was annotated, as PNG or TIFF without loss")
            return facts
        unknown = None if known is None else unknown_values(facts.values, known, facts.more_values)
        if unknown is not None:
            self.add(path, *(SMOOTH if is_picture(path) and len(facts.values) + facts.more_values > MANY else unknown))
        elif all(value == 0 for value, _ in facts.values) and not facts.not_finite:
            self.warn(path, "label map is blank", "leave the case out if that is not meant")
        return facts

    def mask(self, case: Mapping[str, Any], image: Facts | None) -> None:
        """The mask of a case, if it has one, must lie on its scan's grid and leave something of it."""
        facts = self.facts(case[MASK], with_values=True) if MASK in case else None
        if facts is None or facts.values is None:
            return
        if image is not None:
            self.pair(case[MASK], facts, image, case[IMAGE], "mask")
        if all(value == 0 for value, _ in facts.values):
            self.add(case[MASK], "a mask of 0 alone, nothing of its scan is left", "draw 1 where there is tissue")
        elif len(facts.values) > MOST_MASK_VALUES:
            what = f"a mask of {len(facts.values)} values: 0 is left out, all others count"
            self.warn(case[MASK], what, "draw 0 and 1, without smoothing or JPEG")

    def pair(self, path: str, label: Facts, image: Facts, scan: str, name: str = "label map") -> None:
        """A label map or mask, by its name, must lie on the grid of its scan, a file with the facts ``image``."""
        if label.shape != image.shape:
            self.add(path, f"{name} of shape {label.shape}, its scan {image.shape}", "resample it to the scan's grid")
            return
        if is_picture(path) and is_picture(scan):
            return  # pixel for pixel; a pixel size may stand in one of the two files alone
        if label.has_orientation != image.has_orientation:
            who = f"{name}, not its scan," if label.has_orientation else f"scan, not its {name},"
            self.add(path, f"only the {who} names an orientation", "copy the header of the one that is right")
            return
        distance = corner_distance(image.shape, np.array(label.affine), np.array(image.affine))
        if distance > GEOMETRY_TOLERANCE_MM:
            self.add(
                path,
                f"its affine puts a corner {distance:.3f} mm away from where its scan has it "
                f"(tolerance {GEOMETRY_TOLERANCE_MM} mm)",
                "resample it to the scan's grid, or repair the header",
            )
