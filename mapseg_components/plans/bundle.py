# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle that ``mapseg adapt`` makes: configs of the shipped bundles with method, preset and plan put in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from monai.utils import ensure_tuple_rep

from mapseg_components.configs import check_numbers
from mapseg_components.errors import ConfigError
from mapseg_components.files import write_json
from mapseg_components.plans.components import TITLES
from mapseg_components.plans.extents import describe_size
from mapseg_components.plans.federation import federation_names
from mapseg_components.plans.label_maps import add_synthetic_validation
from mapseg_components.plans.recipes import ADAPTATION, ANY_ORDER, INITIAL, Recipe, read_recipe, recipe_names
from mapseg_components.plans.rounds import options_of
from mapseg_components.plans.sizes import FILTERS_NNUNET, PRESETS, plan_unet, settings_of
from mapseg_components.shipped_files import bundles_folder

__all__ = [
    "check_names",
    "check_network",
    "configs_of",
    "of_method",
    "overlaid",
    "settled",
    "unlearnt",
    "write_bundle",
    "write_device",
]

PRETRAINING = "mapseg_pretraining"
LABELLING = "pseudo_labels.yaml"  # of inference, for stages of pseudo labels
UNETS = ("GlobalLocalUNet", "UNetMAE")  # those that begin at half the resolution
SIZES = {"width", "depth", "stride", "dilations", "head_channels", "dropout"}  # of MAPSeg's network
# scans of inference: those of the run's target, unless dataset_dir names a folder
OWN_SCANS = {
    "dataset_dir": "@bundle_root",
    "cases": "$mapseg_components.data.datalist.all_targets(@dataset_dir + '/datalist.json') "
    "if @dataset_dir == @bundle_root else mapseg_components.data.load_scans(@dataset_dir)",
}
BESIDE = ("logging.conf", "evaluate.json", "multi_gpu_train.json")


