# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg predict``: a bundle's own inference config over a scan, a folder, a BIDS dataset or DICOM series."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.transforms import Compose
from monai.utils import optional_import

from mapseg_components import __version__
from mapseg_components.checkpoints import load_weights
from mapseg_components.commands.inputs import inputs_of
from mapseg_components.commands.overlap import in_stages
from mapseg_components.commands.prediction import Earlier, Prediction, read_earlier
from mapseg_components.commands.series import convert, series_record, without_path
from mapseg_components.commands.session import (
    choose_device,
    exit_code_of,
    listed,
    progress,
    stoppable,
    versions,
    working,
)
from mapseg_components.commands.shipped import SEGMENTS, SHIPPED, bundle_of
from mapseg_components.configs import check_settings
from mapseg_components.data import (
    check_results,
    dataset_description,
    dseg_tsv,
    freesurfer_table,
    is_bids,
    itksnap_labels,
    read_nifti,
    refuse_existing,
    result_path,
    result_stem,
    structure_volumes,
    write_volumes_csv,
)
from mapseg_components.data.bids import DESCRIPTION, IGNORED, suffix
from mapseg_components.data.datalist import stem as stem_of
from mapseg_components.data.dicom import Series
from mapseg_components.data.facts import stamp_of
from mapseg_components.data.findings import Finding, findings_of
from mapseg_components.data.left_out import records_of, summary
from mapseg_components.data.nifti import is_nifti, read_geometry
from mapseg_components.data.segmentation import Algorithm, reference_headers, require_highdicom, write_segmentation
from mapseg_components.errors import ConfigError, DataError, MAPSegError, ResourceError, user_error
from mapseg_components.files import (
    lock_folder,
    require_writable,
    sha256_of,
    sweep_temporaries,
    unlock_folders,
    write_json,
    write_text,
)
from mapseg_components.keys import CASE_ID, CONFIDENCE, IMAGE, PRED, PROBABILITIES
from mapseg_components.memory import memory_of
from mapseg_components.reports import can_draw, draw_preview, text_table
from mapseg_components.sides import refuse_sides
from mapseg_components.structures import structures_of
from mapseg_components.transforms import save_probabilities

__all__ = ["Prediction", "Predictions", "predict"]

logger = logging.getLogger(__name__)

SAVING, READER = "SaveLabelMapd", "mapseg_components.data.NiftiReader"
# Bytes per voxel while one scan is read, one segmented and one written; measured in docs/reference/command_line.md
BYTES_OVERLAPPED, BYTES_A_CLASS = 70, 4
TABLE, MANIFEST, STAGING = "volumes.csv", "manifest.json", ".unfinished-"
WRITTEN = ("label_map", "probabilities", "preview", "segmentation")
LOOKUPS = {"labels_itksnap.txt": itksnap_labels, "labels_freesurfer.txt": freesurfer_table}
NEEDED = ("cases", "scans", "dataset", "labels", "network_def", "inferer", "postprocessing", "evaluator")
# parts of a bundle's config that this command does itself: weights once for all scans, tables with confidence, progress
OWN_HANDLERS = ("WeightsLoader", "VolumesTable", "ProgressBar")
# settings that say where and how fast, not what is computed
NOT_RECIPE = {
    *("bundle_root", "ckpt_dir", "output_dir", "dataset_dir", "cases", "weights", "device", "overwrite", "audit"),
    *("audit_file", "num_workers", "imports", "initialize", "run", "stitching_device", "window_batch_size"),
}


