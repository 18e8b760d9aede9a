# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""nnU-Net as the engine of COSMOS's labelling models: what it is given, what it is asked for, and what is refused."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor
from monai.transforms import Compose

from mapseg_components.checkpoints import write_atomic
from mapseg_components.data import load_datalist
from mapseg_components.engines import nnunet
from mapseg_components.engines.nnunet_dataset import balanced, write_dataset
from mapseg_components.errors import CheckpointError, ConfigError
from mapseg_components.inferers import NNUNetInferer
from mapseg_components.inferers.nnunet import mirrored_axes, read_plans, require_nnunet
from mapseg_components.plans.recipes import PSEUDO_LABELS, read_recipe
from mapseg_components.plans.rounds import options_of, require_engine, written_out
from mapseg_components.shipped_files import bundles_folder
from tests.conftest import make_scan, write_nifti

COSMOS = read_recipe("cosmos")
CONFIGS = bundles_folder() / "mapseg_adaptation" / "configs"
LABELS = {"tumour": 500, "cochlea": 7}
# (Z, Y, X) of the body lie along axes 1, 0, 2 of the file, two of them from the other end
TURNED = np.array([[0, 0, -1.5, 3], [0, 1.2, 0, -7], [-2.0, 0, 0, 5], [0, 0, 0, 1]], dtype=float)


def installed() -> bool:
    try:
        importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_nnunet = pytest.mark.skipif(not installed(), reason="nnunetv2 is not installed: pip install -e '.[nnunet]'")


@pytest.fixture
def version(monkeypatch):
    """A function that says which version of nnU-Net is installed, ``None`` for none."""

    def say(found):
        def asked(name):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", asked)

    return say


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_nnunet_trains_and_runs_the_models_that_label_and_no_other(rounds, folds):
    own, other = (
        {stage.name: stage for stage in written_out(COSMOS, {"rounds": rounds, "folds": folds, **engine}).stages}
        for engine in ({}, {"engine": "nnunet"})
    )
    assert [*own] == [*other], "the same stages in the same order"
    label = {path.partition("/")[0] for stage in own.values() for path in stage.weights}
    assert len(label) == rounds * folds
    for name, stage in other.items():
        if name in label:
            assert stage.overlays == ("nnunet.yaml",) and stage.contrasts is None
            assert stage.paths == own[name].paths, "the same datalist"
            assert stage.factors("small-data-cpu") == own[name].short and stage.fold == own[name].fold
        elif stage.kind == PSEUDO_LABELS:
            assert stage.overlays == ("nnunet_labels.yaml",)
            before = [path.partition("/")[0] for path in own[name].weights]
            assert stage.weights == tuple(f"{one}/nnunet.pt" for one in before)
        else:
            assert stage == own[name]
    assert f"student_{rounds}" not in label and other[f"student_{rounds}"] == own[f"student_{rounds}"], "a bundle's"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"engine": "monai"}, "engine is 'monai', expected 'bundle' or 'nnunet'"),
        ({"engine": "nnunet", "rounds": 0}, "set rounds to 1 or more"),
    ],
)
def test_an_engine_that_would_train_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        written_out(COSMOS, settings)


def test_a_missing_or_old_nnunet_is_said_with_the_command_that_installs_it(version):
    version(None)
    with pytest.raises(ConfigError, match=r"nnunetv2 is not installed: pip install 'mapseg-monai\[nnunet\]'"):
        require_engine(COSMOS, {"engine": "nnunet"})
    for broken in (NNUNetInferer, lambda path: nnunet.NNUNetTraining(path, None, LABELS, path, 1, 1)):
        with pytest.raises(ConfigError, match="pip install"):
            broken("nnunet.pt")
    version("2.5.1")
    with pytest.raises(ConfigError, match=r"nnunetv2 is 2\.5\.1"):
        require_nnunet()
    version("2.10.0")
    require_nnunet()


def test_other_engines_and_methods_need_no_nnunet(version):
    version(None)
    for recipe, settings in ((COSMOS, {}), (COSMOS, {"engine": "bundle"}), (read_recipe("mapseg"), {})):
        require_engine(recipe, settings)
    assert "engine" in options_of(COSMOS) and options_of(read_recipe("mapseg")) == {}


@pytest.mark.parametrize("first, second", [(1, 3), (4, 6), (5, 5)])
def test_both_domains_have_half_of_what_is_drawn(first, second):
    names = [f"s{n}" for n in range(first)], [f"t{n}" for n in range(second)]
    counts = Counter(balanced(*names))
    assert sum(counts[name] for name in names[0]) == sum(counts[name] for name in names[1])
    assert all(len({counts[name] for name in group}) == 1 and counts[group[0]] for group in names)
    assert balanced(names[0], []) == names[0]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("transposed", [*itertools.permutations(range(3))])
