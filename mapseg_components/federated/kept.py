# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a party keeps from round to round in a file of its own: local layers, moments, its teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.errors import FederationError

__all__ = ["Kept", "moments_of", "restore_moments"]

logger = logging.getLogger(__name__)


class Kept:
    """A party's state before and after its last round, so that a round can be repeated and gives the same again.

    Rounds may be missing between two of them. A state of another federation is left aside, and so is one of a later
    round of the same federation, which went back to an earlier round: the round starts from nothing, as the first does.

    Args:
        path: of the file. Nothing of it is sent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[str, Any] = {}

    def before(self, federation: str, number: int) -> dict[str, Any]:
        """The state to start a round with; empty in the first one.

        Args:
            federation: identity of the federation, see `mapseg_components.federated.core.Broadcast`.
            number: of the round, from 0.
        """
        self._before = {}
        if self.path.is_file():
            state = read_checked(self.path)
            if state.get("federation") != federation:
                logger.warning(
                    f"{self.path} is of another federation: round {number} starts without it, and its end replaces it."
                )
            elif number >= state["round"]:
                self._before = state["before"] if number == state["round"] else state["after"]
        return self._before

    def keep(self, federation: str, number: int, after: dict[str, Any]) -> None:
        """Write the state after a round; arguments as `before`."""
        state = {"federation": federation, "round": number, "before": self._before, "after": after}
        write_atomic(state, self.path)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """A copy on the CPU of what an optimizer remembers of each parameter, by the parameter's number.

    Examples:
        >>> import torch
        >>> from mapseg_components.federated.kept import moments_of, restore_moments
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor(2.0)
        >>> optimizer.step()
        >>> kept = moments_of(optimizer)
        >>> optimizer.state.clear()
        >>> restore_moments(optimizer, kept)
        >>> optimizer.state[weight]["momentum_buffer"].item()
        2.0
    """
    return {number: copied(entry) for number, entry in optimizer.state_dict()["state"].items()}


def restore_moments(optimizer: torch.optim.Optimizer, moments: Mapping[int, Mapping[str, Any]]) -> None:
    """Put back what `moments_of` returned.

    Raises:
        FederationError: they are of other parameters.
    """
    shapes = [weight.shape for group in optimizer.param_groups for weight in group["params"]]
    for number, entry in moments.items():
        expected = shapes[number] if number < len(shapes) else None
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != expected:
                raise FederationError(
                    f"{name} of parameter {number} is {tuple(value.shape)}, expected "
                    f"{'no such parameter' if expected is None else tuple(expected)}: it is of another network or "
                    "optimizer; move the file away to start with new moments"
                )
    groups = optimizer.state_dict()["param_groups"]
    own = {number: copied(entry) for number, entry in moments.items()}  # the optimizer changes them in place
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A copy on the CPU of an optimizer's entries of a parameter."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in entry.items()
    }
