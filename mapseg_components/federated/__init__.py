# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Adaptation without moving scans: a labelled server, unlabelled sites, weights that travel (MAPSeg, Algorithm 1)."""

from mapseg_components.federated.coordinator import Coordinator
from mapseg_components.federated.core import Aggregation, Broadcast, Update, WeightedMean
from mapseg_components.federated.plan import Plan
from mapseg_components.federated.privacy import Privacy
from mapseg_components.federated.robust import CoordinateMedian, TrimmedMean
from mapseg_components.federated.simulation import simulate
from mapseg_components.federated.site import Site

__all__ = [
    "Aggregation",
    "Broadcast",
    "CoordinateMedian",
    "Coordinator",
    "Plan",
    "Privacy",
    "Site",
    "TrimmedMean",
    "Update",
    "WeightedMean",
    "simulate",
]
