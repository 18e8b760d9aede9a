# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Arguments and text of a command, read from its source: help and usage errors need nothing that it imports."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import dataclass
from inspect import Parameter, Signature

__all__ = ["Declaration", "declaration_of"]


@dataclass(frozen=True)
class Declaration:
    """A command as its source declares it.

    Args:
        name: of the function, and of its module.
        signature: annotations are text, as in the source.
        document: docstring.
    """

    name: str
    signature: Signature
    document: str


def declaration_of(name: str) -> Declaration:
    """Declaration of the command of a name, a function of the module of the same name.

    Raises:
        LookupError: there is no such module, or it has no such function.
    """
    spec = importlib.util.find_spec(f"mapseg_components.commands.{name}")
    if spec is None or spec.origin is None:
        raise LookupError(f"no module of the command {name!r}")
    with open(spec.origin, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    if function is None:
        raise LookupError(f"{spec.origin} has no function {name!r}")
    return Declaration(name, signature_of(function.args), inspect.cleandoc(ast.get_docstring(function) or ""))


def signature_of(arguments: ast.arguments) -> Signature:
    """Signature of a function's arguments; defaults are literals."""
    missing: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    places = zip(arguments.args, [*missing, *arguments.defaults])
    options = zip(arguments.kwonlyargs, arguments.kw_defaults)
    return Signature(
        [
            *(parameter(argument, default, Parameter.POSITIONAL_OR_KEYWORD) for argument, default in places),
            *(parameter(argument, default, Parameter.KEYWORD_ONLY) for argument, default in options),
        ]
    )


def parameter(argument: ast.arg, default: ast.expr | None, kind: inspect._ParameterKind) -> Parameter:
    """One argument with its default, if it has one."""
    return Parameter(
        argument.arg,
        kind,
        default=Parameter.empty if default is None else ast.literal_eval(default),
        annotation=Parameter.empty if argument.annotation is None else ast.unparse(argument.annotation),
    )
