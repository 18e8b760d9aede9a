# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.transforms import (
    AxisExtremesd,
    NegativeValues,
    NegativeValuesd,
    PercentileClip,
    PercentileClipd,
    PercentileTabled,
    RandPercentileClip,
    RandPercentileClipd,
    SelectLabels,
    SelectLabelsd,
)
from mapseg_components.transforms.inputs import MASK_FILE
from mapseg_components.transforms.percentiles import clipped, percentile_table


def volume(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, 30.0, (1, 11, 13, 17)).astype(np.float32))


@pytest.mark.parametrize("percentile", [99.0, 99.5, 99.73, 100.0])
def test_clip_equals_numpy(percentile):
    image = volume()
    top = np.percentile(image.numpy(), percentile)
    expected = ((image - image.min()) / (top - image.min())).clamp(0, 1)
    torch.testing.assert_close(PercentileClip(percentile)(image), expected, rtol=1e-3, atol=1e-3)


def test_table_of_the_volume_scales_its_parts_alike():
    data = PercentileTabled(keys="image")({"image": volume()})
    part = PercentileClip(99.5)(volume()[:, :4], data["image_percentiles"])
    torch.testing.assert_close(part, PercentileClip(99.5)(volume())[:, :4])
    whole = PercentileClipd(keys="image")(data)
    assert "image_percentiles" not in whole and whole["image"].max() == 1


def by_each(image, percentile, foreground):
    """What each transform that takes percentiles makes of an image."""
    keys = {"keys": "image", "foreground": foreground}
    tabled = PercentileTabled(**keys)({"image": image})
    deferred = RandPercentileClipd(**keys, prob=0.0, default=percentile, deferred=True)
    random = RandPercentileClipd(**keys, lower=percentile, upper=percentile, prob=1.0)
    return {
        "array": PercentileClip(percentile, foreground)(image),
        "random": RandPercentileClip(prob=0.0, default=percentile, foreground=foreground)(image),
        "dictionary": PercentileClipd("image", percentile, foreground)({"image": image})["image"],
        "from a table": PercentileClipd("image", percentile)(tabled)["image"],
        "random, from a table": RandPercentileClipd("image", prob=0.0, default=percentile)(tabled)["image"],
        "random, drawn": random({"image": image})["image"],
        "deferred": clipped(image, deferred({"image": image})["image_limits"]),
        "deferred, from a table": clipped(image, deferred(tabled)["image_limits"]),
    }


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("percentile", [95.0, 99.5, 100.0])
def test_percentiles_are_of_the_foreground_if_asked_for(percentile, foreground):
    image = torch.cat([torch.zeros(1, 30, 13, 17), volume()], dim=1)
    top = np.percentile(volume().numpy() if foreground else image.numpy(), percentile)
    for name, found in by_each(image, percentile, foreground).items():
        torch.testing.assert_close(found, (image / top).clamp(0, 1), rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("foreground", [False, True])
def test_every_channel_has_a_range_of_its_own(foreground):
    """Channels in other units: each is scaled as if it were alone."""
    channels = [volume(0), 0.002 * volume(1) - 3.0, 5000 * volume(2) + 70.0]
    alone = [by_each(channel, 99.5, foreground) for channel in channels]
    for name, found in by_each(torch.cat(channels), 99.5, foreground).items():
        torch.testing.assert_close(found, torch.cat([each[name] for each in alone]), msg=name)
        assert found.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1] and found.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]


def test_a_channel_without_contrast_is_named():
    scan = MetaTensor(torch.cat([volume(), torch.full((1, 11, 13, 17), 7.0)]), meta={"filename_or_obj": "case_5.nii"})
    with pytest.raises(DataError, match=r"case_5.nii, channel 1: all voxels are 7"):
        PercentileClip()(scan)
    scan[1, 0, 0, 0] = 9.0
    with pytest.raises(DataError, match=r"case_5.nii, channel 1: its percentile 99.5 equals its minimum \(7\)"):
        PercentileClip()(scan)


@pytest.mark.parametrize("percentile", [99.0, 99.25])
def test_a_drawn_percentile_of_background_falls_back_to_the_default(percentile):
    image = torch.zeros(2, 10, 10, 100)
    image[0, :, 0, :7] = torch.arange(1.0, 71).view(10, 7)  # 0.7 % of the voxels
    image[1, :, 0, :20] = torch.arange(1.0, 201).view(10, 20)
    drawn = RandPercentileClip(lower=percentile, upper=percentile, prob=1.0)
    expected = torch.cat([PercentileClip(99.5)(image[:1]), PercentileClip(percentile)(image[1:])])
    torch.testing.assert_close(drawn(image), expected)
    deferred = RandPercentileClipd("image", lower=percentile, upper=percentile, prob=1.0, deferred=True)
    torch.testing.assert_close(clipped(image, deferred({"image": image})["image_limits"]), expected)
    image[0, :, 0, 4:] = 0
    with pytest.raises(DataError, match=r"channel 0: its percentile 99.5 equals.* \(percentile_foreground\)"):
        drawn(image)


def test_a_table_of_another_image_is_refused():
    with pytest.raises(DataError, match=r"image of 2 channels.*\(1, 1002\), expected one row per channel"):
        PercentileClip()(torch.cat([volume(), volume(1)]), percentile_table(volume()))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_numpy_images_are_scaled_as_tensors_are(dtype):
    image = volume().clamp(max=255).numpy().astype(dtype)
    expected = PercentileClip()(torch.from_numpy(image))
    for found in (PercentileClip()(image), PercentileClipd("image")({"image": image})["image"]):
        torch.testing.assert_close(torch.as_tensor(found), expected)
    tabled = NegativeValuesd("image", "clip")({"image": image})
    tabled = AxisExtremesd("image", above_minimum=True)(PercentileTabled("image")(tabled))
    torch.testing.assert_close(PercentileClipd("image")(tabled)["image"], expected)


