# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks before work starts: every file is read once, every finding is collected, then one error names them all."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.data.datalist import (
    LABEL_MAPS,
    LONGEST_NAME_BYTES,
    has_label_maps,
    has_section,
    read_section,
    stem,
)
from mapseg_components.data.layouts import misplaced
from mapseg_components.errors import ConfigError, DataError, MAPSegError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, MASK, TISSUES
from mapseg_components.scans.facts import AuditRecord, Facts
from mapseg_components.scans.files import FORMATS, is_picture
from mapseg_components.scans.findings import Finding, findings_of, raise_findings
from mapseg_components.scans.pictures import LOSSY
from mapseg_components.structures import structures_of, unknown_values, value_fault

__all__ = ["Audit", "names_of"]

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
# a scan may be in several: evaluating on the scans that the adaptation saw, without their labels, is common, and pseudo
# labels are those of scans for training
SHARED = {"target_training", "target_labelled", "target_test"}
# sections that a training reads, if it has them; scans must differ in content as well
APART = ("source_training", "source_validation", "target_training", "target_labelled")


class Audit:
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

    def datalist(self, datalist: str | Path, sections: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Sound cases of the sections that a datalist has; no scan is opened."""
        found: dict[str, list[dict[str, Any]]] = {}
        for section in sections:
            try:
                if section == "source_training" or has_section(datalist, section):
                    found[section], findings = read_section(datalist, section)
                    self.findings += findings
            except MAPSegError as error:
                self.findings += findings_of(error)
        self.duplicates(found)
        return found

    def duplicates(self, sections: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Report case ids that occur twice in a section or in training and validation, and files in two sections."""
        files: dict[str, list[str]] = {}  # real path to the sections that have it
        for section, cases in sections.items():
            for name, count in Counter(case[CASE_ID] for case in cases).items():
                if count > 1:
                    self.add(section, f"case id {name!r} occurs twice", "set case_id, or in a folder rename a file")
            for case in cases:
                before = files.setdefault(os.path.realpath(case[IMAGE]), [])
                for other in before:
                    if other == section or not {other, section} <= SHARED:
                        self.add(case[IMAGE], f"is in {other} and in {section}", "keep it in one of them")
                before.append(section)
        training = {case[CASE_ID] for case in sections.get("source_training", ())}
        for name in sorted(training & {case[CASE_ID] for case in sections.get("source_validation", ())}):
            self.add(
                "source_validation",
                f"case id {name!r} is in source_training, too",
                "keep a person's scans on one side, or set case_id if it is another person",
            )

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
        if image is not None and facts.shape != image.shape:
            self.add(case[MASK], f"mask of shape {facts.shape}, its scan {image.shape}", "draw it on the scan's grid")
        if all(value == 0 for value, _ in facts.values):
            self.add(case[MASK], "a mask of 0 alone, nothing of its scan is left", "draw 1 where there is tissue")
        elif len(facts.values) > MOST_MASK_VALUES:
            what = f"a mask of {len(facts.values)} values: 0 is left out, all others count"
            self.warn(case[MASK], what, "draw 0 and 1, without smoothing or JPEG")

    def pair(self, path: str, label: Facts, image: Facts, scan: str) -> None:
        """A label map must lie on the grid of its scan, a file with the facts ``image``."""
        if label.shape != image.shape:
            self.add(
                path, f"label map of shape {label.shape}, its scan {image.shape}", "resample it to the scan's grid"
            )
            return
        if is_picture(path) and is_picture(scan):
            return  # pixel for pixel; a pixel size may stand in one of the two files alone
        if label.has_orientation != image.has_orientation:
            who = "label map, not its scan," if label.has_orientation else "scan, not its label map,"
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

    def training(
        self,
        datalist: str | Path,
        labels: Mapping[str, int] | Sequence[int],
        dropped_labels: Sequence[int] = (),
        source_negative_values: str | None = None,
        target_negative_values: str | None = None,
        sections: Sequence[str] = APART,
        given: Mapping[str, Sequence[dict[str, Any]]] | None = None,
        label_maps: bool | None = None,
    ) -> Audit:
        """All that a training run will read; see `check_training_data`."""
        known = known_values(labels, dropped_labels)
        if given is None and label_maps is not None:
            self.kind_of_source(datalist, label_maps)
        found = {name: list(cases) for name, cases in (given or {}).items()}
        if given is None:
            found = self.datalist(datalist, sections)
        else:
            self.duplicates(found)
        images: dict[str, list[tuple[str, Facts | None]]] = {}
        seen: set[float] = set()
        unread = self.skip
        for section, cases in found.items():
            side = "target" if section.startswith("target") else "source"
            policy = target_negative_values if side == "target" else source_negative_values
            for case in cases:
                alone = TISSUES in case  # a label map without an image
                facts = (
                    self.tissues(case[IMAGE]) if alone else self.scan(case[IMAGE], policy, f"{side}_negative_values")
                )
                images.setdefault(section, []).append((case[IMAGE], facts))
                self.mask(case, facts)
                if LABEL not in case:
                    continue
                # a pseudo label names an orientation, its scan may not
                guessed = section == "target_labelled" and facts is not None and not facts.has_orientation
                label = self.label(case[LABEL], None if alone else known, case[IMAGE], None if guessed else facts)
                if section == "source_training":
                    unread |= label is None
                    seen |= {value for value, _ in label.values or ()} if label is not None else set()
        self.content(images)
        self.formats([path for files in images.values() for path, _ in files])
        names = structures_of(labels) if isinstance(labels, Mapping) else {str(value): value for value in labels}
        absent = [f"{name} ({value})" for name, value in names.items() if value not in seen]
        if absent and found.get("source_training") and not unread:
            self.warn(
                "source_training",
                f"no label map has {', '.join(absent)}",
                "such a class cannot be learnt; take it out of labels, or add a scan that has it",
            )
        return self

    def kind_of_source(self, datalist: str | Path, label_maps: bool) -> None:
        """A run that makes its images from label maps, and no other one, needs a datalist that has no images."""
        try:
            found = has_label_maps(datalist)
        except ConfigError:  # reported with its sections
            return
        if found and not label_maps:
            what = f"its source is label maps alone ({LABEL_MAPS}), and the run reads images"
            self.add(datalist, what, "add the overlay label_maps.yaml", ConfigError)
        elif label_maps and not found:
            what = f"its source has images, and {LABEL_MAPS} is true in the run (label_maps.yaml)"
            self.add(
                datalist, what, f'leave the overlay out, or set "{LABEL_MAPS}": true in a datalist without', ConfigError
            )

    def content(self, images: Mapping[str, Sequence[tuple[str, Facts | None]]]) -> None:
        """The same voxels must not stand under two names in sections that must be apart."""
        first: dict[str, tuple[str, str]] = {}
        for section, files in images.items():
            for path, facts in files:
                if facts is None:
                    continue
                other, name = first.setdefault(facts.digest, (section, path))
                if other != section and os.path.realpath(name) != os.path.realpath(path):
                    self.add(path, f"{section} has the same voxels as {name} of {other}", "keep one of them")

    def formats(self, paths: Sequence[str]) -> None:
        """Volumes and 2D images together are hardly meant."""
        pictures = [path for path in paths if is_picture(path)]
        if pictures and len(pictures) < len(paths):
            what = f"{len(pictures)} scans are PNG or TIFF images, {len(paths) - len(pictures)} are NIfTI volumes"
            self.warn(
                pictures[0], what, "convert all to one format: lengths of images are in um or pixels, of volumes in mm"
            )

    def pretraining(self, datalist: str | Path, negative_values: str | None = None) -> Audit:
        """The scans that pretraining will read; no label is read."""
        for cases in self.datalist(datalist, ("source_training", "target_training")).values():
            for case in cases:
                self.mask(case, self.scan(case[IMAGE], negative_values, "negative_values"))
        return self

    def target(self, datalist: str | Path, negative_values: str | None = None) -> Audit:
        """The scans of ``target_training`` alone, which the datalist must have; no other section is looked at."""
        cases, findings = read_section(datalist, "target_training")
        self.findings += findings
        self.duplicates({"target_training": cases})
        for case in cases:
            self.mask(case, self.scan(case[IMAGE], negative_values, "target_negative_values"))
        return self

    def labelled(
        self,
        cases: Sequence[Mapping[str, Any]],
        labels: Mapping[str, int] | Sequence[int],
        dropped_labels: Sequence[int] = (),
        negative_values: str | None = None,
    ) -> Audit:
        """Scans and label maps of an evaluation."""
        known = known_values(labels, dropped_labels)
        self.findings += names_of(cases)
        for case in cases:
            facts = self.scan(case[IMAGE], negative_values, "negative_values")
            self.mask(case, facts)
            if LABEL in case:
                self.label(case[LABEL], known, case[IMAGE], facts)
        return self


def known_values(labels: Mapping[str, int] | Sequence[int], dropped_labels: Sequence[int] | str) -> list[int] | None:
    """Label values that a task names, ``None`` if others are background. Raises `ConfigError` as `structures_of`."""
    if dropped_labels == "others":
        structures_of(labels) if isinstance(labels, Mapping) else None
        return None
    return [*(structures_of(labels).values() if isinstance(labels, Mapping) else labels), *dropped_labels]


def names_of(cases: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """An empty list, and cases whose results would overwrite each other or could not be named."""
    if not cases:
        what = f"no NIfTI scan or image ({FORMATS}) found"
        remedy = "set dataset_dir to the folder of your scans (mapseg prepare converts DICOM)"
        return [Finding("error", "", what, remedy, ConfigError)]
    found = []
    for what, names in (
        ("case ids", [case[CASE_ID] for case in cases]),
        ("scans named", [stem(Path(case[IMAGE])) for case in cases]),
    ):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            remedy = "rename the files"
            found.append(
                Finding("error", "", f"{what} {twice} occur twice and would overwrite each other's results", remedy)
            )
            break
    for case in cases:
        length = len(os.fsencode(stem(Path(case[IMAGE]))))
        if length > LONGEST_NAME_BYTES:
            what = f"its name has {length} bytes, results can be named by {LONGEST_NAME_BYTES}"
            found.append(Finding("error", case[IMAGE], what, "shorten it"))
    return found
