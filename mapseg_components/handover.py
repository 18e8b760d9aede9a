# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The hand-over package: all that a target site gets from a source site, and no image (MAPSeg, section 3.6).

A package is a folder of two files::

    weights.pt      the segmenter's weights, tensors only
    handover.json   network settings, label table, voxel size, checksum of the weights, source validation Dice,
                    volumes of the structures (rounded, over several scans), versions

A folder and not an archive: a person can read ``handover.json`` before it is sent, and every tool that takes weights
takes ``weights.pt`` as it is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn

from mapseg_components import __version__
from mapseg_components.checkpoints import fingerprint, load_weights, read_checked, weights_of, write_atomic
from mapseg_components.data import median_spacing, structure_sizes
from mapseg_components.errors import CheckpointError, ConfigError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.keys import IMAGE, LABEL
from mapseg_components.structures import structures_of

__all__ = ["HandoverPackage", "SourceOnlyWeights", "volume_priors", "write_handover"]

logger = logging.getLogger(__name__)

SCHEMA = 1
FAR = 1.3  # ratio of voxel sizes; training scales the target by as much
MANIFEST, WEIGHTS = "handover.json", "weights.pt"
LARGEST_MANIFEST = 2**20  # bytes; a real one has a few thousand
COPY_AGAIN = "copy the whole package again"
NEGATIVE_VALUES = (None, "clip", "shift", "keep")


def is_whole(lowest: int, highest: int) -> Callable[[Any], bool]:
    """Predicate: an integer within bounds, and no boolean."""
    return lambda value: type(value) is int and lowest <= value <= highest


def is_sized(lowest: int, highest: int) -> Callable[[Any], bool]:
    """Predicate: such an integer, or one per axis."""
    one = is_whole(lowest, highest)
    return lambda value: one(value) or (isinstance(value, list) and len(value) == 3 and all(map(one, value)))


def is_number(lowest: float, highest: float) -> Callable[[Any], bool]:
    """Predicate: a finite number within bounds."""
    return lambda value: type(value) in (int, float) and lowest <= value <= highest


def is_dilations(value: Any) -> bool:
    """Predicate: one to eight dilations, each a number or one per axis."""
    return isinstance(value, list) and 0 < len(value) <= 8 and all(map(is_sized(1, 1024), value))


