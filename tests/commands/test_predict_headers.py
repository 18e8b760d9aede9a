# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg predict`` of one scan under many headers: the same label map, at the same place, of the same volume."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands.predict import predict
from tests.conftest import ROOT, SAMPLE
from tests.headers import orientation_affine, scan_with, write_raw

VARIANTS = ["both", "sform only, pixdim 1", "both, 0.4 mm apart, spacing differs in the sixth digit", "both, metre"]
NAMES = ["plain", "stale", "apart", "metre", "padded", "seven"]


@pytest.fixture(scope="module", params=["as shipped", "of an earlier version"])
def results(tmp_path_factory, request):
    """Folder of scans, folder of results, and rows of volumes; earlier bundles name no reader."""
    place = tmp_path_factory.mktemp("headers")
    scan = nib.as_closest_canonical(nib.load(SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"))
    voxels = np.asarray(scan.dataobj)[6:34, 8:36:, 6:34][::-1, ::-1]
    affine = orientation_affine("LPS", spacing=(1.6, 1.6, 1.6))
    for name, variant in zip(NAMES, VARIANTS):
        scan_with(place / "in" / f"{name}.nii.gz", voxels, affine, variant)
    write_raw(place / "in" / "padded.nii.gz", nib.Nifti1Image(voxels, affine), bytes(32))
    write_raw(place / "in" / "seven.nii.gz", nib.Nifti1Image(voxels[..., None, None, None, None], affine))
    bundle = shutil.copytree(ROOT / "bundles" / "mapseg_adaptation", place / "bundle")
    if request.param != "as shipped":
        config = json.loads((bundle / "configs" / "inference.json").read_text())
        del config["preprocessing"]["transforms"][0]["reader"]
        (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    found = predict(str(place / "in"), str(place / "out"), bundle=str(bundle), quiet=True)
    assert found.exit_code == 0, str(found)
    return place, affine, found


@pytest.mark.parametrize("name", NAMES)
def test_the_label_map_is_that_of_the_plain_scan(results, name):
    place, affine, found = results
    plain, other = (nib.load(place / "out" / f"{one}_seg.nii.gz") for one in ("plain", name))
    np.testing.assert_array_equal(np.asarray(other.dataobj), np.asarray(plain.dataobj))
    assert len(np.unique(np.asarray(plain.dataobj))) > 3
    for form in (other.affine, other.get_sform(), other.get_qform()):
        np.testing.assert_allclose(form, affine, atol=1e-4)
    assert other.header.get_xyzt_units()[0] == "mm"
    volumes = {case: [r["volume_mm3"] for r in found.volumes if r["case"] == case] for case in ("plain", name)}
    assert volumes[name] == pytest.approx(volumes["plain"], rel=1e-5) and max(volumes[name]) > 100


def test_a_picture_is_drawn_of_each(results):
    pytest.importorskip("matplotlib")
    place, _, found = results
    assert [one.message for one in found.predictions] == [""] * len(NAMES)
    assert len(list((place / "out" / "previews").iterdir())) == len(NAMES)


def test_what_is_odd_is_said(tmp_path, caplog):
    voxels = np.random.default_rng(0).integers(1, 99, (20, 22, 24)).astype(np.int16)
    scan_with(tmp_path / "in" / "stale.nii.gz", voxels, orientation_affine("LPS"), "sform only, pixdim 1")
    predict(str(tmp_path / "in"), str(tmp_path / "out"), bundle=str(ROOT / "bundles" / "mapseg_adaptation"))
    assert caplog.text.count("pixdim gives voxel sides of 1 x 1 x 1 mm, the sform 1.1 x 1.6 x 2.3 mm") == 1
