# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From labelled source scans and unlabelled target scans to a bundle with an adapted model and a report."""

from __future__ import annotations

import inspect
import json
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

from mapseg_components.commands.assess import assess
from mapseg_components.commands.check import check
from mapseg_components.commands.planning import PRESETS, canonical_grid, choose_preset, plan_sizes, settings_of
from mapseg_components.commands.prepare import prepare as prepare_scans
from mapseg_components.commands.report import VERDICTS, report, require_matplotlib
from mapseg_components.commands.restore import restore
from mapseg_components.commands.shipped import bundles_folder
from mapseg_components.commands.stages import finished_epochs, run_stage, threads
from mapseg_components.data import load_datalist, load_scans
from mapseg_components.data.datalist import (
    has_section,
    labels_file,
    list_scans,
    open_datalist,
    read_json,
    scans_below,
    stem,
)
from mapseg_components.data.layouts import image_folders, labels_of_scans, misplaced
from mapseg_components.data.results import result_path
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import lock_folder, require_writable, unlock_folders, write_json
from mapseg_components.scans.facts import facts_of
from mapseg_components.scans.findings import Finding, fault, raise_findings
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.session import choose_device, versions, working
from mapseg_components.sides import refuse_sides
from mapseg_components.structures import structures_of, value_fault

__all__ = ["adapt"]

logger = logging.getLogger(__name__)

OVERLAYS = ("source_only.yaml", "from_source.yaml", "any_contrast.yaml")
MOST_LABELS = 255
NOT_ASKED = {"input", "output", "labels", "series", "overwrite", "quiet", "verbose"}  # of mapseg prepare


@dataclass
class AdaptReport:
    """Result of `adapt`.

    Args:
        folder: the new bundle. record: content of its ``run.json``: arguments, plan, seconds of each stage, the
            assessment with its verdict, the report's path.
    """

    folder: str
    record: dict[str, Any]
    exit_code = 0

    def __str__(self) -> str:
        verdict = self.record["assessment"]["verdict"]
        lines = [VERDICTS[verdict["verdict"]], *verdict["why"], "", f"Report  {self.record['report']}"]
        return "\n".join([*lines, f"Bundle  {self.folder}", f"Label maps  {self.folder}/predictions/{verdict['ship']}"])


