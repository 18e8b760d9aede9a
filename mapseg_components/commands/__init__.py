# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands of ``mapseg``, each a function of the same name and arguments.

A command is imported when it is first asked for: PyTorch and MONAI take seconds, which help and a typing error should
not.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapseg_components.commands.adapt import adapt
    from mapseg_components.commands.check import check
    from mapseg_components.commands.demo import demo
    from mapseg_components.commands.evaluate import evaluate
    from mapseg_components.commands.methods import methods
    from mapseg_components.commands.predict import predict
    from mapseg_components.commands.prepare import prepare
    from mapseg_components.commands.report import report
    from mapseg_components.commands.restore import restore

__all__ = ["adapt", "check", "demo", "evaluate", "methods", "predict", "prepare", "report", "restore"]


class Commands(ModuleType):
    """This package: a command's name is its function, where Python would bind the module of the same name."""

    def __getattr__(self, name: str) -> Any:
        """Import a command at its first use; its module is then set below."""
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        importlib.import_module(f"{self.__name__}.{name}")
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind an imported module, or of a command its function."""
        is_command = name in __all__ and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_command else value)


sys.modules[__name__].__class__ = Commands
