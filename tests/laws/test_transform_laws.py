# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Laws of every public transform in any pipeline: kinds of input, metadata, seeds, workers, laziness, inverse."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, ThreadDataLoader
from monai.transforms import ApplyPendingd, Compose, Flipd, Invertd, Orientationd, RandFlipd, Randomizable, Spacingd

from mapseg_components import transforms
from mapseg_components.errors import DataError, MAPSegError, user_error
from mapseg_components.transforms import (
    AssumeOrientation,
    AxisExtremesd,
    ClassVoxelsd,
    RandBlockMask,
    RandBlockMaskd,
    RandGlobalLocalBiasFieldd,
    RandGlobalLocalCrop,
    RandGlobalLocalCropd,
    RandPercentileClip,
    RandPercentileClipd,
    SaveLabelMap,
    SaveLabelMapd,
    SaveVolume,
    SaveVolumed,
    SelectLabels,
    SelectLabelsd,
)
from tests.conftest import make_scan

AFFINE = np.array([[-1.0, 0, 0, 7], [0, 0, 1.1, -3], [0, 1.3, 0, 2], [0, 0, 0, 1]])
PAIR = ["patch", "global_image"]
CROP = {"patch_size": (8, 12, 16), "prob": 1.0, "rotate_range_deg": 20.0, "flip_prob": 0.5}

