# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle's own runs on PNG and TIFF images of several sizes, with a mask on either side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run
from monai.transforms import Compose
from PIL import Image

from mapseg_components.commands import evaluate, predict
from tests.bundles.test_bundles import ADAPTATION
from tests.pictures import cells, make_images, write_picture

LABELS = {"ring": 1, "core": 2}
FLAT = {"patch_size": [16, 16, 1], "window_stride": [12, 12, 1], "stride": [2, 2, 1], "dilations": [[1, 1, 1]]}
FLAT |= {"width": 8, "depth": 1, "head_channels": 8, "labels": LABELS, "device": "$torch.device('cpu')"}
BLOCKS = {"local_block_size": [4, 4, 1], "global_block_size": [4, 4, 1]}


def config(name):
    return str(ADAPTATION / "configs" / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose label maps differ where the mask of a source image is 0, and nowhere else."""
    folder = tmp_path_factory.mktemp("images")
    data = make_images(folder / "data")
    mask = np.ones((40, 56), np.uint8)
    mask[:, 30:] = 0
    write_picture(data / "source" / "images" / "a_mask.png", mask)
    label = cells(0)[1]
    for name, beyond in (("one", 0), ("two", 2)):
        write_picture(data / "source" / "labels" / "a.png", np.where(mask > 0, label, beyond).astype(np.uint8))
        out = folder / name
        places = {"dataset_dir": str(data), "datalist": str(data), "ckpt_dir": str(out), "output_dir": str(out)}
        files = [config("train.json"), config("tiny.yaml")]
        run(run_id="run", config_file=files, bundle_root=str(ADAPTATION), **places, **FLAT, **BLOCKS)
    return folder


def test_labels_under_a_mask_change_no_weight(runs):
    one, two = (torch.load(runs / name / "model.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_label_maps_are_images_on_the_scans_pixels_and_0_under_a_mask(runs):
    out = runs / "predicted"
    settings = {name: value for name, value in FLAT.items() if name != "device"}
    found = predict(
        str(runs / "data" / "target" / "images"),
        str(out),
        bundle=str(ADAPTATION),
        weights=str(runs / "one" / "model.pt"),
        settings=settings,
        device="cpu",
        quiet=True,
    )
    assert found.exit_code == 0
    assert sorted(path.name for path in out.glob("*.tif")) == ["t_seg.tif", "u_seg.tif"]
    for name in ("t", "u"):
        with (
            Image.open(runs / "data/target/images" / f"{name}.tif") as scan,
            Image.open(out / f"{name}_seg.tif") as label,
        ):
            assert scan.size == label.size and np.asarray(label).dtype == np.uint8 and np.asarray(label).max() <= 2
            if name == "u":
                assert not np.asarray(label)[:, 40:].any()
    assert sorted(path.name for path in (out / "previews").iterdir()) == ["t.png", "u.png"]
    figures = evaluate(str(out), str(out), quiet=True)
    assert figures.cases == 2 and "in pixels of 2 without a pixel size" in str(figures)


@pytest.mark.parametrize(
    ("global_view", "shape", "beyond", "validated"),
    [
        (False, (200, 40, 1), 1, (52, 40, 1)),  # 16 + 3 * 12
        (False, (200, 40, 1), 2, (200, 40, 1)),  # a structure of the label map lies elsewhere
        (True, (200, 40, 1), 1, (200, 40, 1)),  # a view of a part is none of the scan
        (False, (200, 80, 70), 1, (200, 80, 70)),
    ],
)
def test_training_validates_the_middle_of_large_images_alone(global_view, shape, beyond, validated):
    parser = ConfigParser.load_config_files([config("train.json"), config("tiny.yaml")])
    sizes = {"patch_size": [16, 16, 1], "window_stride": [12, 12, 1], "global_view": global_view}
    parser = ConfigParser({**parser, **sizes})
    scan = torch.arange(float(np.prod(shape))).reshape(1, *shape)
    label = torch.ones(1, *shape)
    label[0, 0, 0] = beyond
    seen = Compose(parser.get_parsed_content("validate#middle"))({"image": scan, "label": label})
    assert seen["image"].shape[1:] == seen["label"].shape[1:] == validated
    start = [(side - part) // 2 for side, part in zip(shape, validated)]
    assert torch.equal(seen["image"], scan[(slice(None), *(slice(a, a + n) for a, n in zip(start, validated)))])
