# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The stages of ``mapseg adapt``: its folder, its record, and what a training and pseudo labels do in it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from tqdm import tqdm

from mapseg_components.commands.check import check
from mapseg_components.commands.prepare import prepare
from mapseg_components.commands.restore import restore
from mapseg_components.commands.reuse import copy_stage, finished_in, identity_of, record_of
from mapseg_components.commands.stages import finished_epochs, processor_time, run_stage, training_samples
from mapseg_components.commands.verdict import rounded
from mapseg_components.data import load_datalist
from mapseg_components.data.datalist import all_targets, read_json, stem
from mapseg_components.data.results import result_path
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.files import write_json
from mapseg_components.plans.bundle import LABELLING, config_of, unlearnt
from mapseg_components.plans.federation import federation_settings
from mapseg_components.plans.length import of_length, planned_length
from mapseg_components.plans.pseudo_labels import agreement_of, keep_pseudo_labels
from mapseg_components.plans.recipes import (
    ADAPTATION,
    FEDERATION,
    PACKAGE,
    PSEUDO_LABELS,
    SOURCE_ALONE,
    TRANSLATION,
    Stage,
    recipe_for,
    scaled,
)
from mapseg_components.plans.rounds import REQUIRED, divided, require_engine, written_out
from mapseg_components.scans.findings import raise_findings
from mapseg_components.session import versions
from mapseg_components.shipped_files import bundles_folder

__all__ = ["Run"]

logger = logging.getLogger("mapseg_components.commands.adapt")  # the command's, whose level its options set

DATALIST = "datalist.json"
RECORD = "run.json"
NEGATIVE_VALUES = ("negative_values", "source_negative_values", "target_negative_values")
CHECK = "check"  # folder of the findings about all scans
SECTIONS = ("source_training", "source_validation", "target_training", "target_labelled")
MEMBER_SEEDS = 1000  # between the seeds of several source models, so that those of runs with other seeds differ
PSEUDO = "pseudo"  # folder of the pseudo labels that are kept, in that of their stage