def adapt(
    *,
    source: str,
    target: str,
    output: str,
    labels: str | Mapping[str, int] | None = None,
    preset: str = "auto",
    prepare: str | Mapping[str, Any] | None = None,
    pretraining: bool = True,
    random_contrasts: bool = True,
    validation_share: float = 0.2,
    symmetric: bool = False,
    any_position: bool = False,
    settings: str | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> AdaptReport:
    """Adapt a model to unlabelled scans: pretraining, source-only, adaptation, a choice, label maps and a report.

    The output folder becomes a bundle of its own: ``python -m monai.bundle run --config_file configs/inference.json``
    works in it. Stopped at any moment, the same command goes on where it was. No label of the target is read.

    Args:
        source: labelled scans: a datalist (JSON), a folder in the convention of docs/how-to/data.md, a folder with
            ``images`` and ``labels``, or a dataset of nnU-Net or the Medical Segmentation Decathlon (folder or
            ``dataset.json``). Without a section of validation, some cases are held out (`validation_share`).
        target: unlabelled scans: a folder of NIfTI files, one with ``images``, or a datalist.
        output: folder to write, new or of an earlier call with the same arguments.
        labels: structures and their values, as a mapping, JSON text or a JSON file such as ``dataset.json``. By default
            those of the datalist or ``dataset.json``; without, the values found in the source's label maps.
        preset: small-data-cpu, single-gpu, paper, or auto: by GPU and number of scans.
        prepare: prepare all scans first, with these options of mapseg prepare, such as '{"spacing": 1}' (or '{}'), as a
            mapping, JSON text or a JSON file; label maps come back on the target's own grids as well. By default scans
            are taken as they are.
        pretraining: masked autoencoding on all images first.
        random_contrasts: show the source in random contrasts (``any_contrast.yaml``); turn it off if source and target
            have the same contrast.
        validation_share: of the source's cases, one at least, where it names none.
        symmetric: structures are alike on both sides and not named by side: then scans are mirrored as well to see how
            sure a model is. Refused where a name has a side.
        any_position: source and target show different parts of the body: then the place of a structure in a scan says
            nothing about whether it is right.
        settings: settings of the bundles to replace, by name, as a mapping, JSON text or a JSON file; each bundle takes
            those it has.
        seed: of everything random.
        device: auto, cpu, cuda or cuda:1.
        num_threads: of PyTorch on the CPU.
        quiet: no progress bar, errors only.
        verbose: everything that is logged, and tracebacks.

    Returns:
        an `AdaptReport`.

    Raises:
        ConfigError: an argument is wrong, the folder holds another run, or matplotlib is missing.
        DataError: scans or labels cannot be used.
        ResourceError: memory, disk or permissions.
    """
    require_matplotlib()  # the last stage's need, hours later
    for name, path in (("source", source), ("target", target)):
        if not Path(path).exists():
            raise ConfigError(f"{name} {Path(path).absolute()} does not exist: correct the path")
    if not 0 < validation_share < 1:
        raise ConfigError(f"validation_share is {validation_share}, expected a share between 0 and 1")
    choose_device(device)
    request = {
        "source": str(Path(source).absolute()),
        "target": str(Path(target).absolute()),
        "labels": read_mapping("labels", labels),
        "preset": preset,
        "prepare": preparation(prepare),
        "pretraining": pretraining,
        "random_contrasts": random_contrasts,
        "validation_share": validation_share,
        "symmetric": symmetric,
        "any_position": any_position,
        "settings": read_mapping("settings", settings),
        "seed": seed,
        "device": device,
        "num_threads": num_threads,
    }
    folder = Path(output).absolute()
    require_writable(folder)
    lock_folder(folder)
    try:
        with working(num_threads, quiet, verbose):
            logger.setLevel(logging.ERROR if quiet else logging.INFO)
            return AdaptReport(str(folder), Adaptation(folder, request, quiet).run())
    finally:
        unlock_folders([folder])


class Adaptation:
    """The stages of one call of `adapt`.

    Args:
        folder: absolute, locked by this process. request: the arguments. quiet: no progress bars.
    """

    def __init__(self, folder: Path, request: dict[str, Any], quiet: bool) -> None:
        self.folder = folder
        self.request = request
        self.quiet = quiet
        self.record: dict[str, Any] = {"request": request, "versions": versions(), "seconds": {}, "done": []}
        self.bundles = bundles_folder()

    def run(self) -> dict[str, Any]:
        """Every stage that is not done yet."""
        threads(self.request["num_threads"])
        self._resume()
        if "plan" not in self.record:
            self._plan()
            self._write_bundle()
            self._save()
        logger.info(describe(self.record["plan"]))
        if "check" not in self.record:
            self._check()
            self._save()
        stages, models = self.folder / "stages", self.folder / "models"
        encoder: dict[str, Any] = {}
        if self.request["pretraining"]:
            bundle = self.bundles / "mapseg_pretraining"
            pretraining = ["configs/train.json", self.folder / "configs" / "pretraining.json"]
            self._train("pretraining", bundle, pretraining, {})
            encoder = {"encoder_weights": stages / "pretraining" / "model.pt"}
        more = ["configs/any_contrast.yaml"] if self.request["random_contrasts"] else []
        last = ["configs/settings.json"]
        configs = ["configs/train.json", *more]
        self._train("source", self.folder, [*configs, "configs/source_only.yaml", *last], encoder)
        start = {"initial_weights": stages / "source" / "source_only.pt", "diagnostics_scans": 2}
        self._train("adaptation", self.folder, [*configs, "configs/from_source.yaml", *last], start)
        weights = {
            "source_only": stages / "source" / "source_only.pt",
            "adapted": stages / "adaptation" / "model.pt",
        }
        if not weights["adapted"].is_file():
            raise ConfigError(f"{stages / 'adaptation'}: no epoch was validated: let max_epochs reach val_interval")
        if "assessment" not in self.record:
            logger.info("Comparing both models on the target, without labels ...")
            self.record["assessment"] = assess(
                str(self.folder),
                {name: str(path) for name, path in weights.items()},
                self.request["symmetric"],
                self.quiet,
                self.request["any_position"],
            )
            self._save()
        chosen = self.record["assessment"]["verdict"]["ship"]
        models.mkdir(exist_ok=True)
        for name, path in (*weights.items(), ("model", weights[chosen])):
            shutil.copyfile(path, models / f"{name}.pt")
        for name in weights:
            self._predict(name)
        self.record["report"] = report(str(self.folder))
        self._save()
        return self.record

    def _resume(self) -> None:
        path = self.folder / "run.json"
        if not path.is_file():
            own = (".run.lock", ".run.lock.json", *(["prepared"] if self.request["prepare"] is not None else []))
            others = [p.name for p in self.folder.iterdir() if p.name not in own]
            if others:
                raise ConfigError(
                    f"{self.folder} holds {sorted(others)[:3]} and no run of this command: choose a new folder"
                )
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self.request))
        changed = [
            f"{name} was {saved['request'].get(name)!r}, now {now[name]!r}"
            for name in now
            if saved["request"].get(name) != now[name] and name not in ("device", "num_threads")
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run with other arguments ({'; '.join(changed)}): repeat them, "
                "or choose a new folder"
            )
        self.record = {**saved, "request": self.request}

    def _save(self) -> None:
        write_json(self.record, self.folder / "run.json")

    def _scans(self, side: str) -> str:
        """Where the scans of the source or the target are read."""
        given = str(self.request[side])
        return given if self.request["prepare"] is None else str(self.folder / "prepared" / side)

    def _prepare(self) -> None:
        """Prepared scans of both sides; what is there already is skipped."""
        for side in ("source", "target"):
            if not Path(self.request[side]).is_dir():
                raise ConfigError(f"prepare needs {side} as a folder of scans, {self.request[side]} is none")
        for side in ("source", "target"):
            logger.info(f"Preparing the {side}'s scans ...")
            found = prepare_scans(self.request[side], self._scans(side), **self.request["prepare"], quiet=self.quiet)
            if found.exit_code:
                raise DataError(f"{side}: {found}")

    def _plan(self) -> None:
        """Cases, structures, sizes."""
        request = self.request
        self._check_names()
        if request["prepare"] is not None:
            self._prepare()
        source = self._scans("source")
        training, validation = source_cases(source, request["validation_share"], request["seed"])
        target = target_cases(self._scans("target"))
        structures = structure_names(request["labels"], request["source"], [*training, *validation])
        if request["symmetric"]:
            refuse_sides("symmetric", structures)
        grids = [grid_of(case["image"]) for case in [*training, *validation, *target]]
        preset, reason = request["preset"], "asked for"
        if preset == "auto":
            preset, reason = choose_preset(gpu_gib(request["device"]), len(grids))
        planned = plan_sizes([shape for shape, _ in grids], [spacing for _, spacing in grids], preset)
        self.record["plan"] = {
            "preset": preset,
            "reason": reason,
            "source_training": len(training),
            "source_validation": len(validation),
            "target": len(target),
            "median_shape": np.median([shape for shape, _ in grids], axis=0).tolist(),
            "median_spacing_mm": np.round(np.median([spacing for _, spacing in grids], axis=0), 3).tolist(),
            "labels": structures,
            "settings": planned,
        }
        content = {
            "labels": {"0": "background", **{str(value): name for name, value in structures.items()}},
            "source_training": training,
            "source_validation": validation,
            "target_training": target,
        }
        self._check_settings()  # before the folder belongs to this run: it stays free for the corrected command
        write_json(content, self.folder / "datalist.json")

    def _check(self) -> None:
        """Findings about all scans, for the report; what blocks a training ends the first stage."""
        asked = self.request["settings"] or {}
        found = check(
            str(self.folder / "datalist.json"),
            dropped_labels=asked.get("dropped_labels"),
            assume_orientation=asked.get("assume_orientation"),
            non_finite=asked.get("non_finite"),
            output=str(self.folder / "check"),
            overwrite=True,
            quiet=self.quiet,
        )
        self.record["check"] = {"verdict": found.verdict(), "findings": found.rows()}
        logger.info(f"Check of all scans: {found.verdict()}")

    def _write_bundle(self) -> None:
        """Configs of this run: the adaptation bundle's, with the preset's and the planned settings put in."""
        plan, origin = self.record["plan"], self.bundles / "mapseg_adaptation"
        configs = self.folder / "configs"
        configs.mkdir(exist_ok=True)
        (self.folder / "docs").mkdir(exist_ok=True)
        for name in (*OVERLAYS, "logging.conf", "evaluate.json", "multi_gpu_train.json"):
            shutil.copyfile(origin / "configs" / name, configs / name)
        shutil.copyfile(origin / "LICENSE", self.folder / "LICENSE")
        for name in ("train.json", "inference.json"):
            write_json(self._settled(origin, name, "$@bundle_root + '/datalist.json'"), configs / name)
        pretraining = self.bundles / "mapseg_pretraining"
        known = ConfigParser.load_config_file(pretraining / "configs" / "train.json")
        settled = self._settled(pretraining, "train.json", str(self.folder / "datalist.json"))
        write_json({key: settled[key] for key in known if settled[key] != known[key]}, configs / "pretraining.json")
        own = ConfigParser.load_config_file(origin / "configs" / "train.json")
        asked = {key: value for key, value in (self.request["settings"] or {}).items() if key in own}
        write_json(asked, configs / "settings.json")
        metadata = ConfigParser.load_config_file(origin / "configs" / "metadata.json")
        write_json(described(metadata, plan), configs / "metadata.json")
        prepared = (
            ""
            if self.request["prepare"] is None
            else "The scans were prepared by `mapseg prepare` with the options "
            f"`{json.dumps(self.request['prepare'])}`: prepare others alike.\n\n"
        )
        readme = (
            f"# Adapted segmentation model\n\nMade by `mapseg adapt`. Structures: {', '.join(plan['labels'])}.\n\n"
            "`models/model.pt` is what inference uses; `source_only.pt` and `adapted.pt` are both kept. Read\n"
            f"`report.html` before you trust it. {prepared}Research only, not for clinical use.\n"
        )
        (self.folder / "docs" / "README.md").write_text(readme, encoding="utf-8")

    def _settled(self, bundle: Path, name: str, datalist: str) -> dict[str, Any]:
        """A stand-alone config of a bundle with preset, plan, structures, device and the user's settings put in."""
        plan, request = self.record["plan"], self.request
        config = ConfigParser.load_config_file(bundle / "configs" / name)
        known = set(ConfigParser.load_config_file(bundle / "configs" / "train.json")) | set(config)
        wanted: dict[str, Any] = {}
        for overlay in PRESETS[plan["preset"]]["overlays"]:
            if (bundle / "configs" / overlay).is_file():
                wanted |= ConfigParser.load_config_file(bundle / "configs" / overlay)
        wanted |= settings_of(dict.fromkeys(known), plan["settings"])
        wanted |= {"labels": plan["labels"], "seed": request["seed"], **(request["settings"] or {})}
        if name == "train.json":
            wanted |= {"datalist": datalist}
        else:
            wanted |= {"dataset_dir": self._scans("target")}
        if request["device"] != "auto":
            wanted["device"] = f"$torch.device('{request['device']}')"
        return {key: wanted.get(key, value) for key, value in config.items()}

    def _check_names(self) -> None:
        """Raises `ConfigError` for a setting that no bundle has."""
        folders = (self.bundles / "mapseg_adaptation", self.bundles / "mapseg_pretraining")
        known = {key for one in folders for key in ConfigParser.load_config_file(one / "configs" / "train.json")}
        unknown = set(self.request["settings"] or {}) - known
        if unknown:
            raise ConfigError(f"settings {sorted(unknown)} are in no bundle: correct their names")

    def _check_settings(self) -> None:
        """That weights will be chosen at all. Raises `ConfigError`."""
        settled = self._settled(self.bundles / "mapseg_adaptation", "train.json", "")
        epochs, interval = settled["max_epochs"], settled["val_interval"]
        if isinstance(epochs, int) and isinstance(interval, int) and epochs < interval:
            raise ConfigError(
                f"settings: max_epochs is {epochs}, val_interval {interval}, so that no epoch would be validated and "
                "no weights chosen: set val_interval to 1, or more epochs"
            )

    def _train(self, name: str, bundle: Path, configs: Sequence[Any], settings: Mapping[str, Any]) -> None:
        if name in self.record["done"]:
            return
        output = self.folder / "stages" / name
        merged = ConfigParser.load_config_files([str(bundle / config) for config in configs])
        logger.info(f"Stage {name}: {merged['max_epochs']} epochs; what it does stands in {output / 'log.txt'}.")
        with tqdm(total=merged["max_epochs"], desc=name, unit="epoch", disable=True if self.quiet else None) as bar:
            bar.update(finished_epochs(output))

            def on_epoch(done: int) -> None:
                bar.update(done - bar.n)

            seconds = run_stage(name, bundle, [str(config) for config in configs], output, settings, on_epoch)
        self.record["seconds"][name] = round(self.record["seconds"].get(name, 0) + seconds, 1)
        self.record["done"].append(name)
        self._save()

    def _predict(self, name: str) -> None:
        stage = f"predictions of {name}"
        if stage in self.record["done"]:
            return
        settings = {
            "weights": self.folder / "models" / f"{name}.pt",
            "_datalist": self.folder / "datalist.json",
            "cases": "$mapseg_components.data.load_datalist(@_datalist, 'target_training')",
            "overwrite": True,
        }
        output = self.folder / "predictions" / name
        seconds = run_stage(stage, self.folder, ["configs/inference.json"], output, settings)
        if self.request["prepare"] is not None:
            for case in load_datalist(self.folder / "datalist.json", "target_training"):
                image, label_map = Path(case["image"]), result_path(case["image"], output, "seg")
                sidecar = image.with_name(f"{stem(image)}.json")
                restore(label_map, sidecar, output / "native" / label_map.name, overwrite=True)
        self.record["seconds"][stage] = round(seconds, 1)
        self.record["done"].append(stage)
        self._save()