def write_bundle(folder: Path, recipe: Recipe, plan: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Write configs, licence and a README into the folder; of label maps alone, synthetic validation scans as well.

    Args:
        folder: the new bundle.
        recipe: its method.
        plan: ``preset``, ``labels``, ``settings``, ``working_spacing_mm``, ``fine`` and ``after_network``, see
            `mapseg_components.plans.sizes`, `mapseg_components.plans.frame` and `mapseg_components.plans.components`.
        request: arguments of ``mapseg adapt``.
    """
    origin = bundles_folder() / ADAPTATION
    configs = folder / "configs"
    configs.mkdir(exist_ok=True)
    (folder / "docs").mkdir(exist_ok=True)
    own = [stage for stage in recipe.stages if stage.bundle == ADAPTATION]
    stages = {overlay for stage in own for overlay in (*stage.overlays, stage.contrasts) if overlay}
    if recipe.in_any_order() != recipe:
        stages.add(ANY_ORDER)
    if any(stage.weights for stage in own):
        stages.add(LABELLING)
    for name in {*BESIDE, *stages}:
        shutil.copyfile(origin / "configs" / name, configs / name)
    shutil.copyfile(origin / "LICENSE", folder / "LICENSE")
    train = settled(origin, "train.json", recipe, plan, request) | {"datalist": "$@bundle_root + '/datalist.json'"}
    write_json(train, configs / "train.json")
    inference = settled(origin, "inference.json", recipe, plan, request) | OWN_SCANS
    write_json(inference, configs / "inference.json")
    beside = () if "package" in plan else (PRETRAINING,)
    for name in {*beside, *bundles_of(recipe)} - {ADAPTATION}:
        other = bundles_folder() / name
        known = ConfigParser.load_config_file(other / "configs" / "train.json")
        wanted = settled(other, "train.json", recipe, plan, request)
        write_json({key: wanted[key] for key in known if wanted[key] != known[key]}, configs / config_of(name))
    asked = {key: train[key] for key in request["settings"] or {} if key in train}  # a network as it is planned
    asked.pop("device", None)  # no overlay has one, and a run may go on with another
    write_json(asked, configs / "settings.json")
    bound = ConfigParser.load_config_file(origin / "configs" / "handover.yaml")  # of the package, whatever was asked
    bound = {} if "package" in plan else bound  # what may be asked for of a package that was given was checked before
    write_json({key: value for key, value in asked.items() if key not in bound}, configs / "settings_of_target.json")
    metadata = ConfigParser.load_config_file(origin / "configs" / "metadata.json")
    write_json(described(metadata, plan, train), configs / "metadata.json")
    prepared = (
        ""
        if request["prepare"] is None
        else "The scans were prepared by `mapseg prepare` with the options "
        f"`{json.dumps(request['prepare'])}`: prepare others alike.\n\n"
    )
    of_package = "Adapted from a hand-over package, without its source; no labelled scan judged it.\n"
    of_package = of_package if "package" in plan else ""
    sized = f"{describe_size(plan['size'])}\n" if "size" in plan else ""
    readme = (
        f"# Adapted segmentation model\n\nMade by `mapseg adapt`. Method: {recipe.title}.\n{of_package}"
        f"Structures: {', '.join(plan['labels'])}.\n{sized}\n"
        "`models/model.pt` is what inference uses; `source_only.pt` and `adapted.pt` are both kept. Read\n"
        f"`report.html` before you trust it. {prepared}Research only, not for clinical use.\n"
    )
    (folder / "docs" / "README.md").write_text(readme, encoding="utf-8")
    if recipe.of_label_maps:
        add_synthetic_validation(folder)


def settled(
    bundle: Path, name: str, recipe: Recipe, plan: Mapping[str, Any], request: Mapping[str, Any]
) -> dict[str, Any]:
    """A stand-alone config of a bundle: overlays of preset and method, then plan, structures, device, user's settings.

    Args:
        bundle: folder of a shipped bundle.
        name: of the config.
        recipe: see `write_bundle`; plan and request likewise.

    Returns:
        the config's own keys, with new values.
    """
    known = set(ConfigParser.load_config_file(bundle / "configs" / "train.json"))
    config = of_method(bundle, name, recipe, plan["preset"])
    known |= set(config)
    wanted = settings_of(dict.fromkeys(known), plan["settings"])
    wanted |= {name: plan["after_network"][name] for name in TITLES}
    wanted |= {"slice_size": plan["slice_size"], "foreground_mm": plan.get("foreground_mm")}
    wanted |= {"flip_axes": plan["flip_axes"]} if recipe.mirrors else {}
    asked = request["settings"] or {}
    if "target_negative_values" in asked:
        wanted["negative_values"] = asked["target_negative_values"]
    wanted |= {"labels": plan["labels"], "seed": request["seed"], **asked}
    wanted |= device_of(request["device"])
    config = {key: wanted.get(key, value) for key, value in config.items()}
    if "package" in plan:
        return config | {"network_def": plan["network"]}
    if is_planned(config):
        own = str(config["network_def"]["_target_"]).endswith(UNETS)
        deep = config["network_def"].get("deep_supervision", False)
        filters = FILTERS_NNUNET if deep else None
        unet = plan_unet(config["patch_size"], plan["working_spacing_mm"], own and not plan["fine"], filters)
        if own:
            del unet["upsample_kernel_size"]
        if deep:  # at all resolutions but the two lowest, as nnU-Net; one at least
            unet["deep_supr_num"] = max(len(unet["strides"]) - 3, 1)
        config["network_def"] = config["network_def"] | unet | plan.get(INITIAL, {}).get("network", {})
    return config


def of_method(bundle: Path, name: str, recipe: Recipe, preset: str) -> dict[str, Any]:
    """A config of a bundle with the overlays of preset and method. Arguments as of `settled`."""
    configs = bundle / "configs"
    overlays = [*PRESETS[preset]["overlays"]]
    if bundle.name == ADAPTATION:
        overlays += [*recipe.presets.get(preset, ()), *recipe.overlays]
    base = ConfigParser.load_config_file(configs / name)
    return overlaid(base, [configs / overlay for overlay in overlays if (configs / overlay).is_file()])


def device_of(device: str) -> dict[str, str]:
    """The setting for a device; none for ``auto``, which is what the bundles have."""
    return {} if device == "auto" else {"device": f"$torch.device('{device}')"}


def write_device(folder: Path, recipe: Recipe, request: Mapping[str, Any]) -> None:
    """Write the device into the configs of a bundle whose run goes on.

    Args:
        folder: the bundle; recipe and request as for `write_bundle`.
    """
    known = ConfigParser.load_config_file(configs_of(ADAPTATION) / "train.json")
    wanted = known | (request["settings"] or {}) | device_of(request["device"])
    others = [config_of(name) for name in {PRETRAINING, *bundles_of(recipe)} - {ADAPTATION}]
    for path in (folder / "configs" / name for name in ("train.json", "inference.json", *others)):
        if path.is_file():
            write_json(json.loads(path.read_text(encoding="utf-8")) | {"device": wanted["device"]}, path)


def overlaid(base: Mapping[str, Any], overlays: Sequence[Path]) -> dict[str, Any]:
    """A config with overlays on top, as far as they are about its entries: others are of training, or of inference."""
    merged = ConfigParser(dict(base))
    for overlay in overlays:
        for key, value in ConfigParser.load_config_file(overlay).items():
            if key.lstrip("+").partition("#")[0] in base:
                merge_kv(merged, key, value)
    return {key: value for key, value in merged.get().items() if key in base}


def bundles_of(recipe: Recipe) -> list[str]:
    """Names of the shipped bundles whose trainings a recipe has."""
    return list(dict.fromkeys(stage.bundle for stage in recipe.stages))


def configs_of(bundle: str) -> Path:
    """Folder of the configs of a shipped bundle."""
    return bundles_folder() / bundle / "configs"


def config_of(bundle: str) -> str:
    """Name of the config that a new bundle has for the stage of another bundle, e.g. ``pretraining.json``."""
    return f"{bundle.partition('_')[2]}.json"


def unlearnt(folder: Path, model: str) -> dict[str, Any]:
    """Settings of inference that leave out what a model has not learnt.

    Args:
        folder: the new bundle.
        model: ``source_only``, whose uncertainty is still what it began with, or another.
    """
    known = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
    return {"uncertainty_map": False} if model == "source_only" and "uncertainty_map" in known else {}


def is_planned(config: Mapping[str, Any]) -> bool:
    """Whether the network of a config is a U-Net, whose kernels and strides are planned."""
    network = config.get("network_def")  # that of a translation is an expression
    return isinstance(network, Mapping) and str(network.get("_target_")).endswith(("DynUNet", *UNETS))


def check_names(settings: Mapping[str, Any], recipe: Recipe | None = None) -> None:
    """Refuse settings that no bundle has, nor any recipe, and text in the place of numbers. Raises `ConfigError`."""
    if "labels" in settings:
        raise ConfigError("settings has labels, which the whole plan follows from: give them as the argument labels")
    names = dict.fromkeys((ADAPTATION, PRETRAINING, *(bundles_of(recipe) if recipe is not None else ())))
    configs = [configs_of(name) / "train.json" for name in names] + [configs_of(ADAPTATION) / "inference.json"]
    known = {name for method in recipe_names() for name in options_of(read_recipe(method))} | federation_names()
    for config in map(ConfigParser.load_config_file, configs):
        check_numbers(settings, config)
        known |= set(config)
    unknown = set(settings) - known
    if unknown:
        raise ConfigError(f"settings {sorted(unknown)} are in no bundle: correct their names")


def check_network(recipe: Recipe, plan: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Refuse sizes of MAPSeg's network where preset or method have a planned one. Raises `ConfigError`."""
    if "package" in plan:
        return
    config = settled(bundles_folder() / ADAPTATION, "train.json", recipe, plan, request)
    others = [name for name in bundles_of(recipe) if name not in (ADAPTATION, PRETRAINING)]
    theirs = {key for name in others for key in ConfigParser.load_config_file(configs_of(name) / "train.json")}
    without_effect = sorted((set(request["settings"] or {}) & SIZES) - theirs)
    if is_planned(config) and without_effect:
        raise ConfigError(
            f"settings {without_effect} are of the paper's network, and preset {plan['preset']} or method "
            f"{recipe.name} has a U-Net, planned from patch_size and spacing: leave them out, or set network_def too"
        )


def described(metadata: dict[str, Any], plan: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the new bundle."""
    channels = {"0": "background", **{str(i): name for i, name in enumerate(plan["labels"], start=1)}}
    if is_planned(train):
        steps = [2 * step for step in reductions(train["network_def"]["strides"])]
    else:
        steps = [2 * step for step in plan["settings"]["stride"]]  # one voxel of features cannot be normalised
    begun = plan.get(INITIAL, {}).get("bundle")
    sizes = [f"{step}*n" if side > 1 else 1 for step, side in zip(steps, train["patch_size"])]
    metadata = {
        **metadata,
        "name": "Adapted segmentation model",
        "description": f"Made by mapseg adapt for {', '.join(plan['labels'])}.",
        "data_source": "scans of the person who made it" + (f", after {begun} (see docs)" if begun else ""),
        "image_classes": "one channel scaled to [0, 1]",
        "label_classes": f"one channel, 0 background, then {', '.join(plan['labels'])}",
        "pred_classes": f"{len(channels)} channels: {', '.join(channels.values())}",
    }
    formats = metadata["network_data_format"]
    formats["inputs"]["image"]["spatial_shape"] = formats["outputs"]["pred"]["spatial_shape"] = sizes
    formats["outputs"]["pred"] |= {"num_channels": len(channels), "channel_def": channels}
    return metadata


def reductions(strides: Sequence[int | Sequence[int]]) -> list[int]:
    """Product of the strides of all levels along each axis; a number is of all three."""
    product = [1, 1, 1]
    for level in strides:
        product = [one * step for one, step in zip(product, ensure_tuple_rep(level, 3))]
    return product
