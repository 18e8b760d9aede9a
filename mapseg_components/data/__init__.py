# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Datalists, their checks, loaders for several domains, and what is measured on label maps."""

from mapseg_components.data.audit import Audit
from mapseg_components.data.bids import bids_scans, dataset_description, is_bids, result_stem
from mapseg_components.data.cache import MappedCacheDataset
from mapseg_components.data.checks import (
    check_datalist,
    check_labelled_scans,
    check_pretraining_data,
    check_scan,
    check_scans,
    check_target_data,
    check_training_data,
)
from mapseg_components.data.datalist import SECTIONS, load_datalist, load_images, load_scans, tissue_is_known
from mapseg_components.data.given import given_cases
from mapseg_components.data.loaders import DomainBalancedSampler, EpochLoader, SeededDataset, SourceTargetLoader
from mapseg_components.data.results import check_results, refuse_existing, result_path
from mapseg_components.data.scan_audit import ScanAudit
from mapseg_components.data.synthetic import synthetic_scans
from mapseg_components.data.volumes import (
    class_weights,
    share_ranges,
    structure_sizes,
    structure_volumes,
    write_volumes_csv,
)
from mapseg_components.scans import (
    AuditRecord,
    Facts,
    Finding,
    NiftiReader,
    Scan,
    dseg_tsv,
    freesurfer_table,
    itksnap_labels,
    median_spacing,
    read_nifti,
)
from mapseg_components.structures import structures_of

__all__ = [
    "SECTIONS",
    "Audit",
    "AuditRecord",
    "DomainBalancedSampler",
    "EpochLoader",
    "Facts",
    "Finding",
    "MappedCacheDataset",
    "NiftiReader",
    "Scan",
    "ScanAudit",
    "SeededDataset",
    "SourceTargetLoader",
    "bids_scans",
    "check_datalist",
    "check_labelled_scans",
    "check_pretraining_data",
    "check_results",
    "check_scan",
    "check_scans",
    "check_target_data",
    "check_training_data",
    "class_weights",
    "dataset_description",
    "dseg_tsv",
    "freesurfer_table",
    "given_cases",
    "is_bids",
    "itksnap_labels",
    "load_datalist",
    "load_images",
    "load_scans",
    "median_spacing",
    "read_nifti",
    "refuse_existing",
    "result_path",
    "result_stem",
    "share_ranges",
    "structure_sizes",
    "structure_volumes",
    "structures_of",
    "synthetic_scans",
    "tissue_is_known",
    "write_volumes_csv",
]