def test_flips_of_the_network_are_those_of_the_scan(transposed, dimensions):
    """An array is laid and flipped along the axes found, as it would have been along the axes that are allowed."""
    if dimensions == 2:
        assert 2 - transposed[0] not in {2 - axis for axis in transposed[1:]}
    scan = torch.arange(2 * 3 * 4).reshape(2, 3, 4)

    def laid(volume):
        return volume.permute(2, 1, 0).permute(*transposed)

    for axis in range(3):
        found = mirrored_axes([axis], transposed, dimensions)
        if dimensions == 2 and laid(scan).shape[0] == scan.shape[axis]:
            assert found == (), "across the slices"
            continue
        flipped = [number + 3 - dimensions for number in found]
        assert torch.equal(torch.flip(laid(scan), flipped), laid(torch.flip(scan, [axis])))
    assert mirrored_axes([], transposed, dimensions) == ()


def reading(**settings):
    """How the overlay for nnU-Net reads a case."""
    parser = ConfigParser.load_config_files([str(CONFIGS / name) for name in ("train.json", "nnunet.yaml")])
    parser = ConfigParser({**parser, "labels": LABELS, **settings})
    return Compose(parser.get_parsed_content("loading"))


@pytest.fixture
def student(tmp_path):
    """Datalist of a student: labelled scans of both domains, equal case ids, a path with spaces."""
    folder, content = tmp_path / "my scans", {"labels": {"500": "tumour", "7": "cochlea"}}
    for seed, section in enumerate(("source_training", "source_validation", "target_labelled")):
        image, classes = make_scan((7, 8, 9), seed)
        values = np.array([0, 500, 7], np.int16)[classes]
        scan = write_nifti(folder / section / "a b.nii.gz", image - 40, TURNED)
        label = write_nifti(folder / section / "a b_label.nii.gz", values, TURNED)
        content[section] = [{"image": scan, "label": label, "case_id": "a b"}]
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


def test_the_dataset_has_consecutive_classes_and_the_scans_as_they_are(student, tmp_path):
    split = write_dataset(student, reading(), LABELS, tmp_path / "raw data")
    told = json.loads((tmp_path / "raw data" / "dataset.json").read_text())
    assert told["labels"] == {"background": 0, "tumour": 1, "cochlea": 2} and told["numTraining"] == 3
    assert told["file_ending"] == ".nii.gz" and [*told["channel_names"]] == ["0"]
    cases = json.loads((tmp_path / "raw data" / "cases.json").read_text())
    assert sorted(split["train"] + split["val"]) == [*cases], "each domain once in training, validation apart"
    assert [cases[name]["section"] for name in split["val"]] == ["source_validation"]
    for name, case in cases.items():
        entry = load_datalist(student, case["section"])[0]
        for key, found in (("image", f"imagesTr/{name}_0000"), ("label", f"labelsTr/{name}")):
            written = nib.load(tmp_path / "raw data" / f"{found}.nii.gz")
            given = nib.as_closest_canonical(nib.load(entry[key]))
            expected = np.asarray(given.dataobj)
            if key == "label":
                expected = np.select([expected == 500, expected == 7], [1, 2], 0)
            np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
            np.testing.assert_allclose(written.affine, given.affine, atol=1e-5)


def test_voxels_that_count_nowhere_are_the_label_that_nnunet_ignores(student, tmp_path):
    read = reading()

    def masked(case):
        sample = read(case)
        sample["label"][0, 0, 0, 0] = 255
        return sample

    write_dataset(student, masked, LABELS, tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "dataset.json").read_text())["labels"]["ignore"] == 3
    written = np.asarray(nib.load(tmp_path / "raw" / "labelsTr" / "case_0000.nii.gz").dataobj)
    assert written[0, 0, 0] == 3 and (written == 3).sum() == 1


def test_nnunet_sees_the_intensities_of_the_file_on_its_own_grid(student):
    """Neither spacing nor intensities are changed before nnU-Net's own preprocessing, and no weights are loaded."""
    files = [str(CONFIGS / name) for name in ("inference.json", "nnunet_labels.yaml")]
    asked = {"labels": LABELS, "bundle_root": str(CONFIGS.parent), "target_inverted": True}
    parser = ConfigParser({**ConfigParser.load_config_files(files), **asked})
    case = load_datalist(student, "target_labelled")[0]
    seen = parser.get_parsed_content("preprocessing")({"image": case["image"]})["image"]
    expected = nib.as_closest_canonical(nib.load(case["image"]))
    np.testing.assert_array_equal(np.asarray(seen)[0], np.asarray(expected.dataobj))
    names = [type(handler).__name__ for handler in parser.get_parsed_content("handlers")]
    assert names == ["VolumesTable", "ProgressBar"]


