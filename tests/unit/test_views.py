# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Labels of a teacher that averages contrasts, and a student that sees another contrast of patch and view."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mapseg_components.contrast import RandomContrast, changed_alike, contrast_view
from mapseg_components.errors import ConfigError
from mapseg_components.losses import SegmentationLoss
from mapseg_components.methods import ArgmaxLabels, MAPSeg, ViewLabels
from tests.unit.test_methods import batch_of, labels_of, output_of

VIEWS = ["as_is", "inverted", "gamma 0.7", "gamma 1.5", "inverted gamma 2"]


class ByPlace(nn.Module):
    """Logits of a patch and a view that depend on where there is foreground, and not on how bright it is."""

    def forward(self, image, global_image, box):
        return {"logits": self.classes(image, box), "global_logits": self.classes(global_image, box)}

    def classes(self, image, box):
        place = torch.arange(image[0].numel()).view(1, *image.shape[1:]) % 5 / 2
        inside = (image > 0).float() * (1 + box.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1))
        return torch.cat([1 - inside, inside * place, inside], dim=1)


class ByBrightness(nn.Module):
    """Logits of each voxel from its own intensity, for a patch and a view alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv3d(1, 8, 1), nn.Tanh(), nn.Conv3d(8, 3, 1))
        for layer in (self.layers[0], self.layers[2]):
            layer.weight.data *= 5

    def forward(self, image, global_image, box):
        return {"logits": self.layers(image), "global_logits": self.layers(global_image)}


def teacher(network):
    return SimpleNamespace(active=True, network=network)


def inputs_of(seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 1, 4, 5, 6, generator=generator) * 0.98 + 0.01
    view = torch.rand(batch, 1, 3, 6, 4, generator=generator) * 0.98 + 0.01
    image[image < 0.3] = view[view < 0.3] = 0.0
    return {"image": image, "global_image": view, "box": torch.rand(batch, 3, 2, generator=generator)}


@pytest.mark.parametrize("seed", range(3))
def test_views_of_a_network_that_ignores_contrast_change_nothing(seed):
    inputs, by_place = inputs_of(seed), teacher(ByPlace())
    one, mean = (make(by_place).probabilities(**inputs) for make in (ArgmaxLabels, ViewLabels))
    assert one.keys() == mean.keys() == {"logits", "global_logits"}
    for name in one:
        torch.testing.assert_close(mean[name], one[name], rtol=0, atol=1e-6)


def test_the_scan_as_it_is_alone_gives_the_plain_labels_bit_for_bit():
    inputs, network = inputs_of(0), teacher(ByBrightness())
    plain, views = ArgmaxLabels(network)(**inputs), ViewLabels(network, ["as_is"])(**inputs)
    for name in plain:
        assert torch.equal(plain[name].label, views[name].label)
        assert torch.equal(plain[name].confidence, views[name].confidence)


def test_the_labels_are_of_the_mean_probability_of_patch_and_view_in_each_contrast():
    inputs, network = inputs_of(1), ByBrightness()
    changes = [
        lambda x: x,
        lambda x: (1 - x) * (x > 0),
        lambda x: x**0.7,
        lambda x: x**1.5,
        lambda x: ((1 - x) * (x > 0)) ** 2,
    ]
    found = ViewLabels(teacher(network), VIEWS)(**inputs)
    for name, image in (("logits", "image"), ("global_logits", "global_image")):
        each = [network.layers(change(inputs[image])).softmax(1) for change in changes]
        assert not torch.allclose(each[0], each[1], atol=0.1)  # contrast matters to this network
        confidence, label = torch.stack(each).mean(0).max(dim=1, keepdim=True)
        torch.testing.assert_close(found[name].confidence, confidence)
        assert torch.equal(found[name].label, label)


def test_an_order_of_the_batch_is_the_order_of_its_labels():
    inputs, labels, order = inputs_of(2), ViewLabels(teacher(ByBrightness()), VIEWS), [2, 0, 1]
    plain, turned = labels(**inputs), labels(**{name: value[order] for name, value in inputs.items()})
    for name in plain:
        assert torch.equal(plain[name].label[order], turned[name].label)
        torch.testing.assert_close(plain[name].confidence[order], turned[name].confidence)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_view_moves_no_class_to_another_voxel(axis):
    inputs, labels = inputs_of(3), ViewLabels(teacher(ByBrightness()), VIEWS)
    flipped = {name: value.flip(axis) if "image" in name else value for name, value in inputs.items()}
    for name in ("logits", "global_logits"):
        assert torch.equal(labels(**flipped)[name].label, labels(**inputs)[name].label.flip(axis))
    image = inputs["image"]
    touched = image.clone()
    touched[1, 0, 2, 3, 1] = 0.55
    for name in VIEWS:
        moved = contrast_view(name)(touched) != contrast_view(name)(image)
        assert moved.nonzero().tolist() == [[1, 0, 2, 3, 1]]
        assert torch.equal(contrast_view(name)(image) == 0, image == 0)  # background stays where it is, and dark


def test_one_slice_and_mixed_precision_are_labelled():
    inputs = {name: value[..., :1] if "image" in name else value for name, value in inputs_of(4).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = ViewLabels(teacher(ByBrightness()))(**inputs)
    assert found["logits"].label.shape == inputs["image"].shape
    assert found["logits"].confidence.dtype == torch.float32 and not found["logits"].confidence.requires_grad


def test_voxels_that_views_disagree_on_can_be_left_out():
    """Bright is one class, dark another: as it is and inverted say the opposite of each other."""

    class Opposed(nn.Module):
        def forward(self, image, global_image, box):
            def logits(x):
                return torch.cat([torch.where(x > 0, -60.0, 60.0), 60 * (x - 0.5), 60 * (0.5 - x)], dim=1)

            return {"logits": logits(image), "global_logits": logits(global_image)}

    batch, output = batch_of(1, labels=False), output_of(2)
    batch["image"][..., :5] = batch["global_image"][..., :5] = 0.0
    terms = {}
    for views in (["as_is"], ["as_is", "inverted"]):
        labels = ViewLabels(teacher(Opposed()), views)
        (one,) = MAPSeg(labels, local_block_size=4, ignore_unsure=0.7).passes({"target": batch})
        terms[len(views)] = one.terms(output)["target_local_masked"].item()
    sure = output["logits"][..., :5]  # background alone is sure in both
    expected = SegmentationLoss()(sure, torch.zeros_like(sure[:, :1])).item()
    assert terms[2] == pytest.approx(expected, abs=1e-4) and terms[1] != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(
    "views, words",
    [
        ([], "expected a list of different views"),
        ("as_is", "expected a list of different views"),
        (["as_is", "as_is"], "expected a list of different views"),
        (["as_is", "negative"], "view 'negative' is unknown"),
        (["gamma 0"], "view 'gamma 0' is unknown"),
        (["gamma much"], "view 'gamma much' is unknown"),
        (["gamma"], "view 'gamma' is unknown"),
        ([0.7], "view 0.7 is unknown"),
    ],
)
def test_bad_views_are_named(views, words):
    with pytest.raises(ConfigError, match=words):
        ViewLabels(None, views)


def test_one_draw_changes_patch_and_view_alike_and_each_sample_differently():
    patch = torch.linspace(0, 1, 60).view(1, 1, 3, 4, 5).expand(4, -1, -1, -1, -1)
    view = patch.flip(2)[:, :, :, :2]
    change = RandomContrast(invert_prob=0.5, histogram_prob=0.5)
    for seed in range(5):
        torch.manual_seed(seed)
        seen, of_view = changed_alike(change, patch, view)
        torch.testing.assert_close(of_view, seen.flip(2)[:, :, :, :2], rtol=0, atol=1e-6)
        assert len({tuple(one.flatten().tolist()) for one in seen}) == 4
    torch.manual_seed(seed)
    assert torch.equal(changed_alike(change, patch, view)[0], seen)  # from the generator that checkpoints keep


def test_a_random_histogram_rises_from_0_to_1():
    image = torch.linspace(0, 1, 101).view(1, 1, 101, 1, 1).expand(50, -1, -1, -1, -1)
    torch.manual_seed(0)
    curves = RandomContrast(gamma=(1, 1), histogram_prob=1.0, control_points=5)(image)[:, 0, :, 0, 0]
    assert (curves.diff(dim=1) >= 0).all() and (curves[:, 0] == 0).all()
    assert torch.allclose(curves[:, -1], torch.ones(50))
    assert torch.allclose(curves[:, 0:101:25].diff(dim=1) / 25, curves[:, 1:101:25].sub(curves[:, 0:100:25]), atol=1e-5)
    assert curves[:, 50].std() > 0.1 and 0.3 < curves[:, 50].mean() < 0.6
    often = (RandomContrast(gamma=(1, 1), histogram_prob=0.3)(image) != image).flatten(1).any(1).float().mean()
    assert 0.1 < often < 0.5
    with pytest.raises(ConfigError, match="control_points is 2"):
        RandomContrast(control_points=2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_masks_and_contrasts_of_the_student_combine_freely(masked, changed):
    """The teacher sees the scan as it is in all four; the student's patch and view have one contrast."""
    batch, shown = batch_of(3, labels=False), []

    class Remembers(nn.Module):
        def forward(self, image, global_image, box):
            shown.append((image.clone(), global_image.clone()))
            return {"logits": torch.zeros(2, 3, 4, 8, 12), "global_logits": torch.zeros(2, 3, 4, 8, 12)}

    change = RandomContrast(gamma=(0.3, 3)) if changed else None
    method = MAPSeg(ArgmaxLabels(teacher(Remembers())), local_block_size=4, target_masked=masked, change=change)
    (one,) = method.passes({"target": batch})
    assert torch.equal(shown[0][0], batch["image"]) and torch.equal(shown[0][1], batch["global_image"])
    exponents = []
    for key in ("image", "global_image"):
        hidden = (one.inputs[key] == 0) & (batch[key] > 0)
        assert hidden.float().mean() == pytest.approx(0.7 if masked else 0.0, abs=0.04)
        for seen, image, out in zip(one.inputs[key], batch[key], hidden):
            exponents.append((seen[~out].log() / image[~out].log()).median().item())
            torch.testing.assert_close(seen[~out], image[~out] ** exponents[-1], rtol=1e-3, atol=1e-3)
    assert exponents[:2] == pytest.approx(exponents[2:], rel=1e-3)
    assert (exponents[0] != pytest.approx(exponents[1], rel=1e-2)) == changed
    ending = "_masked" if masked else ""
    assert set(one.terms(output_of(0))) == {f"target_{what}{ending}" for what in ("local", "global", "cosine")}
    assert method.selection == (f"target_local{ending}",)
    assert [method.weights[f"target_{what}{ending}"] for what in ("local", "global", "cosine")] == [1.0, 0.1, 0.05]


def test_the_source_is_shown_as_it_is():
    batch = batch_of(0)
    method = MAPSeg(labels_of(torch.zeros(2, 3, 4, 8, 12)), local_block_size=4, change=RandomContrast(invert_prob=1.0))
    clean = method.passes({"source": batch, "target": batch_of(1, labels=False)})[0]
    assert torch.equal(clean.inputs["image"], batch["image"])