class Run:
    """A folder of ``mapseg adapt``, its record and its stages; what is done already is not done again.

    Args:
        folder: absolute, locked by this process.
        request: the arguments.
        quiet: no progress bars.
        reuse: folders of other runs, whose stages are taken over where they are the same.

    Raises:
        ConfigError: the method, or a setting of its recipe, is unknown, or what its engine needs is missing.
    """

    def __init__(self, folder: Path, request: dict[str, Any], quiet: bool, reuse: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.reuse = [run for run in reuse if run != folder]
        self.request = request
        self.quiet = quiet
        self.record: dict[str, Any] = {"request": request, "versions": versions(), "seconds": {}, "done": []}
        kinds = bool(request.get("source_label_maps")), request.get("package") is not None
        self.recipe = written_out(recipe_for(request["method"], *kinds), self.asked)
        self.recipe = self.recipe.with_source_models(request.get("source_models", 1))
        require_engine(self.recipe, self.asked)

    @property
    def asked(self) -> Mapping[str, Any]:
        """Settings of the user."""
        return self.request["settings"] or {}

    @property
    def stages(self) -> Path:
        """Folder of the stages' folders."""
        return self.folder / "stages"

    def save(self) -> None:
        """Write the record."""
        write_json(self.record, self.folder / RECORD)

    def scans(self, side: str) -> str:
        """Where the scans of the source or the target are read."""
        given = str(self.request[side])
        return given if self.request["prepare"] is None else str(self.folder / "prepared" / side)

    def prepare_scans(self) -> None:
        """Prepared scans of both sides; what is there already is skipped."""
        sides = [side for side in ("source", "target") if self.request[side] is not None]
        for side in sides:
            if not Path(self.request[side]).is_dir():
                raise ConfigError(f"prepare needs {side} as a folder of scans, {self.request[side]} is none")
        for side in sides:
            logger.info(f"Preparing the {side}'s scans ...")
            found = prepare(self.request[side], self.scans(side), **self.request["prepare"], quiet=self.quiet)
            if found.exit_code:
                raise DataError(f"{side}: {found}")

    def check_scans(self) -> None:
        """Findings about all scans, for the report.

        Raises:
            ConfigError, DataError or ResourceError: one blocks a training; the folder is free for the next command.
        """
        told = {self.asked.get(name) for name in NEGATIVE_VALUES} - {None}
        found = check(
            str(self.folder / DATALIST),
            dropped_labels=self.asked.get("dropped_labels"),
            negative_values=told.pop() if len(told) == 1 else "keep" if told else None,
            assume_orientation=self.asked.get("assume_orientation"),
            non_finite=self.asked.get("non_finite"),
            output=str(self.folder / CHECK),
            overwrite=True,
            quiet=self.quiet,
        )
        if found.exit_code:
            for name in (RECORD, DATALIST, "LICENSE"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("configs", "docs"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            raise_findings(one for one in found.findings if one.severity == "error")
        self.record["check"] = {"verdict": found.verdict(), "findings": found.rows()}
        logger.info(f"Check of all scans: {found.verdict()}")

    def do(self, stage: Stage) -> None:
        """Run a stage, unless it is done.

        Raises:
            MAPSegError: the error of the stage; what it had done so far stays for the next call.
        """
        if stage.name in self.record["done"]:
            return
        with processor_time(self.record, stage.name, self.save):
            seconds = self._label(stage) if stage.kind == PSEUDO_LABELS else self._train(stage)
        self._done(stage.name, seconds)

    def predict(self, name: str) -> None:
        """Label maps of all target scans by a model of the bundle, unless they are there."""
        stage = f"predictions of {name}"
        if stage in self.record["done"]:
            return
        output = self.folder / "predictions" / name
        settings = {
            "weights": self.folder / "models" / f"{name}.pt",
            **segmented(self.folder / DATALIST),
            **unlearnt(self.folder, name),
        }
        with processor_time(self.record, stage, self.save):
            seconds = run_stage(stage, self.folder, ["configs/inference.json"], output, settings)
        if self.request["prepare"] is not None:
            for case in all_targets(self.folder / DATALIST):
                image, label_map = Path(case["image"]), result_path(case["image"], output, "seg")
                sidecar = image.with_name(f"{stem(image)}.json")
                restore(label_map, sidecar, output / "native" / label_map.name, overwrite=True)
        self._done(stage, seconds)

    def length_of(self, stage: Stage) -> float:
        """Factor of a stage's epochs: those after the source-only model may have one of their own."""
        names = [one.name for one in self.recipe.stages]
        first = self.recipe.models["source_only"].partition("/")[0]
        last = names.index(first) if first in names else -1  # of a package that was given no stage is run
        after = names.index(stage.name) > last and not stage.member  # one of several source models is not
        own = self.request.get("adaptation_length") if after else None
        return float(self.request["length"] if own is None else own)

    def datalist_of(self, stage: Stage) -> Path:
        """The datalist that a stage reads: the run's, or one that an earlier stage has written."""
        return self.stages / stage.paths["datalist"] if "datalist" in stage.paths else self.folder / DATALIST

    def datalist_of_model(self, name: str) -> Path:
        """The datalist of the stage that a model of the recipe is from."""
        first = self.recipe.models[name].partition("/")[0]
        datalists = (self.datalist_of(stage) for stage in self.recipe.stages if stage.name == first)
        return next(datalists, self.folder / DATALIST)  # of a package no stage is run

    def _done(self, name: str, seconds: float) -> None:
        self.record["seconds"][name] = round(self.record["seconds"].get(name, 0) + seconds, 1)
        self.record["done"].append(name)
        self.save()

    def _train(self, stage: Stage) -> float:
        """Seconds of a training."""
        output = self.stages / stage.name
        if stage.bundle == ADAPTATION:
            bundle = self.folder
            contrasts = [stage.contrasts] if self.request["random_contrasts"] and stage.contrasts else []
            asked = "settings_of_target.json" if "handover.yaml" in stage.overlays else "settings.json"
            configs = [f"configs/{name}" for name in ("train.json", *contrasts, *stage.overlays, asked)]
        else:
            bundle = bundles_folder() / stage.bundle
            overlays = [f"configs/{name}" for name in ("train.json", *stage.overlays)]
            configs = [*overlays, str(self.folder / "configs" / config_of(stage.bundle))]
        earlier = {name: self.stages / path for name, path in stage.paths.items() if self._comes(path)}
        merged = ConfigParser.load_config_files([str(bundle / config) for config in configs])
        factors = stage.factors(self.record["plan"]["preset"])
        own = {name: scaled(merged[name], factor) for name, factor in factors.items()} | dict(stage.settings)
        own = {name: value for name, value in own.items() if name.partition("#")[0] not in self.asked}
        own |= dict(stage.fixed)
        if stage.bundle != ADAPTATION:
            own["datalist"] = str(self.folder / DATALIST)  # no path of this machine stands in the bundle's configs
        listed = read_json(self.datalist_of(stage))
        if stage.fold is not None:
            earlier["datalist"] = output / DATALIST
            listed = divided(listed, stage.fold, self.request["seed"])
            own["seed"] = self.request["seed"] + stage.fold[0]  # members of an ensemble differ
        if stage.member:
            own["seed"] = self.request["seed"] + MEMBER_SEEDS * stage.member
        if stage.kind == FEDERATION:
            own |= federation_settings(listed, merged | own, self.asked, self.request["seed"], output)
        self.record.setdefault("epochs", {})[stage.name] = planned_length(merged | own)
        own |= of_length(merged | own, self.length_of(stage))
        epochs = 0 if stage.kind == PACKAGE else own.get("max_epochs", merged.get("max_epochs"))
        files = {name: str(path.relative_to(self.stages)) for name, path in earlier.items()}
        identity = None  # a translation writes where its scans lie; which scan is at which site is no setting
        if stage.bundle != TRANSLATION and stage.kind != FEDERATION:
            sections = {name: listed[name] for name in SECTIONS if name in listed}
            identity = identity_of(stage.name, self.folder, self.record, merged | own, files, sections)
        self.record.setdefault("identities", {})[stage.name] = identity
        seconds = self._take_over(stage.name, identity)
        if seconds is None:
            if stage.fold is not None:
                output.mkdir(parents=True, exist_ok=True)
                write_json(listed, earlier["datalist"])
            length = f"{epochs} epochs; " if epochs else ""
            logger.info(f"Stage {stage.name}: {length}what it does stands in {output / 'log.txt'}.")
            with tqdm(total=epochs, desc=stage.name, unit="epoch", disable=True if self.quiet else None) as bar:
                bar.update(finished_epochs(output))

                def on_epoch(done: int) -> None:
                    bar.update(done - bar.n)

                seconds = run_stage(stage.name, bundle, configs, output, {**earlier, **own}, on_epoch)
        # of the last stage, the adaptation; a sample of the source alone is one patch, others have the target's, too
        patches = 1 if SOURCE_ALONE in stage.overlays else 2
        self.record["samples"] = training_samples(merged | own, finished_epochs(output), patches)
        return seconds

    def _take_over(self, stage: str, identity: str | None) -> float | None:
        """Copy a stage that another run has trained alike, with the seconds that it took; ``None`` if none has."""
        output, reused = self.stages / stage, self.record.setdefault("reused", {})
        if not output.exists():
            run = finished_in(stage, identity, self.reuse)
            if run is None:
                if reused.pop(stage, None):  # of a call whose copy failed
                    self.save()
                if self.reuse and identity is not None:
                    logger.info(f"Stage {stage}: none of the runs to reuse has trained it with the same settings.")
                return None
            reused[stage] = str(run)
            self.save()
            logger.info(f"Stage {stage}: taken over from {run}, where it was trained with the same settings.")
            copy_stage(run, output)
        elif stage not in reused:
            return None  # begun here
        other = record_of(Path(reused[stage]))
        times = self.record.setdefault("processor_seconds", {})
        times[stage] = other.get("processor_seconds", {}).get(stage, 0)
        return float(other.get("seconds", {}).get(stage, 0.0))

    def _comes(self, path: str) -> bool:
        """Whether what lies there is made at all: not by a stage that is left out."""
        left_out = {stage.name for stage in self.recipe.stages if stage.optional and not self.request["pretraining"]}
        return Path(path).parts[0] not in left_out

    def _label(self, stage: Stage) -> float:
        """Seconds of a segmentation of the target's scans, of which those with all structures are kept.

        Scans that an interrupted call had segmented are not segmented again.
        """
        output, datalist = self.stages / stage.name, self.datalist_of(stage)
        cases = load_datalist(datalist, "target_training")
        maps = {case["case_id"]: result_path(case["image"], output, "seg") for case in cases}
        left = [case for case in cases if not maps[case["case_id"]].is_file()]
        weights = [str(self.stages / path) for path in stage.weights]
        logger.info(
            f"Stage {stage.name}: {len(left)} of {len(maps)} target scans to segment by {len(weights)} model(s); what "
            f"it does stands in {output / 'log.txt'}."
        )
        seconds = 0.0
        if left:
            output.mkdir(parents=True, exist_ok=True)
            write_json({"target_training": left}, output / "to_segment.json")
            axes = ConfigParser.load_config_file(self.folder / "configs" / "train.json")["flip_axes"]
            settings = {
                "weights": weights[0],
                "evaluator#inferer#weights": weights[1:],
                "evaluator#inferer#flip_axes": axes,
                **segmented(output / "to_segment.json"),
            }
            configs = [f"configs/{name}" for name in ("inference.json", *(stage.overlays or [LABELLING]))]
            seconds = run_stage(stage.name, self.folder, configs, output, settings)
        plan = self.record["plan"]
        required = self.asked.get(REQUIRED)
        if required is None:
            required = plan["after_network"]["in_every_map"]
        found = keep_pseudo_labels(datalist, maps, plan["labels"], required, output / PSEUDO)
        logger.info(f"Pseudo labels of {len(found['kept'])} of {found['scans']} scans are kept.")
        before = self._labels_before(stage)
        if before is not None:
            earlier = {case: self.stages / before.name / path.name for case, path in maps.items()}
            dice = agreement_of(earlier, maps, list(plan["labels"]))
            known = [value for value in dice.values() if value is not None]
            mean = rounded(sum(known) / len(known)) if known else None
            found["with_round_before"] = {"structures": dice, "mean": mean}
        self.record.setdefault(PSEUDO_LABELS, {})[stage.name] = found
        return seconds

    def _labels_before(self, stage: Stage) -> Stage | None:
        """The stage of pseudo labels of the round before."""
        earlier = self.recipe.stages[: self.recipe.stages.index(stage)]
        return next((one for one in reversed(earlier) if one.kind == PSEUDO_LABELS), None)


def segmented(datalist: Path) -> dict[str, Any]:
    """Settings of inference for the target scans of a datalist; results of an interrupted call are replaced."""
    return {
        "_datalist": datalist,
        "cases": "$mapseg_components.data.datalist.all_targets(@_datalist)",
        "overwrite": True,
    }