class StandIn:
    """A predictor in the place of nnU-Net's: class 1 where an array of it is bright, and what it was given."""

    def __init__(self):
        self.given = []

    def predict_single_npy_array(self, image, properties, *others):
        self.given.append((image, properties))
        share = (image > 0).astype(np.float32)
        return image[0] > 0, np.concatenate([1 - share, share])


def test_the_probabilities_are_those_of_the_scan_that_was_given(version):
    version("2.8.1")
    inferer = NNUNetInferer("never/read.pt")
    inferer._predictor = stand_in = StandIn()
    scan = MetaTensor(torch.randn(1, 1, 3, 4, 5), affine=torch.from_numpy(np.diag([1.5, 1.2, 2.0, 1.0]))[None])
    logits = inferer(scan)
    assert logits.shape == (1, 2, 3, 4, 5) and isinstance(logits, MetaTensor)
    assert torch.equal(logits.argmax(1, keepdim=True) == 1, scan > 0)
    (image, properties), *_ = stand_in.given
    assert image.shape == (1, 5, 4, 3), "channel, Z, Y, X"
    np.testing.assert_allclose(properties["spacing"], [2.0, 1.2, 1.5])
    for wrong in (torch.zeros(1, 1, 3, 4, 5), MetaTensor(torch.zeros(2, 1, 3, 4, 5))):
        with pytest.raises(ConfigError, match="one scan with its affine at a time"):
            inferer(wrong)


def test_weights_without_their_plan_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nnunet\.json is no plan of nnU-Net .*beside nnunet\.pt"):
        read_plans(tmp_path / "nnunet.pt")


def test_a_model_that_is_there_is_not_trained_again(version, tmp_path):
    version("2.8.1")
    write_atomic({"a": torch.zeros(1)}, tmp_path / "nnunet.pt")
    (tmp_path / "nnunet" / "raw").mkdir(parents=True)
    nnunet.NNUNetTraining(tmp_path / "none.json", None, LABELS, tmp_path, 1, 1).run()
    assert {path.name for path in tmp_path.iterdir()} == {"nnunet.pt", "nnunet"}
    assert [*(tmp_path / "nnunet").iterdir()] == [], "what can be made again is deleted"


@needs_nnunet
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 24, 17), (40, 36, 1)])
def test_nnunet_trains_goes_on_and_labels(dataset, tmp_path, shape):
    """Killed after its first epoch, it goes on with the second; label maps are on the scans' own grids."""
    content = json.loads((dataset / "datalist.json").read_text())
    cases = [*content["source_training"], *content["source_validation"], *content["target_training"]]
    for seed, case in enumerate(cases):
        image, label = (voxels[:, :, 9 : 9 + shape[2]] for voxels in make_scan((*shape[:2], 28), seed))
        write_nifti(dataset / case["image"], image)
        if "label" in case:
            write_nifti(dataset / case["label"], label)
    common = {"bundle_root": str(CONFIGS.parent), "dataset_dir": str(dataset), "labels": {"first": 1, "second": 2}}
    common |= {"device": "$torch.device('cpu')"}
    output = tmp_path / "a b"
    files = [str(CONFIGS / name) for name in ("train.json", "nnunet.yaml")]
    length = {"max_epochs": 2, "epoch_length": 2, "flip_axes": [0]}
    places = {"ckpt_dir": str(output), "output_dir": str(output)}

    class Stopped(BaseException):
        pass

    original = nnunet.write_text

    def stop(*arguments):
        original(*arguments)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnunet, "write_text", stop)
        with pytest.raises(Stopped):
            run(run_id="run", config_file=files, **length, **places, **common)
    assert not (output / "nnunet.pt").exists() and len((output / "history.jsonl").read_text().splitlines()) == 1
    run(run_id="run", config_file=files, **length, **places, **common)
    assert [json.loads(line)["epoch"] for line in (output / "history.jsonl").read_text().splitlines()] == [1, 2]
    assert not (output / "nnunet" / "raw").exists() and (output / "nnunet.json").is_file()
    files = [str(CONFIGS / name) for name in ("inference.json", "nnunet_labels.yaml")]
    cases = load_datalist(dataset / "datalist.json", "target_training")
    asked = {"weights": str(output / "nnunet.pt"), "output_dir": str(tmp_path / "labels"), "cases": cases}
    run(run_id="run", config_file=files, **asked, **{"evaluator#inferer#flip_axes": [0]}, **common)
    for case in cases:
        name = case["image"].rpartition("/")[2].replace(".nii", "_seg.nii")
        found, scan = nib.load(tmp_path / "labels" / name), nib.load(case["image"])
        assert found.shape == scan.shape and set(np.unique(found.dataobj)) <= {0, 1, 2}
        np.testing.assert_allclose(found.affine, scan.affine)
