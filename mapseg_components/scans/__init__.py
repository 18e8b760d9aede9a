# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan: its header, voxels and facts, from NIfTI or DICOM, and what is written beside it."""

from mapseg_components.scans.facts import AuditRecord, Facts
from mapseg_components.scans.findings import Finding
from mapseg_components.scans.lookup import dseg_tsv, freesurfer_table, itksnap_labels
from mapseg_components.scans.nifti import Scan, median_spacing, read_nifti
from mapseg_components.scans.reader import NiftiReader

__all__ = [
    "AuditRecord",
    "Facts",
    "Finding",
    "NiftiReader",
    "Scan",
    "dseg_tsv",
    "freesurfer_table",
    "itksnap_labels",
    "median_spacing",
    "read_nifti",
]
