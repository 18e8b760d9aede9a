# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""From labelled source scans, or a package of their model, and unlabelled target scans to an adapted bundle."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapseg_components.commands.assess import assess
from mapseg_components.commands.order import (
    CHOICE,
    asks_for_order,
    describe_order,
    order_of_package,
    recipe_of,
    settle_order,
)
from mapseg_components.commands.report import report, require_matplotlib, verdict_line
from mapseg_components.commands.request import preparation, resumed
from mapseg_components.commands.reuse import runs_to_reuse
from mapseg_components.commands.source_choice import (
    check_number,
    choose_source,
    chosen_of,
    describe_choice,
    is_choice_due,
)
from mapseg_components.commands.stages import threads
from mapseg_components.commands.training import CHECK, DATALIST, Run
from mapseg_components.commands.verdict import least_gain_of
from mapseg_components.data.datalist import has_section
from mapseg_components.errors import ConfigError
from mapseg_components.files import lock_folder, require_writable, sha256_of, unlock_folders, write_json
from mapseg_components.plans.arguments import read_mapping
from mapseg_components.plans.bundle import check_names, write_bundle, write_device
from mapseg_components.plans.cases import hold_out, target_cases
from mapseg_components.plans.effects import check_plan
from mapseg_components.plans.extents import SIZED, sized_source
from mapseg_components.plans.federation import check_federation
from mapseg_components.plans.initial_model import describe_initial, initial_model_for, write_initial
from mapseg_components.plans.label_maps import FOLDER, labelled_cases
from mapseg_components.plans.length import check_length
from mapseg_components.plans.package import check_method, open_package, place_of, plan_of_package, refuse_of_source
from mapseg_components.plans.plan import make_plan
from mapseg_components.plans.recipes import INITIAL, PACKAGE, Stage, recipe_for
from mapseg_components.plans.rounds import check_options
from mapseg_components.plans.sizes import describe
from mapseg_components.session import choose_device, working

__all__ = ["adapt"]

logger = logging.getLogger(__name__)

Cases = list[dict[str, Any]]


@dataclass
class AdaptReport:
    """Result of `adapt`.

    Args:
        folder: the new bundle.
        record: content of its ``run.json``: arguments, plan, seconds of each stage, the assessment with its verdict,
            the report's path.
    """

    folder: str
    record: dict[str, Any]
    exit_code = 0

    def __str__(self) -> str:
        verdict = self.record["assessment"]["verdict"]
        lines = [verdict_line(self.record), *verdict["why"], "", f"Report  {self.record['report']}"]
        return "\n".join([*lines, f"Bundle  {self.folder}", f"Label maps  {self.folder}/predictions/{verdict['ship']}"])