# dictionary transforms that need arguments, by name: how to make one that works on these entries of `case`
DICTIONARY = {
    "ArgmaxOnScand": (lambda **o: transforms.ArgmaxOnScand("pred", **o), ["pred"]),
    "AssumeOrientationd": (lambda **o: transforms.AssumeOrientationd("image", "RAS", **o), ["image"]),
    "AxisExtremesd": (lambda **o: AxisExtremesd("image", **o), ["image"]),
    "ClassVoxelsd": (lambda **o: ClassVoxelsd("label", **o), ["label"]),
    "ClearOutsided": (lambda **o: transforms.ClearOutsided("second", **o), ["second"]),
    "Confidenced": (lambda **o: transforms.Confidenced("pred", **o), ["pred"]),
    "FillEnclosedd": (lambda **o: transforms.FillEnclosedd("label", [1, 2], **o), ["label"]),
    "FillNonFinited": (lambda **o: transforms.FillNonFinited("image", "background", **o), ["image"]),
    "IgnoreOutsided": (lambda **o: transforms.IgnoreOutsided("second", **o), ["second"]),
    "KeepComponentsd": (lambda **o: transforms.KeepComponentsd("label", {1: 1, 2: 2}, **o), ["label"]),
    "NegativeValuesd": (lambda **o: transforms.NegativeValuesd("image", "shift", 3.0, **o), ["image"]),
    "PercentileClipd": (lambda **o: transforms.PercentileClipd("image", **o), ["image"]),
    "PercentileTabled": (lambda **o: transforms.PercentileTabled("image", **o), ["image"]),
    "Probabilitiesd": (lambda **o: transforms.Probabilitiesd("pred", **o), ["pred"]),
    "RandBlockMaskd": (lambda **o: RandBlockMaskd(PAIR, (4, 4, 2), 0.5, **o), PAIR),
    "RandGlobalLocalAdjustContrastd": (
        lambda **o: transforms.RandGlobalLocalAdjustContrastd(PAIR, prob=1.0, **o),
        PAIR,
    ),
    "RandGlobalLocalHistogramShiftd": (
        lambda **o: transforms.RandGlobalLocalHistogramShiftd(PAIR, prob=1.0, **o),
        PAIR,
    ),
    "RandGlobalLocalIntensityCurved": (
        lambda **o: transforms.RandGlobalLocalIntensityCurved(PAIR, prob=1.0, **o),
        PAIR,
    ),
    "RandGlobalLocalBiasFieldd": (lambda **o: RandGlobalLocalBiasFieldd(PAIR, prob=1.0, local_key="patch", **o), PAIR),
    "RandGlobalLocalCropd": (
        lambda **o: RandGlobalLocalCropd(
            **CROP, other_keys=["mask", "second"], other_modes=["nearest", "bilinear"], **o
        ),
        ["image", "label", "mask", "second"],
    ),
    "RandGlobalLocalSynthesisd": (
        lambda **o: transforms.RandGlobalLocalSynthesisd("label", local_key="label", **o),
        ["label"],
    ),
    "RaiseTissued": (lambda **o: transforms.RaiseTissued("image", mask_key="mask_file", **o), ["image"]),
    "RestoreBackgroundd": (lambda **o: transforms.RestoreBackgroundd("second", **o), ["second", "image"]),
    "RandPercentileClipd": (lambda **o: RandPercentileClipd(PAIR, prob=1.0, **o), PAIR),
    "SaveLabelMapd": (lambda folder=".", **o: SaveLabelMapd("label", folder, overwrite=True, **o), ["label"]),
    "SaveVolumed": (lambda folder=".", **o: SaveVolumed("image", folder, overwrite=True, **o), ["image"]),
    "SelectLabelsd": (lambda **o: SelectLabelsd("label", [2, 1], **o), ["label"]),
    "Uncertaintyd": (lambda **o: transforms.Uncertaintyd("pred", 3, **o), ["pred"]),
    "WorkingSpacingd": (lambda **o: transforms.WorkingSpacingd("image", pixdim=(3.0, 3.0, 3.0), **o), ["image"]),
    "WithoutIgnoredd": (lambda **o: transforms.WithoutIgnoredd("pred", **o), ["pred"]),
}
# array transforms: how to make one, and the entry it works on
ARRAY = {
    "AssumeOrientation": (lambda: AssumeOrientation("RAS"), "image"),
    "FillEnclosed": (lambda: transforms.FillEnclosed([1, 2]), "label"),
    "FillNonFinite": (lambda: transforms.FillNonFinite("background"), "image"),
    "KeepComponents": (lambda: transforms.KeepComponents({1: 1, 2: 2}), "label"),
    "NegativeValues": (lambda: transforms.NegativeValues("clip"), "image"),
    "RandBlockMask": (lambda: RandBlockMask((4, 4, 2), 0.5), "image"),
    "RandGlobalLocalCrop": (lambda: RandGlobalLocalCrop(**CROP), "image"),
    "RandPercentileClip": (lambda: RandPercentileClip(prob=1.0), "image"),
    "SaveLabelMap": (lambda: SaveLabelMap(overwrite=True), "label"),
    "SaveVolume": (lambda: SaveVolume(overwrite=True), "image"),
    "SelectLabels": (lambda: SelectLabels([2, 1]), "label"),
}
CLASSES = {name: getattr(transforms, name) for name in transforms.__all__ if inspect.isclass(getattr(transforms, name))}
for name, made in CLASSES.items():  # a new one without needs is found here
    if name.endswith("d") and name not in DICTIONARY and name not in ARRAY:
        DICTIONARY[name] = (lambda made=made, **o: made(PAIR, **o), PAIR)
    elif not name.endswith("d") and name not in ARRAY:
        ARRAY[name] = (made, "image")
SAVING = ("SaveLabelMapd", "SaveVolumed", "SaveLabelMap", "SaveVolume")
RANDOM = [name for name in DICTIONARY if issubclass(CLASSES[name], Randomizable)]
every = pytest.mark.parametrize("name", sorted(DICTIONARY))
every_array = pytest.mark.parametrize("name", sorted(ARRAY))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what is saved without a folder


def entry(values):
    applied = [{"class": "Flip", "id": 1, "extra_info": {}}]
    meta = {"filename_or_obj": "scan.nii.gz"}
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(AFFINE), meta=meta, applied_operations=applied)


