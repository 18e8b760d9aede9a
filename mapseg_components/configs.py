# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a bundle run does first: refuse unknown settings, and make user errors end in one readable line."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from mapseg_components.errors import ConfigError, MAPSegError

__all__ = ["begin_run", "check_settings", "known_settings"]

# what `monai.bundle run --tracking` adds by itself
TRACKING = {key for key, value in DEFAULT_MLFLOW_SETTINGS["configs"].items() if not isinstance(value, dict)}
STANDALONE = ("train.json", "inference.json", "evaluate.json", "multi_gpu_train.json")


def begin_run() -> None:
    """First step of every run of a bundle: plain error messages, and `check_settings`.

    Raises:
        ConfigError: a setting is unknown.
    """
    if sys.excepthook is not plain_error_hook:
        sys.excepthook = plain_error_hook
    workflow = running_workflow()
    if workflow is not None:
        check_settings(workflow.parser.config, Path(str(workflow.config_root_path)))


def check_settings(settings: dict[str, Any], config_folder: Path) -> None:
    """Refuse top-level keys that none of the bundle's own configs has: they are typos that would be ignored.

    Keys of your own, for use by your own expressions, begin with an underscore.

    Args:
        settings: the merged config, overlays and overrides included.
        config_folder: the bundle's folder of configs.

    Raises:
        ConfigError: names each unknown key and the nearest known one.
    """
    known = known_settings(config_folder)
    unknown = sorted(key for key in settings if key not in known and not key.startswith("_"))
    if known and unknown:
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise ConfigError(
            f"unknown setting {', '.join(hints)}: correct it in the overlay or on the command line; "
            "keys of your own begin with '_'"
        )


def known_settings(config_folder: Path) -> set[str]:
    """Top-level keys of the stand-alone configs of a bundle, and those of MONAI's tracking; empty without configs."""
    files = [config_folder / name for name in STANDALONE if (config_folder / name).is_file()]
    keys = {key.lstrip("+") for file in files for key in ConfigParser.load_config_file(file)}
    return keys | TRACKING if keys else keys


def running_workflow() -> ConfigWorkflow | None:
    """The ``ConfigWorkflow`` whose ``run`` calls this expression; MONAI gives expressions no other way to see it."""
    for frame in inspect.stack(context=0):
        owner = frame.frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
    return None


def plain_error_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """After the traceback of an uncaught error, repeat the user error it came from, if any, as the last lines."""
    sys.__excepthook__(kind, error, trace)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MAPSegError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        sys.stderr.write(f"\n{type(cause).__name__}: {cause}\n")
