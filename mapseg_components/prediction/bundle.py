# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's inference config as ``mapseg predict`` runs it: read, checked, and extended by the options."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components import __version__
from mapseg_components.configs import check_numbers, check_settings
from mapseg_components.errors import ConfigError
from mapseg_components.files import sha256_of
from mapseg_components.inferers.onnx_runtime import require_onnxruntime
from mapseg_components.keys import CONFIDENCE, IMAGE, PRED, PROBABILITIES
from mapseg_components.networks import has_uncertainty
from mapseg_components.scans.segmentation import Algorithm
from mapseg_components.shipped_files import shipped_bundles
from mapseg_components.sides import axis_across
from mapseg_components.structures import structures_of
from mapseg_components.transforms import named_classes
from mapseg_components.transforms.components import AFTER_NETWORK

__all__ = ["ONNX", "SAVING", "InferenceBundle", "open_bundle", "read_bundle"]

SAVING, READER, SPLIT = "SaveLabelMapd", "mapseg_components.data.NiftiReader", "Uncertaintyd"
PYTORCH, ONNX = "pytorch", "onnx"  # backends
LARGEST = "largest_component"
MAP = "uncertainty_map"
NEEDED = ("cases", "scans", "dataset", "labels", "network_def", "inferer", "postprocessing", "evaluator")
# parts of a bundle's config that this command does itself: weights once for all scans, tables with confidence, progress
OWN_HANDLERS = ("WeightsLoader", "VolumesTable", "ProgressBar")
# settings that say where and how fast, not what is computed
NOT_RECIPE = {
    *("bundle_root", "ckpt_dir", "output_dir", "dataset_dir", "cases", "weights", "device", "overwrite", "audit"),
    *("audit_file", "num_workers", "imports", "initialize", "run", "stitching_device", "window_batch_size"),
}