@dataclass
class Predictions:
    """Result of `predict`.

    Args:
        output: folder. predictions: one per scan. volumes: rows of ``volumes.csv``. seconds: in all.
        kept: how many were finished by an earlier run. left_out: what else lies in the input, for the screen.
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
        head = ("scan", *(("found in",) if placed else ()), "status", "seconds", "result")
        rows = [
            (
                one.case,
                *((one.place,) if placed else ()),
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
class Place:
    """Where the files of one case go."""

    label_map: Path
    probabilities: Path
    preview: Path
    sidecar: Path | None = None
    segmentation: Path | None = None

    def files(self, of_series: bool) -> list[Path]:
        """All files that a run may write here, or remove; a segmentation only of a series."""
        found = (
            self.label_map,
            self.probabilities,
            self.preview,
            self.sidecar,
            self.segmentation if of_series else None,
        )
        return [path for path in found if path is not None]


def predict(
    input: str,
    output: str,
    *,
    bundle: str,
    weights: str | None = None,
    overlays: str | None = None,
    modality: str | None = None,
    negative_values: str | None = None,
    assume_orientation: str | None = None,
    non_finite: str | None = None,
    keep_largest: str | None = None,
    flip_tta: bool = False,
    probabilities: bool = False,
    dicom_seg: bool = False,
    no_preview: bool = False,
    no_overlap: bool = False,
    overwrite: bool = False,
    continue_prediction: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Predictions:
    """Segment a scan, a folder of scans, a BIDS dataset or DICOM series with a bundle.

    Writes one label map per scan on the scan's own grid (integers, read back and compared), volumes.csv (voxels, mm3,
    whether a structure touches the edge of the field of view, and confidence: the mean largest probability over it),
    names and colours for ITK-SNAP and FreeSurfer, a picture per scan and manifest.json. A BIDS dataset becomes a BIDS
    derivative. A DICOM series becomes NIfTI, named by modality, number and checksum. A scan that cannot be used is
    listed, the others are done. While the network works on one scan, the next is read and the one before written.

    The bundle's inference.json is what runs: the same voxels as by python -m monai.bundle run.

    Args:
        input: a .nii or .nii.gz file, a folder of them, a BIDS dataset (it has dataset_description.json), or a folder
            with DICOM series at any depth.
        output: folder of the results.
        bundle: folder of the bundle, such as mapseg adapt writes; or shipped, the one that comes with the package: it
            segments T2w MRI of the fetal brain at 1.6 mm, nothing else.
        weights: file of weights, by default what the bundle names; several, with commas between them, are averaged.
        overlays: config files on top of inference.json, with commas between them; names without a folder are the
            bundle's.
        modality: of a BIDS dataset with several, e.g. T2w.
        negative_values: clip (MR), shift (CT in HU: adds 1024) or keep; by default what the bundle says.
        assume_orientation: three letters, e.g. RAS, for scans whose header names none; by default such are refused.
        non_finite: background takes NaN and infinite voxels as background; by default such scans are refused.
        keep_largest: structures, with commas between them, or all, of which only the largest connected part is kept.
        flip_tta: average with the result of the left-right mirrored scan; refused if a structure's name has a side.
        probabilities: write the probabilities of all classes, too (4D, steps of 1/255, background first).
        dicom_seg: write a DICOM Segmentation of each DICOM series, too (needs highdicom); it holds patient data.
        no_preview: draw no pictures.
        no_overlap: read, segment and write one scan after the other: less memory, the same results; done by itself
            where several scans at once would take more than half of the memory.
        overwrite: replace results of an earlier run; with a label map go the probabilities, picture and segmentation
            that were made of it.
        continue_prediction: go on in a folder where an earlier run with the same settings and weights stopped, however
            it ended: what it finished is kept, unless the scan has changed since; failed scans are tried again.
        device: auto, cpu, cuda or cuda:<number>.
        num_threads: of the CPU.
        quiet: no progress bar, errors only.
        verbose: all that is logged, and tracebacks.

    Returns:
        what became of each scan, and the volumes.

    Raises:
        ConfigError: input, bundle or an option is wrong, or results exist. CheckpointError: weights do not fit.
        ResourceError: the output folder cannot be written. What is wrong with a scan is in its `Prediction`.
    """
    with working(num_threads, quiet, verbose), stoppable():
        started, began = time.monotonic(), datetime.now(timezone.utc)
        source, folder, home = Path(input), Path(output), bundle_of(bundle)
        if bundle == SHIPPED:
            logger.warning(f"the shipped weights segment {SEGMENTS}; of other scans their label maps mean nothing.")
        derivative = is_bids(source)
        found = inputs_of(source, modality, folder, derivative)
        cases, series, findings = found.cases, found.series, found.findings
        if folder.suffix in (".nii", ".gz"):
            raise ConfigError(f"output is {folder}, expected a folder")
        if os.path.realpath(folder) == os.path.realpath(source):
            raise ConfigError("output is the input folder: choose another, or label maps would be taken for scans")
        if overwrite and continue_prediction:
            raise ConfigError("overwrite and continue_prediction exclude each other: choose one")
        if dicom_seg:
            check_dicom_seg(source, cases, series)
        settings = {
            "bundle_root": str(home.absolute()),
            "dataset_dir": str(source.absolute()),
            "cases": cases,
            "device": f"$torch.device('{choose_device(device)}')",
            "overwrite": overwrite,
            **({"negative_values": negative_values} if negative_values else {}),
            **({"assume_orientation": assume_orientation} if assume_orientation else {}),
            **({"non_finite": non_finite} if non_finite else {}),
        }
        parser = read_bundle(home, listed(overlays), settings)
        names = list(structures_of(parser.get_parsed_content("labels")))
        members = listed(weights) or [str(parser.get_parsed_content("weights"))]
        extend(parser, names, members, kept_structures(keep_largest, names), flip_tta, probabilities)
        drawn = not no_preview and can_draw()
        if not no_preview and not drawn:
            logger.warning("no pictures: matplotlib is not installed (pip install matplotlib).")
        postfix = str(parser.get_parsed_content("output_postfix"))
        places = places_of(cases, folder, source if derivative else None, postfix)
        wanted = [p.label_map for p in places.values()]
        wanted += [p.segmentation for p in places.values()] if dicom_seg else []
        wanted += [p.probabilities for p in places.values()] if probabilities else []
        wanted += [p.preview for p in places.values()] if drawn else []
        wanted += [p.sidecar for p in places.values() if p.sidecar is not None]
        tables = [TABLE, MANIFEST, *LOOKUPS, *([DESCRIPTION, "dseg.tsv"] if derivative else [])]
        remedy = "" if continue_prediction else "set continue_prediction to go on with it, "

        def check_folder() -> bool:
            """Refuse results that would be replaced; returns whether there is a run to go on with."""
            goes_on = continue_prediction and (folder / MANIFEST).is_file()
            results, replaced = [*wanted, *(folder / name for name in tables)], overwrite or goes_on
            refuse_existing(results, folder, replaced, f"{remedy}set overwrite to replace it")
            if not derivative:
                check_results(cases, folder, postfix, (), replaced)
            return goes_on

        check_folder()
        require_writable(folder)
        lock_folder(folder)
        try:
            goes_on = check_folder()  # again, for another run may have ended meanwhile
            parser["overwrite"] = overwrite or goes_on  # what is done again; files of others are refused
            nameless = found.has_dicom
            run = Run(parser, names, places, drawn, quiet, series, dicom_seg, nameless, not no_overlap)
            run.use(members)
            if goes_on:
                run.earlier = read_earlier(folder / MANIFEST, folder / TABLE, run.recipe, run.weights)
            sweep(folder, places)
            with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder) as staging:
                run.write_to(folder, Path(staging))
                run.left_out = records_of(found.left_out, source, named=not nameless)
                run.prepare(cases, findings, source)

                def write_manifest() -> None:
                    run.finish(folder, [predict.__name__, str(source), str(folder)], began, started, source)

                run.write_manifest = write_manifest
                try:
                    write_manifest()  # first of all: there is a run to go on with
                    write_lookups(run, names, source if derivative else None, folder)
                    run.all()
                finally:  # also of a run that was interrupted
                    run.save()
        finally:
            unlock_folders([folder])
        seconds = round(time.monotonic() - started, 1)
        left = summary(found.left_out, source)
        return Predictions(str(folder), run.predictions, run.rows(), seconds, len(run.kept), left)


def sweep(folder: Path, places: Mapping[str, Place]) -> None:
    """Remove what a run that was killed left unfinished; call it under the folder's lock."""
    folders = {folder, *(path.parent for place in places.values() for path in place.files(False))}
    for each in sorted(one for one in folders if one.is_dir()):
        sweep_temporaries(each)
    for left in folder.glob(f"{STAGING}*"):
        if re.fullmatch(rf"{re.escape(STAGING)}[a-z0-9_]{{8}}", left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)