def adapt(
    *,
    target: str,
    output: str,
    source: str | None = None,
    package: str | None = None,
    labels: str | Mapping[str, Any] | None = None,
    source_label_maps: bool = False,
    method: str | None = None,
    preset: str = "auto",
    prepare: str | Mapping[str, Any] | None = None,
    pretraining: bool = True,
    random_contrasts: bool = True,
    validation_share: float | None = None,
    held_out: float = 0.2,
    symmetric: bool = False,
    any_position: bool = False,
    match_size: bool = True,
    initial_model: bool = True,
    settings: str | Mapping[str, Any] | None = None,
    source_models: int = 1,
    length: float = 1.0,
    adaptation_length: float | None = None,
    reuse: str | Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    num_threads: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> AdaptReport:
    """Adapt a model to unlabelled scans: the stages of a method, a choice, label maps and a report.

    The output folder becomes a bundle of its own: ``python -m monai.bundle run --config_file configs/inference.json``
    works in it. Stopped at any moment, the same command goes on where it was. No label of the target is read. Without
    the source's scans, a package or bundle of a model that learnt them takes their place (docs/how-to/test_time.md).

    Args:
        target: unlabelled scans: a folder of NIfTI, PNG or TIFF files, one with ``images``, or a datalist.
        output: folder to write, new or of an earlier call with the same arguments.
        source: labelled scans: a datalist (JSON), a folder in the convention of docs/how-to/data.md, a folder with
            ``images`` and ``labels``, or a dataset of nnU-Net or the Medical Segmentation Decathlon (folder or
            ``dataset.json``). Without a section of validation, some cases are held out (`validation_share`).
        package: in the place of source: a hand-over package of a source site (a folder with ``handover.json``), or a
            bundle with weights: the folder of one that mapseg adapt wrote, or the name of one that comes with the
            package, such as brain_any_contrast. Network, structures, patch and spacing are those of the package.
        labels: structures and their values, as a mapping such as {"caudate": [11, 50]}, JSON text or a JSON file. By
            default those of the datalist or ``dataset.json``; without, the values found in the source's label maps.
        source_label_maps: the source is label maps without images: images of any contrast are made of all their values
            while training.
        method: how the model learns from the target; ``mapseg methods`` lists them; by default mapseg, of label maps
            label_maps, of a package test_time.
        preset: small-data-cpu, single-gpu, paper, or auto: small-data-cpu, with a GPU as well; the larger ones have
            not been measured.
        prepare: prepare all scans first, with these options of mapseg prepare, such as '{"spacing": 1}' (or '{}'), as a
            mapping, JSON text or a JSON file; label maps come back on the target's own grids as well. By default scans
            are taken as they are.
        pretraining: masked autoencoding on all images first, where the method has such a stage (mapseg_masked).
        random_contrasts: show the source in random contrasts, and find out by the source-only model whether the target
            is bright where the source is dark; turn it off if both have the same contrast.
        validation_share: of the source's cases, one at least, where it names none; by default 0.2.
        held_out: share of the target's scans, two at least, that adaptation does not see and both models are judged
            on; 0 for none. Below five target scans none is held out.
        symmetric: structures are alike on both sides and not named by side: then scans are mirrored as well to see how
            sure a model is. Refused where a name has a side.
        any_position: source and target show different parts of the body: then the place of a structure in a scan says
            nothing about whether it is right.
        match_size: where what the source's scans show is much larger or smaller than what the target's show, as adults'
            brains beside newborns', train on source scans at the target's size. Copies of them are written. A package's
            model works on larger or smaller voxels.
        initial_model: where a model that comes with the package has learnt all structures in images of any contrast
            (brain_any_contrast), learn the source from its weights, by its network, for a third of the epochs.
        settings: settings of the bundles to replace, by name, as a mapping, JSON text or a JSON file; each bundle takes
            those it has. The method may have some too, such as rounds of cosmos (docs/explanation/methods.md).
        source_models: train so many models of the source, alike but for the seed, and go on with the one that is surest
            on the target's scans, without labels. Each takes as long as the one that is trained by default.
        length: factor of the epochs of every stage, such as 0.5 for half of them; two epochs at least.
        adaptation_length: the same for the stages after the source-only model alone, by default as `length`.
        reuse: other runs of this command, with commas between them: a stage that one of them has trained with the same
            settings, scans, seed and versions is taken over, such as the source-only model that several methods begin
            with.
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
    if (source is None) == (package is None):
        given = "neither is given" if source is None else "both are given"
        raise ConfigError(f"source or package, {given}: give labelled scans as source, or a model of them as package")
    for name, path in (("source", source), ("target", target)):
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {Path(path).absolute()} does not exist: correct the path")
    if package is not None:
        refuse_of_source(labels=labels, source_label_maps=source_label_maps, validation_share=validation_share)
    if validation_share is not None and not 0 < validation_share < 1:
        raise ConfigError(f"validation_share is {validation_share}, expected a share between 0 and 1")
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is {held_out}, expected a share from 0 to below 1")
    check_number(source_models, package)
    check_length(length)
    check_length(length if adaptation_length is None else adaptation_length)
    choose_device(device)
    recipe = recipe_for(method, source_label_maps, package is not None)
    request = {
        "source": None if source is None else str(Path(source).absolute()),
        "package": None if package is None else str(place_of(package)),
        "target": str(Path(target).absolute()),
        "labels": read_mapping("labels", labels),
        "source_label_maps": recipe.of_label_maps,
        "method": recipe.name,
        "preset": preset,
        "prepare": preparation(prepare, recipe.of_label_maps),
        "pretraining": pretraining and not recipe.of_label_maps and package is None,
        "random_contrasts": random_contrasts and not recipe.of_label_maps,
        "validation_share": validation_share,
        "held_out": held_out,
        "symmetric": symmetric,
        "any_position": any_position,
        "match_size": match_size and not recipe.of_label_maps,
        INITIAL: initial_model and random_contrasts and recipe.order is not None and package is None,
        "settings": read_mapping("settings", settings),
        "source_models": source_models,
        "length": length,
        "adaptation_length": adaptation_length,
        "seed": seed,
        "device": device,
        "num_threads": num_threads,
    }
    folder, others = Path(output).absolute(), runs_to_reuse(reuse)
    require_writable(folder)
    lock_folder(folder)
    try:
        with working(num_threads, quiet, verbose):
            logger.setLevel(logging.ERROR if quiet else logging.INFO)
            return AdaptReport(str(folder), Adaptation(folder, request, quiet, others).run())
    finally:
        unlock_folders([folder])


class Adaptation(Run):
    """The stages of one call of `adapt`.

    Args:
        folder: absolute, locked by this process.
        request: the arguments.
        quiet: no progress bars.
        reuse: folders of other runs.
    """

    def train(self) -> None:
        """Plan, check and every stage of the recipe that is not done yet."""
        threads(self.request["num_threads"])
        self._resume()
        if "plan" not in self.record:
            self._plan()
            plan = self.record.pop("plan")
            self.save()  # a call that is killed before the bundle is written plans again
            self.record["plan"] = plan
            write_bundle(self.folder, self.recipe, self.record["plan"], self.request)
            self.save()
        else:
            write_device(self.folder, self.recipe, self.request)
        logger.info(describe(self.record["plan"]))
        if INITIAL in self.record["plan"]:
            logger.info(describe_initial(self.record["plan"][INITIAL]))
        if "check" not in self.record:
            self.check_scans()
            self.save()
        if INITIAL in self.record["plan"] and INITIAL not in self.record.get("identities", {}):
            self.record["identities"] = {INITIAL: write_initial(self.folder, self.record["plan"])}
            self.save()
        self.recipe = recipe_of(chosen_of(self.recipe, self.record), self.record, self.request)
        self._find_order(Stage(PACKAGE))
        seen: set[str] = set()
        while stage := next((stage for stage in self.recipe.stages if stage.name not in seen), None):
            seen.add(stage.name)
            if self.request["pretraining"] or not stage.optional:
                self.do(stage)
            self._choose_source(stage)
            self._find_order(stage)

    def _choose_source(self, done: Stage) -> None:
        """Choose one of several source models once the last of them is trained."""
        if is_choice_due(self.recipe, done, self.record):
            self.record[CHOICE] = choose_source(self.folder, self.recipe, self.record, self.request)
            self.save()
            logger.info(describe_choice(self.record[CHOICE]))
            self.recipe = chosen_of(self.recipe, self.record)

    def _find_order(self, done: Stage) -> None:
        """Find out whether the target is bright for dark, where that follows a stage, or the package."""
        if asks_for_order(self.recipe, done, self.record, self.request):
            self.record["order"] = settle_order(self.folder, self.stages / str(self.recipe.order))
            logger.info(describe_order(self.record["order"]))
            self.save()
            self.recipe = recipe_of(self.recipe, self.record, self.request)

    def run(self) -> dict[str, Any]:
        """Everything that is not done yet: training, comparison of both models, label maps, report."""
        self.train()
        models = self.folder / "models"
        weights = {name: self.stages / path for name, path in self.recipe.models.items()}
        self.record["models"] = self.recipe.models
        if not weights["adapted"].is_file():
            raise ConfigError(f"{weights['adapted'].parent}: no epoch was validated: let max_epochs reach val_interval")
        if "assessment" not in self.record:
            logger.info("Comparing both models on the target, without labels ...")
            self.record["assessment"] = assess(
                str(self.folder),
                {name: str(path) for name, path in weights.items()},
                self.request["symmetric"],
                self.quiet,
                self.request["any_position"] or bool(self.asked.get("synthesis_optional")),
                (self.request["random_contrasts"] or self.recipe.of_label_maps) and self.recipe.inverts,
                self.record.get("samples"),
                {name: str(self.datalist_of_model(name)) for name in weights},
                self.record["plan"].get("package"),
                least_gain_of(self.recipe, has_section(self.folder / DATALIST, "target_heldout")),
            )
            self.save()
        chosen = self.record["assessment"]["verdict"]["ship"]
        models.mkdir(exist_ok=True)
        for name, path in (*weights.items(), ("model", weights[chosen])):
            shutil.copyfile(path, models / f"{name}.pt")
        for name in weights:
            self.predict(name)
        self.record["report"] = report(str(self.folder))
        self.save()
        return self.record

    def _resume(self) -> None:
        path = self.folder / "run.json"
        if not path.is_file():
            own = {".run.lock", ".run.lock.json", FOLDER, SIZED, CHECK}
            own |= {"prepared"} if self.request["prepare"] is not None else set()
            if self.stages.is_dir() and {p.name for p in self.stages.iterdir()} <= {PACKAGE}:
                own.add(self.stages.name)  # a call that was refused
            others = [p.name for p in self.folder.iterdir() if p.name not in own]
            if others:
                raise ConfigError(
                    f"{self.folder} holds {sorted(others)[:3]} and no run of this command: choose a new folder"
                )
            return
        self.record = resumed(path, self.request)

    def _plan(self) -> None:
        """Cases, structures, sizes."""
        request = self.request
        check_names(self.asked, self.recipe)
        if request["prepare"] is not None:
            self.prepare_scans()
        if request.get("package") is None:
            training, validation, structures, values, own = labelled_cases(request, self.scans("source"), self.folder)
        target = target_cases(self.scans("target"))
        adapted_on, held_out = hold_out(target, request["held_out"], request["seed"])
        if request.get("package") is not None:
            self._plan_of_package(target, adapted_on, held_out)
            return
        check_options(self.recipe, self.asked, structures, [*training, *validation])
        check_federation(self.recipe, self.asked, adapted_on, held_out, request["seed"])
        found: dict[str, Any] = {"label_values": values}
        if not self.recipe.of_label_maps:
            training, validation, sized = sized_source(
                training, validation, target, self.folder / SIZED, bool(request.get("match_size")), self.asked
            )
            found |= sized
        given = [*training, *validation], target, found.get("foreground_mm")
        initial = initial_model_for(structures, *given, self.recipe, request)
        plan = make_plan(training, validation, target, held_out, structures, request, initial) | found
        plan["settings"] |= own
        self.record["plan"] = plan
        content = {
            "source_label_maps": self.recipe.of_label_maps,
            "labels": {"0": "background", **{str(value): name for name, value in structures.items()}},
            "source_training": training,
            "source_validation": validation,
            "target_training": adapted_on,
            **({"target_heldout": held_out} if held_out else {}),
        }
        # while the folder is not this run's yet: it stays free for the corrected command
        check_plan(self.recipe, plan, request, recipe_of(self.recipe, self.record, request))
        write_json(content, self.folder / "datalist.json")

    def _plan_of_package(self, target: Cases, adapted_on: Cases, held_out: Cases) -> None:
        """Network and structures of a package, which is copied: the run keeps what it began from."""
        package = open_package(Path(self.request["package"]), self.stages / PACKAGE)
        check_method(self.recipe, package, self.asked)
        plan = self.record["plan"] = plan_of_package(package, target, held_out, self.request)
        plan["settings"] |= order_of_package(package, self.request)
        check_plan(self.recipe, plan, self.request)
        content = {
            "labels": {"0": "background", **{str(value): name for name, value in package.labels.items()}},
            "target_training": adapted_on,
            **({"target_heldout": held_out} if held_out else {}),
        }
        write_json(content, self.folder / "datalist.json")
        self.record["done"].append(PACKAGE)
        self.record["identities"] = {PACKAGE: sha256_of(package.folder / "handover.json")}  # for runs that are reused
