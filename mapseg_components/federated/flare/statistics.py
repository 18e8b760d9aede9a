# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The picture of the domain gap by NVFlare's statistics job; each site says for itself whether it takes part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.statistics_spec import Bin, DataType, Feature, Histogram, HistogramType, Statistics
from nvflare.app_common.executors.statistics.statistics_executor import StatisticsExecutor
from nvflare.app_common.filters.statistics_privacy_filter import StatisticsPrivacyFilter
from nvflare.app_common.statistics.json_stats_file_persistor import JsonStatsFileWriter
from nvflare.app_common.statistics.min_count_cleanser import MinCountCleanser
from nvflare.app_common.workflows.statistics_controller import StatisticsController
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType

from mapseg_components.configs import parser_of
from mapseg_components.data import load_datalist
from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.federated.flare.party import Party, sides_of
from mapseg_components.federated.site import SECTION
from mapseg_components.federated.statistics import FEATURES, LEAST_SCANS, summary_of
from mapseg_components.files import write_json
from mapseg_components.keys import IMAGE, SOURCE, TARGET

__all__ = ["RESULT", "SiteStatistics", "make_statistics_job"]

logger = logging.getLogger(__name__)

NAME = "mapseg_statistics"
RESULT = "statistics/domain_gap.json"  # in the job's folder at the server
TASK = "fed_stats"
WAIT_S = 600  # for the other sites, each of which reads all its scans, once min_sites have answered
SCANS = "scans"  # NVFlare's name of the data set; there is one


class SiteStatistics(Statistics):
    """Answers from `summary_of` alone, made once in a job and written to the site's folder as ``statistics.json``.

    A site takes part if ``share_statistics`` is true in its settings, with ``statistics_min_scans`` scans or more.
    What a job asks beyond that (a least or greatest value, quantiles, other bins) is refused.

    Args:
        side: whose scans, ``"target"`` or ``"source"``.

    Raises:
        ConfigError: another side.
    """

    def __init__(self, side: str = TARGET) -> None:
        super().__init__()
        if side not in (SOURCE, TARGET):
            raise ConfigError(f"side is {side!r}, expected {SOURCE!r} or {TARGET!r}: correct the job")
        self.side = side
        self.site = ""
        self._summary: dict[str, Any] | None = None

    def initialize(self, fl_ctx: FLContext) -> None:
        """Take the site's name."""
        self.site = fl_ctx.get_identity_name()

    def features(self) -> dict[str, list[Feature]]:
        """Names of the statistics that the site sends.

        Raises:
            ConfigError or DataError: the site takes no part; NVFlare goes on without it.
        """
        try:
            self._summarize()
        except MAPSegError as error:
            logger.error(f"{self.site} sends no statistics: {error}")
            raise
        return {SCANS: [Feature(name, DataType.FLOAT) for name in FEATURES]}

    def count(self, dataset_name: str, feature_name: str) -> int:
        """Number of scans."""
        return int(self._summarize()["scans"])

    def sum(self, dataset_name: str, feature_name: str) -> float:
        """Of the rounded mean."""
        return self.count(dataset_name, feature_name) * self.mean(dataset_name, feature_name)

    def mean(self, dataset_name: str, feature_name: str) -> float:
        """Rounded."""
        return float(self._of(feature_name)["mean"])

    def stddev(self, dataset_name: str, feature_name: str) -> float:
        """Rounded."""
        return float(self._of(feature_name)["stddev"])

    def variance_with_mean(
        self, dataset_name: str, feature_name: str, global_mean: float, global_count: float
    ) -> float:
        """From the rounded values, whatever mean the server sends."""
        count, mean = self.count(dataset_name, feature_name), self.mean(dataset_name, feature_name)
        spread = (count - 1) * self.stddev(dataset_name, feature_name) ** 2
        return (spread + count * (mean - global_mean) ** 2) / max(global_count - 1, 1)

    def min_value(self, dataset_name: str, feature_name: str) -> float:
        """Of the fixed bins, not of the scans."""
        return FEATURES[feature_name].low

    def max_value(self, dataset_name: str, feature_name: str) -> float:
        """Of the fixed bins, not of the scans."""
        return FEATURES[feature_name].high

    def histogram(
        self, dataset_name: str, feature_name: str, num_of_bins: int, global_min_value: float, global_max_value: float
    ) -> Histogram:
        """In the fixed bins.

        Raises:
            ConfigError: the job asks for others.
        """
        bounds = FEATURES[feature_name]
        if (num_of_bins, global_min_value, global_max_value) != (bounds.bins, bounds.low, bounds.high):
            raise ConfigError(
                f"{self.site}: {num_of_bins} bins of {feature_name} from {global_min_value} to {global_max_value} were "
                f"asked for, expected {bounds}: make the job with the same version"
            )
        edges = bounds.edges.tolist()
        shares = self._of(feature_name)["histogram"]
        return Histogram(HistogramType.STANDARD, [Bin(*each) for each in zip(edges, edges[1:], shares)])

    def _of(self, feature: str) -> dict[str, Any]:
        return dict(self._summarize()["features"][feature])

    def _summarize(self) -> dict[str, Any]:
        if self._summary is None:
            party = Party.read(self.site)
            get = parser_of(party.settings).get_parsed_content
            if get("share_statistics") is not True:
                raise ConfigError(
                    f"{self.site}: share_statistics is {get('share_statistics')!r}: "
                    f"set it to true in {self.site}.json to take part"
                )
            images = [str(case[IMAGE]) for case in load_datalist(party.datalist, SECTION[self.side])]
            try:
                summary = summary_of(images, get("statistics_min_scans"))
            except MAPSegError as error:
                raise type(error)(f"{self.site}: {error}") from error
            write_json(summary, Path(party.output_dir) / "sites" / self.site / "statistics.json")
            self._summary = summary
        return self._summary


def make_statistics_job(sites: Sequence[str], min_sites: int, source_site: str | None = None) -> FedJob:
    """A job that collects the statistics of these sites; arguments as `make_job`.

    NVFlare writes them to `RESULT` in the job's folder at the server. Its ``MinCountCleanser`` looks at what a site
    sends once more.
    """
    histograms = {name: {"bins": each.bins, "range": [each.low, each.high]} for name, each in FEATURES.items()}
    asked = {"count": {}, "sum": {}, "mean": {}, "stddev": {}, "histogram": histograms}
    job = FedJob(name=NAME, min_clients=min_sites)
    job.set_app_packages(["mapseg_components"])
    writer = job.to_server(JsonStatsFileWriter(RESULT), id="writer")
    job.to_server(
        StatisticsController(
            asked, writer, min_clients=min_sites, wait_time_after_min_received=WAIT_S, enable_pre_run_task=False
        )
    )
    for site, side in sides_of(sites, source_site).items():
        generator = job.to(SiteStatistics(side), site, id="statistics")
        job.to(StatisticsExecutor(generator_id=generator), site, tasks=[TASK])
        cleanser = job.to(MinCountCleanser(LEAST_SCANS), site, id="min_count")
        job.to(StatisticsPrivacyFilter([cleanser]), site, tasks=[TASK], filter_type=FilterType.TASK_RESULT)
    return job