def check_dicom_seg(source: Path, cases: Sequence[Mapping[str, Any]], series: Mapping[str, Series]) -> None:
    """Every scan must be a DICOM series, and highdicom be there. Raises `ConfigError`."""
    other = next((str(case[IMAGE]) for case in cases if case[CASE_ID] not in series), None)
    if other is not None or not series:
        what = f"{other} is none" if other is not None else f"{source} has none"
        raise ConfigError(f"dicom_seg needs DICOM series, and {what}: leave out dicom_seg, or choose another input")
    require_highdicom()


def read_bundle(bundle: Path, overlays: Sequence[str], settings: Mapping[str, Any]) -> ConfigParser:
    """A bundle's ``inference.json`` with overlays and settings on top.

    Raises:
        ConfigError: there is no such bundle or overlay, it has no part that is needed, or a setting is unknown.
    """
    configs = bundle / "configs"
    files = [configs / "inference.json"]
    files += [Path(name) if Path(name).parent != Path(".") else configs / name for name in overlays]
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"no config at {file}: set bundle to the folder of a bundle, overlays to its config files"
            )
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    if (configs / "metadata.json").is_file():
        parser.read_meta(str(configs / "metadata.json"))
    missing = [name for name in NEEDED if name not in parser.config]
    if missing:
        raise ConfigError(f"{files[0]} has no {', '.join(missing)}: predict runs bundles of MAPSeg segmenters")
    for name, value in settings.items():
        parser[name] = value
    check_settings({key: value for key, value in parser.config.items() if key != "_meta_"}, configs)
    return parser