class InferenceBundle:
    """The inference config of a bundle with the structures and weights of a run.

    Args:
        parser: the config, with overlays, settings and options.
        names: structures, in the order of their class indices from 1.
        members: files of weights; several are averaged.
    """

    def __init__(self, parser: ConfigParser, names: Sequence[str], members: Sequence[str]) -> None:
        self.parser, self.names, self.members = parser, list(names), list(members)
        parser["weights"] = self.members[0]

    def __getitem__(self, name: str) -> Any:
        """A part of the config as an object or value."""
        return self.parser.get_parsed_content(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Replace a part of the config; all parts are made anew when they are next asked for."""
        self.parser[name] = value

    @property
    def postfix(self) -> str:
        """What follows a scan's name in the name of its label map."""
        return str(self["output_postfix"])

    @property
    def uncertainty(self) -> bool:
        """Whether it writes maps of uncertainty."""
        return bool(self[MAP]) if MAP in self.parser.config else False

    @property
    def version(self) -> str | None:
        """Version in the bundle's metadata."""
        return (self.parser.config.get("_meta_") or {}).get("version")

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

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The settings that decide what is computed, as plain values."""
        recipe = {key: value for key, value in self.parser.config.items() if key not in NOT_RECIPE and key != "_meta_"}
        if isinstance(recipe["inferer"], dict):  # files of an ensemble are listed among the weights, with checksums
            recipe["inferer"] = {key: value for key, value in recipe["inferer"].items() if key != "weights"}
        return json.loads(json.dumps(recipe, sort_keys=True, default=repr))

    @property
    def algorithm(self) -> Algorithm:
        """What made the label maps, for a DICOM Segmentation."""
        meta = self.parser.config.get("_meta_") or {}
        name = str(meta.get("name") or Path(self["bundle_root"]).name)
        digests = "+".join((one["sha256"] or "unknown")[:16] for one in self.weights)
        return Algorithm(name, str(self.version or "unknown"), __version__, digests)


def open_bundle(
    home: Path,
    overlays: Sequence[str],
    settings: Mapping[str, Any],
    weights: Sequence[str],
    keep_largest: Sequence[str],
    flip_tta: bool,
    probabilities: bool,
    uncertainty: bool = False,
    backend: str = PYTORCH,
) -> InferenceBundle:
    """A bundle, ready to run; without options its label maps are those of its own config.

    Args:
        home: its folder.
        overlays: config files on top of ``inference.json``; names without a folder are the bundle's.
        settings: values on top of those.
        weights: files; empty for what the bundle names. Several are averaged.
        keep_largest: structures of which only the largest connected part is kept, or ``["all"]``.
        flip_tta: average with the result of the left-right mirrored scan.
        probabilities: give the probabilities of all classes, too.
        uncertainty: give the uncertainty of each voxel, too; by default what the bundle says.
        backend: ``pytorch`` or ``onnx``, see `mapseg_components.inferers.OnnxInferer`.

    Raises:
        ConfigError: bundle, overlay, setting or structure is unknown, or an option does not suit the bundle.
    """
    parser = read_bundle(home, overlays, settings)
    labels = structures_of(parser.get_parsed_content("labels"))
    names = list(labels)
    for setting, check in AFTER_NETWORK.items():  # before any scan is segmented
        if setting in parser.config:
            check(setting, parser.get_parsed_content(setting), labels)
    members = list(weights) or [str(parser.get_parsed_content("weights"))]
    if uncertainty:
        show_uncertainty(parser, home)
    if backend != PYTORCH:
        compute_by(backend, parser, members)
    extend(parser, names, members, kept_structures(keep_largest, names), flip_tta, probabilities)
    return InferenceBundle(parser, names, members)


def compute_by(backend: str, parser: ConfigParser, members: Sequence[str]) -> None:
    """Let ONNX Runtime compute a bundle's network.

    Args:
        backend: its name.
        parser: the bundle's config.
        members: files of weights.

    Raises:
        ConfigError: the backend is unknown or not installed, there are several weights, or the network is shown a
            global view.
    """
    if backend != ONNX:
        raise ConfigError(f"backend is {backend!r}, expected {PYTORCH} or {ONNX}")
    if len(members) > 1:
        raise ConfigError(f"backend {ONNX} computes one network, and {len(members)} weights are given: name one file")
    if "global_view" in parser.config and parser.get_parsed_content("global_view"):
        raise ConfigError(
            f"backend {ONNX} computes networks of one image, and this bundle's is shown a global view as well: leave "
            "out backend"
        )
    require_onnxruntime()  # before any scan is read
    parser["amp"] = None  # a graph traced in bf16 is none of float32
    parser["inferer"] = {"_target_": "mapseg_components.inferers.OnnxInferer", "inferer": parser.config["inferer"]}


def show_uncertainty(parser: ConfigParser, home: Path) -> None:
    """Let a bundle write its network's uncertainty. Raises `ConfigError` if there is none."""
    network = parser.get_parsed_content("network_def")
    if not has_uncertainty(network):
        raise ConfigError(
            f"the network of bundle {home} ({type(network).__name__}) has no uncertainty head: leave out uncertainty, "
            "or train a model that has one (mapseg adapt --method buda_seg)"
        )
    if MAP not in parser.config:
        raise ConfigError(f"{home / 'configs' / 'inference.json'} has no {MAP}: make the bundle anew by this version")
    parser[MAP] = True


def read_bundle(bundle: Path, overlays: Sequence[str], settings: Mapping[str, Any]) -> ConfigParser:
    """A bundle's ``inference.json`` with overlays and settings on top.

    Raises:
        ConfigError: there is no such bundle or overlay, it has no part that is needed, or a setting is unknown
            or text in the place of a number.
    """
    configs = bundle / "configs"
    files = [configs / "inference.json"]
    files += [Path(name) if Path(name).parent != Path(".") else configs / name for name in overlays]
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"no config at {file}: set bundle to the folder of a bundle or one of {shipped_bundles()}, overlays to "
                "its config files"
            )
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    if (configs / "metadata.json").is_file():
        parser.read_meta(str(configs / "metadata.json"))
    missing = [name for name in NEEDED if name not in parser.config]
    if missing:
        raise ConfigError(f"{files[0]} has no {', '.join(missing)}: predict runs bundles of MAPSeg segmenters")
    check_numbers(settings, parser.config)
    for name, value in settings.items():
        parser[name] = value
    asked = {key: value for key, value in parser.config.items() if key != "_meta_"}
    check_settings(asked, configs, parser.locator)
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
    if kept and LARGEST in parser.config:
        own = parser.get_parsed_content(LARGEST)
        parser[LARGEST] = [*own, *(names[one - 1] for one in kept if names[one - 1] not in own)]
    handlers, postprocessing = parser.config.get("handlers", []), parser.config["postprocessing"]
    if not isinstance(handlers, list) or not isinstance(postprocessing, dict) or "transforms" not in postprocessing:
        raise ConfigError("the bundle's handlers are no list, or its postprocessing has no list of transforms")
    parser["handlers"] = [one for one in handlers if not target_of(one).endswith(OWN_HANDLERS)]
    flip_axes = []
    if flip_tta:
        frame = parser.get_parsed_content("working_directions") if "working_directions" in parser.config else None
        flip_axes = [axis_across("flip_tta", names, frame)]
    if flip_tta or len(members) > 1:
        parser["inferer"] = {
            "_target_": "mapseg_components.inferers.AveragingInferer",
            "inferer": parser.config["inferer"],
            "weights": list(members[1:]),
            "flip_axes": flip_axes,
        }
    parser["preprocessing"] = with_reader(parser.config.get("preprocessing"))
    steps = list(postprocessing["transforms"])
    saving = next((i for i, one in enumerate(steps) if target_of(one).endswith(SAVING)), None)
    if saving is None:
        raise ConfigError("the bundle's postprocessing has no SaveLabelMapd: predict cannot tell what it writes")
    first = [one for one in steps[:1] if target_of(one).endswith(SPLIT)]  # logits and uncertainty
    steps, saving = steps[len(first) :], saving - len(first)
    before = [*first, {"_target_": "mapseg_components.transforms.Confidenced", "keys": [PRED]}]
    maps = [CONFIDENCE]
    if probabilities:
        before.append({"_target_": "mapseg_components.transforms.Probabilitiesd", "keys": [PRED]})
        maps.append(PROBABILITIES)
    invert = {"_target_": "Invertd", "keys": maps, "transform": "@preprocessing", "orig_keys": [IMAGE] * len(maps)}
    after: list[dict[str, Any]] = [{**invert, "nearest_interp": True, "to_tensor": True}]
    if kept and LARGEST not in parser.config:  # a bundle of an earlier version
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


def kept_structures(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class indices of named structures. Raises `ConfigError` for an unknown name, or without scikit-image."""
    wanted = list(names) if list(wanted) == ["all"] else list(wanted)
    return named_classes("keep_largest", wanted, {name: value for value, name in enumerate(names, start=1)})
