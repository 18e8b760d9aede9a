# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a mapping of labels means in every spelling, and which values of a label map are whole."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.data import class_weights
from mapseg_components.data.labels import label_mapping
from mapseg_components.data.volumes import structure_sizes
from mapseg_components.errors import ConfigError, DataError
from mapseg_components.scans.facts import facts_of
from mapseg_components.structures import (
    are_whole,
    ignored_value,
    listed_values,
    number_text,
    structures_of,
    to_whole,
    unknown_values,
)
from mapseg_components.transforms import SelectLabels
from tests.conftest import ROOT, write_nifti

NAMED = {"liver": 1, "spleen": 3, "left kidney": 2}
SPELLINGS = {
    "name to value": NAMED,
    "nnU-Net v2": {"background": 0, **NAMED},
    "values as text": {"Background": "0", **{name: str(value) for name, value in NAMED.items()}},
    "nnU-Net v1, Decathlon": {"0": "background", **{str(value): name for name, value in NAMED.items()}},
    "YAML": {0: "clear label", **{value: name for name, value in NAMED.items()}},
}
FAULTS = [
    ({"background": 0, "whole tumour": [1, 2, 3], "core": [2]}, "'whole tumour' is a region of the values"),
    ({"background": 0, "liver": 1, "ignore": 2}, "'ignore' is 2.*name 2 in dropped_labels"),
    ({"liver": 0}, "'liver' is 0, but 0 is background.*another value"),
    ({"background": 1, "liver": 2}, "'background' is 1, but background is 0.*dropped_labels"),
    ({"liver": 1, "spleen": 1}, "value 1 occurs twice"),
    ({"liver": -1}, "'liver' is -1, expected a whole number from 1"),
    ({"liver": 1.5}, "'liver' is 1.5, expected a whole number"),
    ({"liver": True}, "'liver' is True, expected a whole number"),
    ({"liver": 1 << 24, "spleen": (1 << 24) + 1}, "'spleen' is 16777217, expected a whole number from 1 to 16777216"),
    ({"background": 0}, "name no structure"),
    ({}, "name no structure"),
]