def extend(
    parser: ConfigParser,
    names: Sequence[str],
    members: Sequence[str],
    kept: Sequence[int],
    flip_tta: bool,
    probabilities: bool,
) -> None:
    """Add to a bundle's config what the options ask for; label maps stay as they are without options.

    Raises:
        ConfigError: the label maps would be wrong by a mirror image, or the config saves no label map.
    """
    handlers, postprocessing = parser.config.get("handlers", []), parser.config["postprocessing"]
    if not isinstance(handlers, list) or not isinstance(postprocessing, dict) or "transforms" not in postprocessing:
        raise ConfigError("the bundle's handlers are no list, or its postprocessing has no list of transforms")
    parser["handlers"] = [one for one in handlers if not target_of(one).endswith(OWN_HANDLERS)]
    if flip_tta:
        refuse_sides("flip_tta", names)
    if flip_tta or len(members) > 1:
        parser["inferer"] = {
            "_target_": "mapseg_components.inferers.AveragingInferer",
            "inferer": parser.config["inferer"],
            "weights": list(members[1:]),
            "flip_axes": [0] if flip_tta else [],
        }
    parser["preprocessing"] = with_reader(parser.config.get("preprocessing"))
    steps = list(postprocessing["transforms"])
    saving = next((i for i, one in enumerate(steps) if target_of(one).endswith(SAVING)), None)
    if saving is None:
        raise ConfigError("the bundle's postprocessing has no SaveLabelMapd: predict cannot tell what it writes")
    before = [{"_target_": "mapseg_components.transforms.Confidenced", "keys": [PRED]}]
    maps = [CONFIDENCE]
    if probabilities:
        before.append({"_target_": "mapseg_components.transforms.Probabilitiesd", "keys": [PRED]})
        maps.append(PROBABILITIES)
    invert = {"_target_": "Invertd", "keys": maps, "transform": "@preprocessing", "orig_keys": [IMAGE] * len(maps)}
    after: list[dict[str, Any]] = [{**invert, "nearest_interp": True, "to_tensor": True}]
    if kept:
        after.append({"_target_": "KeepLargestConnectedComponentd", "keys": [PRED], "applied_labels": list(kept)})
    parser["postprocessing#transforms"] = [*before, *steps[:saving], *after, *steps[saving:]]


def with_reader(preprocessing: Any) -> Any:
    """Preprocessing that reads a scan where its audit saw it; bundles of earlier versions name no reader."""
    if not isinstance(preprocessing, dict) or not isinstance(preprocessing.get("transforms"), list):
        return preprocessing
    steps = [
        {"reader": READER, **step} if target_of(step).rpartition(".")[2] == "LoadImaged" else step
        for step in preprocessing["transforms"]
    ]
    return {**preprocessing, "transforms": steps}


def target_of(component: Any) -> str:
    """Class that a part of a config names; empty for an expression."""
    return str(component.get("_target_", "")) if isinstance(component, dict) else ""


def kept_structures(keep_largest: str | None, names: Sequence[str]) -> list[int]:
    """Class indices of named structures. Raises `ConfigError` for an unknown name, or without scikit-image."""
    wanted = listed(keep_largest)
    if not wanted:
        return []
    if not optional_import("skimage.measure")[1]:
        raise ConfigError("keep_largest needs scikit-image, which is not installed: pip install scikit-image")
    wanted = list(names) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ConfigError(f"keep_largest names {', '.join(unknown)}, the bundle has {', '.join(names)}")
    return [list(names).index(name) + 1 for name in wanted]


def places_of(cases: Sequence[Mapping[str, Any]], folder: Path, dataset: Path | None, postfix: str) -> dict[str, Place]:
    """Case id to the places of its files. Raises `DataError` if two scans would write one file."""
    places: dict[str, Place] = {}
    for case in cases:
        if dataset is None:
            stem = stem_of(Path(case[IMAGE]))
            place = Place(
                folder / f"{stem}_{postfix}.nii.gz",
                folder / f"{stem}_probabilities.nii.gz",
                folder / "previews" / f"{stem}.png",
                segmentation=folder / f"{stem}_{postfix}.dcm",
            )
        else:
            stem = folder / result_stem(case[IMAGE], dataset)
            place = Place(
                stem.with_name(f"{stem.name}_dseg.nii.gz"),
                stem.with_name(f"{stem.name}_probseg.nii.gz"),
                folder / "figures" / f"{stem.name}_dseg.png",
                stem.with_name(f"{stem.name}_dseg.json"),
            )
        if place in places.values():
            raise DataError(f"two scans would write {place.label_map}: rename one, or run them apart")
        places[case[CASE_ID]] = place
    return places


Todo = tuple[Prediction, Mapping[str, Any]]  # and its case


