# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The data side as the bundles configure it: what a draw holds, and that each setting reaches the side it is named for.

Settings are distinguished by their effect: both sides get different values, and samples, masks and passes are looked
at.
"""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from mapseg_components.data import SeededDataset
from mapseg_components.handlers import ScoreCheckpoint, TeacherValidation
from mapseg_components.transforms import PercentileClip
from mapseg_components.transforms.percentiles import clipped
from tests.bundles.test_bundles import ADAPTATION, LABELS, PRETRAINING, overlays
from tests.conftest import write_nifti

PATCH = (16, 20, 12)
STILL = {"affine_prob": 0.0, "percentile_prob": 0.0}
SOURCE, TARGET, MAE = (
    (ADAPTATION, "train#dataset"),
    (ADAPTATION, "train#target_dataset"),
    (PRETRAINING, "train#dataset"),
)
IDS = {"ids": lambda value: value[1].replace("#", " ") if isinstance(value, tuple) else str(value)}


def parsed(bundle, *files, **settings):
    """A bundle's training config with tiny sizes on top of the named files."""
    paths = [bundle / "configs" / name for name in (*files, "tiny.yaml")]
    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in paths]))
    defaults = {"patch_size": list(PATCH), "device": "$torch.device('cpu')", "amp": None, "bundle_root": str(bundle)}
    parser.update({**defaults, **({"labels": LABELS} if bundle == ADAPTATION else {}), **settings})
    return parser


def training(bundle, *overlays, **settings):
    return parsed(bundle, "train.json", *overlays, **settings)


def inference(bundle, **settings):
    """`inference.json` at the same sizes; its scans are not looked for."""
    return parsed(bundle, "inference.json", cases=[], **{"dataset#data": [], **settings})


def make_scans(folder, shape=PATCH, lowest=0.0, seed=0, margin=0):
    """A datalist of two scans a section: half of the voxels background at the lowest value, outliers above the rest,
    and foreground up to every face but for a margin in voxels. Target scans are five times as bright."""
    generator, content = np.random.default_rng(seed), {}
    for section in ("source_training", "source_validation", "target_training"):
        content[section] = []
        for number in range(2):
            scan = generator.gamma(2.0, 30.0, shape) * (generator.random(shape) < 0.5)
            scan[generator.random(shape) < 0.01] *= 8  # what percentiles are for
            corners = tuple(np.array([[0, -1]] * 3))
            scan[corners] = 50.0
            scan = np.pad(scan[tuple(slice(0, side - 2 * margin) for side in shape)], margin)
            scan = np.where(scan > 0, scan * (5 if section.startswith("target") else 1) + lowest, lowest)
            entry = {"image": f"{section}/{number}.nii.gz", "case_id": f"{section}-{number}"}
            write_nifti(folder / entry["image"], scan.astype(np.float32), np.eye(4))
            if section != "target_training":
                entry["label"] = f"{section}/{number}_label.nii.gz"
                write_nifti(folder / entry["label"], generator.integers(0, 3, shape).astype(np.uint8), np.eye(4))
            content[section].append(entry)
    (folder / "datalist.json").write_text(json.dumps(content))
    return {"dataset_dir": str(folder)}


def draws(parser, dataset, number, seed=0):
    """Samples of the first scan."""
    data = SeededDataset(parser.get_parsed_content(dataset))
    return [data[0, seed + k] for k in range(number)]


def raw(parser, dataset):
    """Voxels of the first scan, (X, Y, Z)."""
    return np.asarray(nib.load(parser.get_parsed_content(dataset).data[0]["image"]).dataobj)


class Views:
    """A network that keeps what it is asked to encode: first the inferer's global view."""

    def __init__(self):
        self.seen = []

    def encode(self, image):
        self.seen.append(image.clone())
        return torch.zeros(len(image), 1, 4, 5, 3)

    def context(self, features, box, grid, size):
        return features

    def decode(self, features, context):
        return torch.zeros(len(features), 3, *PATCH)


# values


POLICIES = {
    ADAPTATION: {"source_negative_values": "keep", "target_negative_values": "keep"},
    PRETRAINING: {"negative_values": "keep"},
}