def is_range(value: Any) -> bool:
    """Predicate: two factors."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number(0.01, 100), value))


# what a package says about network, preprocessing and the target side of training, and which values are possible
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "in_channels": is_whole(1, 64),
    "patch_size": is_sized(1, 1024),
    "width": is_whole(1, 8192),
    "depth": is_whole(1, 256),
    "stride": is_sized(1, 64),
    "dilations": is_dilations,
    "head_channels": is_whole(1, 8192),
    "dropout": is_number(0, 1),
    "percentile": is_number(0, 100),
    "percentile_foreground": lambda value: isinstance(value, bool),
    "window_stride": is_sized(1, 1024),
    "window_weighting": lambda value: value in ("constant", "gaussian"),
    "source_negative_values": lambda value: value in NEGATIVE_VALUES,
    "target_negative_values": lambda value: value in NEGATIVE_VALUES,
    "target_scale_range": is_range,
    "target_rotation_deg": is_number(0, 180),
    "mask_ratio": is_number(0, 1),
    "mask_value": lambda value: value in (None, "mean") or is_number(-1e6, 1e6)(value),
    "local_block_size": is_sized(1, 1024),
    "global_block_size": is_sized(1, 1024),
}
# settings that decide what the weights mean; a target site may set the others otherwise
BINDING = (
    *("in_channels", "patch_size", "width", "depth", "stride", "dilations", "head_channels"),
    *("percentile", "percentile_foreground"),
)


def write_handover(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    network: nn.Module,
    settings: Mapping[str, Any],
    labels: Mapping[str, int],
    evaluator: Evaluator,
    cases: Sequence[Mapping[str, Any]],
    min_scans: int,
) -> None:
    """Validate weights on the source's validation scans and write them as a package.

    ``handover.json`` is written last: a package that was interrupted half way is refused by its checksum.

    Args:
        folder: the package; an earlier one there is replaced.
        weights: file of the segmenter's weights, e.g. ``source_only.pt``. They are loaded into ``network``.
        network: the segmenter that ``evaluator`` runs.
        settings: values of all of `SETTINGS`.
        labels: structure name to label value.
        evaluator: of the source's validation scans; its key metric is MONAI's ``MeanDice`` with details.
        cases: labelled source scans, for `volume_priors`.
        min_scans: see `volume_priors`.

    Raises:
        ConfigError: a setting is missing or out of bounds, or a scan count below 2 is asked for.
        CheckpointError: the weights are missing, damaged or of another network.
        ResourceError: the folder cannot be written.
    """
    folder = Path(folder)
    if min_scans < 2:
        raise ConfigError(f"handover_min_scans is {min_scans}: figures of one scan must not leave, set 2 or more")
    load_weights(network, weights)
    labels = structures_of(labels)
    content = {
        "schema": SCHEMA,
        "weights": {"fingerprint": fingerprint(network)},
        "settings": {name: plain(settings.get(name)) for name in SETTINGS},
        "labels": dict(labels),
        "spacing_mm": median_spacing([case[LABEL] for case in cases]),
        "source_validation": validation_dice(evaluator, list(labels)),
        "volumes": volume_priors(cases, labels, min_scans),
        "versions": {
            "mapseg_components": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "monai": monai.__version__,
        },
    }
    write_atomic(weights_of(network), folder / WEIGHTS)
    content["weights"]["sha256"] = sha256_of(folder / WEIGHTS)
    check_content(content, folder / MANIFEST)
    write_json(content, folder / MANIFEST)
    logger.info(
        f"Wrote the hand-over package {folder}: source validation Dice {content['source_validation']['mean']}, "
        f"sha256 of {MANIFEST} {sha256_of(folder / MANIFEST)}."
    )


def validation_dice(evaluator: Evaluator, names: Sequence[str]) -> dict[str, Any]:
    """Run an evaluator; mean Dice per structure over the scans that have it, three decimals, ``None`` without any."""
    evaluator.run()
    key = evaluator.state.key_metric_name
    per_scan = evaluator.state.metric_details[key].double().cpu()  # (scans, structures), NaN where absent
    means = [None if bool(column.isnan().all()) else float(column.nanmean()) for column in per_scan.T]
    known = [value for value in means if value is not None]
    return {
        "metric": "Dice",
        "scans": len(per_scan),
        "mean": round(sum(known) / len(known), 3) if known else None,
        "structures": {name: None if mean is None else round(mean, 3) for name, mean in zip(names, means, strict=True)},
    }


def volume_priors(cases: Sequence[Mapping[str, Any]], labels: Mapping[str, int], min_scans: int) -> dict[str, Any]:
    """Volumes of the structures over labelled scans, rounded so that no single scan can be read off.

    Args:
        cases: with ``label``, a file.
        labels: structure name to label value.
        min_scans: a structure that fewer scans have is ``None``.

    Returns:
        ``min_scans`` and ``structures``: for each the number of scans that have it, and of ``volume_mm3`` and ``share``
        (of the voxels of all structures in its scan) mean, standard deviation and range; two significant digits, the
        range rounded outward.
    """
    sizes = structure_sizes(cases, labels)
    structures: dict[str, Any] = {}
    for name in labels:
        present = [scan for scan in sizes if scan[name][0] > 0]
        if len(present) < min_scans:
            structures[name] = None
            continue
        volumes = np.array([scan[name][1] for scan in present])
        shares = np.array([scan[name][0] / sum(voxels for voxels, _ in scan.values()) for scan in present])
        structures[name] = {"scans": len(present), "volume_mm3": rounded(volumes), "share": rounded(shares)}
    return {"min_scans": min_scans, "structures": structures}


def rounded(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and range of positive numbers to two significant digits, the range outward."""
    low, high = float(values.min()), float(values.max())
    ends = [
        step(end / 10.0 ** (exponent := math.floor(math.log10(end)) - 1)) * 10.0**exponent
        for step, end in ((math.floor, low), (math.ceil, high))
    ]
    figures = [float(f"{value:.2g}") for value in (values.mean(), values.std(ddof=1), *ends)]
    return {"mean": figures[0], "sd": figures[1], "range": figures[2:]}