class Run:
    """The scans of one call, in their order; what became of each is kept.

    Args:
        parser: the bundle's config. names: structures. places: of the results. drawn: draw pictures.
        quiet: no progress bars.
        series: case id to DICOM series. dicom_seg: write a segmentation of each.
        nameless: the input has DICOM, readable or not, and its path stands in no file.
        overlap: read the next scan and write the one before while the network works on one.
    """

    def __init__(
        self,
        parser: ConfigParser,
        names: Sequence[str],
        places: Mapping[str, Place],
        drawn: bool,
        quiet: bool,
        series: Mapping[str, Series],
        dicom_seg: bool,
        nameless: bool,
        overlap: bool = False,
    ) -> None:
        self.parser, self.names, self.places = parser, list(names), places
        self.drawn, self.quiet = drawn, quiet
        self.series, self.dicom_seg, self.nameless = series, dicom_seg, nameless
        self.overlap = overlap
        self.predictions: list[Prediction] = []
        self.volumes: list[dict[str, Any]] = []
        self.write_manifest: Callable[[], None] = lambda: None
        self.earlier: Earlier | None = None
        self.kept: list[str] = []
        self.left_out: list[dict[str, Any]] = []
        self._todo: list[Todo] = []
        self.members: list[str] = []
        self._output: dict[str, Any] = {}

    def use(self, members: Sequence[str]) -> None:
        """Which weights are taken."""
        self.members = list(members)
        self.parser["weights"] = str(members[0])

    def write_to(self, folder: Path, staging: Path) -> None:
        """Where results go, and a folder on the same disk where they are made."""
        self.folder, self.staging = folder, staging
        self.parser["output_dir"] = str(staging)
        # a converted series is read once, and gone after this run
        self.parser["audit_file"] = None if self.nameless else str(folder / "audit.json")

    def prepare(self, cases: Sequence[Mapping[str, Any]], findings: Sequence[Finding], source: Path) -> None:
        """Load the weights, convert DICOM series, check all scans. Raises `CheckpointError`.

        Args:
            cases: scans. findings: what of the input could not be used. source: the input.
        """
        cases = [{**case, IMAGE: self.file_of(case)} for case in cases]
        self.predictions = [self.begun(case, source) for case in cases]
        if self.earlier is not None:
            self.take_over(self.earlier)
        self.parser["cases"] = cases
        scans = self.parser.get_parsed_content("scans")
        scans.progress = lambda items: progress(items, "reading", self.quiet)
        self.parser.get_parsed_content("initialize")
        load_weights(self.parser.get_parsed_content("network_def"), self.parser.get_parsed_content("weights"))
        todo = [pair for pair in zip(self.predictions, cases) if pair[0].status != "done"]  # by an earlier run
        for one, case in progress([pair for pair in todo if pair[0].series], "converting", self.quiet):
            self.convert(one, case)
        scans.cases = [case for one, case in todo if one.status != "failed"]
        try:
            usable = {case[CASE_ID] for case in scans.usable}
        except MAPSegError as error:
            logger.debug(f"no scan is usable: {error}")
            usable = set()
        for one, case in todo:
            if one.status != "failed" and one.case not in usable:
                self.refused(one, case, scans.findings)
        self._todo = [(one, case) for one, case in todo if one.case in usable]
        for number, finding in enumerate(findings, start=1):
            logger.error(str(finding))
            self.predictions.append(unreadable(number, finding, source))

    def file_of(self, case: Mapping[str, Any]) -> str:
        """The file to read: the scan's, or where a DICOM series is converted to."""
        return str(self.staging / case[IMAGE]) if case[CASE_ID] in self.series else case[IMAGE]

    def begun(self, case: Mapping[str, Any], source: Path) -> Prediction:
        """Prediction of a case of which nothing is done yet."""
        series = self.series.get(case[CASE_ID])
        claimed = self.earlier is None and bool(self.parser.get_parsed_content("overwrite"))
        if series is None:
            scan = os.path.relpath(case[IMAGE], source) if self.nameless else case[IMAGE]
            return Prediction(case[CASE_ID], scan, stamp=stamp_of(case[IMAGE]), claimed=claimed)
        record, place = series_record(series), os.path.relpath(series.folder, source)
        stamps = [stamp_of(file) or [0, 0] for file in series.files]
        stamp = [sum(size for size, _ in stamps), max(changed for _, changed in stamps)]
        scan = f"series {series.number}"
        return Prediction(case[CASE_ID], scan, series=record, stamp=stamp, claimed=claimed, place=place)

    def take_over(self, earlier: Earlier) -> None:
        """Keep what an earlier run finished: of scans that have not changed since, and of those not in the input now.

        Raises:
            ConfigError: a result would replace a file that the earlier run did not claim.
        """
        done = {case: one for case, one in earlier.scans.items() if one.status == "done" and case in earlier.volumes}
        unclaimed = []
        for number, one in enumerate(self.predictions):
            place, before = self.places[one.case], earlier.scans.get(one.case)
            if before is None or not (before.claimed or before.status == "done"):
                unclaimed += [path for path in place.files(one.series is not None) if os.path.lexists(path)]
                continue
            one.claimed = True
            wanted = [place.label_map, *([place.sidecar] if place.sidecar is not None else [])]
            wanted += [place.probabilities] if before.probabilities else []  # by the same settings
            wanted += [place.segmentation] if self.dicom_seg and place.segmentation is not None else []
            same = all(getattr(before, name) == getattr(one, name) for name in ("scan", "stamp", "series"))
            if one.case in done and same and all(path.is_file() for path in wanted):
                named = {key: str(getattr(place, key)) for key in WRITTEN if getattr(before, key) is not None}
                self.predictions[number] = replace(before, place=one.place, **named)
                self.kept.append(one.case)
        if unclaimed:
            named = f"{unclaimed[0]}{f' and {len(unclaimed) - 1} more' if len(unclaimed) > 1 else ''}"
            raise ConfigError(f"{named} would be replaced, and the earlier run did not write it: move it away")
        gone = sorted(set(done) - {one.case for one in self.predictions})
        self.predictions += [done[case] for case in gone]
        self.kept += gone
        self.volumes = [row for case in self.kept for row in earlier.volumes[case]]
        logger.info(f"{len(self.kept)} scans are kept as an earlier run finished them.")

    def save(self) -> None:
        """Write table and manifest, the manifest last: what it calls done has its rows."""
        write_volumes_csv(self.rows(), self.folder / TABLE)
        self.write_manifest()

    def rows(self) -> list[dict[str, Any]]:
        """Volumes in the order of the scans."""
        order = {one.case: number for number, one in enumerate(self.predictions)}
        return sorted(self.volumes, key=lambda row: order[row["case"]])

    def convert(self, one: Prediction, case: Mapping[str, Any]) -> None:
        """Write a DICOM series where it is read from; an error is its own."""
        series = self.series[one.case]
        try:
            if self.dicom_seg:
                reference_headers(series)
            one.notes = convert(series, Path(case[IMAGE]))
            for note in one.notes:
                logger.warning(f"{one.place}, {one.scan}: {note}")
        except MAPSegError as error:
            self.failed(one, error, str(series))

    def all(self) -> None:
        """Segment what is usable."""
        if not self._todo:
            return
        self._evaluator = self.parser.get_parsed_content("evaluator")
        self._evaluator.interrupt_resume_enabled = False  # else the run after one that raised would do nothing
        self._evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        self._dataset = self.parser.get_parsed_content("dataset")
        self._collate = self._evaluator.data_loader.collate_fn
        self._saving = split(self.parser.get_parsed_content("postprocessing"))
        with progress(None, "segmenting", self.quiet, len(self._todo)) as bar:

            def write(todo: Todo, output: dict[str, Any]) -> None:
                self.write(todo, output)
                bar.update()

            try:
                in_stages(self._todo, self.read, self.segment, write, self.overlap and self.memory_allows_overlap())
            finally:
                for one, _ in self._todo:
                    one.seconds = None if one.status == "not done" else one.seconds

    def memory_allows_overlap(self) -> bool:
        """Whether three of the largest scans together take at most half of the memory."""
        voxels = max(voxels_of(case[IMAGE]) for _, case in self._todo)
        needed = voxels * (BYTES_OVERLAPPED + BYTES_A_CLASS * (len(self.names) + 1))
        available = memory_of("cpu")
        if available is None or 2 * needed <= available:
            return True
        found = f"{needed / 2**30:.1f} GiB, more than half of {available / 2**30:.1f} GiB"
        logger.info(f"Scans are segmented one after the other: several at once would take {found}.")
        return False

    @contextlib.contextmanager
    def own(self, todo: Todo) -> Iterator[None]:
        """Context of a stage of a scan, whose error is its own, and whose seconds are counted."""
        one, case = todo
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failed(one, user_error(error) or origin(error), case[IMAGE])
        finally:
            one.seconds = round((one.seconds or 0.0) + time.monotonic() - started, 2)

    def read(self, todo: Todo) -> dict[str, Any] | None:
        """A scan as the network takes it, a batch of one; ``None`` if that failed."""
        with self.own(todo):
            self._dataset.data = [todo[1]]
            return self._collate([self._dataset[0]])
        return None

    def segment(self, todo: Todo, batch: dict[str, Any] | None) -> dict[str, Any] | None:
        """All that runs on the device, from the network up to saving; what is to be saved lies on the CPU."""
        if batch is None:
            return None
        loader, engine, output = [batch], self._evaluator, None
        with self.own(todo):
            engine.data_loader, engine.state.epoch_length = loader, 1
            engine.run()
            output = self._output
        loader.clear()  # no more references to the scan than the one that is returned
        self._output, engine.state.batch, engine.state.output = {}, None, None
        return output

    def write(self, todo: Todo, output: dict[str, Any] | None) -> None:
        """Save what the network made of a scan, and note that it is done, so that a run that is killed can go on."""
        one, case = todo
        if output is not None:
            with self.own(todo):
                one.claimed = True
                self.write_manifest()
                self.keep(one, case, self.places[one.case], self._saving(output))
                one.status = "done"
            with contextlib.suppress(ResourceError):  # a full disk is reported by the next claim, or at the end
                self.save()
        if one.series is not None:
            Path(case[IMAGE]).unlink(missing_ok=True)

    def failed(self, one: Prediction, error: BaseException, path: str) -> None:
        """Note why there is no result; without the scan's path if the input has DICOM."""
        found = findings_of(error) if isinstance(error, MAPSegError) else ()
        logger.error(f"{one.place or one.scan} failed: {'; '.join(map(str, found)) or repr(error)}")
        if self.nameless:
            message = "; ".join(f"{finding.what}: {finding.remedy}" for finding in found) or type(error).__name__
            message = message.replace(path, one.scan).replace(f"{self.staging}{os.sep}", "")
        else:
            message = "; ".join(map(str, found)) or repr(error)
        one.status, one.message, one.kind = "failed", message, type(error)

    def refused(self, one: Prediction, case: Mapping[str, Any], findings: Sequence[Finding]) -> None:
        """Note why a scan was left out."""
        own = [finding for finding in findings if finding.severity == "error" and finding.file == case[IMAGE]]
        one.status = "failed"
        one.message = "; ".join(f"{finding.what}: {finding.remedy}" for finding in own) or "it could not be used"
        one.kind = own[0].kind if len({finding.kind for finding in own}) == 1 else DataError

    def _take(self, engine: Any) -> None:
        output = engine.state.output[0]
        self._output = {key: value.cpu() if torch.is_tensor(value) else value for key, value in output.items()}

    def keep(self, one: Prediction, case: Mapping[str, Any], place: Place, output: Mapping[str, Any]) -> None:
        """Give the files of a scan their names, and add its volumes."""
        label_map, affine = np.asarray(output[PRED][0]), np.asarray(output[PRED].affine)
        confidence = np.asarray(output[CONFIDENCE][0])
        if confidence.shape != label_map.shape:
            raise ConfigError(
                f"confidence of shape {confidence.shape}, label map {label_map.shape}: preprocessing is not inverted"
            )
        rows = structure_volumes(label_map, affine, self.names, confidence)
        if PROBABILITIES in output:
            save_probabilities(np.asarray(output[PROBABILITIES]), affine, place.probabilities)
            one.probabilities = str(place.probabilities)
        staged = result_path(case[IMAGE], self.staging, str(self.parser.get_parsed_content("output_postfix")))
        place.label_map.parent.mkdir(parents=True, exist_ok=True)
        if place.sidecar is not None:
            source = Path(one.scan).relative_to(self.parser.get_parsed_content("dataset_dir")).as_posix()
            write_json({"Manual": False, "SpatialReference": "orig", "Sources": [f"bids:raw:{source}"]}, place.sidecar)
        if self.dicom_seg and place.segmentation is not None:
            write_segmentation(self.series[one.case], label_map, self.names, self.algorithm(), place.segmentation)
            one.segmentation = str(place.segmentation)
        picture = self.draw(one, case, staged)
        try:
            os.replace(staged, place.label_map)
            if self.parser.get_parsed_content("overwrite"):
                self.remove_what_was_made_of_the_label_map_before(one, place)
        except OSError as error:
            raise ResourceError(f"{place.label_map} was not written ({error}): choose another output folder") from error
        one.label_map = str(place.label_map)
        self.volumes += [{"case": one.case, **row} for row in rows]
        self.keep_picture(one, picture, place.preview)

    def draw(self, one: Prediction, case: Mapping[str, Any], label_map: Path) -> Path | None:
        """A picture among the unfinished files; ``None`` for none, or if that fails: the scan is done all the same."""
        picture = self.staging / "picture.png"
        try:
            if self.drawn:
                labels = read_nifti(label_map)  # on the scan's grid
                grey = read_nifti(case[IMAGE]).voxels
                draw_preview(grey, labels.voxels, labels.affine, self.names, Path(case[IMAGE]).name, picture)
                return picture
        except Exception as error:
            self.without_picture(one, error)
        return None

    def keep_picture(self, one: Prediction, picture: Path | None, place: Path) -> None:
        """Take away the picture of the label map before, and give the new one its name."""
        try:
            if self.parser.get_parsed_content("overwrite"):
                place.unlink(missing_ok=True)
            if picture is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(picture, place)
                one.preview = str(place)
        except OSError as error:
            self.without_picture(one, error)

    def without_picture(self, one: Prediction, error: Exception) -> None:
        """Note it."""
        one.message = f"its picture is missing, or of an earlier run: {type(error).__name__}"
        logger.warning(f"{one.place or one.scan}: {one.message} ({error}); its label map is written")

    def remove_what_was_made_of_the_label_map_before(self, one: Prediction, place: Place) -> None:
        """Files of an earlier run that this one does not write; `keep_picture` sees to the picture."""
        segmentation = place.segmentation if one.series is not None else None  # only of a series is there one of ours
        for path, mine in ((place.probabilities, one.probabilities), (segmentation, one.segmentation)):
            if path is not None and mine is None:
                path.unlink(missing_ok=True)

    @cached_property
    def weights(self) -> list[dict[str, str | None]]:
        """Files of weights with their checksums, ``None`` of one that cannot be read."""
        found: list[dict[str, str | None]] = []
        for path in self.members:
            digest = None
            with contextlib.suppress(OSError):
                digest = sha256_of(path)
            found.append({"file": path, "sha256": digest})
        return found

    def algorithm(self) -> Algorithm:
        """What made the label maps, for a DICOM-SEG."""
        meta = self.parser.config.get("_meta_") or {}
        name = str(meta.get("name") or Path(self.parser.get_parsed_content("bundle_root")).name)
        digests = "+".join((one["sha256"] or "unknown")[:16] for one in self.weights)
        return Algorithm(name, str(meta.get("version") or "unknown"), __version__, digests)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The settings that decide what is computed, as plain values."""
        recipe = {key: value for key, value in self.parser.config.items() if key not in NOT_RECIPE and key != "_meta_"}
        if isinstance(recipe["inferer"], dict):  # files of an ensemble stand among the weights, with their checksums
            recipe["inferer"] = {key: value for key, value in recipe["inferer"].items() if key != "weights"}
        return json.loads(json.dumps(recipe, sort_keys=True, default=repr))

    def finish(self, folder: Path, command: Sequence[str], began: datetime, started: float, source: Path) -> None:
        """Write ``manifest.json``."""
        line = list(sys.argv) if Path(sys.argv[0]).name in ("mapseg", "__main__.py") else list(command)
        content = {
            "mapseg": __version__,
            "command": without_path(line, source) if self.nameless else line,
            "started": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 2),
            "versions": versions(),
            "platform": platform.platform(),
            "device": str(self.parser.get_parsed_content("device")),
            "bundle": str(self.parser.get_parsed_content("bundle_root")),
            "bundle_version": (self.parser.config.get("_meta_") or {}).get("version"),
            "settings_sha256": hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest(),
            "settings": self.recipe,
            "weights": self.weights,
            "labels": {name: index for index, name in enumerate(self.names, start=1)},
            "scans": [one.record() for one in self.predictions],
            "left_out": self.left_out,
        }
        write_json(content, folder / MANIFEST)


def voxels_of(scan: str) -> int:
    """Number of voxels by a scan's header; 0 if that cannot be read, of which its reading will tell."""
    try:
        return math.prod(read_geometry(scan).shape)
    except MAPSegError:
        return 0


