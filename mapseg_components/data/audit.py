# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks before work starts: every file is read once, every finding is collected, then one error names them all."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.data.datalist import (
    LABEL_MAPS,
    LONGEST_NAME_BYTES,
    has_label_maps,
    has_section,
    read_section,
    stem,
)
from mapseg_components.data.file_audit import FileAudit
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.keys import CASE_ID, IMAGE, LABEL, TISSUES
from mapseg_components.scans.facts import Facts
from mapseg_components.scans.files import FORMATS, is_picture
from mapseg_components.scans.findings import Finding, findings_of
from mapseg_components.structures import structures_of

__all__ = ["Audit", "names_of"]

logger = logging.getLogger(__name__)

# a scan may be in several: evaluating on the scans that the adaptation saw, without their labels, is common, and pseudo
# labels are those of scans for training
SHARED = {"target_training", "target_labelled", "target_test"}
# sections that a training reads, if it has them; scans must differ in content as well
APART = ("source_training", "source_validation", "target_training", "target_labelled")


class Audit(FileAudit):
    """Checks of datalists and their scans; nothing is raised before `close`, except for settings that make no sense.

    Args and raises: see `FileAudit`.
    """

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