@pytest.mark.parametrize("labels", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_means_the_same(labels):
    assert structures_of(labels) == NAMED
    assert list(structures_of(labels)) == list(NAMED)
    assert structures_of(json.loads(json.dumps(labels))) == NAMED


@pytest.mark.parametrize("labels, message", FAULTS)
def test_what_is_no_mapping_of_structures_is_refused_by_name(labels, message):
    with pytest.raises(ConfigError, match=f"^here.*{message}"):
        structures_of(labels, "here")


def test_ignore_is_known_by_its_name():
    labels = {"background": 0, "liver": 1, "ignore": 7}
    assert ignored_value(labels) == 7 and ignored_value(NAMED) is None
    assert structures_of(labels, ignore=True) == {"liver": 1}


@pytest.mark.parametrize("divisor", [3, 10, 7, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_numbers_by_a_slope_of_float32_are_whole(divisor, dtype):
    numbers = np.array([*range(1000), 5000, 12345, 1 << 23])
    scaled = ((numbers * divisor) * np.float64(np.float32(1 / divisor))).astype(dtype)
    np.testing.assert_array_equal(to_whole(scaled), numbers)
    assert are_whole(scaled).all()


@pytest.mark.parametrize("value", [0.9882, 2.0235, 10.92, 0.5, 1.001, -0.3, 0.0002, 254.9, 1e-3])
def test_fractions_stay_and_are_told_with_all_digits(value):
    values = np.array([0, 1, value, 254])
    np.testing.assert_array_equal(to_whole(values), values)
    assert not are_whole(values).all()
    what, remedy = unknown_values([(0.0, 9), (value, 4)], [1])
    assert number_text(value) == str(value) and f"fractions: {value} (4 voxels)" in what
    assert "before it was rescaled or resampled" in remedy


def test_values_that_are_not_finite_are_not_whole():
    assert not are_whole(np.array([np.nan, np.inf, -np.inf])).any()


def test_large_values_and_a_mask_of_255_say_what_to_do():
    assert "values above 16777216: 16777218 (2 voxels)" in unknown_values([(16777218.0, 2)], [1])[0]
    assert "as in {'liver': 255}" in unknown_values([(0, 9), (255, 4)], [1])[1]
    assert unknown_values([(0, 9), (255, 4)], [255]) is None


def label_map(folder, divisor=10):
    """A label map of 0, 1, 3 as int16 with a slope of 1/divisor in float32."""
    voxels = np.zeros((5, 6, 7), np.int16)
    voxels[1:3], voxels[3, :4] = divisor, 3 * divisor
    image = nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 0.5, 1.0]))
    image.header.set_slope_inter(1 / divisor, 0)
    nib.save(image, folder / "scaled.nii.gz")
    path = write_nifti(folder / "plain.nii.gz", voxels // divisor, np.diag([1.0, 2.0, 0.5, 1.0]))
    assert not np.array_equal(np.asarray(nib.load(folder / "scaled.nii.gz").dataobj), voxels // divisor)
    return str(folder / "scaled.nii.gz"), str(path)


@pytest.mark.parametrize("listed", [1, 8, 11])
def test_values_named_and_values_counted_are_all_values(listed):
    text = listed_values([(value, 5) for value in range(1, listed + 1)], more_values=3)
    named, more = text.count("voxels"), int(text.rpartition(" and ")[2].removesuffix(" more"))
    assert named + more == listed + 3


def test_a_scaled_label_map_is_read_as_the_plain_one_everywhere(tmp_path):
    scaled, plain = label_map(tmp_path)
    assert facts_of(scaled, with_values=True).values == facts_of(plain, with_values=True).values
    labels = {"background": 0, "one": 1, "three": 3}
    assert structure_sizes([{"label": scaled}], labels) == structure_sizes([{"label": plain}], labels)
    assert list(structure_sizes([{"label": plain}], labels)[0]) == ["one", "three"]
    weights = [class_weights([{"label": path}], labels, 0.5) for path in (scaled, plain)]
    assert weights[0] == weights[1] and len(weights[0]) == 3
    one = np.nextafter(np.float32(1), np.float32(0))  # what float32 may make of a third of 3
    found = SelectLabels(labels)(torch.tensor([[[[0.0, float(one), 3.0]]]]))
    assert found.dtype == torch.uint8 and found.flatten().tolist() == [0, 1, 2]


def test_select_labels_refuses_fractions_with_all_digits():
    with pytest.raises(DataError, match=r"fractions: 0\.9882 \(1 voxels\)"):
        SelectLabels({"one": 1})(torch.tensor([[[[0.0, 0.9882, 1.0]]]]))


def test_as_many_structures_as_class_indices_below_the_one_that_is_ignored():
    last = SelectLabels(range(1, 255))(torch.tensor([[[[0.0, 254.0]]]]))
    assert last.flatten().tolist() == [0, 254]
    with pytest.raises(ConfigError, match="labels name 255 structures, expected 254 at most"):
        SelectLabels(range(1, 256))


def test_labels_as_text_may_be_longer_than_a_path():
    text = json.dumps({f"structure number {value}": value for value in range(1, 30)})
    assert len(text) > 400 and len(label_mapping(text)[0]) == 29
    with pytest.raises(ConfigError, match="expected a bundle, or JSON such as"):
        label_mapping(text[:-1])


@pytest.mark.parametrize("name", ["train.json", "inference.json", "evaluate.json"])
def test_background_gets_no_channel_and_no_name_in_a_bundle(name):
    configs = ROOT / "bundles" / "mapseg_adaptation" / "configs"
    files = [configs / "inference.json", configs / name] if name == "evaluate.json" else [configs / name]
    parsers = [ConfigParser(), ConfigParser()]
    for parser, labels in zip(parsers, ({"background": 0, "a": 4, "b": 2}, {"0": "background", "4": "a", "2": "b"})):
        parser.read_config([str(file) for file in files])
        parser["labels"] = labels
        expressions = [
            path for path, value in leaves(parser.config) if isinstance(value, str) and "structures_of" in value
        ]
        assert expressions and not any(
            "(@labels)" in str(v) for _, v in leaves(parser.config) if "structures_of" not in str(v)
        )
        for path in expressions:
            assert parser.get_parsed_content(path) == (["a", "b"] if path.endswith("names") else 3), path


def leaves(config, path=""):
    """Names and values of a config."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        name = f"{path}#{key}" if path else str(key)
        yield (name, value)
        yield from leaves(value, name)
