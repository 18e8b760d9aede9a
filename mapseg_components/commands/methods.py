# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The methods that can adapt a model, what each needs, where it fails and what was measured."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from mapseg_components.plans.recipes import Recipe, read_recipe, recipe_names

__all__ = ["methods"]

WIDTH = 100


@dataclass
class MethodsReport:
    """Result of `methods`.

    Args:
        recipes: in the order they are listed.
    """

    recipes: list[Recipe]
    exit_code = 0

    def __str__(self) -> str:
        return "\n\n".join([*map(described, self.recipes), "mapseg adapt --method NAME runs one of them."])


def described(recipe: Recipe) -> str:
    """Name and title, what the method needs, where it fails, what was measured."""
    source = "source scans at hand" if recipe.source else "source scans, or a package, for a first stage only"
    dimensions = " and ".join(f"{number}D" for number in recipe.dimensions)
    needs = "; ".join([source, dimensions, *([recipe.needs] if recipe.needs else [])])
    fails = [f"Known to fail {recipe.fails}."] if recipe.fails else []
    lines = [recipe.title, f"Needs {needs}.", *fails, f"Measured: {recipe.measured}"]
    wrapped = [line for text in lines for line in textwrap.wrap(text, WIDTH - 4)]
    return "\n".join([recipe.name, *(f"    {line}" for line in wrapped)])


def methods() -> MethodsReport:
    """List the methods of mapseg adapt --method: what each does, what it needs, where it fails, what was measured.

    Returns:
        a `MethodsReport`.
    """
    return MethodsReport([read_recipe(name) for name in recipe_names()])
