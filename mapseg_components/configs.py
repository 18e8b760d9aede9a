# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Start of a bundle run: unknown settings are refused, folders are locked, user errors end in one readable line."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import locate as locate_by_name
from types import TracebackType
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import lock_folder, require_writable, sweep_temporaries, unlock_folders

__all__ = [
    "OF_ROUNDS",
    "begin_run",
    "check_numbers",
    "check_settings",
    "end_run",
    "given_lists",
    "parser_of",
    "require_same_settings",
    "resolved",
    "running_settings",
    "values_of",
]

# what `monai.bundle run --tracking` adds by itself
TRACKING = {key for key, value in DEFAULT_MLFLOW_SETTINGS["configs"].items() if not isinstance(value, dict)}
STANDALONE = ("train.json", "inference.json", "evaluate.json", "multi_gpu_train.json", "federated.json")
# parts of a config whose keys are fixed; below them, and elsewhere, only the arguments of components are
SECTIONS = ("train", "validate")
MONAI_KEYS = {"finalize", "displayable_configs"}  # known to MONAI and MONAI Label, in none of our configs
# easily mistaken for a setting of the other stage, where they would do nothing
TRAINING_ONLY = {"initial_weights", "encoder_weights", "resume", "save_steps"}
INFERENCE_ONLY = {"weights", "cases", "section", "results", "overwrite", "output_postfix", "scans"}
EVALUATION_ONLY = {"section", "results"}  # of evaluate.json alone
# of a federation that goes on: who is in a round, not what a step computes. `rounds` is no such setting, nor are steps:
# the learning rate of a round follows from the one, the weights that travel from the others
OF_ROUNDS = ("min_sites", "participation", "round_timeout_s", "max_movement", "spacing_range_mm", "privacy_max_epsilon")
# what may differ when a run is resumed, by the last part of its name: where things are, how fast they go, not
# what is trained (`network` and `backend` wrap `network_def` for several processes)
SAFE_TO_CHANGE = {
    *("bundle_root", "ckpt_dir", "output_dir", "dataset_dir", "datalist", "device", "imports", "initialize", "run"),
    *("training", "finalize", "resume", "max_epochs", "patience", "val_interval", "num_workers", "cache_rate"),
    *("cache_dir", "handover_dir", "handover_min_scans", "save_steps", "window_batch_size", "batched_passes"),
    *("audit", "audit_file", "network", "backend", "_disabled_", "diagnostics_scans", "picture_scans"),
    *("compile", "activation_checkpointing", "fused", "pin_memory", "keep_freed_memory", "stitching_device"),
    *("memory_format", "sites", "share_statistics", "statistics_min_scans", *OF_ROUNDS),
    *TRACKING,
}
# lists of what is reported and when
HANDLERS = (
    *("load_encoder", "load_initial_weights", "checkpoint", "schedule", "student_validation", "teacher_validation"),
    *("score", "diagnostics", "history", "progress"),
)
SAFE_LISTS = ("train#handlers", "validate#handlers", *HANDLERS)


def begin_run(folders: Sequence[str | os.PathLike[str]] = ()) -> None:
    """First step of every run of a bundle: plain error messages, `check_settings`, and its folders claimed.

    Each folder is made, written to for a test, locked against other runs until `end_run` or the end of the process, and
    swept of what an interrupted run left. In a distributed run the first process does this.

    Args:
        folders: what the run writes to.

    Raises:
        ConfigError: a setting is unknown.
        ResourceError: a folder cannot be written, or another run is using it.
    """
    if sys.excepthook is not plain_error_hook:
        sys.excepthook = plain_error_hook
    workflow = running_workflow()
    if workflow is not None:
        check_settings(workflow.parser.config, Path(str(workflow.config_root_path)), workflow.parser.locator)
        if given_lists() and "labels" not in workflow.parser:
            raise ConfigError(
                "train#dataset#data is a list of labelled scans, and this bundle learns from the images of a datalist "
                "alone: MONAI Label offers its training and cannot run it; serve a bundle with labels, such as "
                "mapseg_adaptation"
            )
    if int(os.environ.get("RANK", 0)) == 0:
        for folder in folders:
            require_writable(folder)
            lock_folder(folder)
            sweep_temporaries(folder)


def end_run(folders: Sequence[str | os.PathLike[str]] = ()) -> None:
    """Last step of a run: give up what `begin_run` claimed, for a process that goes on to do other things."""
    unlock_folders(folders)


