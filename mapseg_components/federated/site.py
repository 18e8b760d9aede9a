# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One party of a federation: the trainer of the bundle on the data of one side, a round at a time."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from mapseg_components.checkpoints import (
    load_weights,
    random_state,
    restore_random_state,
    weights_of,
)
from mapseg_components.configs import parser_of
from mapseg_components.data import check_training_data, load_datalist
from mapseg_components.data.audit import Audit
from mapseg_components.data.datalist import open_datalist
from mapseg_components.errors import ConfigError, FederationError, MAPSegError
from mapseg_components.federated.core import Broadcast, Update, site_seed, validate_weights
from mapseg_components.federated.kept import Kept, moments_of, restore_moments
from mapseg_components.federated.plan import BROADCAST, STUDENT, TEACHER, Plan
from mapseg_components.federated.privacy import Privacy, PrivacyAccountant, protect
from mapseg_components.keys import IMAGE, SOURCE, TARGET
from mapseg_components.structures import structures_of

__all__ = ["Site", "class_names", "initial_weights"]

logger = logging.getLogger(__name__)

SLOW = 0.25  # of the way to the student in a round
SECTION = {SOURCE: "source_training", TARGET: "target_training"}


class Site:
    """The server with its labelled source, or a client with its unlabelled target scans.

    A round depends on the broadcast, the round's number, the plan and the site's scans, name and settings, and on
    nothing that happened before (but for `Plan.local_layers`): optimizer moments start from zero, student and teacher
    from the broadcast, draws from (seed, site, round). So a site may miss rounds, or be started anew, at any time.
    With `Plan.keep_moments` moments and teacher go on from the party's last round, whichever that was; a round that is
    repeated starts from the same as before.

    Each side trains by the bundle's ``method`` with its half of the batch: MAPSeg by Eq. 9 at the source and Eq. 10
    at the target (``target_clean`` true, ``beta`` 0.5). The teacher follows from the first step. `Plan.privacy` acts on
    what a target side sends back, alike in the simulation and between real sites.

    Args:
        name: of the site; names its seed and appears in messages.
        side: ``"source"`` or ``"target"``.
        plan: what all parties agreed on.
        settings: merged config of the bundle, as plain values: ``train.json``, overlays, ``federated.json``.
        datalist: file or folder; only ``source_training`` (source) or ``target_training`` (target) is looked at.
        folder: where the site's history, audit, local weights and moments are kept; nothing of it is sent.

    Raises:
        ConfigError: see `Plan` and the bundle's components.
    """

    def __init__(
        self, name: str, side: str, plan: Plan, settings: Mapping[str, Any], datalist: str | Path, folder: str | Path
    ) -> None:
        self.name, self.side, self.plan = name, side, plan
        self.datalist, self.folder = str(datalist), Path(folder)
        self.settings = dict(settings)
        self.labels = class_names(settings)
        self.seed = site_seed(plan.seed, SOURCE if side == SOURCE else name)  # whoever has the source draws alike
        self.privacy = plan.privacy if side == TARGET else Privacy()
        self._accountant = PrivacyAccountant(self.folder / "privacy.json", self.privacy)
        self._local = Kept(self.folder / "local.pt")
        self._kept = Kept(self.folder / "kept.pt")
        self._parser: ConfigParser | None = None
        self._warned = False

    def check(self) -> None:
        """Read every scan of this side once, before any round.

        Raises:
            FederationError: a site has no scans, another label table, or scans of another spacing.
            ConfigError: the method cannot learn from this side by itself.
            DataError, ResourceError, ConfigError: as `check_training_data`. Every message names the site.
        """
        with self._named():
            parser = parser_of(self.settings)
            get = parser.get_parsed_content
            self.plan.check_method(self.settings["method"], self.side)
            cases = load_datalist(self.datalist, SECTION[self.side])
            self._check_label_table(get("labels"), get("dropped_labels"))
            options = {key: get(key) for key in ("audit", "assume_orientation", "non_finite")}
            audit_file = self.folder / "audit.json"
            check_training_data(
                self.datalist,
                get("labels"),
                get("dropped_labels"),
                get("source_negative_values"),
                get("target_negative_values"),
                sections=[SECTION[self.side]],
                record=audit_file,
                **options,
            )
            if self.plan.spacing_range_mm is not None:
                self._check_spacing(cases, audit_file)

    def train(self, broadcast: Broadcast) -> Update:
        """One round: student and teacher start as the broadcast, train, and one of them is what is sent back.

        Raises:
            FederationError: the broadcast does not fit this network, or is not finite; the privacy budget is spent.
            DataError, NonFiniteError, ResourceError: while training; the message names the site.
        """
        started = time.monotonic()
        with self._named():
            self._accountant.require_budget()
            if self._parser is None:
                self._build()
            try:
                weights = self._train(broadcast)
            except Exception:
                self._parser = None  # an interrupted engine is not run again
                raise
            if self.privacy.active:
                weights = protect(weights, broadcast.weights, self.privacy)
            spent = self._accountant.spend()
        return Update(
            site=self.name,
            round=broadcast.round,
            weights=weights,
            scans=self.scans,
            ema_steps=self.teacher.steps,
            labels=self.labels,
            losses=self.history.means(),
            seconds=time.monotonic() - started,
            privacy=spent,
        )

    def _build(self) -> None:
        settings = dict(self.settings)
        other = {SOURCE: TARGET, TARGET: SOURCE}[self.side]
        self.scans = len(load_datalist(self.datalist, SECTION[self.side]))
        steps = self.plan.server_steps if self.side == SOURCE else self.plan.client_steps
        batch_size = parser_of(settings).get_parsed_content("batch_size")
        self.steps = -(-self.scans // batch_size) if steps is None else steps
        settings |= {
            "seed": self.seed,
            "datalist": self.datalist,
            "epoch_length": self.steps,
            "max_epochs": self.plan.rounds,
            "warmup_epochs": 0,
            "_folder": str(self.folder),
        }
        parser = parser_of(settings)
        parser[f"train#dataloader#{other}_loader"] = None
        if self.side == TARGET:
            parser["class_weights"] = None  # would be counted in source labels
        parser["train#handlers"] = [
            {
                "_target_": "mapseg_components.handlers.EpochHistory",
                "output_dir": "@_folder",
                "optimizer": "@optimizer",
            },
            "@teacher",
        ]
        self.trainer = parser.get_parsed_content("train#trainer")
        self.network = parser.get_parsed_content("network_def")
        self.teacher = parser.get_parsed_content("teacher")
        self.teacher_network = parser.get_parsed_content("teacher_network")
        self.optimizer = parser.get_parsed_content("optimizer")
        self.loader = parser.get_parsed_content("train#dataloader")
        self.history = parser.get_parsed_content("train#handlers")[0]
        self.local = self.plan.local_names(self.network.state_dict()) if self.side == TARGET else set()
        self._frozen: torch.nn.Module | None = None
        if self.side == TARGET and self.plan.labels_by == BROADCAST:
            self._frozen = copy.deepcopy(self.teacher.network)
            parser.get_parsed_content("pseudo_labels").teacher = SimpleNamespace(network=self._frozen, active=True)
        self._scaler = copy.deepcopy(self.trainer.optimization.scaler.state_dict())
        self._parser = parser

    def _train(self, broadcast: Broadcast) -> dict[str, torch.Tensor]:
        number = broadcast.round
        validate_weights(broadcast.weights, self.network.state_dict(), f"{self.name}: what the server sent")
        self.network.load_state_dict({**broadcast.weights, **self._local_before(broadcast)})
        student = self.teacher.student.state_dict()
        kept = self._kept.before(broadcast.federation, number) if self.plan.keep_moments else {}
        self.teacher.load_state_dict(
            {"network": kept.get("teacher", student), "steps": broadcast.ema_steps, "active": True}
        )
        if self._frozen is not None:
            self._frozen.load_state_dict(student)
        self._check_the_pace()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        if kept:
            restore_moments(self.optimizer, kept["moments"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(number)
        self.trainer.optimization.scaler.load_state_dict(self._scaler)
        self.loader.epoch, self.loader.batches = number, 0
        state = self.trainer.state  # a round is an epoch of the trainer
        state.epoch, state.iteration, state.max_epochs = number, number * self.steps, number + 1
        with drawing_from(np.random.SeedSequence([self.seed, number])):
            self.trainer.run()
        if state.iteration != (number + 1) * self.steps:
            raise FederationError(
                f"round {number} made {state.iteration - number * self.steps} of {self.steps} steps: "
                "the loader ended early; lower server_steps or client_steps"
            )
        weights = weights_of(self.network if self.plan.upload == STUDENT else self.teacher_network)
        if self.plan.keep_moments:
            teacher = weights_of(self.teacher.network)
            after = {"moments": moments_of(self.optimizer), "teacher": teacher}
            self._kept.keep(broadcast.federation, number, after)
        if self.local:
            after = {name: weights.pop(name) for name in sorted(self.local)}
            self._local.keep(broadcast.federation, number, after)
        return weights

    def _local_before(self, broadcast: Broadcast) -> dict[str, torch.Tensor]:
        """The site's own values of local layers; empty in its first round, which starts from the broadcast."""
        found = self._local.before(broadcast.federation, broadcast.round) if self.local else {}
        if found and set(found) != self.local:
            raise FederationError(
                f"{self._local.path} keeps {len(found)} tensors, local_layers names {len(self.local)}: "
                "keep local_layers as it was, or move the file away to start from the server's values"
            )
        return found

    def _check_the_pace(self) -> None:
        """Refuse a teacher that stands still where it is sent; warn once if a round's work hardly reaches it."""
        if self.plan.upload != TEACHER:
            return
        followed = self.teacher.followed(self.steps)
        if not followed:
            raise ConfigError("upload is teacher, and the teacher stands still in a round: set upload to student")
        if followed < SLOW and not self._warned:
            self._warned = True
            logger.warning(
                f"{self.name}: in a round of {self.steps} steps the teacher, which is what travels, takes "
                f"{followed:.0%} of the way to its student: more steps or a faster ema_schedule keep more of its work."
            )

    def _check_label_table(self, labels: Mapping[str, int], dropped: list[int] | str) -> None:
        table = (open_datalist(self.datalist) or {}).get("labels")
        if not isinstance(table, Mapping):
            return
        named = structures_of(table, f"the label table of {self.datalist}").items()
        expected = {str(value): name for name, value in structures_of(labels).items()}
        left_out = [value for _, value in named if str(value) not in expected] if dropped == "others" else dropped
        found = {str(value): name for name, value in named if value not in left_out}
        if found != expected:
            raise FederationError(
                f"the label table of {self.datalist} is {found}, expected {expected}: "
                "rename its labels, or agree on labels and dropped_labels with the federation"
            )

    def _check_spacing(self, cases: list[dict[str, Any]], audit_file: Path) -> None:
        least, greatest = self.plan.spacing_range_mm or (0.0, np.inf)
        audit = Audit(record=audit_file)
        for case in cases:
            facts = audit.record.facts(case[IMAGE], False)
            sides = np.linalg.norm(np.array(facts.affine)[:3, :3], axis=0)
            if sides.min() < least or sides.max() > greatest:
                spacing = " x ".join(f"{side:.3g}" for side in sides)
                audit.add(
                    case[IMAGE],
                    f"voxels of {spacing} mm, spacing_range_mm is [{least:g}, {greatest:g}]",
                    "resample it, or agree on another range",
                )
        audit.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of this block begin with the site's name."""
        try:
            yield
        except MAPSegError as error:
            if str(error).startswith(self.name):
                raise
            named = type(error)(f"{self.name}: {error}")
            named.findings = error.findings
            raise named from error


def class_names(settings: Mapping[str, Any]) -> list[str]:
    """Names of the classes in the order of their index, background left out."""
    return list(structures_of(parser_of(settings).get_parsed_content("labels")))


def initial_weights(settings: Mapping[str, Any], seed: int, trained: bool = False) -> dict[str, torch.Tensor]:
    """Weights before the first round: random by the seed, then ``encoder_weights`` and ``initial_weights`` if given.

    Args:
        settings: merged config.
        seed: of random weights.
        trained: refuse those, for a federation in which nobody has a source.

    Raises:
        CheckpointError: a weights file is missing, damaged or of another network.
        ConfigError: there is none, and nobody would learn a label.
    """
    parser = parser_of(settings)
    if trained and parser.get_parsed_content("initial_weights") is None:
        raise ConfigError(
            "server_steps is 0, and initial_weights null: nothing would know the structures; name weights of "
            "source-only training"
        )
    with drawing_from(np.random.SeedSequence(seed)):
        network = parser.get_parsed_content("network_def")
    for key, prefix in (("encoder_weights", "encoder."), ("initial_weights", "")):
        path = parser.get_parsed_content(key)
        if path is not None:
            count = load_weights(network, path, prefix)
            logger.info(f"Loaded {count} of {count} tensors of {path} ({key}).")
    return weights_of(network)


@contextlib.contextmanager
def drawing_from(origin: np.random.SeedSequence) -> Iterator[None]:
    """Every generator is seeded from here inside the block, and as it was before afterwards."""
    before = random_state()
    word = int(origin.generate_state(1)[0])
    torch.manual_seed(word)
    np.random.seed(word)
    try:
        yield
    finally:
        restore_random_state(before)
