# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The sliding windows do what a user of MONAI's inferer expects, and what they did before, bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Invertd, Orientationd
from monai.utils import set_determinism

from mapseg_components.boxes import box_of_mask, expand_box, resample_box
from mapseg_components.errors import ConfigError, NonFiniteError
from mapseg_components.inferers import AutocastInferer, AveragingInferer, GlobalLocalSlidingWindowInferer
from mapseg_components.networks import GlobalLocalPass
from tests.conftest import make_scan

ROI, STRIDE = (16, 12, 20), (10, 12, 14)
AFFINE = np.array([[-1.0, 0, 0, 7], [0, 1.1, 0, -3], [0, 0, 1.3, 2], [0, 0, 0, 1]])
TURN = Compose([Orientationd("image", axcodes="RAS", labels=None)])


def scan(shape=(30, 34, 26), seed=0):
    return torch.from_numpy(make_scan(shape, seed)[0])[None] / 300


def known(seed):
    """A scan with a file and an orientation, turned to RAS by a transform that can be inverted."""
    affine = AFFINE @ np.diag([1, 1, 1 + seed, 1])
    image = MetaTensor(scan(seed=seed), affine=affine, meta={"filename_or_obj": f"scan {seed}.nii.gz"})
    return TURN({"image": image})


def two_classes(windows):
    return torch.cat([0.5 - windows, windows - 0.5], dim=1)


def as_it_was(image, network, roi, stride, batch, mode):
    """The first version of the inferer for one plain scan: the same operations in the same order."""
    region_of = expand_box(box_of_mask((image != 0).any(0).numpy()), roi)
    shape = image.shape[1:]

    def cropped(volume):
        padding = [[max(-int(a), 0), max(int(b) - side, 0)] for (a, b), side in zip(region_of, shape)]
        inner = tuple(slice(max(int(a), 0), min(int(b), side)) for (a, b), side in zip(region_of, shape))
        return F.pad(volume[(slice(None), *inner)], [size for pair in reversed(padding) for size in pair])

    region, foreground = cropped(image), cropped((image != 0).any(0)[None])[0]
    sides = torch.tensor(region.shape[1:], dtype=torch.float32)
    view = resample_box(region[None], torch.stack([torch.zeros(3), sides], 1)[None], list(roi))
    view_features, scale = network.encode(view), torch.tensor(roi, dtype=torch.float32) / sides
    windows = [w for w in dense_patch_slices(tuple(foreground.shape), roi, stride) if foreground[w].any()]
    weight = compute_importance_map(roi, mode=mode, sigma_scale=0.125)
    total, count = torch.zeros(3, *shape), torch.zeros(shape)
    for start in range(0, len(windows), batch):
        some = windows[start : start + batch]
        features = network.encode(torch.stack([region[(slice(None), *w)] for w in some]))
        ends = torch.tensor([[[s.start, s.stop] for s in w] for w in some], dtype=torch.float32) * scale[:, None]
        context = network.context(view_features.expand(len(some), *[-1] * 4), ends, list(roi), list(features.shape[2:]))
        for window, one in zip(some, network.decode(features, context).float()):
            target, source = [], []
            for part, first, side in zip(window, region_of[:, 0].astype(int).tolist(), shape):
                low, high = max(first + part.start, 0), min(first + part.stop, side)
                target.append(slice(low, high))
                source.append(slice(low - first - part.start, high - first - part.start))
            total[(slice(None), *target)].addcmul_(weight[tuple(source)], one[(slice(None), *source)])
            count[tuple(target)] += weight[tuple(source)]
    result = total / count.clamp(min=1e-6)
    for number, one in enumerate(result):
        one.masked_fill_(count == 0, -10.0 if number else 0.0)
    return result[None]


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("shape", [(30, 34, 26), (9, 34, 11), (10, 9, 8)])
def test_numbers_are_those_of_the_first_version_bit_for_bit(tiny_network, shape, mode):
    image = scan(shape)
    inferer = GlobalLocalSlidingWindowInferer(roi_size=ROI, stride=STRIDE, sw_batch_size=3, mode=mode)
    with torch.no_grad():
        expected = as_it_was(image, tiny_network, ROI, STRIDE, 3, mode)
    assert torch.equal(inferer(image[None], tiny_network), expected)