def check_settings(settings: Mapping[str, Any], config_folder: Path, locator: ComponentLocator | None = None) -> None:
    """Refuse keys that would be ignored: at the top level, in ``train`` and ``validate``, and arguments of components.

    Additional keys, for use by your expressions, begin with an underscore.

    Args:
        settings: the merged config, overlays and overrides included.
        config_folder: the bundle's folder of configs; its own configs say which keys there are.
        locator: of a parser, which knows MONAI's components already.

    Raises:
        ConfigError: names each unknown key and the nearest known one.
    """
    known = known_keys(config_folder)
    if not known[""]:
        return
    if "train" in settings and EVALUATION_ONLY <= set(settings):
        raise ConfigError(
            "evaluate.json goes on inference.json: \"['configs/inference.json','configs/evaluate.json']\", with the "
            "overlays that the weights were trained with after these, --weights and --dataset_dir; train.json holds no "
            "inference"
        )
    found = [("", key) for key in settings] + [
        (section, key) for section in SECTIONS if isinstance(settings.get(section), dict) for key in settings[section]
    ]
    other_stage = INFERENCE_ONLY if "train" in settings else TRAINING_ONLY
    problems = [
        hint(f"{section}#{key}" if section else key, key, known[section] - other_stage)
        for section, key in found
        if (key not in known[section] or (not section and key in other_stage)) and not str(key).startswith("_")
    ]
    problems += unknown_arguments(dict(settings), locator or ComponentLocator())
    if problems:
        raise ConfigError(
            f"unknown setting {', '.join(problems)}: correct it in the overlay or on the command line; "
            "additional keys begin with '_'"
        )


