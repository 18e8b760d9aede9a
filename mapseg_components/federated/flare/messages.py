# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Between our messages and NVFlare's: arrays and plain numbers in both directions, nothing else.

A site answers with weights, or, where NVFlare's filters act on them, with differences to the weights of its task: that
is what those filters are made for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from mapseg_components.errors import FederationError
from mapseg_components.federated.core import Broadcast, Update

__all__ = ["from_broadcast", "from_update", "refusal", "to_broadcast", "to_update"]

STEPS, SCANS, LABELS, LOSSES, SECONDS, PRIVACY, ROUND, SIDE, FAILED, FEDERATION = (
    "mapseg_ema_steps",
    "mapseg_scans",
    "mapseg_labels",
    "mapseg_losses",
    "mapseg_seconds",
    "mapseg_privacy",
    "mapseg_round",
    "mapseg_side",
    "mapseg_failed",
    "mapseg_federation",
)
IDENTITY = re.compile(r"[0-9a-f]{16}")


def from_broadcast(broadcast: Broadcast, rounds: int, side: str) -> FLModel:
    """A task for a side."""
    return FLModel(
        params_type=ParamsType.FULL,
        params=arrays(broadcast.weights),
        current_round=broadcast.round,
        total_rounds=rounds,
        meta={STEPS: broadcast.ema_steps, ROUND: broadcast.round, SIDE: side, FEDERATION: broadcast.federation},
    )


def to_broadcast(model: FLModel, side: str, rounds: int) -> Broadcast:
    """What a site takes from a task: tensors, two counts and an identity; whatever else came along is not looked at.

    Args:
        model: the task.
        side: of the site.
        rounds: of the site's plan, which the learning rate of a round follows from; compared with the server's.

    Raises:
        FederationError: the task is for the other side or of another number of rounds, its counts are no counts, or its
            identity is none.
    """
    meta = model.meta or {}
    if meta.get(SIDE) != side:
        raise FederationError(
            f"the server sent a task for the {meta.get(SIDE)!r} side, expected {side!r}: correct source_site of the job"
        )
    if model.total_rounds != rounds:
        raise FederationError(
            f"the server's federation has {str(model.total_rounds)[:20]} rounds, and rounds is {rounds} here, so that "
            "learning rates would differ: set rounds to the same number in the settings of both"
        )
    counts = {key: meta.get(key) for key in (ROUND, STEPS)}
    if not all(type(value) is int and value >= 0 for value in counts.values()):
        raise FederationError(f"the server sent {counts}, expected whole numbers: use the same version everywhere")
    identity = meta.get(FEDERATION)
    if not isinstance(identity, str) or not IDENTITY.fullmatch(identity):
        raise FederationError(
            f"the server sent {str(identity)[:40]!r} as identity of the federation, expected 16 hexadecimal digits: "
            "use the same version everywhere"
        )
    return Broadcast(counts[ROUND], counts[STEPS], tensors(model.params), identity)  # type: ignore[arg-type]


def from_update(update: Update, base: Mapping[str, torch.Tensor] | None = None) -> FLModel:
    """A site's answer; its name is added by the server, who knows it from the connection.

    Args:
        update: of the site.
        base: weights of its task, to send differences to them.
    """
    weights = dict(update.weights)
    if base is not None:
        weights = {name: value - base[name] if value.is_floating_point() else value for name, value in weights.items()}
    return FLModel(
        params_type=ParamsType.FULL if base is None else ParamsType.DIFF,
        params=arrays(weights),
        meta={
            ROUND: update.round,
            SCANS: update.scans,
            STEPS: update.ema_steps,
            LABELS: list(update.labels),
            LOSSES: dict(update.losses),
            SECONDS: update.seconds,
            PRIVACY: dict(update.privacy),
        },
    )


def refusal(error: Exception) -> FLModel:
    """The answer of a site that failed: the kind of error alone. Its text names files and stays in the site's log."""
    return FLModel(
        params_type=ParamsType.FULL, params={"none": np.zeros(1, np.float32)}, meta={FAILED: type(error).__name__}
    )


def to_update(model: FLModel, task: Broadcast) -> Update:
    """A site's answer to a task as it came, differences added; `validate_update` says what of it is accepted.

    Raises:
        FederationError: the site says that it failed, or an entry is missing.
    """
    meta = model.meta or {}
    site = str(meta.get("client_name"))
    if FAILED in meta:
        raise FederationError(f"{site}: {meta[FAILED]} there: its own log says more")
    try:
        weights = tensors(model.params)
        if model.params_type == ParamsType.DIFF:
            weights = added(weights, task.weights)
        return Update(
            site=site,
            round=meta[ROUND],
            weights=weights,
            scans=meta[SCANS],
            ema_steps=meta[STEPS],
            labels=[str(name) for name in meta[LABELS]],
            losses={str(name): float(value) for name, value in meta[LOSSES].items()},
            seconds=float(meta[SECONDS]),
            privacy={str(name): float(value) for name, value in meta[PRIVACY].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FederationError(
            f"{site}: its answer has no usable {error}: use the same version of mapseg_components everywhere"
        ) from error


def arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Numpy arrays, as NVFlare sends them by default."""
    return {name: value.numpy() for name, value in weights.items()}


def added(difference: Mapping[str, Any], base: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Weights again; what does not fit stays as it is, to be refused by name."""
    return {name: base[name] + value if fits(value, base.get(name)) else value for name, value in difference.items()}


def fits(value: Any, base: torch.Tensor | None) -> bool:
    """A floating tensor of the shape and type of another one."""
    return (
        base is not None
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.shape == base.shape
        and value.dtype == base.dtype
    )


def tensors(params: Any) -> dict[str, Any]:
    """Tensors of arrays; anything else stays as it is, to be refused by name."""
    if not isinstance(params, Mapping):
        raise FederationError(f"a message holds {type(params).__name__} where weights belong: it is not used")
    return {
        str(name): torch.from_numpy(np.array(value))
        if isinstance(value, np.ndarray) and value.dtype != object
        else value
        for name, value in params.items()
    }