@pytest.mark.parametrize("lowest", [0.0, -120.0])
@pytest.mark.parametrize(
    "bundle, overlay", [(b, o) for b in (ADAPTATION, PRETRAINING) for o in ("train.json", *overlays(b))], **IDS
)
def test_every_config_gives_images_in_0_to_1_with_background_0(bundle, overlay, lowest, tmp_path):
    settings = make_scans(tmp_path, (24, 22, 18), lowest) | POLICIES[bundle] | {"labels": LABELS}
    settings |= {"intensity_prob": 1.0} if bundle == ADAPTATION else {}
    settings |= {"stride": 4} if "cardiac" in overlay else {}
    parser = training(bundle, *([] if overlay == "train.json" else [overlay]), **settings)
    for dataset in ("train#dataset", *(["train#target_dataset"] if bundle == ADAPTATION else [])):
        samples = draws(parser, dataset, 16)
        for sample in samples:
            for key in {"image", "global_image"} & set(sample):
                image = torch.as_tensor(sample[key])
                assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1, (dataset, key)
        view = "global_image" if "global_image" in samples[0] else "image"
        assert any((torch.as_tensor(sample[view]) == 0).any() for sample in samples)
        assert max(float(sample[view].max()) for sample in samples) > 0.3


def test_equal_intensities_of_patch_and_view_stay_equal_in_every_overlay():
    """A field aside, which depends on the place, what is done to intensities is one curve for both."""
    view = torch.from_numpy(np.random.default_rng(0).random((1, *PATCH)).astype(np.float32))
    view[0, :2] = 0.0
    patch = view[:, :9].clone()
    patch[patch > 0.6] = 0.3  # other extremes
    box = torch.tensor([[0.0, 9.0], [0.0, 20.0], [0.0, 12.0]])
    changed = set()
    for overlay in ("train.json", *overlays(ADAPTATION)):
        more = [] if overlay == "train.json" else [overlay]
        parser = training(ADAPTATION, *more, intensity_prob=1.0, bias_field_range=[0.0, 0.0])
        if not parser.get_parsed_content("global_view"):
            continue  # there is nothing to be equal to
        steps = parser.get_parsed_content("source_intensity")
        for seed in range(8):
            sample = {"image": patch, "global_image": view, "box": box}
            for number, step in enumerate(steps):
                step.set_random_state(seed * 100 + number)
                sample = step(sample)
            same_place = patch == view[:, :9]
            difference = torch.as_tensor(sample["image"]) - torch.as_tensor(sample["global_image"])[:, :9]
            assert difference[same_place].abs().max() < 1e-5, overlay
            assert torch.as_tensor(sample["global_image"])[0, :2].eq(0).all(), overlay
            changed |= {overlay} if not torch.allclose(torch.as_tensor(sample["global_image"]), view) else set()
    assert "any_contrast.yaml" in changed and "train.json" in changed


# one order: clipped, then sampled, in training and in inference


@pytest.mark.parametrize("shape", [(18, 14, 16), (22, 26, 19), (47, 45, 38)], ids=str)
@pytest.mark.parametrize("lowest", [0.0, 200.0])
@pytest.mark.parametrize("dataset", [SOURCE, TARGET, MAE], **IDS)
def test_a_draw_without_random_change_has_the_global_view_of_inference(dataset, lowest, shape, tmp_path):
    bundle, name = dataset
    settings = make_scans(tmp_path, shape, lowest, margin=1) | STILL
    settings |= {"intensity_prob": 0.0} if bundle == ADAPTATION else {"flip_prob": 0.0}
    parser = training(bundle, **settings)
    trained = torch.as_tensor(draws(parser, name, 1)[0]["global_image"])
    scan = parser.get_parsed_content(name).data[0]["image"]
    later, found = inference(ADAPTATION, window_stride=list(PATCH)), []
    whole = torch.from_numpy(raw(parser, name))[None] - lowest
    for volume in (later.get_parsed_content("preprocessing")({"image": scan})["image"], whole):
        views = Views()
        later.get_parsed_content("inferer").inferer(volume[None], views)
        found.append(torch.as_tensor(views.seen[0][0]))
    torch.testing.assert_close(trained, found[0], atol=1e-5, rtol=0)
    other_order = clipped(found[1], PercentileClip(99.5).limits(whole))
    assert (trained - other_order).abs().max() > 0.05


# settings that one side has