def check_numbers(asked: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse text in the place of numbers; expressions and references are none.

    Args:
        asked: settings of a user.
        known: a config with the values that they replace.

    Raises:
        ConfigError: names the first such setting, and the value that it has by default.

    Examples:
        >>> from mapseg_components.configs import check_numbers
        >>> check_numbers({"max_epochs": "$2 * @rounds", "amp": "bf16"}, {"max_epochs": 30, "amp": "auto"})
        >>> check_numbers({"max_epochs": "ten"}, {"max_epochs": 30})
        Traceback (most recent call last):
            ...
        mapseg_components.errors.ConfigError: settings: max_epochs is "ten", expected a number such as 30
    """
    for name, value in asked.items():
        default = known.get(name)
        usual = default if isinstance(default, list) else [default]
        numeric = usual and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in usual)
        given = value if isinstance(value, list) else [value]
        if numeric and any(isinstance(one, str) and not one.startswith(("$", "@", "%")) for one in given):
            expected = "numbers" if isinstance(default, list) else "a number"
            raise ConfigError(
                f"settings: {name} is {json.dumps(value)}, expected {expected} such as {json.dumps(default)}"
            )


def known_keys(config_folder: Path) -> dict[str, set[str]]:
    """Keys of the stand-alone configs of a bundle by section, ``""`` for the top level; empty without configs."""
    keys: dict[str, set[str]] = {section: set() for section in ("", *SECTIONS)}
    for name in STANDALONE:
        if not (config_folder / name).is_file():
            continue
        for path, value in ConfigParser.load_config_file(config_folder / name).items():
            first, *rest = path.lstrip("+").replace("::", "#").split("#")
            keys[""].add(first)
            if first in SECTIONS:
                keys[first].update(rest[:1] or value)
    if keys[""]:
        keys[""] |= TRACKING | MONAI_KEYS
    return keys


def unknown_arguments(settings: Any, locator: ComponentLocator, path: str = "") -> Iterator[str]:
    """Arguments that a component (``_target_``) does not have, anywhere in a config."""
    if isinstance(settings, list):
        for number, value in enumerate(settings):
            yield from unknown_arguments(value, locator, f"{path}#{number}")
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        yield from unknown_arguments(value, locator, f"{path}#{key}" if path else str(key))
    target = settings.get("_target_")
    if not isinstance(target, str) or target.startswith(("$", "@")):
        return
    try:
        component = ConfigComponent(config=settings, id=path, locator=locator)
        parameters = inspect.signature(locate(component.resolve_module_name())).parameters
    except (ImportError, ModuleNotFoundError, TypeError, ValueError):
        return  # MONAI reports what it cannot make
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # the component itself refuses what it does not know
    for key in settings:
        if key not in parameters and not key.startswith("_"):
            yield hint(f"{path}#{key}", key, set(parameters))


def locate(name: Any) -> Any:
    """The class or function of a dotted name, which may be one already."""
    return locate_by_name(name) if isinstance(name, str) else name


def hint(where: str, key: str, known: set[str]) -> str:
    """An unknown key, and the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{where!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def given_lists() -> dict[str, list[dict[str, Any]]]:
    """Cases that stand in the running bundle's config themselves, where a datalist's are read by an expression.

    MONAI Label trains in this way: it replaces ``train#dataset#data`` and ``validate#dataset#data`` by lists.

    Returns:
        ``source_training`` and ``source_validation``, as far as they were given; empty if the first was not.
    """
    workflow = running_workflow()
    if workflow is None:
        return {}
    places = {"source_training": "train#dataset#data", "source_validation": "validate#dataset#data"}
    lists = {section: workflow.parser.get(place) for section, place in places.items()}
    found = {section: list(cases) for section, cases in lists.items() if isinstance(cases, (list, tuple))}
    return found if "source_training" in found else {}


def running_settings() -> dict[str, Any]:
    """The merged config of the bundle run that calls this, as plain JSON values; empty outside of one."""
    workflow = running_workflow()
    return {} if workflow is None else json.loads(json.dumps(workflow.parser.config, default=repr))


def resolved(name: str) -> dict[str, Any]:
    """A component of the running bundle's config with its references and expressions replaced by their values.

    Args:
        name: such as ``network_def``. It is not made.

    Raises:
        ConfigError: no bundle runs, or a value of it is no plain one.
    """
    return plain(name, parser_of_run().get_parsed_content(name, instantiate=False).get_config())


def values_of(names: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Groups of settings of the running bundle, from names to values.

    Raises:
        ConfigError: as `resolved`.
    """
    parser = parser_of_run()
    return {
        group: {name: plain(name, parser.get_parsed_content(name)) for name in listed}
        for group, listed in names.items()
    }


def parser_of_run() -> ConfigParser:
    """A parser of the running bundle's config; what it makes is not the run's. Raises `ConfigError` outside of one."""
    workflow = running_workflow()
    if workflow is None:
        raise ConfigError("a setting is asked for outside of a bundle's run: run the bundle by monai.bundle run")
    return parser_of(workflow.parser.config)


def parser_of(settings: Mapping[str, Any]) -> ConfigParser:
    """A parser of its own: components made from it are shared with nobody."""
    parser = ConfigParser(copy.deepcopy(dict(settings)))
    parser.get_parsed_content("imports")
    return parser


def plain(name: str, value: Any) -> Any:
    """A value as JSON has it. Raises `ConfigError` if it is more than that."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} has a value that is not plain ({error}): write it out") from error


def require_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume with settings that make it another training.

    Args:
        saved: `running_settings` when the resume file was written.
        now: those of this run.
        path: the resume file.

    Raises:
        ConfigError: names each differing setting, its old and its new value.
    """
    if not saved or not now:
        return
    before, after = dict(leaves(saved)), dict(leaves(now))
    changed = [
        f"{name} was {json.dumps(before.get(name))[:80]}, now {json.dumps(after.get(name))[:80]}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if changed:
        listed = "; ".join(changed[:5]) + (" ..." if len(changed) > 5 else "")
        raise ConfigError(
            f"{path} was written with other settings ({listed}): keep them, choose another ckpt_dir, "
            "or set resume to false to start anew"
        )


def leaves(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Names (``a#b#c``) and values of all settings that must not change; an empty container is a value."""
    if path in SAFE_LISTS or path.rpartition("#")[2] in SAFE_TO_CHANGE or path.startswith("_"):
        return
    if isinstance(settings, (dict, list)) and settings:
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for name, value in items:
            yield from leaves(value, f"{path}#{name}" if path else str(name))
    else:
        yield path, settings


def running_workflow() -> ConfigWorkflow | None:
    """The ``ConfigWorkflow`` whose ``run`` calls this expression, found on the call stack.

    MONAI hands an expression what its references evaluate to, never the config itself: ``@name`` gives one value, and
    ``@`` alone, the whole config, is a circular reference. A separate workflow class would see the parser, but
    ``monai.bundle run`` takes one only from its command line (``--workflow_name``), where every user would have to
    type it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
        frame = frame.f_back
    return None


def plain_error_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """After the traceback of an uncaught error, repeat the user error it came from, if any, as the last lines."""
    sys.__excepthook__(kind, error, trace)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MAPSegError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        sys.stderr.write(f"\n{type(cause).__name__}: {cause}\n")