class HandoverPackage:
    """A package as the target site reads it: nothing is opened before it is asked for, nothing in it is executed.

    It belongs into the ``save_dict`` of ``TrainingCheckpoint``: a run does not resume from another package.

    Args:
        folder: the package.

    Raises:
        ConfigError: ``handover.json`` is damaged, newer than this version, or holds impossible values.
        CheckpointError: a file is missing, or the weights' checksum differs.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @cached_property
    def content(self) -> dict[str, Any]:
        """Checked content of ``handover.json``."""
        path = self.folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"no hand-over package at {self.folder} ({MANIFEST} is missing): {COPY_AGAIN}")
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, expected a few thousand: {COPY_AGAIN}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ConfigError(f"{path} is no valid JSON ({reason}): {COPY_AGAIN}") from error
        check_content(content, path)
        dice = content["source_validation"]
        logger.info(
            f"Hand-over package {self.folder}: {len(content['labels'])} structures, source validation Dice "
            f"{dice['mean']} on {dice['scans']} scans, sha256 of {MANIFEST} {sha256_of(path)}."
        )
        return content

    @property
    def labels(self) -> dict[str, int]:
        """Structure name to label value, in the order of the network's classes, background left out."""
        return dict(self.content["labels"])

    @property
    def settings(self) -> dict[str, Any]:
        """Values of all of `SETTINGS`."""
        settings = dict(self.content["settings"])
        if settings.get("mask_value") is None:  # a package of an earlier version
            settings["mask_value"] = 0.0
        return settings

    @cached_property
    def weights(self) -> str:
        """Path of the weights, after their checksum was compared."""
        path, expected = self.folder / WEIGHTS, self.content["weights"]["sha256"]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from the hand-over package: {COPY_AGAIN}")
        found = sha256_of(path)
        if found != expected:
            raise CheckpointError(f"{path} has sha256 {found}, {MANIFEST} says {expected}: {COPY_AGAIN}")
        return str(path)

    def require(self, labels: Mapping[str, int], settings: Mapping[str, Any], network: nn.Module) -> None:
        """Refuse a run that is not the package's: its label table, settings and network must be equal.

        Args:
            labels: of the run, in order. settings: of the run; those of `BINDING` must be the package's.
            network: the run's segmenter.

        Raises:
            ConfigError: names each setting, found and expected.
            CheckpointError: the networks' fingerprints differ all the same.
        """
        path = self.folder / MANIFEST
        pairs = [("labels", list(structures_of(labels).items()), list(self.labels.items()))]
        pairs += [(name, plain(settings.get(name)), self.settings[name]) for name in BINDING]
        differing = [
            f"{name} is {found}, the package has {expected}" for name, found, expected in pairs if found != expected
        ]
        if differing:
            raise ConfigError(
                f"this run does not fit {path}: {'; '.join(differing)}: leave these settings to the package "
                "(put handover.yaml after all overlays that have them), or ask for another package"
            )
        found, expected = fingerprint(network), self.content["weights"]["fingerprint"]
        if found != expected:
            raise CheckpointError(
                f"{path} is of a network with fingerprint {expected}, its settings make {found}: "
                f"{COPY_AGAIN}, or use the mapseg_components {self.content['versions'].get('mapseg_components')} "
                "that wrote it"
            )

    def compare_spacing(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Warn if the target's median voxel size is far from the source's: scans are not resampled."""
        found, expected = median_spacing([case[IMAGE] for case in cases]), self.content["spacing_mm"]
        if any(max(own, other) > FAR * min(own, other) for own, other in zip(found, expected)):
            logger.warning(
                f"{cases[0][IMAGE]} and the other target scans have a median spacing of {found} mm, the source had "
                f"{expected} mm: structures look larger or smaller than the weights know them; resample the scans."
            )

    def state_dict(self) -> dict[str, str]:
        """Checksum of the weights."""
        return {"sha256": self.content["weights"]["sha256"]}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare with what `state_dict` returned. Raises `ValueError` for another package."""
        if state["sha256"] != self.state_dict()["sha256"]:
            raise ValueError(f"the run began with weights {state['sha256']}, {self.folder} has {self.state_dict()}")


class SourceOnlyWeights:
    """Keep the package's weights as ``source_only.pt`` beside what adaptation writes: the baseline to compare with.

    Attach it after ``TrainingCheckpoint``, which renames the files of a run before.

    Args:
        package: the package. save_dir: folder of the files.
    """

    def __init__(self, package: HandoverPackage, save_dir: str) -> None:
        self.package = package
        self.save_dir = Path(save_dir)

    def attach(self, engine: Engine) -> None:
        """Write at ``Events.STARTED``, unless a resumed run finds it there."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        path, record = self.save_dir / "source_only.pt", self.save_dir / "model_selection.json"
        if idist.get_rank() != 0:
            return
        content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if path.is_file() and path.name in content:
            return
        write_atomic(read_checked(self.package.weights), path)
        dice = self.package.content["source_validation"]["mean"]
        content[path.name] = {"weights": "hand-over package", "source_dice": dice, **self.package.state_dict()}
        write_json(content, record)


def check_content(content: Any, path: Path) -> None:
    """Refuse what is no content of a package that this version can read. Raises `ConfigError`."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int:
        raise ConfigError(f"{path} is no hand-over package (no number as 'schema'): {COPY_AGAIN}")
    if schema != SCHEMA:
        remedy = "update mapseg_components" if schema > SCHEMA else "ask the source site for a new package"
        raise ConfigError(f"{path} has schema {schema}, this version reads {SCHEMA}: {remedy}")
    parts = ("weights", "settings", "labels", "source_validation", "volumes", "versions")
    wrong = [name for name in parts if not isinstance(content.get(name), dict)]
    if not wrong:
        wrong += [
            f"settings#{name}" for name, is_right in SETTINGS.items() if not is_right(content["settings"].get(name))
        ]
        wrong += [f"weights#{name}" for name in ("sha256", "fingerprint") if not is_hex(content["weights"].get(name))]
        spacing = content.get("spacing_mm")
        is_spacing = isinstance(spacing, list) and len(spacing) == 3 and all(map(is_number(0.001, 1000), spacing))
        wrong += [] if is_spacing else ["spacing_mm"]
        wrong += [] if is_label_table(content["labels"]) else ["labels"]
        dice = content["source_validation"]
        wrong += [] if dice.get("mean") is None or is_number(0, 1)(dice["mean"]) else ["source_validation#mean"]
        wrong += [] if is_whole(1, 10**6)(dice.get("scans")) else ["source_validation#scans"]
    if wrong:
        found = "; ".join(f"{name} is {shown(content, name)}" for name in wrong[:5])
        raise ConfigError(f"{path} has missing or impossible values ({found}): {COPY_AGAIN}")


def is_label_table(table: Mapping[Any, Any]) -> bool:
    """Predicate: printable names of different positive values."""
    names = all(isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100 for name in table)
    return 0 < len(table) <= 1024 and names and all(map(is_whole(1, 2**31), table.values())) and unique(table.values())


def unique(values: Any) -> bool:
    """Whether no value occurs twice."""
    return len(set(values)) == len(values)


def is_hex(value: Any) -> bool:
    """Predicate: lower-case hexadecimal digits."""
    return isinstance(value, str) and 0 < len(value) <= 64 and set(value) <= set("0123456789abcdef")


def shown(content: Mapping[str, Any], name: str) -> str:
    """A value (``a#b``) for a message, cut short."""
    value: Any = content
    for key in name.split("#"):
        value = value.get(key, "absent")
    return repr(value)[:80]


def plain(value: Any) -> Any:
    """A setting as JSON has it: sequences as lists."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
