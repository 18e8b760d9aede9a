# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The target site's half: a package as it is read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from mapseg_components.checkpoints import fingerprint, read_checked, write_atomic
from mapseg_components.data import median_spacing
from mapseg_components.errors import CheckpointError, ConfigError
from mapseg_components.files import sha256_of, write_json
from mapseg_components.handover.fragments import faults_of_fragment, faults_of_value, network_of, plain
from mapseg_components.inferers.trial import TARGET_INVERTED
from mapseg_components.keys import IMAGE
from mapseg_components.structures import structures_of
from mapseg_components.transforms.components import AFTER_NETWORK

__all__ = ["HandoverPackage", "SourceOnlyWeights", "check_content"]

logger = logging.getLogger(__name__)

SCHEMA = 2
FAR = 1.3  # ratio of voxel sizes; training scales the target by as much
MANIFEST, WEIGHTS = "handover.json", "weights.pt"
PARTS = ("preprocessing", "training")  # of the settings
LARGEST_MANIFEST = 2**20  # bytes; a real one has a few thousand
COPY_AGAIN = "copy the whole package again"


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
        validated = f"{dice['mean']} on {dice['scans']} scans" if dice["scans"] else "unknown"
        logger.info(
            f"Hand-over package {self.folder}: {len(content['labels'])} structures, source validation Dice "
            f"{validated}, sha256 of {MANIFEST} {sha256_of(path)}."
        )
        return content

    @property
    def labels(self) -> dict[str, int]:
        """Structure name to label value, in the order of the network's classes, background left out."""
        return dict(self.content["labels"])

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """``preprocessing`` and ``training``, each name to value."""
        return {part: Settings(self.content["settings"][part]) for part in PARTS}

    @property
    def share_ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest share of each structure among the source's, for `mapseg_components.handlers.ShareLimits`.

        Rounded outward; a structure of which too few scans may tell is left out.
        """
        found: dict[str, tuple[float, float]] = {}
        structures = self.content["volumes"].get("structures")
        for name in self.labels if isinstance(structures, dict) else ():
            share = structures[name].get("share") if isinstance(structures.get(name), dict) else None
            ends = share.get("range") if isinstance(share, dict) else None
            if isinstance(ends, list) and len(ends) == 2 and all(map(is_number(0, 1.1), ends)) and ends[0] <= ends[1]:
                found[name] = (ends[0], min(ends[1], 1.0))
        return found

    @property
    def after_network(self) -> Settings:
        """Which components of structures are kept and whose holes are filled, by setting of a bundle's inference; empty
        where the package does not say."""
        after = {"largest_component": [], "kept_components": {}, "fill_holes": []}
        return Settings({**after, **self.content.get("after_network", {})})

    @cached_property
    def network(self) -> nn.Module:
        """The network that the weights belong to, with random weights; the same object each time.

        Raises:
            CheckpointError: it is not the weights'; seen before memory is taken for it.
            ConfigError: it cannot be made.
        """
        fragment, expected = self.content["network"], self.content["weights"]["fingerprint"]
        found = fingerprint(network_of(fragment, "meta"))
        if found != expected:
            path = self.folder / MANIFEST
            raise CheckpointError(f"{path}: its network has fingerprint {found}, its weights {expected}: {COPY_AGAIN}")
        return network_of(fragment)

    @property
    def variance(self) -> str | None:
        """How the network's uncertainty head works, see `mapseg_components.networks.TwoHeads`; ``None`` without one."""
        return self.content["network"].get("variance")

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

    def require(
        self,
        labels: Mapping[str, int],
        settings: Mapping[str, Mapping[str, Any]],
        network: nn.Module,
        without_effect: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse a run that is not the package's: its label table, preprocessing and network must be equal.

        Args:
            labels: of the run, in order.
            settings: of the run; those of ``preprocessing`` must be the package's.
            network: the run's segmenter.
            without_effect: settings of a network that the run has beside the package's; all must be ``None``.

        Raises:
            ConfigError: names each setting, found and expected.
            CheckpointError: the networks' fingerprints differ all the same.
        """
        path = self.folder / MANIFEST
        pairs = [("labels", list(structures_of(labels).items()), list(self.labels.items()))]
        given = plain(settings["preprocessing"])
        pairs += [(name, given.get(name), value) for name, value in self.settings["preprocessing"].items()]
        pairs += [(name, value, "a network of its own") for name, value in (without_effect or {}).items() if value]
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
                f"{path} is of a network with fingerprint {expected}, this run's has {found}: "
                f"{COPY_AGAIN}, or use the mapseg_components {self.content['versions'].get('mapseg_components')} "
                "that wrote it"
            )

    def compare_spacing(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Warn if the target's median voxel size is far from the source's, unless scans are resampled to one."""
        working = self.settings["preprocessing"].get("working_spacing")
        if (working and all(working)) or self.content["spacing_mm"] is None:
            return
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


class Settings(dict[str, Any]):
    """Settings of a package by name."""

    def __missing__(self, name: str) -> Any:
        raise ConfigError(f"the hand-over package has no setting {name!r}: ask the source site for a new package")


class SourceOnlyWeights:
    """Keep the package's weights as ``source_only.pt`` beside what adaptation writes: the baseline to compare with.

    Attach it after ``TrainingCheckpoint``, which renames the files of a run before.

    Args:
        package: the package.
        save_dir: folder of the files.
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
    parts = ("weights", "network", "settings", "labels", "source_validation", "volumes", "versions")
    wrong = [name for name in parts if not isinstance(content.get(name), dict)]
    if not wrong:
        wrong += [f"settings#{part}" for part in PARTS if not isinstance(content["settings"].get(part), dict)]
        wrong += faults_of_value(content["settings"], "settings")
        wrong += faults_of_fragment(content["network"])
        wrong += [f"weights#{name}" for name in ("sha256", "fingerprint") if not is_hex(content["weights"].get(name))]
        spacing = content.get("spacing_mm")
        is_spacing = isinstance(spacing, list) and len(spacing) == 3 and all(map(is_number(1e-6, 1e6), spacing))
        unknown = "spacing_mm" in content and spacing is None  # of a bundle
        wrong += [] if is_spacing or unknown else ["spacing_mm"]
        sides = content.get("foreground_mm")  # `None`, or absent, where it is not known
        is_extent = isinstance(sides, list) and len(sides) == 3 and all(map(is_number(0.01, 10000), sides))
        wrong += [] if sides is None or is_extent else ["foreground_mm"]
        wrong += [] if type(content.get(TARGET_INVERTED, False)) is bool else [TARGET_INVERTED]  # of a bundle alone
        after = content.get("after_network", {})  # absent where it is not known
        wrong += faults_of_after(after, content["labels"]) if isinstance(after, dict) else ["after_network"]
        wrong += [] if is_label_table(content["labels"]) else ["labels"]
        wrong += faults_of_figures(content["source_validation"], content["volumes"].get("structures") or {})
    if wrong:
        found = "; ".join(f"{name} is {shown(content, name)}" for name in wrong[:5])
        untold = any(name.startswith(("source_validation", "volumes")) for name in wrong)
        instead = ", or ask for one with null in the place of figures that are not told" if untold else ""
        raise ConfigError(f"{path} has missing or impossible values ({found}): {COPY_AGAIN}{instead}")


def faults_of_figures(dice: Mapping[str, Any], structures: Any) -> list[str]:
    """Parts of ``source_validation`` and ``volumes#structures`` that are neither figures nor ``None``, for a Dice or
    the volumes of a structure that are not told."""
    wrong = [] if "mean" in dice and is_dice(dice["mean"]) else ["source_validation#mean"]
    wrong += [] if is_whole(0, 10**6)(dice.get("scans")) else ["source_validation#scans"]
    by_structure = dice.get("structures", {})  # absent where it is not known
    is_table = isinstance(by_structure, dict) and all(map(is_dice, by_structure.values()))
    wrong += [] if is_table else ["source_validation#structures"]
    if not isinstance(structures, dict):
        return [*wrong, "volumes#structures"]
    for name, one in structures.items():
        volume = one.get("volume_mm3") if isinstance(one, dict) else None
        ends = volume.get("range") if isinstance(volume, dict) else None
        is_range = (
            isinstance(ends, list) and len(ends) == 2 and all(map(is_number(0, 1e15), ends)) and ends[0] <= ends[1]
        )
        wrong += [] if one is None or is_range else [f"volumes#structures#{name}#volume_mm3"]
    return wrong


def is_dice(value: Any) -> bool:
    """Predicate: a Dice, or ``None`` where it is not told."""
    return value is None or is_number(0, 1)(value)


def faults_of_after(after: Mapping[str, Any], labels: Mapping[str, int]) -> list[str]:
    """Parts of ``after_network`` that are no lists of structures, nor numbers of components by structure."""
    wrong = []
    for name, value in after.items():
        known = isinstance(value, (list, dict)) and all(isinstance(one, str) and one in labels for one in value)
        numbers = value.values() if isinstance(value, dict) else ()
        if name not in AFTER_NETWORK or not known or not all(map(is_whole(1, 1000), numbers)):
            wrong.append(f"after_network#{name}")
    return wrong


def is_whole(lowest: int, highest: int) -> Callable[[Any], bool]:
    """Predicate: an integer within bounds, and no boolean."""
    return lambda value: type(value) is int and lowest <= value <= highest


def is_number(lowest: float, highest: float) -> Callable[[Any], bool]:
    """Predicate: a finite number within bounds."""
    return lambda value: type(value) in (int, float) and lowest <= value <= highest


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
        if isinstance(value, list):
            value = value[int(key)]
        else:
            value = value.get(key, "absent") if isinstance(value, dict) else "absent"
    return repr(value)[:80]
