# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The server's side of a federation, alike for the simulation and for NVFlare: rounds, who is in, what is on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.configs import require_same_settings
from mapseg_components.errors import CheckpointError, FederationError
from mapseg_components.federated.core import (
    Broadcast,
    Update,
    local_names,
    movement,
    participants,
    payload_bytes,
    validate_update,
)
from mapseg_components.federated.plan import Plan
from mapseg_components.files import write_json, write_text
from mapseg_components.keys import TARGET_LOSS

__all__ = ["Coordinator"]

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, PREVIOUS = "federation.pt", "federation.previous.pt"


class Coordinator:
    """Global model, open round and log. A round is: `start`, `accept_source`, `accept` or `exclude` per site, `close`.

    Files: ``federation.pt`` in ``ckpt_dir``, the state after the last closed round (the one before it beside it as
    ``federation.previous.pt``); ``model.pt``, global weights of the round with the best Score (minus the sites' mean
    target loss, weighted by their scans), with ``model_selection.json``; in ``output_dir``, ``rounds.jsonl``, a
    line per round. Each is written whole or not at all; nothing changes on disk before a round is closed.

    Args:
        plan: settings of the federation.
        weights: before the first round; names, shapes and types of all that travels.
        labels: class names in the order of their index.
        ckpt_dir: see above.
        output_dir: see above.
        settings: merged config, to refuse going on with another one.
        resume: go on after the last closed round found in ``ckpt_dir``; otherwise start anew and replace its files.

    Raises:
        CheckpointError: the state found is damaged or of another network.
        ConfigError: it has other settings.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        labels: list[str],
        ckpt_dir: str | Path,
        output_dir: str | Path,
        settings: Mapping[str, Any] | None = None,
        resume: bool = True,
    ) -> None:
        self.plan, self.weights, self.labels = plan, dict(weights), labels
        self.ckpt_dir, self.log_path = Path(ckpt_dir), Path(output_dir) / "rounds.jsonl"
        self.settings = json.loads(json.dumps(dict(settings or {}), default=repr))
        self.local = local_names(weights, plan.local_layers)
        self.round, self.ema_steps, self.best_score = 0, 0, -math.inf
        self.history: list[dict[str, Any]] = []
        if resume:
            self._load()

    def start(self) -> Broadcast:
        """Open the next round; the task of the source side."""
        self._started = time.monotonic()
        self._mean, self._steps, self._bytes = self.plan.aggregation(), self.ema_steps, 0
        self._accepted: dict[str, dict[str, Any]] = {}
        self._excluded: dict[str, str] = {}
        return Broadcast(self.round, self.ema_steps, self.weights)

    def accept_source(self, update: Update) -> Broadcast:
        """Take the source side's teacher; the task of the sites.

        Raises:
            FederationError: it is refused, see `validate_update`; a round cannot go on without it.
        """
        moved = validate_update(update, self.weights, self.round, self.labels)
        self._source, self._steps = update, update.ema_steps
        self._shared = {name: value for name, value in update.weights.items() if name not in self.local}
        self._source_line = {"movement": moved, "seconds": round(update.seconds, 2), "losses": dict(update.losses)}
        return Broadcast(self.round, update.ema_steps, update.weights)

    def participants(self, sites: Iterable[str]) -> list[str]:
        """The sites to ask in this round."""
        return participants(sites, self.plan.participation, self.plan.min_sites, self.plan.seed, self.round)

    def accept(self, update: Update) -> None:
        """Add a site's update to the mean; the first one of a site counts.

        Raises:
            FederationError: it is refused, see `validate_update`, or it is the site's second one.
        """
        if update.site in self._accepted:
            raise FederationError(
                f"{update.site}: a second update for round {self.round}, the first one counts: give each site its name"
            )
        moved = validate_update(update, self._shared, self.round, self.labels, self.plan.max_movement)
        self._mean.add(update.weights, update.scans)
        self._steps = max(self._steps, update.ema_steps)
        self._bytes += payload_bytes(update.weights)
        self._accepted[update.site] = {
            "scans": update.scans,
            "movement": moved,
            "seconds": round(update.seconds, 2),
            "losses": dict(update.losses),
            **({"privacy": dict(update.privacy)} if update.privacy else {}),
        }

    def exclude(self, site: str, reason: Any) -> None:
        """Go on without a site in this round."""
        self._excluded.setdefault(site, str(reason))
        logger.warning(f"Round {self.round} goes on without {site}: {reason}")

    def close(self) -> dict[str, Any]:
        """Average, write everything down, and be ready for the next round.

        Returns:
            the round's line of ``rounds.jsonl``.

        Raises:
            FederationError: too few sites; the global model is that of the round before, in memory and on disk.
            ResourceError: the disk is full; likewise.
        """
        if len(self._accepted) < self.plan.min_sites:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in self._excluded.items()) or "no site answered"
            raise FederationError(
                f"round {self.round} has {len(self._accepted)} of min_sites {self.plan.min_sites} sites ({reasons}): "
                f"{self.ckpt_dir / STATE} still holds the last closed round; the same command goes on from there "
                "when the sites are back"
            )
        weights = {**self._source.weights, **self._mean.result()}
        line = self._line(weights)
        history = [*self.history, line]
        best_score = self.best_score
        if line["score"] is not None and line["score"] > best_score:
            best_score = line["score"]
            write_atomic(weights, self.ckpt_dir / "model.pt")
            selection = {"weights": "global", "round": self.round, "score": best_score}
            write_json({"model.pt": selection}, self.ckpt_dir / "model_selection.json")
        write_atomic(
            {
                "format": FORMAT,
                "fingerprint": shapes_of(weights),
                "settings": json.dumps(self.settings),
                "round": self.round + 1,
                "ema_steps": self._steps,
                "best_score": best_score,
                "history": json.dumps(history),
                "weights": weights,
            },
            self.ckpt_dir / STATE,
            keep_previous=self.ckpt_dir / PREVIOUS,
        )
        self.weights, self.ema_steps, self.best_score = weights, self._steps, best_score
        self.round, self.history = self.round + 1, history
        self._write_log()
        logger.info(
            f"Round {line['round']} closed: {len(self._accepted)} sites, the teacher moved by {line['movement']:.3g}, "
            f"Score {line['score']}."
        )
        return line

    def _line(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        total = self._mean.total
        sites = {
            name: {**self._accepted[name], "weight": self._accepted[name]["scans"] / total}
            for name in sorted(self._accepted)
        }
        scored = [(line["weight"], line["losses"].get(TARGET_LOSS, math.nan)) for line in sites.values()]
        score = -sum(weight * loss for weight, loss in scored)
        asked = len({*sites, *self._excluded})
        return {
            "round": self.round,
            "seconds": round(time.monotonic() - self._started, 2),
            "learning_rate": self.plan.learning_rate(self.round),
            "ema_steps": self._steps,
            "movement": movement(self.weights, weights),
            "score": score if math.isfinite(score) else None,
            "source": self._source_line,
            "sites": sites,
            "excluded": self._excluded,
            "bytes_to_sites": payload_bytes(self._source.weights) * asked,
            "bytes_from_sites": self._bytes,
        }

    def _write_log(self) -> None:
        write_text("".join(json.dumps(line) + "\n" for line in self.history), self.log_path)

    def _load(self) -> None:
        path = self.ckpt_dir / STATE
        if not path.is_file():
            return
        try:
            state = read_checked(path)
        except CheckpointError as error:
            before = path.with_name(PREVIOUS)
            hint = (
                f"; the round before it is {before}: move {path.name} away and rename that one"
                if before.is_file()
                else ""
            )
            raise CheckpointError(f"{error}{hint}") from error
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is no state of a federation: choose another ckpt_dir, or set resume to false"
            )
        if state["fingerprint"] != shapes_of(self.weights):
            raise CheckpointError(
                f"{path} is of another network (fingerprint {state['fingerprint']}, expected "
                f"{shapes_of(self.weights)}): use the network settings it was trained with, or choose another ckpt_dir"
            )
        require_same_settings(json.loads(state["settings"]), self.settings, path)
        self.weights, self.round, self.ema_steps = state["weights"], state["round"], state["ema_steps"]
        self.best_score, self.history = state["best_score"], json.loads(state["history"])
        self._write_log()
        logger.info(f"Resumed from {path}: {self.round} of {self.plan.rounds} rounds are closed.")


def shapes_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hexadecimal digits of names, shapes and types."""
    lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in weights.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
