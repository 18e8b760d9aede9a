# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Translation of slices: the trainer against plain equations, its laws, and what it writes."""

from __future__ import annotations

import copy
import gzip
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.inferers import SliceInferer
from torch import nn

from mapseg_components.checkpoints import read_checked
from mapseg_components.engines import ReplayBuffer, TranslationTrainer
from mapseg_components.errors import ConfigError, DataError, NonFiniteError
from mapseg_components.files import sha256_of
from mapseg_components.handlers import EMATeacher, TrainingCheckpoint, TranslationPictures
from mapseg_components.losses import SliceDiceLoss
from mapseg_components.networks import DomainDiscriminators, DomainTranslators, SliceTranslator
from mapseg_components.prediction.translation import save_label, write_translated
from mapseg_components.scans import read_nifti
from mapseg_components.scans.nifti import read_geometry
from mapseg_components.scans.rewriting import copy_packed, write_with_header
from mapseg_components.structures import IGNORED
from mapseg_components.transforms import RestoreBackgroundd
from tests.conftest import make_scan
from tests.headers import VARIANTS, orientation_affine, scan_with, write_raw
from tests.pictures import cells, write_picture

CLASSES = 3


def batch(seed=0, count=2, sides=(24, 32), classes=CLASSES):
    """Slices of both domains; the first source slice has no structure."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (count, 1, *sides), generator=draw)
    label[0] = 0
    source, target = (torch.rand(count, 1, *sides, generator=draw) for _ in range(2))
    return {"source": {"image": source, "label": label}, "target": {"image": target}}


def game(seed=0, **settings):
    """A trainer over two batches with networks of its own."""
    torch.manual_seed(seed)
    network, judges = DomainTranslators(CLASSES, width=4), DomainDiscriminators(width=4, layers=1)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (network, judges)]
    given = {"max_epochs": 1, "replay": ReplayBuffer(3), "train_data_loader": [batch(1), batch(2)], **settings}
    return TranslationTrainer(
        "cpu",
        network=network,
        optimizer=optimizers[0],
        discriminators=judges,
        discriminator_optimizer=optimizers[1],
        **given,
    )


def weights(module):
    return copy.deepcopy(module.state_dict())


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# the equations


@pytest.mark.parametrize("criterion", ["least_squares", "bce"])
def test_terms_are_those_of_the_plain_equations(criterion):
    trainer, given = game(criterion=criterion), batch(5)
    source, target, label = given["source"]["image"], given["target"]["image"], given["source"]["label"]
    forth, back, judges = trainer.network.to_target, trainer.network.to_source, trainer.discriminators
    found, translated = trainer._generators(source, target, label, epoch=6)
    with torch.no_grad():
        (as_target, logits), (as_source, _) = forth(source), back(target)
        again, of_translated = back(as_target)

        def of_scores(scores, real):
            if criterion == "least_squares":
                return ((scores - real) ** 2).mean()
            chance = torch.sigmoid(scores)
            return -torch.log(chance if real else 1 - chance).mean()

        def dice_loss(scores, slice_label):
            chance, losses = scores.softmax(dim=0), []
            for value in range(1, CLASSES):
                truth = (slice_label[0] == value).float()
                if truth.any():
                    losses.append(1 - 2 * (chance[value] * truth).sum() / (chance[value].sum() + truth.sum()))
            return sum(losses) / len(losses)

        expected = {
            "cycle": (again - source).abs().mean() + (forth(as_source)[0] - target).abs().mean(),
            "identity": (forth(target)[0] - target).abs().mean() + (back(source)[0] - source).abs().mean(),
            "adversarial": of_scores(judges.target(as_target)[-1], 1.0) + of_scores(judges.source(as_source)[-1], 1.0),
            "segmentation": dice_loss(logits[1], label[1]) + dice_loss(of_translated[1], label[1]),  # slice 0 is empty
        }
        trainer.replay = ReplayBuffer(0)
        of_judges = sum(
            of_scores(judges(real, name), 1.0) + of_scores(judges(made, name), 0.0)
            for name, real, made in (("target", target, as_target), ("source", source, as_source))
        )
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-4, atol=1e-6, msg=name)
    judged = trainer._discriminators({"source": source, "target": target}, translated)
    torch.testing.assert_close(judged.detach(), of_judges / 2, rtol=1e-4, atol=1e-6)
    weighted = 0.01 * expected["cycle"] + 0.1 * expected["adversarial"] + 0.5 * expected["identity"]
    torch.testing.assert_close(
        trainer._total(found).detach(), weighted + expected["segmentation"], rtol=1e-4, atol=1e-6
    )


def test_translated_slices_are_segmented_only_after_some_epochs():
    trainer, given = game(translated_segmentation_after=5), batch(5)
    inputs = given["source"]["image"], given["target"]["image"], given["source"]["label"]
    by_epoch = [trainer._generators(*inputs, epoch=epoch)[0]["segmentation"].item() for epoch in (1, 5, 6)]
    assert by_epoch[0] == by_epoch[1] < by_epoch[2]


def test_identity_generators_have_no_cycle_and_no_identity_loss():
    class Same(nn.Module):
        def encode(self, image):
            return [image]

        def decode(self, features, image):
            return features[0]

        def forward(self, image):
            return image

    trainer, given = game(segmentation_weight=0.0), batch(3)
    trainer.network.to_target.translator = trainer.network.to_source.translator = Same()
    found, translated = trainer._generators(given["source"]["image"], given["target"]["image"], None, epoch=9)
    assert found["cycle"].item() == 0 and found["identity"].item() == 0
    assert "segmentation" not in found
    assert torch.equal(translated["target"], given["source"]["image"])


def test_each_step_moves_its_own_networks_alone():
    trainer, given = game(), batch(4)
    source, target, label = given["source"]["image"], given["target"]["image"], given["source"]["label"]
    before = weights(trainer.network), weights(trainer.discriminators)
    losses, translated = trainer._generators(source, target, label, epoch=9)
    trainer.optimization.backward(trainer._total(losses))
    assert all(one.grad is None for one in trainer.discriminators.parameters())
    trainer.optimization.finish({} | {name: loss.detach() for name, loss in losses.items()}, ends=True)
    assert not equal(before[0], weights(trainer.network)) and equal(before[1], weights(trainer.discriminators))
    moved = weights(trainer.network)
    judged = trainer._discriminators({"source": source, "target": target}, translated)
    trainer.discrimination.backward(judged)
    assert all(one.grad is None for one in trainer.network.parameters())
    trainer.discrimination.finish({"discriminator": judged.detach()}, ends=True)
    assert equal(moved, weights(trainer.network)) and not equal(before[1], weights(trainer.discriminators))


def test_without_the_segmentation_weight_no_label_is_needed_and_no_segmentation_decoder_moves():
    unlabelled = {"source": {"image": batch(1)["source"]["image"]}, "target": batch(1)["target"]}
    trainer = game(segmentation_weight=0.0, train_data_loader=[unlabelled])
    before = weights(trainer.network)
    trainer.run()
    for name, value in trainer.network.state_dict().items():
        still = ".segmentation." in name or name.endswith("inverted")
        assert torch.equal(value, before[name]) == still, name
    assert "segmentation" not in trainer.state.output[0]


def test_every_part_of_both_directions_learns():
    trainer = game(translated_segmentation_after=0)
    before = weights(trainer.network)
    trainer.run()
    still = [name for name, value in trainer.network.named_parameters() if torch.equal(value, before[name])]
    # instance normalization follows these: a constant of a channel changes nothing
    assert still == [] or all(name.endswith("conv.bias") for name in still)


def test_absent_structures_and_empty_slices_are_left_out_of_dice():
    loss, logits = SliceDiceLoss(), torch.randn(3, 4, 7, 9, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(3, 1, 7, 9, dtype=torch.long)
    label[0, 0, :2], label[1, 0, :3], label[1, 0, 4:] = 1, 1, 3
    alone = [loss(logits[number : number + 1], label[number : number + 1]) for number in (0, 1)]
    torch.testing.assert_close(loss(logits, label), (alone[0] + alone[1]) / 2)
    logits.requires_grad_(True)
    loss(logits, label).backward()
    assert not logits.grad[2].any() and logits.grad[0].any()
    assert loss(logits[2:], label[2:]).item() == 0


# the game


def test_the_replay_buffer_gives_new_slices_or_kept_ones_and_loses_none():
    torch.manual_seed(0)
    buffer, given = ReplayBuffer(4), []
    for number in range(30):
        given += buffer.exchange(
            "target", torch.full((2, 1, 1, 1), float(number)) + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
        )
    values = sorted([float(one) for one in given] + [float(one) for one in buffer.slices["target"]])
    new = [number + half for number in range(30) for half in (0.0, 0.5)]
    # the first four were given and kept
    assert sorted({*values}) == new and len(values) == len(new) + 4
    assert 10 < sum(float(one) != expected for one, expected in zip(given, new)) < 50


def resumable(folder, epochs):
    trainer = game(max_epochs=epochs)
    average = EMATeacher(trainer.network, 0, [[None, 0.9]])
    saved = {
        "network": trainer.network,
        "discriminators": trainer.discriminators,
        "average": average,
        "optimizer": trainer.optimizer,
        "discriminator_optimizer": trainer.discrimination.optimizer,
        "replay": trainer.replay,
    }
    TrainingCheckpoint(str(folder / "last.pt"), saved).attach(trainer)
    average.attach(trainer)
    trainer.run()
    return read_checked(folder / "last.pt")


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{path}#{key}")
    elif isinstance(value, (list, tuple)):
        for key, one in enumerate(value):
            yield from leaves(one, f"{path}#{key}")
    else:
        yield path, value


def test_a_resumed_game_equals_an_uninterrupted_one_replay_included(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = dict(leaves(resumable(tmp_path / "whole", 2)))
    resumable(tmp_path / "parts", 1)
    torch.manual_seed(99)
    parts = dict(leaves(resumable(tmp_path / "parts", 2)))
    assert whole.keys() == parts.keys() and any("replay" in name and "slices" in name for name in whole)
    for name, value in whole.items():
        same = torch.equal(value, parts[name]) if isinstance(value, torch.Tensor) else value == parts[name]
        assert same, name


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_nan_in_the_game_ends_it_and_leaves_the_checkpoint(tmp_path, side):
    resumable(tmp_path, 1)
    before = sha256_of(tmp_path / "last.pt")
    broken = batch(1)
    broken[side]["image"][0, 0, 3, 4] = float("nan")
    broken[side]["case_id"] = ["good", "bad"]
    trainer = game(max_epochs=2, train_data_loader=[broken, batch(2)])
    saved = {"network": trainer.network, "replay": trainer.replay}
    TrainingCheckpoint(str(tmp_path / "other.pt"), saved).attach(trainer)
    kept = weights(trainer.network)
    with pytest.raises(NonFiniteError, match="bad"):
        trainer.run()
    assert equal(kept, weights(trainer.network))
    assert sha256_of(tmp_path / "last.pt") == before and not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize(
    "settings, message",
    [({"criterion": "hinge"}, "criterion is 'hinge'"), ({"cycle_weight": -1.0}, "cycle_weight must be 0 or more")],
)
def test_unknown_settings_of_the_game_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        game(**settings)


def test_slices_that_the_networks_cannot_take_are_refused():
    with pytest.raises(ConfigError, match="too small for 3 discriminator_layers, expected 32"):
        DomainDiscriminators(width=4, layers=3)(torch.rand(1, 1, 24, 48), "source")
    with pytest.raises(ValueError, match="expected multiples of 4"):
        SliceTranslator(width=4)(torch.rand(1, 1, 24, 30))
    for settings in ({"width": 0}, {"levels": 0}, {"norm": "layer"}):
        with pytest.raises(ConfigError):
            SliceTranslator(**settings)


def test_discriminators_give_scores_alone_and_no_slice_judges_another():
    judges, images = DomainDiscriminators(width=4, layers=2), torch.rand(3, 1, 32, 40)
    together = judges(images, "target")
    assert together.shape[1] == 1
    apart = torch.cat([judges(one[None], "target") for one in images])
    torch.testing.assert_close(together, apart)


def test_empty_surroundings_stay_empty_and_dark_spots_do_not_count():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 24, 32) * 0.5 + 0.5
    image[..., :10, :] = 0.0
    image[..., 17, 20] = 0.0
    translated = SliceTranslator(width=4)(image)
    assert not translated[..., :8, :].any()
    assert (translated[..., 8:, :] > 0).all()


# volumes


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "NaN" not in name])
def test_a_translated_scan_lies_where_the_scan_does_whatever_its_header_says(tmp_path, variant):
    image, _ = make_scan((7, 9, 11))
    path = scan_with(tmp_path / "scan.nii", image, orientation_affine("PIR"), variant)
    result = tmp_path / "translated.nii.gz"
    voxels = np.random.default_rng(0).random((7, 9, 11)).astype(np.float32)
    write_with_header(voxels, path, result)
    found, scan = read_nifti(result), read_geometry(path)
    assert np.array_equal(found.voxels, voxels) and found.voxels.dtype == np.float32
    assert np.array_equal(found.affine, scan.affine)
    changed = ("datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "cal_max", "cal_min")
    headers = [
        nib.Nifti1Header(content[:348], check=False)
        for content in (path.read_bytes(), gzip.decompress(result.read_bytes()))
    ]
    for field in headers[0]:
        if field not in changed:
            assert headers[0][field].tobytes() == headers[1][field].tobytes(), field


def test_big_endian_scans_and_scaled_ones_are_written_alike(tmp_path):
    image, _ = make_scan((7, 9, 11))
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(image.astype(np.int16), np.diag([2.0, 3, 4, 1]), header), tmp_path / "scan.nii.gz")
    voxels = np.random.default_rng(0).random((7, 9, 11)).astype(np.float32)
    write_with_header(voxels, tmp_path / "scan.nii.gz", tmp_path / "out.nii.gz")
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").get_fdata(dtype=np.float32), voxels)
    write_raw(tmp_path / "scaled.nii", nib.Nifti1Image(image, np.eye(4)), scl_slope=0.5, scl_inter=3)
    write_with_header(voxels, tmp_path / "scaled.nii", tmp_path / "out.nii.gz")
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").get_fdata(dtype=np.float32), voxels)
    with pytest.raises(DataError, match="shape"):
        write_with_header(voxels[1:], tmp_path / "scan.nii.gz", tmp_path / "other.nii.gz")
    assert not (tmp_path / "other.nii.gz").exists()


def test_translated_volumes_keep_labels_bit_for_bit_and_open_no_target(tmp_path):
    content = {"source_training": [], "source_validation": [], "target_training": [], "target_test": []}
    for number, (section, ending) in enumerate((s, e) for s in list(content)[:2] for e in (".nii", ".nii.gz")):
        image, label = make_scan((9, 11, 7), seed=number)
        affine = orientation_affine(("PIR", "LAS", "RSA", "ILP")[number])
        entry = {"image": f"{number}{ending}", "label": f"{number}_label{ending}", "domain": f"site {number}"}
        for key, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, affine), tmp_path / entry[key])
        content[section].append(entry)
    content["target_training"] = [{"image": "absent.nii.gz", "label": "absent_label.nii.gz"}]
    (tmp_path / "datalist.json").write_text(json.dumps(content))

    class Darker(nn.Module):
        def forward(self, image):
            return image * 0.25

    seen = []

    def before(case):
        seen.append(sorted(case))
        scan = read_nifti(case["image"])
        return {**case, "image": torch.from_numpy(scan.voxels)[None].float()}

    written = write_translated(
        tmp_path / "datalist.json", tmp_path / "out", Darker(), SliceInferer(2, roi_size=(9, 11)), before,
        RestoreBackgroundd("pred"), {"first": 1, "second": 2},
    )  # fmt: skip
    found = json.loads(written.read_text())
    assert found["labels"] == {"0": "background", "1": "first", "2": "second"}
    assert found["target_training"] == [{"image": str(tmp_path / "absent.nii.gz"), "case_id": "absent"}]
    assert set(found) == {"labels", "source_training", "source_validation", "target_training"}
    assert all("label" not in keys for keys in seen)
    for section in ("source_training", "source_validation"):
        for entry, origin in zip(found[section], content[section]):
            number = origin["image"].partition(".")[0]
            assert entry["image"] == str(tmp_path / "out" / "images" / f"{number}.nii.gz")
            assert entry["domain"] == origin["domain"] and entry["case_id"] == number
            scan, result = nib.load(tmp_path / origin["image"]), nib.load(entry["image"])
            assert np.array_equal(scan.affine, result.affine) and result.get_data_dtype() == np.float32
            np.testing.assert_allclose(result.get_fdata(), scan.get_fdata() * 0.25, rtol=1e-6)
            packed, plain = gzip.open(entry["label"]).read(), (tmp_path / origin["label"]).read_bytes()
            assert packed == (gzip.decompress(plain) if origin["label"].endswith(".gz") else plain)
            if origin["label"].endswith(".gz"):
                assert sha256_of(entry["label"]) == sha256_of(tmp_path / origin["label"])


def test_a_translation_that_is_nan_is_not_written(tmp_path):
    image, label = make_scan((9, 11, 7))
    for name, voxels in (("a.nii.gz", image), ("label.nii.gz", label)):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    content = {"source_training": [{"image": "a.nii.gz", "label": "label.nii.gz"}]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(NonFiniteError, match="case a: 693 translated voxels are NaN"):
        write_translated(
            tmp_path / "datalist.json", tmp_path / "out", nn.Identity(), SliceInferer(2, roi_size=(9, 11)),
            lambda case: {"image": torch.full((1, 9, 11, 7), float("nan"))}, lambda case: case, {"first": 1},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_label_map_of_an_image_has_the_pixel_size_of_the_image(tmp_path):
    image, label = cells(0)
    for folder, pixels in (("images", image), ("labels", label)):
        write_picture(tmp_path / folder / "a.png", pixels)
    (tmp_path / "images" / "pixel_size.json").write_text(json.dumps({"PixelSize": 2, "PixelSizeUnits": "um"}))
    save_label(str(tmp_path / "labels" / "a.png"), str(tmp_path / "images" / "a.png"), tmp_path / "a.nii.gz")
    written = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(written.affine, read_nifti(tmp_path / "images" / "a.png").affine)
    assert np.array_equal(np.unique(written.dataobj), np.unique(label))


def test_pictures_of_the_translation_leave_out_ignored_voxels(tmp_path):
    class ToSource(nn.Module):  # what was translated, and a structure everywhere
        def forward(self, image):
            return image, torch.cat([torch.zeros_like(image), torch.ones_like(image)], dim=1)

    class Translators(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_target = self.to_source = ToSource()

    label = torch.ones(1, 12, 8, 5, dtype=torch.int64)
    label[:, 6:] = IGNORED
    scans = [{"image": torch.rand(1, 12, 8, 5), "label": label, "case_id": "a"}]
    engine = Engine(lambda engine, batch: None)
    pictures = TranslationPictures(scans, scans, Translators(), SliceInferer(2, roi_size=(12, 8)), tmp_path, 1, "cpu")
    pictures.attach(engine)
    assert engine.run([0]).metrics["translated_dice"] == 1.0


def test_a_label_map_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        copy_packed(tmp_path / "absent.nii.gz", tmp_path / "copy.nii.gz")
    assert not (tmp_path / "copy.nii.gz").exists()


def test_background_is_what_touches_the_border_in_every_channel():
    scan = torch.ones(2, 6, 7, 5)
    scan[:, 0], scan[0, 5], scan[:, 3, 3, 2] = 0.0, 0.0, 0.0
    restored = RestoreBackgroundd(["pred"])({"image": scan, "pred": torch.full((1, 6, 7, 5), 0.5)})["pred"]
    assert not restored[:, 0].any() and (restored[:, 1:] == 0.5).all()
    with pytest.raises(DataError, match="bring both to one grid"):
        RestoreBackgroundd(["pred"])({"image": scan, "pred": torch.zeros(1, 6, 7, 4)})