def read_mapping(name: str, given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A mapping, or one from JSON text or a JSON file. Raises `ConfigError`."""
    if not isinstance(given, str):
        return None if given is None else json.loads(json.dumps(dict(given)))
    try:
        is_file = Path(given).is_file()
        content = json.loads(Path(given).read_text(encoding="utf-8") if is_file else given)
        if isinstance(content, dict):
            return content
        reason = f"it is a {type(content).__name__}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f'{name} {given!r} is no JSON object or file of one ({reason}): give a JSON such as {{"liver": 1}}'
    )


def preparation(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Options of ``mapseg prepare`` that decide its results. Raises `ConfigError` for others."""
    options = read_mapping("prepare", given)
    known = set(inspect.signature(prepare_scans).parameters) - NOT_ASKED
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ConfigError(f"prepare has {unknown}, expected options among {sorted(known)}")
    return options


def source_cases(source: str, validation_share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Cases for training and validation. Raises `ConfigError`, `DataError`."""
    path = Path(source)
    if path.is_dir() and (path / "images").is_dir():
        if not (path / "labels").is_dir():
            raise ConfigError(f"{path / 'labels'} does not exist: put the label maps there, named as their images")
        cases = labelled_folder(path)
    elif path.is_dir() and not (path / "source").is_dir() and open_datalist(path) is None:
        expected = "images/ and labels/, imagesTr/ and labelsTr/ (nnU-Net, Decathlon), or source/"
        raise ConfigError(f"{path} has none of {expected}{scans_below(path)}: see docs/how-to/data.md for the folders")
    else:
        cases = load_datalist(path, "source_training")
        refuse_misplaced(cases)
        if has_section(path, "source_validation"):
            return cases, load_datalist(path, "source_validation")
    if len(cases) < 2:
        raise DataError(
            f"{path} has {len(cases)} labelled case(s): two at least are needed, one of them for validation"
        )
    held_out = min(max(round(len(cases) * validation_share), 1), len(cases) - 1)
    chosen = set(random.Random(seed).sample(range(len(cases)), held_out))
    logger.info(f"Held out for validation: {sorted(cases[i]['case_id'] for i in chosen)}.")
    return [c for i, c in enumerate(cases) if i not in chosen], [c for i, c in enumerate(cases) if i in chosen]


def labelled_folder(path: Path) -> list[dict[str, Any]]:
    """Cases of ``path/images`` and ``path/labels``."""
    images, labels = list_scans(path / "images"), list_scans(path / "labels")
    maps = labels_of_scans(images, labels)
    odd = sorted(
        {stem(scan) for scan in images if scan not in maps} | {stem(m) for m in set(labels) - {*maps.values()}}
    )
    if odd or not images:
        found = odd[:5] or "there are none"
        raise DataError(f"{path}: images and labels do not pair ({found}): give both the same names")
    cases = [{"image": str(s.absolute()), "label": str(m.absolute()), "case_id": stem(m)} for s, m in maps.items()]
    refuse_misplaced(cases)
    return cases


def target_cases(target: str) -> list[dict[str, Any]]:
    """Unlabelled cases. Raises `ConfigError`."""
    path = Path(target)
    if (path.is_file() and path.suffix == ".json") or (path / "target").is_dir():
        return load_datalist(path, "target_training")
    folders = image_folders(path)
    if len(folders) > 1:
        named = " and ".join(one.name for one in folders)
        raise ConfigError(f"{path} has {named}: name the folder of the target's scans, such as {folders[-1]}")
    folder = folders[0] if folders else path
    cases = load_scans(folder)
    if not cases:
        raise ConfigError(
            f"{folder} has no NIfTI file (.nii, .nii.gz){scans_below(folder)}: name the folder of the target's scans"
        )
    refuse_misplaced(cases)
    return cases


def refuse_misplaced(cases: Sequence[Mapping[str, Any]]) -> None:
    """Refuse label maps and several channels in the place of scans. Raises `DataError` with all of them."""
    reasons = ((case["image"], misplaced(case["image"])) for case in cases)
    raise_findings(Finding("error", str(path), *reason) for path, reason in reasons if reason is not None)


def structure_names(
    labels: Mapping[str, int] | None, source: str, cases: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Structures to train for: as asked, as the datalist or ``dataset.json`` says, or as found in the label maps."""
    if labels:
        found = labels.get("labels")
        return structures_of(found if isinstance(found, dict) else labels, "labels")
    named = labels_file(source)
    if named is not None:
        return structures_of(read_json(named)["labels"], f"{named}, labels")
    values: dict[float, int] = {}
    for case in cases:
        facts = facts_of(case["label"], with_values=True)
        wrong = value_fault(facts.values or (), more_values=facts.more_values)
        if wrong is not None:
            raise fault(case["label"], *wrong)
        values |= {value: 0 for value, _ in facts.values or ()}
    values.pop(0.0, None)
    if not values or len(values) > MOST_LABELS:
        raise DataError(f"the label maps of {source} have {len(values)} values above 0: name the structures by labels")
    return {f"structure {int(value)}": int(value) for value in sorted(values)}


def grid_of(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and mm per axis of a scan, from its header. Raises `DataError`."""
    found = read_geometry(path)
    return canonical_grid(found.shape, found.affine)


def gpu_gib(device: str) -> float:
    """Memory of the GPU that will be used; 0 without one."""
    if device == "cpu" or not torch.cuda.is_available():
        return 0.0
    number = torch.device("cuda" if device == "auto" else device).index or 0
    return torch.cuda.get_device_properties(number).total_memory / 2**30


def describe(plan: Mapping[str, Any]) -> str:
    """The plan in words, for the terminal."""
    sizes = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
    return (
        f"Preset {plan['preset']} ({plan['reason']}). Source {plan['source_training']} + "
        f"{plan['source_validation']} for validation, target {plan['target']}; median scan {plan['median_shape']} "
        f"voxels of {plan['median_spacing_mm']} mm. "
        f"Structures: {', '.join(plan['labels'])}. {sizes}."
    )


def described(metadata: dict[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the new bundle."""
    channels = {"0": "background", **{str(i): name for i, name in enumerate(plan["labels"], start=1)}}
    sizes = [f"{2 * step}*n" for step in plan["settings"]["stride"]]  # one voxel of features cannot be normalised
    metadata = {
        **metadata,
        "name": "Adapted segmentation model",
        "description": f"Made by mapseg adapt (MAPSeg, CVPR 2024) for {', '.join(plan['labels'])}.",
        "data_source": "scans of the person who made it",
        "image_classes": "one channel scaled to [0, 1]",
        "label_classes": f"one channel, 0 background, then {', '.join(plan['labels'])}",
        "pred_classes": f"{len(channels)} channels: {', '.join(channels.values())}",
    }
    formats = metadata["network_data_format"]
    formats["inputs"]["image"]["spatial_shape"] = formats["outputs"]["pred"]["spatial_shape"] = sizes
    formats["outputs"]["pred"] |= {"num_channels": len(channels), "channel_def": channels}
    return metadata
