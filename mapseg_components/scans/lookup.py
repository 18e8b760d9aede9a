# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Names and colours of a label map's values, in the files that viewers open."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mapseg_components.colours import channels, structure_colours

__all__ = ["dseg_tsv", "freesurfer_table", "itksnap_labels"]


def itksnap_labels(names: Sequence[str]) -> str:
    """Label description file of ITK-SNAP (Segmentation > Import Label Descriptions).

    Args:
        names: structures in the order of their class index, background left out.
    """
    lines = [
        "# ITK-SnAP Label Description File",
        "# index  red  green  blue  opacity  visible  mesh  name",
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for index, (name, colour) in enumerate(zip(names, structure_colours(len(names))), start=1):
        red, green, blue = channels(colour)
        label = printable(name).replace('"', "'")
        lines.append(f'{index:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{label}"')
    return "\n".join(lines) + "\n"


def freesurfer_table(names: Sequence[str]) -> str:
    """Colour table of FreeSurfer and FreeView; its names have no spaces. Arguments as `itksnap_labels`."""
    lines = ["# index name red green blue transparency", "0 Unknown 0 0 0 0"]
    for index, (name, colour) in enumerate(zip(names, structure_colours(len(names))), start=1):
        label = re.sub(r"\s+", "-", printable(name))
        lines.append(f"{index} {label} {' '.join(map(str, channels(colour)))} 0")
    return "\n".join(lines) + "\n"


def dseg_tsv(names: Sequence[str]) -> str:
    """Table of a BIDS discrete segmentation: index, name, color. Arguments as `itksnap_labels`."""
    lines = ["index\tname\tcolor", "0\tbackground\t#000000"]
    for index, (name, colour) in enumerate(zip(names, structure_colours(len(names))), start=1):
        lines.append(f"{index}\t{printable(name)}\t{colour}")
    return "\n".join(lines) + "\n"


def printable(name: str) -> str:
    """A name on one line, without tabs."""
    return re.sub(r"\s+", " ", name).strip()
