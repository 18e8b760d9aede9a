# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The server's side of a federation, alike for the simulation and for NVFlare: rounds, who is in, what is on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
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
    movement,
    participants,
    payload_bytes,
    validate_update,
)
from mapseg_components.federated.plan import BROADCAST, LAST, Plan
from mapseg_components.files import set_aside, write_json, write_text
from mapseg_components.keys import TARGET_LOSS

__all__ = ["Coordinator"]

logger = logging.getLogger(__name__)

FORMAT = 2
STATE, PREVIOUS, MODEL, SELECTION = "federation.pt", "federation.previous.pt", "model.pt", "model_selection.json"
ROUNDS, HISTORY = "rounds.jsonl", "history.jsonl"


class Coordinator:
    """Global model, open round and log. A round is: `start`, `accept_source`, `accept` or `exclude` per site, `close`.

    Files: ``federation.pt`` in ``ckpt_dir``, the state after the last closed round (the one before it beside it as
    ``federation.previous.pt``); ``model.pt``, global weights of the round with the best Score (minus the sites' mean
    target loss, weighted by their scans, or alike where the aggregation takes them so), or of the last one, with
    ``model_selection.json``; in ``output_dir``, ``rounds.jsonl``, a line per round, and its main figures as
    ``history.jsonl``, as of any training. Each is written whole or not at all; nothing changes on disk before a round
    is closed, but that a federation which starts anew sets the files of the one before aside. Where the plan ships what
    the server sends next, `unfinished` says after the last round whether it is still to be made, for `finish`.

    Args:
        plan: settings of the federation.
        weights: before the first round; names, shapes and types of all that travels.
        labels: class names in the order of their index.
        ckpt_dir: see above.
        output_dir: see above.
        settings: merged config, to refuse going on with another one.
        resume: go on after the last closed round found in ``ckpt_dir``; otherwise start anew, and the files above of an
            earlier federation are renamed to ``<name>.earlier``.

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
        self.ckpt_dir, self.output_dir = Path(ckpt_dir), Path(output_dir)
        self.settings = json.loads(json.dumps(dict(settings or {}), default=repr))
        self.local = plan.local_names(weights)
        self.federation = secrets.token_hex(8)  # of no seed: a federation that is started anew is another one
        self.round, self.ema_steps, self.best_score = 0, 0, -math.inf
        self.history: list[dict[str, Any]] = []
        self._pending: dict[str, Any] | None = None  # a round that is shipped as the server sends it next
        if resume:
            self._load()
        else:
            self._set_aside()

    def start(self) -> Broadcast:
        """Open the next round; the task of the source side."""
        self._started = time.monotonic()
        self._mean, self._steps, self._bytes = self.plan.aggregation(), self.ema_steps, 0
        self._accepted: dict[str, dict[str, Any]] = {}
        self._excluded: dict[str, str] = {}
        return Broadcast(self.round, self.ema_steps, self.weights, self.federation)

    def accept_source(self, update: Update) -> Broadcast:
        """Take what the source side sends, its teacher or its student; the task of the sites.

        Raises:
            FederationError: it is refused, see `validate_update`; a round cannot go on without it.
        """
        moved = validate_update(update, self.weights, self.round, self.labels)
        self._source, self._steps = update, update.ema_steps
        self._shared = {name: value for name, value in update.weights.items() if name not in self.local}
        self._source_line = {"movement": moved, "seconds": round(update.seconds, 2), "losses": dict(update.losses)}
        return Broadcast(self.round, update.ema_steps, update.weights, self.federation)

    def skip_source(self) -> Broadcast:
        """Where nobody has a source: the task of the sites is the average of the round before."""
        return self.accept_source(Update("server", self.round, self.weights, 1, self.ema_steps, self.labels))

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
                "when the sites are back, or with a lower min_sites"
            )
        weights = {**self._source.weights, **self._mean.result()}
        line = self._line(weights)
        best_score, better, pending = self.best_score, self.plan.select == LAST, None
        if self._pending is not None:
            self._ship(self._source.weights, self._pending)
        if line["score"] is not None and line["score"] > best_score:
            best_score, better = line["score"], True
        if better:
            selection = {"round": self.round, "score": line["score"]}
            if self.plan.ship == BROADCAST:
                pending = {"weights": BROADCAST, **selection}
            else:
                self._ship(weights, {"weights": "global", **selection})
        self._save(weights, self.round + 1, self._steps, best_score, [*self.history, line], pending)
        self._write_log()
        logger.info(
            f"Round {line['round']} closed: {len(self._accepted)} sites, the weights moved by {line['movement']:.3g}, "
            f"Score {line['score']}."
        )
        return line

    @property
    def unfinished(self) -> bool:
        """Whether all rounds are closed, and ``model.pt`` waits for what the server makes of the last one."""
        return self.round >= self.plan.rounds and self._pending is not None

    def finish(self, update: Update) -> None:
        """Ship what the server has made of the last round; `start` gives its task.

        Raises:
            FederationError: it is refused, see `validate_update`.
            ResourceError: the disk is full; the state on disk is that of the last closed round.
        """
        assert self._pending is not None
        validate_update(update, self.weights, self.round, self.labels)
        self._ship(update.weights, self._pending)
        self._save(self.weights, self.round, self.ema_steps, self.best_score, self.history, None, closes=False)
        logger.info("The server's labelled steps on the last average are shipped as model.pt.")

    def _ship(self, weights: Mapping[str, torch.Tensor], selection: Mapping[str, Any]) -> None:
        write_atomic(weights, self.ckpt_dir / MODEL)
        write_json({MODEL: dict(selection)}, self.ckpt_dir / SELECTION)

    def _save(
        self,
        weights: Mapping[str, torch.Tensor],
        number: int,
        ema_steps: int,
        best_score: float,
        history: list[dict[str, Any]],
        pending: dict[str, Any] | None,
        closes: bool = True,
    ) -> None:
        """Write the state, and take it once it is on disk; that of the round before is kept where it closes a round."""
        write_atomic(
            {
                "format": FORMAT,
                "federation": self.federation,
                "fingerprint": shapes_of(weights),
                "settings": json.dumps(self.settings),
                "round": number,
                "ema_steps": ema_steps,
                "best_score": best_score,
                "history": json.dumps(history),
                "pending": json.dumps(pending),
                "weights": weights,
            },
            self.ckpt_dir / STATE,
            keep_previous=self.ckpt_dir / PREVIOUS if closes else None,
        )
        self.weights, self.round, self.ema_steps, self.best_score = dict(weights), number, ema_steps, best_score
        self.history, self._pending = history, pending

    def _line(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        alike = getattr(self._mean, "alike", False)
        shares = {
            name: 1 / len(self._accepted) if alike else accepted["scans"] / self._mean.total
            for name, accepted in self._accepted.items()
        }
        sites = {name: {**self._accepted[name], "weight": shares[name]} for name in sorted(shares)}
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
        write_text(jsonl(self.history), self.output_dir / ROUNDS)
        write_text(jsonl(map(as_epoch, self.history)), self.output_dir / HISTORY)

    def _set_aside(self) -> None:
        """Rename what an earlier federation left, so that none of it is taken for this one's."""
        names = {self.ckpt_dir: (STATE, PREVIOUS, MODEL, SELECTION), self.output_dir: (ROUNDS, HISTORY)}
        found = set_aside(folder / name for folder, listed in names.items() for name in listed)
        if found:
            logger.warning(f"resume is false: renamed {[str(path) for path in found]} to *.earlier.")

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
                f"{path} is no state of a federation that this version reads: choose another ckpt_dir, or set resume "
                "to false"
            )
        if state["fingerprint"] != shapes_of(self.weights):
            raise CheckpointError(
                f"{path} is of another network (fingerprint {state['fingerprint']}, expected "
                f"{shapes_of(self.weights)}): use the network settings it was trained with, or choose another ckpt_dir"
            )
        require_same_settings(json.loads(state["settings"]), self.settings, path)
        self.weights, self.round, self.ema_steps = state["weights"], state["round"], state["ema_steps"]
        self.best_score, self.history = state["best_score"], json.loads(state["history"])
        self._pending, self.federation = json.loads(state["pending"]), state["federation"]
        self._write_log()
        logger.info(f"Resumed from {path}: {self.round} of {self.plan.rounds} rounds are closed.")


def jsonl(lines: Iterable[Mapping[str, Any]]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def as_epoch(line: Mapping[str, Any]) -> dict[str, Any]:
    """A round in the words of `mapseg_components.handlers.EpochHistory`; rounds are epochs, counted from 1."""
    score = line["score"]
    figures = {"learning_rate": line["learning_rate"], "score": score, TARGET_LOSS: None if score is None else -score}
    return {"epoch": line["round"] + 1, "seconds": line["seconds"], **figures}


def shapes_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hexadecimal digits of names, shapes and types."""
    lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in weights.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