@pytest.mark.parametrize("foreground", [False, True])
def test_percentile_foreground_reaches_training_validation_and_inference(foreground, tmp_path):
    """A patch of the scan's own shape is the scan, so that a sample can be computed by hand."""
    settings = make_scans(tmp_path) | STILL | {"percentile": 95.0, "percentile_foreground": foreground}
    adaptation = training(ADAPTATION, intensity_prob=0.0, **settings)
    found = {name: draws(adaptation, name, 1)[0]["image"] for name in ("train#dataset", "train#target_dataset")}
    found["validate#dataset"] = adaptation.get_parsed_content("validate#dataset")[0]["image"]
    scans = {name: raw(adaptation, name) for name in found}
    pretraining = training(PRETRAINING, flip_prob=0.0, **settings)
    found["pretraining"] = draws(pretraining, "train#dataset", 1)[0]["image"]
    scans["pretraining"] = raw(pretraining, "train#dataset")
    scan = adaptation.get_parsed_content("train#target_dataset").data[0]["image"]
    for bundle in (ADAPTATION, PRETRAINING):
        parser = inference(bundle, percentile=95.0, percentile_foreground=foreground)
        name = f"inference of {bundle.name}"
        seen = parser.get_parsed_content("preprocessing").transforms[:7]  # up to clipping
        data = {"image": scan}
        for step in seen:
            data = step(data)
        found[name], scans[name] = data["image"], scans["train#target_dataset"]
    for name, image in found.items():
        counted = scans[name][scans[name] > 0] if foreground else scans[name]
        expected = (scans[name] / np.percentile(counted, 95)).clip(0, 1)
        np.testing.assert_allclose(torch.as_tensor(image)[0].numpy(), expected, atol=2e-3, err_msg=name)
    assert len(found) == 6


def zooms(samples):
    """Voxel sizes of the patch on each axis, mm; the scans have 1 mm."""
    return np.array([np.linalg.norm(np.asarray(sample["image"].affine)[:3, :3], axis=0) for sample in samples])


def turned(samples):
    """Whether each patch is turned against the scan."""
    return [bool(np.abs(np.asarray(s["image"].affine)[:3, :3][~np.eye(3, dtype=bool)]).max() > 0.01) for s in samples]


def test_each_side_has_its_own_scales_and_rotations(tmp_path):
    settings = make_scans(tmp_path, (30, 28, 26)) | {"affine_prob": 1.0}
    settings |= {"source_scale_range": [0.5, 0.6], "target_scale_range": [1.5, 2.0]}
    parser = training(ADAPTATION, source_rotation_deg=0, target_rotation_deg=20, **settings)
    source, target = (draws(parser, name, 6) for name in ("train#dataset", "train#target_dataset"))
    assert (1 / zooms(source)).min() >= 0.5 - 1e-6 and (1 / zooms(source)).max() <= 0.6 + 1e-6
    assert (1 / zooms(target)).min() >= 1.5 - 1e-6 and (1 / zooms(target)).max() <= 2.0 + 1e-6
    assert not any(turned(source)) and all(turned(target))
    parser = training(ADAPTATION, source_rotation_deg=20, target_rotation_deg=0, **settings)
    assert all(turned(draws(parser, "train#dataset", 6))) and not any(turned(draws(parser, "train#target_dataset", 6)))


BY_POLICY = {
    "clip": lambda scan: scan.clip(min=0),
    "shift": lambda scan: (scan + 1024).clip(min=0),
    "keep": lambda scan: scan,
}


@pytest.mark.parametrize("source, target", [("clip", "shift"), ("shift", "clip"), ("clip", "keep"), ("keep", "clip")])
def test_each_side_has_its_own_policy_for_negative_values(source, target, tmp_path):
    """The percentile 100 is the maximum: an image tells its policy by where its zero lies."""
    settings = make_scans(tmp_path, lowest=-70.0) | STILL | {"percentile": 100.0, "intensity_prob": 0.0}
    settings |= {"source_negative_values": source, "target_negative_values": target, "diagnostics_scans": 1}
    parser = training(ADAPTATION, **settings)
    found = {
        "train#dataset": (source, draws(parser, "train#dataset", 1)[0]["image"]),
        "train#target_dataset": (target, draws(parser, "train#target_dataset", 1)[0]["image"]),
        "train#diagnostic_dataset": (target, parser.get_parsed_content("train#diagnostic_dataset")[0]["image"]),
        "validate#dataset": (source, parser.get_parsed_content("validate#dataset")[0]["image"]),
    }
    for name, (policy, image) in found.items():
        scan = BY_POLICY[policy](raw(parser, name))
        expected = (scan - scan.min()) / (scan.max() - scan.min())
        np.testing.assert_allclose(torch.as_tensor(image)[0].numpy(), expected, atol=1e-4, err_msg=name)