OUTPUTS = {
    "tensor": lambda w: torch.cat([w, w.roll(1, 2), 1 - w], 1),
    "tuple": lambda w: (w, torch.cat([w * 2, w.roll(1, 3)], 1)),
    "list of one": lambda w: [w],
    "dict": lambda w: {"main": torch.cat([w, w.roll(2, 4)], 1), "aux": w * w},
    "half resolution": lambda w: (w, F.avg_pool3d(w, 2)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", [0.5, (0.0, 0.25, 0.5)])
def test_equals_monai_where_all_is_foreground(name, mode, overlap):
    torch.manual_seed(0)
    inputs = torch.rand(2, 1, 32, 24, 28) + 0.1
    settings = {"roi_size": (8, 8, 4), "sw_batch_size": 3, "overlap": overlap, "mode": mode, "sigma_scale": 0.2}
    found = GlobalLocalSlidingWindowInferer(**settings)(inputs, OUTPUTS[name])
    expected = SlidingWindowInferer(**settings)(inputs, OUTPUTS[name])
    assert type(found) is type(expected)
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(parts(found), parts(expected))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if isinstance(found, dict):
        assert set(found) == set(expected)


def parts(outputs):
    return [outputs[key] for key in sorted(outputs)] if isinstance(outputs, dict) else outputs


def test_gaussian_windows_weigh_their_centre_more():
    """Windows that disagree: one is 0 everywhere, the next 1. Between their centres the mean follows the distance."""
    inputs = torch.ones(1, 1, 8, 8, 12)
    calls = itertools.count()

    def numbered(windows):
        return torch.full_like(windows, float(next(calls)))

    settings = {"roi_size": 8, "stride": 4, "sw_batch_size": 1}
    line = GlobalLocalSlidingWindowInferer(**settings, mode="gaussian")(inputs, numbered)[0, 0, 4, 4]
    shared = line[4:8]
    assert (shared.diff() > 0.05).all() and shared[0] < 0.5 < shared[-1]
    calls = itertools.count()
    flat = GlobalLocalSlidingWindowInferer(**settings, mode="constant")(inputs, numbered)[0, 0, 4, 4, 4:8]
    assert flat.tolist() == [0.5] * 4


WRAPPED = {
    "alone": lambda inferer: inferer,
    "autocast": lambda inferer: AutocastInferer(inferer, "bf16"),
    "flips": lambda inferer: AveragingInferer(inferer, (), [0, 2]),
    "flips of autocast": lambda inferer: AveragingInferer(AutocastInferer(inferer, None), (), [1]),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_of_metatensors_is_its_scans_and_knows_them(tiny_network, wrap, count):
    inferer = WRAPPED[wrap](GlobalLocalSlidingWindowInferer(ROI))
    cases = [known(seed) for seed in range(count)]
    batch = list_data_collate(cases)["image"]
    logits = inferer(batch, tiny_network)
    assert isinstance(logits, MetaTensor) and logits.is_batch and logits.shape == (count, 3, 30, 34, 26)
    assert logits.meta["filename_or_obj"] == [f"scan {seed}.nii.gz" for seed in range(count)]
    for one, case in zip(decollate_batch(logits), cases):
        image = case["image"]
        alone = inferer(image.as_tensor()[None], tiny_network)[0]
        torch.testing.assert_close(one.as_tensor(), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.affine, image.affine)
        assert one.meta["filename_or_obj"] == image.meta["filename_or_obj"]
        assert [step["class"] for step in one.applied_operations] == ["Orientation"]


def test_a_batch_in_an_evaluator_comes_back_to_each_scans_own_grid(tiny_network):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[list_data_collate([{**known(seed), "label": torch.zeros(1)} for seed in range(2)])],
        network=tiny_network,
        inferer=AutocastInferer(GlobalLocalSlidingWindowInferer(ROI), None),
        postprocessing=Invertd("pred", transform=TURN, orig_keys="image", nearest_interp=False),
    )
    evaluator.run()
    for seed, output in enumerate(evaluator.state.output):
        expected = GlobalLocalSlidingWindowInferer(ROI)(known(seed)["image"].as_tensor()[None], tiny_network)[0]
        torch.testing.assert_close(output["pred"].as_tensor(), expected.flip(1), rtol=0, atol=1e-5)
        assert output["pred"].affine[0, 0] < 0


def test_plain_tensors_stay_plain_and_one_scan_needs_no_file(tiny_network):
    inferer = GlobalLocalSlidingWindowInferer(ROI)
    assert type(inferer(scan()[None], tiny_network)) is torch.Tensor
    logits = inferer(MetaTensor(scan(), affine=torch.from_numpy(AFFINE))[None], tiny_network)
    torch.testing.assert_close(logits.affine, torch.from_numpy(AFFINE))


@pytest.mark.parametrize("overlap, stride", [(0.5, (8, 6, 10)), ((0.0, 0.25, 0.99), (16, 9, 1)), (0.999, (1, 1, 1))])
def test_overlap_is_a_stride(overlap, stride):
    assert GlobalLocalSlidingWindowInferer(ROI, overlap=overlap).stride == stride


def test_windows_go_to_the_networks_device_and_logits_to_the_wanted_one():
    """The meta device stands for a GPU: what is sent to it has no values, but a place."""
    seen = set()

    def elsewhere(windows, *_):
        seen.add(windows.device.type)
        return torch.zeros(windows.shape)

    inferer = GlobalLocalSlidingWindowInferer(ROI, sw_device="meta", device="cpu")
    assert inferer(scan()[None], elsewhere).device.type == "cpu" and seen == {"meta"}
    for name in ("device", "stitching_device"):
        assert GlobalLocalSlidingWindowInferer(ROI, **{name: "meta"})._stitcher(scan()[None]).type == "meta"
    assert GlobalLocalSlidingWindowInferer(ROI, device="meta")(scan()[None], two_classes, device="cpu").sum() != 0
    large = GlobalLocalSlidingWindowInferer(ROI, cpu_thresh=100)
    assert large._stitcher(scan()[None].to("meta")).type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_scan_on_the_cpu_is_segmented_on_the_gpu(tiny_network):
    expected = GlobalLocalSlidingWindowInferer(ROI)(scan()[None], tiny_network)
    network = copy.deepcopy(tiny_network).cuda()
    for inputs, settings in ((scan(), {"sw_device": "cuda"}), (scan().cuda(), {"device": "cpu"})):
        found = AutocastInferer(GlobalLocalSlidingWindowInferer(ROI, **settings), None)(inputs[None], network)
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    half = AutocastInferer(GlobalLocalSlidingWindowInferer(ROI, sw_device="cuda", device="cpu"), "bf16")
    assert 0 < (half(scan()[None], network) - expected).abs().max() < 0.1


def test_mixed_precision_is_that_of_the_networks_device(monkeypatch):
    """The scan may lie elsewhere and its windows be moved to the network."""
    asked = []
    monkeypatch.setattr(
        "mapseg_components.inferers.precision.autocast", lambda d, amp: asked.append(d) or torch.no_grad()
    )
    network = torch.nn.Conv3d(1, 2, 1, device="meta")
    AutocastInferer(lambda inputs, network: inputs, "bf16")(scan()[None], network)
    AutocastInferer(lambda inputs, network: inputs, "bf16")(scan()[None], two_classes)
    assert [torch.device(one).type for one in asked] == ["meta", "cpu"]


def test_progress_shows_a_bar(capsys):
    GlobalLocalSlidingWindowInferer(ROI, progress=True)(scan()[None], two_classes)
    assert "100%" in capsys.readouterr().err


def test_arguments_reach_a_network_that_is_called_on_each_window(tiny_network):
    def scaled(windows, factor, shift=0.0, condition=None):
        assert condition is None or condition.shape == windows.shape
        return windows * factor + shift + (0 if condition is None else condition)

    inferer, inputs = GlobalLocalSlidingWindowInferer(ROI), scan()[None]
    plain = inferer(inputs, lambda w: w * 2 + 1)
    assert torch.equal(inferer(inputs, scaled, 2, shift=1.0), plain)
    assert torch.equal(inferer(inputs, scaled, 2, shift=1.0, buffer_steps=2, buffer_dim=0), plain)
    inside = inputs != 0
    both = inferer(inputs, scaled, 1.0, condition=inputs.flip(2))
    torch.testing.assert_close(both[inside], (inputs + inputs.flip(2))[inside])
    with pytest.raises(ConfigError, match=r"condition of shape \(1, 1, 30, 34, 25\)"):
        inferer(inputs, scaled, 1.0, condition=inputs[..., 1:])
    with pytest.raises(ConfigError, match=r"take no further arguments.*'temperature'"):
        inferer(inputs, tiny_network, temperature=2)


def test_the_training_pass_is_seen_through(tiny_network):
    inferer = GlobalLocalSlidingWindowInferer(ROI)
    assert torch.equal(inferer(scan()[None], GlobalLocalPass(tiny_network)), inferer(scan()[None], tiny_network))


def test_one_output_channel_is_background_where_no_window_looked():
    image = torch.zeros(1, 1, 20, 24, 28)
    image[..., 4:8, 5:9, 6:10] = 1
    for network in (lambda w: w - 0.5, lambda w: (w - 0.5, two_classes(w))):
        found = GlobalLocalSlidingWindowInferer(4)(image, network)
        one = found[0] if isinstance(found, tuple) else found
        assert torch.equal(one.sigmoid() >= 0.5, image > 0)
    assert torch.equal(found[1].argmax(1), (image > 0).long()[:, 0])


def test_an_inferer_survives_pickling(tiny_network):
    inferer = pickle.loads(pickle.dumps(GlobalLocalSlidingWindowInferer(ROI, overlap=0.25, mode="gaussian")))
    assert inferer.stride == (12, 9, 15) and inferer(scan()[None], tiny_network).shape == (1, 3, 30, 34, 26)


def test_training_settings_of_the_network_are_left_alone(tiny_network):
    set_determinism(0)
    GlobalLocalSlidingWindowInferer(ROI)(scan()[None], tiny_network.train())
    assert tiny_network.training and all(p.requires_grad for p in tiny_network.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"roi_size": 8, "stride": 4, "overlap": 0.5}, "stride 4 and overlap 0.5"),
        ({"roi_size": 8, "overlap": 1.0}, "overlap is 1.0"),
        ({"roi_size": 8, "overlap": (0.5, -0.1, 0)}, "overlap is"),
        ({"roi_size": (8, -1, 8)}, r"roi_size is \(8, -1, 8\), expected voxels"),
        ({"roi_size": (8, 8)}, "for each of three axes"),
        ({"roi_size": 8, "global_size": 0}, "global_size is 0"),
        ({"roi_size": 8, "device": "cpu", "stitching_device": "cuda"}, "are one setting"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        GlobalLocalSlidingWindowInferer(**settings)


def test_bad_input_and_output_are_named():
    inferer = GlobalLocalSlidingWindowInferer(8)
    for inputs, found in ((scan(), "Tensor of shape"), (scan()[None].numpy(), "ndarray of shape")):
        with pytest.raises(ConfigError, match=f"input is {found}.*B, C, X, Y, Z"):
            inferer(inputs, two_classes)
    with pytest.raises(ConfigError, match=r"output 'names' is list.*leave it out"):
        inferer(scan()[None], lambda w: {"logits": w, "names": ["a"]})
    with pytest.raises(ConfigError, match=r"output 1 is a tensor of shape \(4,\)"):
        inferer(scan()[None], lambda w: (w, torch.zeros(4)))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        inferer(scan()[None], lambda w: (w, w / 0))


def test_a_mean_of_what_has_no_softmax_is_refused():
    inferer = GlobalLocalSlidingWindowInferer(8)
    with pytest.raises(ConfigError, match="one output channel"):
        AveragingInferer(inferer, (), [0])(scan()[None], lambda w: w)
    with pytest.raises(ConfigError, match=r"returned a dict.*logits alone"):
        AveragingInferer(inferer, (), [0])(scan()[None], lambda w: {"logits": two_classes(w)})