@pytest.mark.parametrize("lowest", [0.0, -50.0, 30.0])
def test_foreground_above_the_minimum_is_what_scaling_leaves_above_0(lowest):
    image = torch.full((2, 11, 13, 17), lowest)
    image[0, 3:7, 2:9, 5:16] += volume()[0, 3:7, 2:9, 5:16] + 1
    image[1, 4:8, 4:5, 6:17] += 20
    found = AxisExtremesd("image", above_minimum=True)({"image": image})["image_extremes"]
    expected = AxisExtremesd("image")({"image": PercentileClip(100)(image)})["image_extremes"]
    assert torch.equal(found, expected) and found.max(0).values.tolist() == [7, 8, 16]


def test_random_percentile_is_shared_and_seeded():
    data = {"image_percentiles": PercentileTabled("image")({"image": volume()})["image_percentiles"]}
    data |= {"image": volume()[:, :5], "global_image": volume()[:, :5]}
    keys = ["image", "global_image"]
    draw = [RandPercentileClipd(keys, prob=1.0).set_random_state(seed)(data) for seed in (1, 1, 2)]
    torch.testing.assert_close(draw[0]["image"], draw[0]["global_image"])
    torch.testing.assert_close(draw[0]["image"], draw[1]["image"])
    assert not torch.allclose(draw[0]["image"], draw[2]["image"])
    assert "image_percentiles" not in draw[0] and "image_percentiles" in data


def test_random_percentile_falls_back_to_the_default():
    transform = RandPercentileClip(prob=0.0, default=99.5)
    torch.testing.assert_close(transform(volume()), PercentileClip(99.5)(volume()))


@pytest.mark.parametrize("bad, word", [(torch.ones(1, 4, 5, 6), "no contrast"), (volume() / 0, "NaN or infinite")])
def test_scan_without_contrast_is_named(bad, word):
    scan = MetaTensor(bad, meta={"filename_or_obj": "t1/case_5.nii.gz"})
    with pytest.raises(DataError, match=f"case_5.*{word}"):
        PercentileClip()(scan)


def test_scans_whose_tissue_is_known_have_their_negative_values_behind_them():
    raised = MetaTensor(torch.tensor([0.0, 0.0, 5.0, 900.0]), meta={MASK_FILE: "mask.nii.gz"})
    for policy in ("shift", "clip", "keep", None):
        assert NegativeValues(policy)(raised).tolist() == [0, 0, 5, 900]


def test_negative_values_are_a_choice():
    image = torch.tensor([-2000.0, -1024.0, -100.0, 0.0, 50.0])
    assert NegativeValues("clip")(image).tolist() == [0, 0, 0, 0, 50]
    assert NegativeValues("shift")(image).tolist() == [0, 0, 924, 1024, 1074]
    assert NegativeValues("keep")(image) is image
    assert NegativeValuesd("ct", "shift")({"ct": image})["ct"].max() == 1074
    with pytest.raises(ConfigError, match="negative_values is 'zero'"):
        NegativeValues("zero")


def test_labels_become_consecutive():
    label = torch.tensor([0, 4, 9, 2, 4]).view(1, 5, 1, 1)
    assert SelectLabels({"a": 9, "b": 4}, dropped=[2])(label).flatten().tolist() == [0, 2, 1, 0, 2]
    out = SelectLabelsd("label", [4, 9, 2], allow_missing_keys=True)({"label": label})
    assert out["label"].flatten().tolist() == [0, 1, 2, 3, 1] and out["label"].dtype == torch.uint8
    assert SelectLabelsd("label", [4], allow_missing_keys=True)({"image": 1}) == {"image": 1}


@pytest.mark.parametrize(
    "values, words",
    [
        ([0, 1, 7], r"7 \(1 voxels\).*dropped_labels"),
        ([-1, 0, 1], "-1.*dropped_labels"),
        ([0.0, 1.5, 1.0], "fractions: 1.5"),
    ],
)
def test_unknown_label_is_named(values, words):
    label = MetaTensor(torch.tensor(values).view(1, 3, 1, 1), meta={"filename_or_obj": "labels/x.nii.gz"})
    with pytest.raises(DataError, match=f"x.nii.gz.*{words}"):
        SelectLabels([1])(label)


@pytest.mark.parametrize("policy", ["clip", "shift", "keep"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_damage_is_not_clipped_away(policy, bad):
    image = volume()
    image[0, 1, 2, 3] = bad
    with pytest.raises(DataError, match="1 voxels are NaN or infinite"):
        PercentileTabled("image")(NegativeValuesd("image", policy)({"image": image}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.int64])
def test_large_label_values_map_exactly(dtype):
    values = [500, 600, 420, 550, 205, 820, 850]
    label = torch.tensor([0, *values]).to(dtype).view(1, 8, 1, 1)
    assert SelectLabels(values)(label).flatten().tolist() == list(range(8))


def test_unknown_value_of_a_narrow_type_is_named():
    with pytest.raises(DataError, match=r"44 \(1 voxels\)"):  # 300 modulo 256 is 44
        SelectLabels([300])(torch.tensor([0, 44], dtype=torch.uint8).view(1, 2, 1, 1))


def test_label_named_twice_is_refused():
    with pytest.raises(ConfigError, match="name each value once"):
        SelectLabels([1, 2], dropped=[2])
