# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Make an NVFlare job: ``python -m mapseg_components.federated.flare.job --help``. It carries no code and no setting.

``--write FOLDER`` writes it for POC and provisioned deployments; ``--simulate FOLDER`` runs it in NVFlare's simulator,
every site in a separate process on this machine; ``--allow FILE`` lets a party run it. With ``--statistics`` the job
trains nothing, but collects the picture of the domain gap, which ``--draw`` makes of its result.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from monai.utils import optional_import
from nvflare.apis.dxo import DataKind
from nvflare.apis.filter import Filter
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType
from nvflare.recipe.sim_env import SimEnv

from mapseg_components.errors import ConfigError
from mapseg_components.federated.flare.controller import TASK, MAPSegController
from mapseg_components.federated.flare.executor import SiteExecutor
from mapseg_components.federated.flare.party import PARTY_DIR, sides_of
from mapseg_components.federated.flare.statistics import make_statistics_job
from mapseg_components.federated.privacy import Privacy
from mapseg_components.keys import TARGET
from mapseg_components.reports.domain_gap import draw_domain_gap

__all__ = ["allow_components", "make_job", "simulate"]

logger = logging.getLogger(__name__)

NAME = "mapseg_federated"
# what a job names of ours, and all that it names
COMPONENTS = [
    "mapseg_components.federated.flare.controller.MAPSegController",
    "mapseg_components.federated.flare.executor.SiteExecutor",
    "mapseg_components.federated.flare.statistics.SiteStatistics",
]
# of NVFlare, but not in its list of classes that a job may name
QUANTIZER = "nvflare.app_opt.pt.quantization.quantizer.ModelQuantizer"
DEQUANTIZER = "nvflare.app_opt.pt.quantization.dequantizer.ModelDequantizer"
# all but the first are computed on a CUDA device, at the server and at every site; NVFlare's "adaquant" is left out: it
# chooses its levels by the range of a tensor, and leaves three for differences of 0.001
WIRES = ("float16", "blockwise8", "float4", "normfloat4")


def make_job(
    sites: Sequence[str],
    min_sites: int,
    source_site: str | None = None,
    filters: Sequence[Filter] = (),
    wire: str | None = None,
) -> FedJob:
    """A job for these sites.

    Args:
        sites: names of the clients with target scans.
        min_sites: the job starts with so many of them.
        source_site: client with the labelled source; ``None``: the server trains on it.
        filters: NVFlare's, on the differences that sites with target scans send, in this order.
        wire: one of `WIRES`, in which weights travel to the sites and differences back; ``None``: float32.

    Raises:
        ConfigError: an unknown wire, or bitsandbytes is missing.
    """
    pack, unpack = quantization_filters(wire)
    job = FedJob(name=NAME, min_clients=min_sites + (source_site is not None))
    job.set_app_packages(["mapseg_components"])  # installed at the sites: otherwise a copy of its code would travel
    job.to_server(MAPSegController(source_site=source_site))
    for site, side in sides_of(sites, source_site).items():
        outgoing = [*(filters if side == TARGET else ()), *pack]
        job.to(SiteExecutor(side, bool(outgoing)), site)
        for each in outgoing:
            job.to(each, site, tasks=[TASK], filter_type=FilterType.TASK_RESULT)
        for each in unpack:
            job.to(each, site, tasks=[TASK], filter_type=FilterType.TASK_DATA)
    for each in pack:
        job.to_server(each, tasks=[TASK], filter_type=FilterType.TASK_DATA)
    for each in unpack:
        job.to_server(each, tasks=[TASK], filter_type=FilterType.TASK_RESULT)
    return job


def quantization_filters(wire: str | None) -> tuple[list[Filter], list[Filter]]:
    """NVFlare's filters before sending and after receiving; none for ``None``."""
    if wire is None:
        return [], []
    if wire not in WIRES:
        raise ConfigError(f"--wire is {wire!r}, expected one of {', '.join(WIRES)}: correct it")
    (pack, found), (unpack, _) = (
        optional_import(module, name=name)
        for module, _, name in (each.rpartition(".") for each in (QUANTIZER, DEQUANTIZER))
    )
    if not found:
        raise ConfigError("--wire needs bitsandbytes at the server and at every site: pip install 'mapseg-monai[wire]'")
    return [pack(wire)], [unpack()]


