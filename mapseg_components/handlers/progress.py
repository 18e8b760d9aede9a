# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite's progress bar as a handler that a config can name."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from ignite.handlers import ProgressBar

from mapseg_components.handlers.outputs import loss_terms
from mapseg_components.keys import TOTAL_LOSS

__all__ = ["LossProgressBar"]


class LossProgressBar(ProgressBar):
    """A bar per epoch that shows the current loss; silent where there is no terminal.

    Args:
        tqdm_kwargs: passed to tqdm, e.g. ``desc``.

    Raises:
        ConfigError: while running, the trainer's output has no ``loss``.

    Examples:
        >>> from ignite.engine import Engine
        >>> from mapseg_components.handlers import LossProgressBar
        >>> engine = Engine(lambda engine, batch: {"loss": 0.5})
        >>> LossProgressBar(desc="training", disable=True).attach(engine)  # disable: no bar in this example
        >>> engine.run([1, 2, 3]).iteration
        3
    """

    def __init__(self, **tqdm_kwargs: Any) -> None:
        super().__init__(**{"disable": None, **tqdm_kwargs})

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        """Show the loss of a trainer's output."""
        super().attach(engine, output_transform=lambda _: {TOTAL_LOSS: float(loss_terms(engine)[TOTAL_LOSS])})
