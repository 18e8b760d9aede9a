# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg predict``: a bundle's own inference config over a scan, a folder, a BIDS dataset or DICOM series."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapseg_components.commands.adapt_each import ScanAdaptation, ask_for
from mapseg_components.data import is_bids
from mapseg_components.data.left_out import records_of, summary
from mapseg_components.errors import ConfigError
from mapseg_components.files import lock_folder, require_writable, unlock_folders
from mapseg_components.handover import resized_spacing
from mapseg_components.keys import CASE_ID, IMAGE
from mapseg_components.plans.arguments import read_mapping
from mapseg_components.plans.extents import find_size
from mapseg_components.prediction.bundle import ONNX, InferenceBundle, open_bundle
from mapseg_components.prediction.inputs import Inputs, inputs_of
from mapseg_components.prediction.intake import begun, taken_over, unreadable, usable
from mapseg_components.prediction.journal import Call, Journal
from mapseg_components.prediction.places import MANIFEST, STAGING, TABLE, Output, places_of
from mapseg_components.prediction.records import Earlier, Prediction, Predictions, read_earlier
from mapseg_components.prediction.run import Run
from mapseg_components.prediction.writing import Writer
from mapseg_components.reports import can_draw
from mapseg_components.scans.dicom import Series
from mapseg_components.scans.extents import median_extent
from mapseg_components.scans.files import is_nifti
from mapseg_components.scans.segmentation import require_highdicom
from mapseg_components.session import choose_device, listed, stoppable, working
from mapseg_components.shipped_files import SEGMENTS, SHIPPED, bundle_of

__all__ = ["Prediction", "Predictions", "predict"]

logger = logging.getLogger(__name__)

FOREGROUND = "foreground_mm"  # setting of a bundle's inference; those of earlier versions have none


