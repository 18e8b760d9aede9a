# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A whole federation in one process: for research, teaching and tests (MAPSeg, Algorithm 1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mapseg_components.configs import running_settings
from mapseg_components.errors import ConfigError, FederationError, user_error
from mapseg_components.federated.coordinator import Coordinator
from mapseg_components.federated.plan import Plan
from mapseg_components.federated.site import Site, class_names, initial_weights
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["SERVER", "simulate"]

logger = logging.getLogger(__name__)

SERVER = "server"


def simulate(
    plan: Plan,
    datalist: str | Path,
    sites: Mapping[str, str | Path],
    ckpt_dir: str | Path,
    output_dir: str | Path,
    resume: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Run all rounds, site after site; the same call goes on after the last closed round.

    On a CPU its weights are then those of a run without a stop, bit for bit, unless `Plan.round_timeout_s` leaves out a
    site: that is by the clock; or `Plan.privacy` adds noise, which is drawn anew.

    Args:
        plan: settings of the federation.
        datalist: the server's; its ``source_training`` is read, unless the server takes no step.
        sites: name to datalist; the ``target_training`` of each is read, without labels.
        ckpt_dir: see `Coordinator`.
        output_dir: see `Coordinator`; the files of each party are in ``output_dir/sites/<name>``.
        resume: see `Coordinator`.
        settings: merged config; by default that of the bundle run that calls this.

    Returns:
        global weights after the last round.

    Raises:
        ConfigError, DataError, FederationError, CheckpointError or ResourceError: see `Site`, `Coordinator`. A site
            that fails in a round is left out of that round; too few end the run, with the last closed round on disk.
    """
    settings = running_settings() if settings is None else settings
    if len(sites) < plan.min_sites or SERVER in sites:
        raise ConfigError(
            f"sites names {sorted(sites)}, expected {plan.min_sites} (min_sites) or more, and none called {SERVER!r}: "
            "give sites as {name: datalist, ...}"
        )
    folder = Path(output_dir) / "sites"
    server = None if plan.server_steps == 0 else Site(SERVER, SOURCE, plan, settings, datalist, folder / SERVER)
    clients = {name: Site(name, TARGET, plan, settings, path, folder / name) for name, path in sorted(sites.items())}
    for party in (server, *clients.values()):
        if party is not None:
            party.check()
    weights = initial_weights(settings, plan.seed, trained=server is None)
    coordinator = Coordinator(plan, weights, class_names(settings), ckpt_dir, output_dir, settings, resume)
    while coordinator.round < plan.rounds:
        start = coordinator.start()
        task = coordinator.skip_source() if server is None else coordinator.accept_source(server.train(start))
        for name in coordinator.participants(clients):
            try:
                update = clients[name].train(task)
                if plan.round_timeout_s is not None and update.seconds > plan.round_timeout_s:
                    raise FederationError(
                        f"{name}: took {update.seconds:.1f} s, round_timeout_s is {plan.round_timeout_s:g}: "
                        "raise it, or start anew with fewer client_steps"
                    )
                coordinator.accept(update)
            except Exception as error:  # MONAI wraps what a component refuses
                known = user_error(error)
                if known is None:
                    raise
                coordinator.exclude(name, known)
        coordinator.close()
    if coordinator.unfinished and server is not None:
        coordinator.finish(server.train(coordinator.start()))
    return coordinator.weights