def case(seed=0, kind="meta"):
    """Every entry that one of the transforms reads, three different sides, and three that none knows."""
    image, label = make_scan((20, 24, 28), seed)
    generator = np.random.default_rng(seed)
    pred = generator.standard_normal((3, 20, 24, 28)).astype(np.float32)
    data = {
        "image": image[None],
        "label": label[None],
        "mask": (label[None] > 0).astype(np.uint8),
        "second": image[None] / 2,
        "pred": pred,
        "patch": generator.random((1, 8, 12, 16), np.float32),
        "global_image": generator.random((1, 12, 8, 16), np.float32),
    }
    kinds = {
        "meta": entry,
        "tensor": torch.from_numpy,
        "numpy": lambda v: v,
        "swapped": lambda v: v.astype(v.dtype.newbyteorder()),
    }
    result = {key: kinds[kind](values) for key, values in data.items()}
    result["box"] = torch.tensor([[0.0, 6], [2, 8], [4, 12]])
    return {**result, "case_id": "a", "weight": 0.5, "notes": ["x"]}


def for_(name, **options):
    data = case(**options)
    if name != "RandGlobalLocalCropd":
        return data
    return {key: value for key, value in data.items() if key not in ("pred", *PAIR, "box")}


def made(name, seed=3, **options):
    transform = DICTIONARY[name][0](**options)
    if isinstance(transform, Randomizable):
        transform.set_random_state(seed)
    return transform


def values(found):
    if isinstance(found, (torch.Tensor, np.ndarray)):
        found = np.asarray(found)
        return found.astype(found.dtype.newbyteorder("="))
    return found


def same(one, other, types=True, **tolerance):
    assert set(one) == set(other)
    for key in one:
        first, second = values(one[key]), values(other[key])
        if isinstance(first, np.ndarray):
            assert not types or first.dtype == second.dtype, key
            np.testing.assert_allclose(first.astype(float), second.astype(float), err_msg=key, **tolerance)
        else:
            assert first == second, key


def test_every_public_transform_is_tried():
    assert {*DICTIONARY, *ARRAY} == set(CLASSES)
    assert len(DICTIONARY) >= 16 and len(RANDOM) >= 4


@every
@pytest.mark.parametrize("kind", ["numpy", "swapped", "tensor"])
def test_arrays_and_plain_tensors_give_the_values_of_metatensors(name, kind):
    """But for the place that a rotation turns about in millimetres, which only metadata knows."""
    expected, found = case(), case(kind=kind)
    if name == "RandGlobalLocalCropd":
        expected, found = for_(name), for_(name, kind=kind)
        for key in ("image", "label", "mask", "second"):
            expected[key].affine = torch.eye(4)
    if name in ("WorkingFramed", "WorkingSpacingd"):  # laid by its affine, which is the identity without metadata
        for key in (*PAIR, "image"):
            expected[key].affine = torch.eye(4)
    if (name, kind) == ("WorkingSpacingd", "swapped"):
        pytest.skip("MONAI's resampling takes native byte order alone")
    expected, given, found = made(name)(expected), found, made(name)(found)
    for key in {*found} - {"case_id", "weight", "notes"}:
        assert isinstance(found[key], torch.Tensor) or found[key] is given[key], key
    same(expected, found)


@every_array
def test_array_versions_take_arrays_too(name):
    factory, key = ARRAY[name]
    results = []
    for kind in ("meta", "tensor", "numpy"):
        transform = factory()
        if isinstance(transform, Randomizable):
            transform.set_random_state(3)
        image = case(kind=kind)[key]
        if kind == "meta":
            image.affine = torch.eye(4)
        found = transform(image)
        results.append(found if isinstance(found, dict) else {"it": found})
        one = next(iter(results[-1].values()))
        kept = name == "WorkingFrame" or isinstance(one, MetaTensor) == (kind == "meta")  # MONAI's own gives it one
        assert kept and (isinstance(one, torch.Tensor) or name in SAVING)
    same(results[0], results[1])
    same(results[0], results[2])