def allow_components(resources: str | Path) -> None:
    """Add our components to the classes that a party's ``local/resources.json`` lets jobs name.

    A start-up kit comes with ``resources.json.default``, which such a file replaces as a whole: it is copied first.
    """
    path = Path(resources)
    origin = next((file for file in (path, path.with_name(f"{path.name}.default")) if file.is_file()), None)
    content = {"format_version": 2} if origin is None else json.loads(origin.read_text())
    allowed = content.get("class_allow_list", list(DEFAULT_CLASS_ALLOW_LIST))
    content["class_allow_list"] = [
        *allowed,
        *(name for name in (*COMPONENTS, QUANTIZER, DEQUANTIZER) if name not in allowed),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4) + "\n")


def simulate(job: FedJob, sites: Sequence[str], workspace: str | Path) -> None:
    """Run a job in NVFlare's simulator, as many threads as sites (fewer would start sites anew between tasks).

    Raises:
        RuntimeError: the simulator failed; its logs are in the workspace.
    """
    allow_components(Path(workspace) / job.name / "local" / "resources.json")
    # the sites are part of the job already; their number is for the threads
    SimEnv(clients=list(sites), num_threads=len(sites), workspace_root=str(workspace)).deploy(job)


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sites", nargs="*", default=[], help="names of the clients with target scans")
    arguments.add_argument("--source-site", help="client with the labelled source (default: the server itself)")
    arguments.add_argument("--min-sites", type=int, help="the job starts with so many (default: all)")
    percentile = "NVFlare's PercentilePrivacy on what sites send: percentile and limit, e.g. 90 0.01"
    arguments.add_argument("--percentile", nargs=2, type=float, metavar=("PERCENT", "LIMIT"), help=percentile)
    arguments.add_argument("--wire", choices=WIRES, help="NVFlare's quantization of what travels (default: float32)")
    # not --export: importing NVFlare takes that one out of the command line
    arguments.add_argument("--write", metavar="FOLDER", help="write the job here")
    arguments.add_argument("--simulate", metavar="FOLDER", help="run it here, in NVFlare's simulator")
    arguments.add_argument("--statistics", action="store_true", help="collect statistics of the sites' scans instead")
    arguments.add_argument("--draw", nargs=2, metavar=("RESULT", "PNG"), help="draw what such a job wrote")
    arguments.add_argument("--allow", metavar="FILE", help="add our components to a local/resources.json")
    given = arguments.parse_args()
    if given.allow:
        allow_components(given.allow)
    everyone = list(sides_of(given.sites, given.source_site))
    if given.draw:
        for site in draw_domain_gap(*given.draw, everyone):
            logger.warning(f"no answer: {site}; its log gives the reason")
    if not (given.write or given.simulate):
        return
    if not given.sites:
        raise ConfigError("--sites names no site: name the clients with target scans")
    least = given.min_sites or len(given.sites)
    filters = []
    if given.percentile:
        percentile, limit = given.percentile
        Privacy(percentile=percentile, limit=limit)  # NVFlare's filter ignores wrong values silently
        filters.append(PercentilePrivacy(percentile, limit, data_kinds=[DataKind.WEIGHT_DIFF]))
    if given.statistics:
        job = make_statistics_job(given.sites, least, given.source_site)
    else:
        job = make_job(given.sites, least, given.source_site, filters, given.wire)
    if given.write:
        job.export_job(given.write)
    if given.simulate:
        if PARTY_DIR not in os.environ:
            raise ConfigError(f"{PARTY_DIR} is not set: set it to the folder with server.json and a file for each site")
        simulate(job, everyone, given.simulate)


if __name__ == "__main__":
    main()
