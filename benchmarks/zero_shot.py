# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice of a bundle on labelled scans that it was not trained on, also where both name their structures otherwise.

    python -m benchmarks.zero_shot SCANS TRUTH --bundle brain_any_contrast --structures '{"hippocampus": [[1], [1]]}'

``--structures`` says of each structure which values of the bundle's label maps it is made of, and which of the truth's;
what neither names is background. Label maps come from ``mapseg predict``, figures from ``mapseg evaluate``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from mapseg_components.commands.evaluate import Evaluation, evaluate
from mapseg_components.commands.predict import predict
from mapseg_components.data.label_maps import label_maps
from mapseg_components.scans.nifti import read_nifti

Structures = Mapping[str, Sequence[Sequence[int]]]


def main(line: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", help="folder of scans")
    parser.add_argument("truth", help="folder of their label maps, of the same names")
    parser.add_argument("--bundle", default="brain_any_contrast")
    parser.add_argument("--weights", help="file, by default the bundle's own")
    parser.add_argument(
        "--structures", required=True, type=json.loads, help="name: [values found, values of the truth]"
    )
    parser.add_argument("--match_size", action="store_true", help="as of mapseg predict")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(line)
    options = (given.bundle, given.weights, given.threads, given.match_size)
    print(measured(given.scans, given.truth, given.structures, *options))


def measured(
    scans: str,
    truth: str,
    structures: Structures,
    bundle: str,
    weights: str | None = None,
    threads: int | None = None,
    match_size: bool = False,
) -> Evaluation:
    """Figures of all scans; options as on the command line.

    Raises:
        RuntimeError: a scan was not segmented.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = predict(
            scans,
            str(folder / "all"),
            bundle=bundle,
            weights=weights,
            match_size=match_size,
            no_preview=True,
            num_threads=threads,
            quiet=True,
        )
        if found.exit_code:
            raise RuntimeError(str(found))
        for side, place in enumerate((folder / "all", truth)):
            own = {name: values[side] for name, values in structures.items()}
            for path in label_maps(str(place)).values():
                renumber(path, folder / str(side) / path.name, own)
        labels = {name: value for value, name in enumerate(structures, start=1)}
        return evaluate(
            str(folder / "0"), str(folder / "1"), labels=json.dumps(labels), num_threads=threads, quiet=True
        )


def renumber(path: Path, copy: Path, structures: Mapping[str, Sequence[int]]) -> None:
    """Write a label map in which each structure has its number, from 1, and all else is background."""
    scan = read_nifti(path)
    result = np.zeros(scan.voxels.shape, np.uint8)
    for number, values in enumerate(structures.values(), start=1):
        result[np.isin(scan.voxels, values)] = number
    copy.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(result, scan.affine), copy)


if __name__ == "__main__":
    main()