def origin(error: BaseException) -> BaseException:
    """The error that MONAI wraps into one which only names a transform."""
    return error if error.__cause__ is None else origin(error.__cause__)


def split(postprocessing: Compose) -> Compose:
    """Take saving, and what comes after it, out of a bundle's postprocessing; returns what was taken."""
    steps = postprocessing.transforms
    saving = next(i for i, step in enumerate(steps) if type(step).__name__.endswith(SAVING))
    taken = copy.copy(postprocessing)
    postprocessing.transforms, taken.transforms = steps[:saving], steps[saving:]
    return taken


def unreadable(number: int, finding: Finding, source: Path) -> Prediction:
    """What becomes of a folder, or file, that could not be read as scans; but for NIfTI its path is in no file."""
    message = f"{finding.what}: {finding.remedy}"
    place = os.path.relpath(finding.file or source, source)
    if is_nifti(finding.file):
        return Prediction(stem_of(Path(finding.file)), place, "failed", message=message, kind=finding.kind)
    return Prediction(
        f"unreadable_{number}", "part of the input", "failed", message=message, kind=finding.kind, place=place
    )


def write_lookups(run: Run, names: Sequence[str], dataset: Path | None, folder: Path) -> None:
    """Names and colours, and what makes a folder a BIDS derivative."""
    for file, text in LOOKUPS.items():
        write_text(text(names), folder / file)
    if dataset is not None:
        modalities = sorted({suffix(Path(one.scan)) for one in run.predictions})
        write_json(dataset_description(dataset, "mapseg-monai", __version__, modalities), folder / DESCRIPTION)
        write_text(dseg_tsv(names), folder / "dseg.tsv")
        write_text("\n".join(IGNORED) + "\n", folder / ".bidsignore")