# masks


def blocks(hidden, side):
    """(N, 1, X, Y, Z) boolean: share of hidden voxels in each block of this side."""
    return torch.nn.functional.avg_pool3d(hidden.float(), side)


@pytest.mark.parametrize("mask_value", [-1.0, "mean"])
@pytest.mark.parametrize("bundle", [ADAPTATION, PRETRAINING], ids=lambda path: path.name)
def test_blocks_of_patch_and_view_have_their_own_sizes_and_show_the_mask_value(bundle, mask_value, tmp_path):
    settings = make_scans(tmp_path, (24, 28, 20)) | {"patch_size": [16, 16, 16], "mask_value": mask_value}
    settings |= {"local_block_size": 8, "global_block_size": 2, "mask_ratio": 0.5, "batched_passes": False}
    settings |= {"ckpt_dir": str(tmp_path / "out"), "output_dir": str(tmp_path / "out"), "max_epochs": 1}
    settings |= {"epoch_length": 1, "batch_size": 1, "resume": False}
    if bundle == ADAPTATION:
        settings |= {"warmup_epochs": 0, "source_masked": True, "target_clean": True}
    parser = training(bundle, **settings)
    trainer, seen = parser.get_parsed_content("train#trainer"), []  # the teacher has been copied by now
    trainer.network.register_forward_pre_hook(
        lambda _, inputs, named: seen.append([image.clone() for image in (*inputs, *named.values())]), with_kwargs=True
    )
    trainer.run()
    if bundle == PRETRAINING:  # patch, then view
        pairs = [(seen[0][0], seen[1][0])]
    else:  # source clean, source masked, target clean, target masked
        assert len(seen) == 4
        pairs = [one[:2] for one in seen[1::2]]
        for clean, masked in ((seen[0], seen[1]), (seen[2], seen[3])):
            assert not any((image == -1).any() for image in clean[:2])
            shown = [torch.isclose(a, b) for a, b in zip(clean[:2], masked[:2])]
            assert all(0.4 < part.float().mean() < 0.9 for part in shown)  # of one sample, half of it hidden
    for patch, view in pairs:
        values = [-1.0, -1.0] if mask_value == -1.0 else [image.flatten().mode().values for image in (patch, view)]
        local, whole = (image == value for image, value in zip((patch, view), values))
        if mask_value == "mean":
            assert all(0 < value < 1 for value in values)
        assert set(blocks(local, 8).unique().tolist()) == {0.0, 1.0} and local.float().mean() == 0.5
        assert set(blocks(whole, 2).unique().tolist()) == {0.0, 1.0} and whole.float().mean() == 0.5
        assert not set(blocks(whole, 8).unique().tolist()) <= {0.0, 1.0}


# who is validated


def test_each_evaluator_runs_the_network_that_it_is_named_for(tmp_path):
    parser = training(ADAPTATION, **make_scans(tmp_path), output_dir=str(tmp_path), ckpt_dir=str(tmp_path))
    student, teacher = parser.get_parsed_content("network_def"), parser.get_parsed_content("teacher")
    assert student is not teacher.network.network
    called = []
    student.encoder.register_forward_pre_hook(lambda *_: called.append("student"))
    teacher.network.network.encoder.register_forward_pre_hook(lambda *_: called.append("teacher"))
    names = {"student": "validate#evaluator", "teacher": "validate#teacher_evaluator"}
    evaluators = {name: parser.get_parsed_content(place) for name, place in names.items()}
    for name, evaluator in evaluators.items():
        called.clear()
        evaluator.run()
        assert set(called) == {name}
    score, waiting = parser.get_parsed_content("score"), parser.get_parsed_content("teacher_validation")
    assert isinstance(score, ScoreCheckpoint) and isinstance(waiting, TeacherValidation)
    networks = {"student": student, "teacher": teacher.network.network}
    for name, (network, evaluator) in score.candidates.items():
        assert network is networks[name] and evaluator is evaluators[name]
    assert waiting.validator is evaluators["teacher"] and waiting.teacher is teacher
