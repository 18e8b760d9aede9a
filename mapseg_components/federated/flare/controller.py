# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The server's part of a federation on NVFlare: tasks out, updates in; what they mean is `Coordinator`'s knowledge."""

from __future__ import annotations

import threading
import time

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController

from mapseg_components.errors import ConfigError, FederationError
from mapseg_components.federated.coordinator import Coordinator
from mapseg_components.federated.core import Broadcast, Update
from mapseg_components.federated.flare.messages import from_broadcast, to_update
from mapseg_components.federated.flare.party import Party
from mapseg_components.federated.site import Site, class_names, initial_weights
from mapseg_components.files import lock_folder, require_writable, sweep_temporaries, unlock_folders
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["MAPSegController"]

TASK = "train"
POLL_S = 0.2


class MAPSegController(ModelController):
    """Rounds of Algorithm 1 over NVFlare's sites. Its settings are read from the server's disk, see `Party`.

    A job that is submitted again goes on after the last closed round in ``ckpt_dir``.

    Args:
        source_site: the client with the labelled source; by default the server itself trains on it.
        join_timeout_s: how long to wait for ``min_sites`` sites at the start.
    """

    def __init__(self, source_site: str | None = None, join_timeout_s: float = 60.0) -> None:
        super().__init__(persistor_id="", ignore_result_error=True)
        self.source_site = source_site
        self.join_timeout_s = join_timeout_s
        self._lock = threading.Lock()

    def run(self) -> None:
        """Every round that is not closed yet.

        Raises:
            FederationError, ConfigError, CheckpointError, DataError, ResourceError: the job ends with its message;
                ``federation.pt`` holds the last closed round.
        """
        party = Party.read("server")
        plan = party.plan
        if plan.round_timeout_s is None:
            raise ConfigError("round_timeout_s is null, but a site that is gone is noticed by it alone: set seconds")
        folders = (party.ckpt_dir, party.output_dir)
        for folder in folders:
            require_writable(folder)
            lock_folder(folder)
            sweep_temporaries(folder)
        source = None
        if self.source_site is None and plan.server_steps != 0:
            source = party.site(SOURCE)
            source.check()
        weights = initial_weights(party.settings, plan.seed, trained=plan.server_steps == 0)
        self.coordinator = Coordinator(
            plan, weights, class_names(party.settings), *folders, party.settings, party.resume
        )
        self._wait_for_sites(plan.min_sites)
        while self.coordinator.round < plan.rounds and not self.abort_signal.triggered:
            self._round(source)
        if self.coordinator.unfinished and not self.abort_signal.triggered:
            self.coordinator.finish(self._source_update(source, self.coordinator.start()))
        unlock_folders(folders)

    def _round(self, source: Site | None) -> None:
        coordinator = self.coordinator
        start = coordinator.start()
        if coordinator.plan.server_steps == 0:
            task = coordinator.skip_source()
        else:
            task = coordinator.accept_source(self._source_update(source, start))
        asked = coordinator.participants(self._targets())
        waiting = set(asked)

        def take(model: FLModel) -> None:
            with self._lock:
                site = str(model.meta["client_name"])
                waiting.discard(site)
                try:
                    coordinator.accept(to_update(model, task))
                except FederationError as error:
                    coordinator.exclude(site, error)

        self._send(task, asked, TARGET, take)
        with self._lock:
            for site in sorted(waiting):
                coordinator.exclude(
                    site, f"no answer within round_timeout_s {coordinator.plan.round_timeout_s:g}, or gone"
                )
            coordinator.close()

    def _source_update(self, source: Site | None, task: Broadcast) -> Update:
        if source is not None:
            return source.train(task)
        assert self.source_site is not None
        found: list[FLModel] = []
        self._send(task, [self.source_site], SOURCE, found.append)
        if not found:
            raise FederationError(
                f"{self.source_site}: no answer for round {task.round}, and without the source no round goes on: "
                "start that site again and submit the job again"
            )
        return to_update(found[0], task)

    def _send(self, task: Broadcast, sites: list[str], side: str, take) -> None:
        plan = self.coordinator.plan
        model = from_broadcast(task, plan.rounds, side)
        self.send_model(TASK, model, targets=sites, timeout=int(plan.round_timeout_s or 0), callback=take)
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                raise FederationError(f"the job was aborted in round {task.round}: submit it again to go on from there")
            time.sleep(POLL_S)

    def _targets(self) -> list[str]:
        return [client.name for client in self.engine.get_clients() if client.name != self.source_site]

    def _wait_for_sites(self, least: int) -> None:
        end = time.monotonic() + self.join_timeout_s
        while len(self._targets()) < least and time.monotonic() < end and not self.abort_signal.triggered:
            time.sleep(POLL_S)