@every
def test_unsigned_16_bit_scans_are_taken(name):
    data = for_(name, kind="numpy")
    given = {key: np.rint(np.abs(data[key]) * 100).astype(np.uint16) for key in DICTIONARY[name][1] if key in data}
    if "label" in given:
        given["label"] = data["label"].astype(np.uint16)
    wide = {key: value.astype(np.int32) for key, value in given.items()}
    if name not in SAVING:
        same(made(name)({**data, **given}), made(name)({**data, **wide}), types=False)  # untouched entries have theirs


@every
def test_metadata_stays(name):
    data = for_(name)
    found = made(name)(data)
    for key in {*DICTIONARY[name][1], "confidence", "probabilities"} & set(found):
        if name in ("RandGlobalLocalCropd", "WorkingFramed", "WorkingSpacingd"):
            continue  # they have a place of their own, see test_pairing_laws.py and test_frame.py
        assert isinstance(found[key], MetaTensor), key
        np.testing.assert_allclose(found[key].affine.numpy(), AFFINE)
        assert found[key].meta["filename_or_obj"] == "scan.nii.gz"
        assert [step["class"] for step in found[key].applied_operations] == ["Flip"]


@every
def test_other_entries_and_the_input_are_left_alone(name):
    data = for_(name)
    before = copy.deepcopy(data)
    found = made(name)(data)
    assert set(data) == set(before)
    same(data, before)
    for key in set(data) - set(DICTIONARY[name][1]):
        assert found[key] is data[key], key


@every
def test_missing_entries_are_named_or_allowed(name):
    data = {key: value for key, value in for_(name).items() if key not in DICTIONARY[name][1]}
    with pytest.raises(KeyError, match=DICTIONARY[name][1][0]):
        made(name)(data)
    if name != "RandGlobalLocalCropd":
        assert made(name, allow_missing_keys=True)(data) == data


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_repeats_a_draw_and_another_does_not(name):
    found = [made(name, seed)(for_(name)) for seed in (3, 3, 4)]
    same(found[0], found[1])
    with pytest.raises(AssertionError):
        same(found[0], found[2])
    state = made(name).set_random_state(state=np.random.RandomState(3))
    again = made(name).set_random_state(state=np.random.RandomState(3))
    same(state(for_(name)), again(for_(name)))


@every
def test_a_pickled_transform_goes_on_as_the_original(name):
    transform = made(name)
    transform(for_(name))
    other = pickle.loads(pickle.dumps(transform))
    same(transform(for_(name)), other(for_(name)))


@every
def test_datasets_and_workers_give_what_a_call_gives(name):
    """Cached, in processes and in threads; what is random differs from item to item."""
    steps = Compose([Flipd(DICTIONARY[name][1], 0), made(name)])
    data = [for_(name, seed=seed) for seed in range(2)]
    for one in data:
        del one["notes"]
    expected = None if name in RANDOM else [steps(one) for one in data]
    cached = CacheDataset(data, steps, progress=False, copy_cache=False)
    loaders = {
        "processes": DataLoader(Dataset(data, steps), batch_size=2, num_workers=2),
        "cached": DataLoader(cached, batch_size=2),
        "threads": ThreadDataLoader(cached, batch_size=2, num_workers=0),
    }
    for loader in loaders.values():
        for _ in range(2):  # a cached entry is not changed by its use
            batch = next(iter(loader))
            for key, value in batch.items():
                if expected is not None and isinstance(value, torch.Tensor) and value.ndim == 5:
                    same({key: value[1]}, {key: expected[1][key]})
    if name in RANDOM:
        first, second = (cached[0] for _ in range(2))
        with pytest.raises(AssertionError):
            same(first, second)


