# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle's own run on label maps without images."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import torch

from tests.bundles.test_bundles import ADAPTATION, same, train, weights
from tests.conftest import write_nifti
from tests.unit.test_label_maps import head


def test_a_source_of_label_maps_trains_and_goes_on_as_if_it_had_not_stopped(tmp_path):
    for seed in range(3):
        write_nifti(tmp_path / "maps" / f"{seed}.nii.gz", head(seed))
    cases = [{"label": f"maps/{seed}.nii.gz"} for seed in range(3)]
    content = {"source_label_maps": True, "source_training": cases[:2], "source_validation": cases[2:]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    labels = {"left": 17, "right": 53, "stem": 16}
    overlays = ("label_maps.yaml", "source_only.yaml")

    def run(name, **settings):
        return train(ADAPTATION, tmp_path / name, tmp_path, *overlays, labels=labels, **settings)

    whole = run("whole")
    scans = sorted((whole / "synthetic").glob("*.nii.gz"))
    assert [path.name for path in scans] == [f"2_{number}.nii.gz" for number in range(1, 5)]
    assert all(0 <= np.asarray(nib.load(path).dataobj).min() for path in scans)
    run("halves", max_epochs=1)
    run("halves")
    same(weights(whole / "source_only.pt"), weights(tmp_path / "halves" / "source_only.pt"))
    assert all(torch.isfinite(value).all() for value in weights(whole / "source_only.pt").values())