def predict(
    input: str,
    output: str,
    *,
    bundle: str,
    weights: str | None = None,
    overlays: str | None = None,
    settings: str | Mapping[str, Any] | None = None,
    modality: str | None = None,
    negative_values: str | None = None,
    assume_orientation: str | None = None,
    non_finite: str | None = None,
    keep_largest: str | None = None,
    match_size: bool = False,
    flip_tta: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    dicom_seg: bool = False,
    no_preview: bool = False,
    no_overlap: bool = False,
    overwrite: bool = False,
    continue_prediction: bool = False,
    adapt_each: int = 0,
    seed: int = 0,
    backend: str = "pytorch",
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
        bundle: folder of the bundle, such as mapseg adapt writes; or the name of one that comes with the package, such
            as brain_any_contrast. shipped is mapseg_adaptation: it segments T2w MRI of the fetal brain at 1.6 mm,
            nothing else.
        weights: file of weights, by default what the bundle names; several, with commas between them, are averaged.
        overlays: config files on top of inference.json, with commas between them; names without a folder are the
            bundle's.
        settings: values on top of those, by name, as a mapping, JSON text or a JSON file, such as
            '{"largest_component": []}'.
        modality: of a BIDS dataset with several, e.g. T2w.
        negative_values: clip (MR), shift (CT in HU: adds 1024) or keep; by default what the bundle says.
        assume_orientation: three letters, e.g. RAS, for scans whose header names none; by default such are refused.
        non_finite: background takes NaN and infinite voxels as background; by default such scans are refused.
        keep_largest: structures, with commas between them, or all, of which only the largest connected part is kept.
        match_size: where what these scans show is much larger or smaller than what the bundle's model learnt from, as
            newborns' brains beside adults', work on voxels that are larger or smaller by as much. For scans that show
            the same as those, such as brains without skull; without it a warning says what was found.
        flip_tta: average with the result of the left-right mirrored scan; refused if a structure's name has a side.
        probabilities: write the probabilities of all classes, too (4D, steps of 1/255, background first).
        uncertainty: write the uncertainty of each voxel that the network learnt (mean absolute value over the classes),
            too; refused if its network has no such head. By default what the bundle says: those of method buda_seg do.
        dicom_seg: write a DICOM Segmentation of each DICOM series, too (needs highdicom); it holds patient data.
        no_preview: draw no pictures.
        no_overlap: read, segment and write one scan after the other: less memory, the same results; done by itself
            where several scans at once would take more than half of the memory.
        overwrite: replace results of an earlier run; with a label map go the probabilities, picture and segmentation
            that were made of it.
        continue_prediction: go on in a folder where an earlier run with the same settings and weights stopped, however
            it ended: what it finished is kept, unless the scan has changed since; failed scans are tried again.
        adapt_each: steps of adaptation to each scan alone, without the source, such as 20: the scan is segmented by the
            adapted weights if its label map is more consistent by them, else by the bundle's, which stay as they are.
            The table and manifest say which, and the gain. Not with several weights.
        seed: of adapt_each.
        backend: pytorch, or onnx: ONNX Runtime computes the network, in float32 on the CPU (it needs the extra export);
            faster on images, not on volumes. Not for networks with a global view.
        device: auto, cpu, cuda or cuda:<number>.
        num_threads: of the CPU.
        quiet: no progress bar, errors only.
        verbose: all that is logged, and tracebacks.

    Returns:
        what became of each scan, and the volumes.

    Raises:
        ConfigError: input, bundle or an option is wrong, or results exist.
        CheckpointError: weights do not fit.
        ResourceError: the output folder cannot be written. What is wrong with a scan is in its `Prediction`.
    """
    with working(num_threads, quiet, verbose), stoppable():
        call, home = Call(Path(input), Path(output)), bundle_of(bundle)
        if home != Path(bundle) and home == bundle_of(SHIPPED):  # by a name, not by its path
            logger.warning(f"the shipped weights segment {SEGMENTS}; of other scans their label maps mean nothing.")
        dataset = call.source if is_bids(call.source) else None
        inputs = inputs_of(call.source, modality, call.folder, dataset is not None)
        check_options(call, inputs, overwrite, continue_prediction, dicom_seg)
        if backend == ONNX and (adapt_each or device.startswith("cuda")):
            other = "adapt_each, which trains" if adapt_each else f"device {device}"
            raise ConfigError(f"backend {ONNX} computes one network on the CPU, and not with {other}: leave one out")
        policies = {
            "negative_values": negative_values,
            "assume_orientation": assume_orientation,
            "non_finite": non_finite,
        }
        own = {
            "bundle_root": str(home.absolute()),
            "dataset_dir": str(call.source.absolute()),
            "cases": inputs.cases,
            "device": f"$torch.device('{'cpu' if backend == ONNX else choose_device(device)}')",
            "overwrite": overwrite,
            **{name: value for name, value in policies.items() if value},
        }
        asked = read_mapping("settings", settings) or {}
        taken = sorted(set(asked) & {*own, "output_dir", "weights", "audit_file"})
        if taken:
            raise ConfigError(f"settings has {taken}, which the command's own arguments say: leave them out")
        segmenter = open_bundle(
            *(home, listed(overlays), own | asked, listed(weights), listed(keep_largest)),
            *(flip_tta, probabilities, uncertainty, backend),
        )
        if match_size and "working_spacing" in asked:
            raise ConfigError("match_size and working_spacing both say on which voxels to work: leave one out")
        ask_for(segmenter, home, adapt_each, seed)
        drawn = not no_preview and can_draw()
        if not no_preview and not drawn:
            logger.warning("no pictures: matplotlib is not installed (pip install matplotlib).")
        places = places_of(inputs.cases, call.folder, dataset, segmenter.postfix)
        results = Output(
            *(call.folder, places, dataset, segmenter.postfix, probabilities, segmenter.uncertainty, dicom_seg, drawn)
        )
        goes_on = results.check(inputs.cases, overwrite, continue_prediction)
        if "working_spacing" not in asked:
            fit_size(segmenter, home, inputs.cases, match_size, call.folder / MANIFEST if goes_on else None)
        require_writable(call.folder)
        lock_folder(call.folder)
        try:
            # again, for another run may have ended meanwhile
            goes_on = results.check(inputs.cases, overwrite, continue_prediction)
            segmenter["overwrite"] = overwrite or goes_on  # what is done again; files of others are refused
            table, manifest = call.folder / TABLE, call.folder / MANIFEST
            earlier = read_earlier(manifest, table, segmenter.recipe, segmenter.weights) if goes_on else None
            results.sweep()
            with tempfile.TemporaryDirectory(prefix=STAGING, dir=call.folder) as staging:
                journal = run(call, inputs, segmenter, results, earlier, Path(staging), quiet, not no_overlap)
        finally:
            unlock_folders([call.folder])
        left, seconds = summary(inputs.left_out, call.source), round(call.seconds, 1)
        return Predictions(str(call.folder), journal.predictions, journal.rows(), seconds, len(journal.kept), left)


def fit_size(
    bundle: InferenceBundle, home: Path, cases: Sequence[Mapping[str, Any]], match: bool, earlier: Path | None = None
) -> None:
    """Compare what scans show with what a model has learnt from, and work at its size if that is asked for.

    Args:
        bundle: that is used; its working spacing changes.
        home: its folder.
        cases: all scans; DICOM series and images have no known size.
        match: whether to, or to warn alone.
        earlier: manifest of a run that goes on, which has found a size, of other scans perhaps.

    Raises:
        ConfigError: there is another size, and the bundle does not say on which voxels its model works; or its extent
            is none.
    """
    known = bundle[FOREGROUND] if FOREGROUND in bundle.parser.config else None
    if known is None:
        if match:
            logger.warning(f"match_size: bundle {home} does not say how large what it learnt from is (foreground_mm).")
        return
    if not (isinstance(known, list) and len(known) == 3 and all(type(s) in (int, float) and s > 0 for s in known)):
        raise ConfigError(f"{FOREGROUND} of bundle {home} is {known!r}, expected three lengths in mm, or null")
    before = earlier_spacing(earlier) if match and earlier is not None else None
    if before is not None:
        bundle["working_spacing"] = before
        logger.warning(f"match_size: the model works on voxels of {bundle['working_spacing']} mm as before.")
        return
    scans = [case[IMAGE] for case in cases if is_nifti(str(case[IMAGE]))]
    size = find_size(known, median_extent(scans, bundle["negative_values"]))
    if size is None:
        if match:
            logger.warning("match_size: these scans show as much as what the model learnt from, or that is not known.")
        return
    here, there = (" x ".join(f"{side:.0f}" for side in size[name]) for name in ("target_mm", "source_mm"))
    found = f"what these scans show measures {here} mm, what the model learnt from {there} mm ({size['factor']:.2f})"
    if not match:
        logger.warning(
            f"{found}: if both show the same, such as brains without skull, match_size lets it work at its own size."
        )
        return
    spacing = resized_spacing(bundle["working_spacing"], None, bundle["working_directions"], size["factor"])
    if spacing is None:
        raise ConfigError(
            f"match_size: {found}, and bundle {home} works on the scans' own voxels (working_spacing is "
            f"{bundle['working_spacing']}): resample the scans, or leave out match_size"
        )
    bundle["working_spacing"] = spacing
    logger.warning(f"{found}: the model works on voxels of {spacing} mm.")


def earlier_spacing(manifest: Path) -> Any:
    """The spacing that an earlier run worked on, as its manifest says; ``None`` without a readable one."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["settings"]["working_spacing"]
    except (OSError, KeyError, TypeError, ValueError):  # `read_earlier` says why
        return None


def check_options(call: Call, inputs: Inputs, overwrite: bool, continue_prediction: bool, dicom_seg: bool) -> None:
    """Refuse options that contradict each other, the input or the output. Raises `ConfigError`."""
    if call.folder.suffix in (".nii", ".gz"):
        raise ConfigError(f"output is {call.folder}, expected a folder")
    if os.path.realpath(call.folder) == os.path.realpath(call.source):
        raise ConfigError("output is the input folder: choose another, or label maps would be taken for scans")
    if overwrite and continue_prediction:
        raise ConfigError("overwrite and continue_prediction exclude each other: choose one")
    if dicom_seg:
        check_dicom_seg(call.source, inputs.cases, inputs.series)


def check_dicom_seg(source: Path, cases: Sequence[Mapping[str, Any]], series: Mapping[str, Series]) -> None:
    """Every scan must be a DICOM series, and highdicom be there. Raises `ConfigError`."""
    other = next((str(case[IMAGE]) for case in cases if case[CASE_ID] not in series), None)
    if other is not None or not series:
        what = f"{other} is none" if other is not None else f"{source} has none"
        raise ConfigError(f"dicom_seg needs DICOM series, and {what}: leave out dicom_seg, or choose another input")
    require_highdicom()


def run(
    call: Call,
    inputs: Inputs,
    bundle: InferenceBundle,
    output: Output,
    earlier: Earlier | None,
    staging: Path,
    quiet: bool,
    overlap: bool,
) -> Journal:
    """Check and segment all scans, and write tables and manifest, also of a run that is interrupted.

    Args:
        call: of the command.
        inputs: its scans.
        bundle: what runs.
        output: where results go; locked.
        earlier: what an earlier run left, to go on with it.
        staging: folder for unfinished files, below the output.
        quiet: no progress bars.
        overlap: read the next scan and write the one before while the network works on one.

    Returns:
        what became of each scan.

    Raises:
        CheckpointError: the weights do not fit.
        ConfigError: a result would replace a file of somebody else.
        ResourceError: the output folder cannot be written.
    """
    bundle["output_dir"] = str(staging)
    # a converted series is read once, and gone after this run
    bundle["audit_file"] = None if inputs.has_dicom else str(output.folder / "audit.json")
    claimed = earlier is None and bool(bundle["overwrite"])
    kept = taken_over(begun(inputs, call.source, claimed), earlier, output)
    predictions = [*kept.predictions, *unreadable(inputs.findings, call.source)]
    left_out = records_of(inputs.left_out, call.source, named=not inputs.has_dicom)
    journal = Journal(call, bundle, predictions, kept.cases, kept.volumes, left_out, inputs.has_dicom, staging)
    todo = usable(inputs, journal, output, quiet)
    try:
        journal.write_manifest()  # first of all: there is a run to go on with
        output.write_lookups(bundle.names, [one.scan for one in journal.predictions])
        if todo:
            around = ScanAdaptation(bundle, staging / "package") if "adapt_each" in bundle.parser.config else None
            Run(bundle, journal, Writer(bundle, output, inputs.series, staging), todo, quiet, overlap, around).all()
    finally:
        journal.save()
    return journal
