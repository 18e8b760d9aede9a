# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Where results go: the files of each scan, the tables beside them, and what may be replaced."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components import __version__
from mapseg_components.data import (
    check_results,
    dataset_description,
    dseg_tsv,
    freesurfer_table,
    itksnap_labels,
    refuse_existing,
    result_stem,
)
from mapseg_components.data.bids import DESCRIPTION, IGNORED, suffix
from mapseg_components.data.datalist import stem as stem_of
from mapseg_components.data.results import uncertainty_path
from mapseg_components.errors import DataError
from mapseg_components.files import sweep_temporaries, write_json, write_text
from mapseg_components.keys import CASE_ID, IMAGE, UNCERTAINTY
from mapseg_components.scans.files import result_ending

__all__ = ["MANIFEST", "STAGING", "TABLE", "Output", "Place", "places_of"]

TABLE, MANIFEST, STAGING = "volumes.csv", "manifest.json", ".unfinished-"
STRUCTURES, LOOKUPS = "dseg.tsv", {"labels_itksnap.txt": itksnap_labels, "labels_freesurfer.txt": freesurfer_table}


@dataclass(frozen=True)
class Place:
    """Where the files of one case go."""

    label_map: Path
    probabilities: Path
    uncertainty: Path
    preview: Path
    sidecar: Path | None = None
    segmentation: Path | None = None

    def files(self, of_series: bool) -> list[Path]:
        """All files that a run may write here, or remove; a segmentation only of a series."""
        segmentation = self.segmentation if of_series else None
        found = (self.label_map, self.probabilities, self.uncertainty, self.preview, self.sidecar, segmentation)
        return [path for path in found if path is not None]


def places_of(cases: Sequence[Mapping[str, Any]], folder: Path, dataset: Path | None, postfix: str) -> dict[str, Place]:
    """Case id to the places of its files. Raises `DataError` if two scans would write one file."""
    places: dict[str, Place] = {}
    for case in cases:
        if dataset is None:
            stem = stem_of(Path(case[IMAGE]))
            place = Place(
                folder / f"{stem}_{postfix}{result_ending(case[IMAGE])}",
                folder / f"{stem}_probabilities.nii.gz",
                uncertainty_path(case[IMAGE], folder),
                folder / "previews" / f"{stem}.png",
                segmentation=folder / f"{stem}_{postfix}.dcm",
            )
        else:
            stem = folder / result_stem(case[IMAGE], dataset)
            place = Place(
                stem.with_name(f"{stem.name}_dseg.nii.gz"),
                stem.with_name(f"{stem.name}_probseg.nii.gz"),
                stem.with_name(f"{stem.name}_{UNCERTAINTY}.nii.gz"),
                folder / "figures" / f"{stem.name}_dseg.png",
                stem.with_name(f"{stem.name}_dseg.json"),
            )
        if place in places.values():
            raise DataError(f"two scans would write {place.label_map}: rename one, or run them apart")
        places[case[CASE_ID]] = place
    return places


@dataclass(frozen=True)
class Output:
    """The folder of a run, and what is written into it.

    Args:
        folder: where it is.
        places: case id to the places of its files.
        dataset: the BIDS dataset whose derivative the folder becomes; ``None`` for none.
        postfix: what follows a scan's name in the name of its label map.
        probabilities: the probabilities of all classes are written.
        uncertainties: maps of uncertainty are written.
        segmentations: a DICOM Segmentation of each series is written.
        previews: a picture of each scan is written.
    """

    folder: Path
    places: Mapping[str, Place]
    dataset: Path | None
    postfix: str
    probabilities: bool
    uncertainties: bool
    segmentations: bool
    previews: bool

    def check(self, cases: Sequence[Mapping[str, Any]], overwrite: bool, continue_prediction: bool) -> bool:
        """Refuse results that would be replaced; returns whether there is a run to go on with. Raises `ConfigError`."""
        goes_on = continue_prediction and (self.folder / MANIFEST).is_file()
        replaced = overwrite or goes_on
        remedy = "" if continue_prediction else "set continue_prediction to go on with it, "
        refuse_existing(self.results(), self.folder, replaced, f"{remedy}set overwrite to replace it")
        if self.dataset is None:
            check_results(cases, self.folder, self.postfix, (), replaced)
        return goes_on

    def results(self) -> list[Path]:
        """All files that the run writes."""
        places = self.places.values()
        found: list[Path | None] = [place.label_map for place in places]
        found += [place.segmentation for place in places] if self.segmentations else []
        found += [place.probabilities for place in places] if self.probabilities else []
        found += [place.uncertainty for place in places] if self.uncertainties else []
        found += [place.preview for place in places] if self.previews else []
        found += [place.sidecar for place in places]
        tables = [TABLE, MANIFEST, *LOOKUPS, *([DESCRIPTION, STRUCTURES] if self.dataset is not None else [])]
        return [path for path in found if path is not None] + [self.folder / name for name in tables]

    def sweep(self) -> None:
        """Remove what a run that was killed left unfinished; call it under the folder's lock."""
        folders = {self.folder, *(path.parent for place in self.places.values() for path in place.files(False))}
        for each in sorted(one for one in folders if one.is_dir()):
            sweep_temporaries(each)
        for left in self.folder.glob(f"{STAGING}*"):
            ours = re.fullmatch(rf"{re.escape(STAGING)}[a-z0-9_]{{8}}", left.name)
            if ours and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)

    def write_lookups(self, names: Sequence[str], scans: Iterable[str]) -> None:
        """Write names and colours of the structures, and what makes a folder a BIDS derivative.

        Args:
            names: structures.
            scans: files of the scans, for the modalities of a derivative.
        """
        for file, text in LOOKUPS.items():
            write_text(text(names), self.folder / file)
        if self.dataset is not None:
            modalities = sorted({suffix(Path(scan)) for scan in scans})
            description = dataset_description(self.dataset, "mapseg-monai", __version__, modalities)
            write_json(description, self.folder / DESCRIPTION)
            write_text(dseg_tsv(names), self.folder / STRUCTURES)
            write_text("\n".join(IGNORED) + "\n", self.folder / ".bidsignore")