@every
@pytest.mark.parametrize("before", ["orientation", "orientation and spacing", "flip, applied"])
def test_a_lazy_pipeline_gives_the_same_or_is_refused(name, before):
    keys = DICTIONARY[name][1]
    steps = [Orientationd(keys, axcodes="RAS", labels=None)]
    if before == "orientation and spacing":
        steps.append(Spacingd(keys, (1.5, 1.2, 1.3), mode="nearest" if "label" in keys else "bilinear"))
    if before == "flip, applied":
        steps = [RandFlipd(keys, prob=1.0), ApplyPendingd(keys)]
    if name == "WorkingSpacingd" and "spacing" in before:
        pytest.skip("MONAI makes one interpolation of two")
    if name == "RandBlockMaskd":
        steps = [Flipd(PAIR, 0), Flipd(PAIR, 1)]  # blocks have to divide the image
    results = []
    for lazy in (False, True):
        data = for_(name)
        for key in keys:
            data[key].applied_operations = []
        try:
            results.append(Compose([*steps, made(name)], lazy=lazy).set_random_state(3)(data))
        except RuntimeError as error:
            assert lazy and before != "flip, applied"
            refusal = str(user_error(error))
            # MONAI's lazy resampling of several steps interpolates label maps
            assert "ApplyPendingd" in refusal or ("label" in keys and ("values" in refusal or "whole" in refusal))
            return
    same(*results, types=False, rtol=1e-4, atol=1e-4)  # MONAI's lazy resampling makes label maps float32


def test_a_label_map_of_fractions_has_no_class_voxels():
    """Whole numbers as float32 keeps them are classes; what linear interpolation left behind is none."""
    label = torch.zeros(1, 4, 5, 6)
    label[0, 1, 2, 3] = 1.0000001
    assert ClassVoxelsd("label")({"label": label})["label_voxels"].tolist() == [[1, 1, 2, 3]]
    label[0, 2, 2, 3] = 0.55
    with pytest.raises(DataError, match=r"0\.55.*whole\s+numbers.*nearest"):
        ClassVoxelsd("label")({"label": label})
    with pytest.raises(DataError, match=r"\(3, 4, 5, 6\).*argmax"):
        ClassVoxelsd("label")({"label": torch.zeros(3, 4, 5, 6)})
    label[0, 2, 2, 3] = 70000
    assert ClassVoxelsd("label")({"label": label})["label_voxels"].tolist()[1] == [70000, 2, 2, 3]


@pytest.mark.parametrize("lazy", [True, None])
def test_a_crop_with_pending_operations_is_refused_alone_and_composed(lazy):
    turn = Orientationd(["image", "label"], axcodes="RAS", labels=None, lazy=True)
    data = {key: value for key, value in for_("RandGlobalLocalCropd").items() if key in ("image", "label")}
    crop = RandGlobalLocalCropd(**CROP)
    with pytest.raises(MAPSegError, match=r"image has pending operations.*ApplyPendingd"):
        crop(turn(data))
    with pytest.raises(RuntimeError) as error:
        Compose([turn, crop], lazy=lazy)(data)
    assert "pending operations" in str(user_error(error.value))


@every
def test_an_inverse_gives_the_grid_back_or_is_refused(name):
    """Intensities have no inverse, as in MONAI: the voxels come back to where they were, with the values they have."""
    keys = DICTIONARY[name][1]
    steps = Compose([Orientationd(keys, axcodes="RAS", labels=None), made(name)])
    data = for_(name)
    for key in keys:
        data[key].applied_operations = []
    found = steps(data)
    if name == "RandGlobalLocalCropd":
        with pytest.raises(RuntimeError) as error:
            Invertd("image", transform=steps)(found)
        assert "no inverse" in str(user_error(error.value)) and "ResampleToMatch" in str(user_error(error.value))
        with pytest.raises(NotImplementedError, match="no inverse"):
            Invertd("image", transform=made(name))(found)
        return
    back = Invertd(keys, transform=steps, nearest_interp=True)(found)
    for key in keys:
        assert back[key].shape[1:] == data[key].shape[1:]
        np.testing.assert_allclose(back[key].affine.numpy(), AFFINE, atol=1e-6)
