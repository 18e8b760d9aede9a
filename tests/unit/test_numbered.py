# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Values of label maps become numbers of structures by a table, whatever type they have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapseg_components.structures import LARGEST_EXACT, numbered
from mapseg_components.transforms.shapes import around_structures, shapes_in

PARTS = {"first": [17, 53], "second": [3], "third": [250, 251]}


def plainly(values, parts):
    found = np.zeros(values.shape, np.int32)
    for number, part in enumerate(parts.values(), start=1):
        found[np.isin(values, part)] = number
    return found


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "int64", "uint64", "float32", "float64"])
def test_every_type_has_the_same_numbers(kind):
    values = np.arange(252).reshape(6, 6, 7).astype(kind)
    found = numbered(values, PARTS)
    assert found.dtype == np.int32 and np.array_equal(found, plainly(values, PARTS)) and set(found.flat) == {0, 1, 2, 3}


def test_values_far_from_all_structures_are_background():
    values = np.array([-5e9, -1, 0, 2, 4, 252, LARGEST_EXACT, 3e38])
    assert not numbered(values, PARTS).any()
    assert numbered(np.array([LARGEST_EXACT, 1], np.float32), {"last": [LARGEST_EXACT]}).tolist() == [1, 0]


@given(st.integers(0, 2**32 - 1))
def test_components_and_holes_are_those_of_the_whole_label_map(seed):
    generator = np.random.default_rng(seed)
    shape = [1 if generator.random() < 0.2 else side for side in generator.integers(2, 9, 3)]
    classes = np.zeros(shape, np.int32)
    for number in (1, 2):
        corner = [generator.integers(side) for side in shape]
        box = tuple(slice(start, start + generator.integers(1, 6)) for start in corner)
        classes[box] = np.where(generator.random(classes[box].shape) < 0.8, number, 0)
    assert shapes_in(around_structures(classes), 2) == shapes_in(classes, 2)
