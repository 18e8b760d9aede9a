# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Named handlers as one entry of a list of handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine

__all__ = ["HandlerChain"]


class HandlerChain:
    """Several handlers as one, attached in their order.

    In a config each handler has its own id, and ``handlers`` refers to them: other entries find them by that id, and a
    client that inserts a handler before or after the chain shifts none of them. MONAI and its clients expect every
    entry of ``train#handlers`` to be a dictionary, so that references cannot be entries themselves.

    Args:
        handlers: objects with ``attach``; ``None``, a disabled one, is left out.

    Examples:
        >>> from ignite.engine import Engine, Events
        >>> from ignite.handlers import EpochOutputStore
        >>> from mapseg_components.handlers import HandlerChain
        >>> engine, store = Engine(lambda engine, number: 2 * number), EpochOutputStore()
        >>> HandlerChain([None, store]).attach(engine)
        >>> state = engine.run([1, 2, 3])
        >>> store.data
        [2, 4, 6]
    """

    def __init__(self, handlers: Sequence[Any]) -> None:
        self.handlers = [handler for handler in handlers if handler is not None]

    def attach(self, engine: Engine) -> None:
        """Attach each."""
        for handler in self.handlers:
            handler.attach(engine)
