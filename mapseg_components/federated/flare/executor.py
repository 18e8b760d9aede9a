# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A site's part of a federation on NVFlare: starts the training process, and nothing else."""

from __future__ import annotations

import sys

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode

from mapseg_components.errors import ConfigError
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["SiteExecutor"]

LAUNCH_TIMEOUT_S = 300.0  # of the training process, which imports PyTorch and MONAI
HEARTBEAT_TIMEOUT_S = 120.0


class SiteExecutor(ClientAPIExecutor):
    """NVFlare's Client API executor with one fixed command: our client, run by the interpreter that runs NVFlare.

    NVFlare's executor takes the command from the job, so that a site that allows it allows any command. This one
    can be allowed by itself (``class_allow_list`` of the site's ``local/resources.json``).

    Args:
        side: ``"target"`` or ``"source"``.
        differences: send differences to the weights that arrived, for NVFlare's filters to act on.

    Raises:
        ConfigError: another side.
    """

    def __init__(self, side: str = TARGET, differences: bool = False) -> None:
        if side not in (SOURCE, TARGET):
            raise ConfigError(f"side is {side!r}, expected {SOURCE!r} or {TARGET!r}: correct the job")
        self.side, self.differences = side, differences
        command = [sys.executable, "-u", "-m", "mapseg_components.federated.flare.client", "--side", side]
        super().__init__(
            execution_mode=ExecutionMode.EXTERNAL_PROCESS,
            command=[*command, "--differences"] if differences else command,
            launch_timeout=LAUNCH_TIMEOUT_S,
            heartbeat_timeout=HEARTBEAT_TIMEOUT_S,
        )
