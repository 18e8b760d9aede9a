# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A site's process in an NVFlare federation: ``python -m mapseg_components.federated.flare.client --side target``.

NVFlare starts it, by the job's command, in the site's environment. It reads the site's settings (`Party`), takes
weights, two counts and an identity from each task, and compares the number of rounds; a config, code or a path that a
server might send is not looked at.
"""

from __future__ import annotations

import argparse
import logging
import os

import nvflare.client as flare
import torch

from mapseg_components.errors import user_error
from mapseg_components.federated.flare.messages import from_update, refusal, to_broadcast
from mapseg_components.federated.flare.party import Party
from mapseg_components.keys import SOURCE, TARGET

logger = logging.getLogger(__name__)


def main() -> None:
    """Answer tasks until the job ends. A round that fails is answered by the kind of error, and the site stays."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--side", choices=(SOURCE, TARGET), default=TARGET)
    arguments.add_argument("--differences", action="store_true", help="send differences to what arrived")
    given = arguments.parse_args()
    side = given.side
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    flare.init()
    site = None
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        try:
            if site is None:
                checked = Party.read(flare.get_site_name()).site(side)
                checked.check()
                site = checked
            task = to_broadcast(model, side, site.plan.rounds)
            answer = from_update(site.train(task), task.weights if given.differences else None)
        except Exception as error:  # MONAI wraps what a component refuses; the site stays whatever it was
            known = user_error(error)
            logger.error(f"{type(known or error).__name__}: {known or error}", exc_info=known is None)
            answer = refusal(known or error)
        flare.send(answer)


if __name__ == "__main__":
    main()
