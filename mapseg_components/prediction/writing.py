# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The files of one scan: label map and maps beside it, DICOM Segmentation, BIDS sidecar, picture, rows of the table."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.data import read_nifti, result_path, structure_volumes
from mapseg_components.data.results import uncertainty_path
from mapseg_components.errors import ConfigError, ResourceError
from mapseg_components.files import write_json
from mapseg_components.keys import CONFIDENCE, IMAGE, PRED, PROBABILITIES
from mapseg_components.prediction.bundle import InferenceBundle
from mapseg_components.prediction.places import Output, Place
from mapseg_components.prediction.records import Prediction
from mapseg_components.reports import draw_preview
from mapseg_components.scans.dicom import Series
from mapseg_components.scans.files import is_picture
from mapseg_components.scans.pictures import in_mm
from mapseg_components.scans.segmentation import write_segmentation
from mapseg_components.transforms import save_probabilities

__all__ = ["Writer"]

logger = logging.getLogger(__name__)


class Writer:
    """Gives the results of one scan after another their names.

    Args:
        bundle: what runs; it saves the label map among the unfinished files.
        output: where results go, and which are written.
        series: case id to DICOM series.
        staging: folder of the unfinished files, on the same disk as ``output``.
    """

    def __init__(self, bundle: InferenceBundle, output: Output, series: Mapping[str, Series], staging: Path) -> None:
        self.bundle, self.output, self.series, self.staging = bundle, output, series, staging

    def keep(
        self, one: Prediction, case: Mapping[str, Any], place: Place, output: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Write all files of a scan; its label map gets its name last but for the picture.

        Args:
            one: of the scan; its files are noted.
            case: of the scan.
            place: of its files.
            output: label map (1, X, Y, Z) with its affine, confidence, and probabilities if they are wanted.

        Returns:
            its rows of the table.

        Raises:
            ConfigError: the bundle does not bring its confidence back to the scan's grid.
            ResourceError: a file cannot be written.
        """
        label_map, affine = np.asarray(output[PRED][0]), np.asarray(output[PRED].affine)
        confidence = np.asarray(output[CONFIDENCE][0])
        if confidence.shape != label_map.shape:
            raise ConfigError(
                f"confidence of shape {confidence.shape}, label map {label_map.shape}: preprocessing is not inverted"
            )
        rows = structure_volumes(label_map, affine, self.bundle.names, confidence)
        if PROBABILITIES in output:
            grid = in_mm(affine, case[IMAGE]) if is_picture(case[IMAGE]) else affine
            save_probabilities(np.asarray(output[PROBABILITIES]), grid, place.probabilities)
            one.probabilities = str(place.probabilities)
        staged = result_path(case[IMAGE], self.staging, self.bundle.postfix)
        place.label_map.parent.mkdir(parents=True, exist_ok=True)
        if place.sidecar is not None:
            source = Path(one.scan).relative_to(self.bundle["dataset_dir"]).as_posix()
            write_json({"Manual": False, "SpatialReference": "orig", "Sources": [f"bids:raw:{source}"]}, place.sidecar)
        if self.output.segmentations and place.segmentation is not None:
            series, algorithm = self.series[one.case], self.bundle.algorithm
            write_segmentation(series, label_map, self.bundle.names, algorithm, place.segmentation)
            one.segmentation = str(place.segmentation)
        picture = self.draw(one, case, staged)
        try:
            if self.output.uncertainties:
                os.replace(uncertainty_path(case[IMAGE], self.staging), place.uncertainty)
                one.uncertainty = str(place.uncertainty)
            os.replace(staged, place.label_map)
            if self.bundle["overwrite"]:
                self.remove_derived(one, place)
        except OSError as error:
            raise ResourceError(f"{place.label_map} was not written ({error}): choose another output folder") from error
        one.label_map = str(place.label_map)
        self.keep_picture(one, picture, place.preview)
        adaptation = {} if one.adaptation is None else {"adaptation": one.adaptation["used"]}
        adaptation |= {} if one.adaptation is None else {"gain": one.adaptation["gain"]}
        return [{"case": one.case, **row, **adaptation} for row in rows]

    def remove_derived(self, one: Prediction, place: Place) -> None:
        """Remove what was made of an earlier label map and is not written now; `keep_picture` sees to the picture."""
        segmentation = place.segmentation if one.series is not None else None  # without a series it is somebody else's
        for path, written in (
            (place.probabilities, one.probabilities),
            (place.uncertainty, one.uncertainty),
            (segmentation, one.segmentation),
        ):
            if path is not None and written is None:
                path.unlink(missing_ok=True)

    def draw(self, one: Prediction, case: Mapping[str, Any], label_map: Path) -> Path | None:
        """A picture among the unfinished files; ``None`` for none, or if that fails: the scan is done all the same."""
        if not self.output.previews:
            return None
        picture = self.staging / "picture.png"
        try:
            labels = read_nifti(label_map)  # on the scan's grid
            grey = read_nifti(case[IMAGE]).voxels
            name, body = Path(case[IMAGE]).name, not is_picture(case[IMAGE])
            draw_preview(grey, labels.voxels, labels.affine, self.bundle.names, name, picture, body)
        except Exception as error:
            self.without_picture(one, error)
            return None
        return picture

    def keep_picture(self, one: Prediction, picture: Path | None, place: Path) -> None:
        """Take away the picture of the label map before, and give the new one its name."""
        try:
            if self.bundle["overwrite"]:
                place.unlink(missing_ok=True)
            if picture is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(picture, place)
                one.preview = str(place)
        except OSError as error:
            self.without_picture(one, error)

    def without_picture(self, one: Prediction, error: Exception) -> None:
        """Note that a scan's picture is missing; its label map is not affected."""
        one.message = f"its picture is missing, or of an earlier run: {type(error).__name__}"
        logger.warning(f"{one.place or one.scan}: {one.message} ({error}); its label map is written")
